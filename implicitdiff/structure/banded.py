"""Bands: terms whose deltas have offsets, as slices of a variable make them.

In: `Contribution`s with places. Out: a `Form` that is diagonal, banded or block-diagonal, or None where some term is no
band. `u[1:] - u[:-1]` couples row i with column i + 1: on both sides the same label runs along a slice, and the two
slices start one entry apart. Next file: `dependence.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from implicitdiff.graph.build import Builder
from implicitdiff.graph.ir import Label, Ref
from implicitdiff.graph.maps import Place, pad, start_and_step
from implicitdiff.structure.forms import Band, Chain, Contribution, Entry, Form, Space


@dataclass(frozen=True)
class _Tie:
    """column = row + offset along one axis; `single`: in this row only, as u[0] makes it, None: in a slice of rows."""

    offset: int
    single: int | None = None


def form_of(build: Builder, space: Space, terms: Sequence[Contribution]) -> Form | None:
    """The form of a matrix over one variable whose every term ties axes; None where that is not so.

    A term of single entries (u[0] u[3]) alone proves no width: such terms have to fit into the band that slices make,
    or be as many as a loop over the axis makes.
    """
    if len(space.names) != 1:
        return None
    ties: list[tuple[_Tie | None, ...]] = []
    for term in terms:
        found = _ties(term)
        if found is None or not any(found):
            return None
        ties.append(found)
    entry = _entry(build, space, terms, ties)
    if entry.empty:
        return None
    columns = list(zip(*ties, strict=True))
    groups = frozenset(k for k, c in enumerate(columns) if all(t is not None and t.offset == 0 for t in c))
    reaches = {k: reach for k, c in enumerate(columns) if (reach := _reach(c, space.sizes[0][k])) > 0}
    if reaches:
        return _banded(space, entry, groups, reaches, columns)
    if len(groups) == len(columns):
        # without a term along the whole axes a part of the diagonal may be zero for every value of the inputs
        if all(t.has_places for t in terms):
            return None
        return Form(space, ((entry,),), "diagonal", "every term ties all axes of the variable to themselves")
    if groups:
        reason = f"every term ties {_listed(groups)} of the variable to itself"
        return Form(space, ((entry,),), "block-diagonal", reason, groups)
    return None


def _ties(term: Contribution) -> tuple[_Tie | None, ...] | None:
    """One tie (or None: free) for each axis; None where a slice is not tied, or tied to another axis."""
    found: list[_Tie | None] = []
    sides = zip(
        term.rows,
        term.columns,
        _places(term.row_places, term),
        _places(term.column_places, term),
        strict=True,
    )
    for row, column, above, across in sides:
        start, step = start_and_step(above)
        other_start, other_step = start_and_step(across)
        single = above is not None and across is not None and above[0] == across[0] == "index"
        if single or (row == column and step == other_step):
            found.append(_Tie(other_start - start, start if single else None))
        elif above is not None or across is not None or row in term.columns or column in term.rows:
            return None
        else:
            found.append(None)
    return tuple(found)


def _places(places: tuple[Place | None, ...], term: Contribution) -> tuple[Place | None, ...]:
    return places or (None,) * len(term.rows)


def _entry(
    build: Builder, space: Space, terms: Sequence[Contribution], ties: Sequence[tuple[_Tie | None, ...]]
) -> Entry:
    """The terms over the space's own labels: equal offsets and places are added before they are padded."""
    rows, columns = space.rows[0], space.columns[0]
    inner: dict[tuple[int, Place], Label] = {}
    sums: dict[tuple[tuple[int | None, ...], tuple[Place | None, ...]], list[Ref]] = {}
    for term, tied in zip(terms, ties, strict=True):
        names: dict[Label, Label] = {}
        places = _places(term.row_places, term)
        for k, place in enumerate(places):
            if place is None:
                names[term.rows[k]] = rows[k]
            else:
                size = build.labels.sizes[term.rows[k]]
                names[term.rows[k]] = inner.setdefault((k, place), build.labels.new(size))
            if tied[k] is None:
                names[term.columns[k]] = columns[k]
        product = build.con(build.times(*(f.rename(names) for f in term.factors)), term.summed)
        offsets = tuple(None if t is None else t.offset for t in tied)
        sums.setdefault((offsets, places), []).append(product)
    padded: dict[tuple[int | None, ...], list[Ref]] = {}
    for (offsets, places), refs in sums.items():
        axes = [(place, inner.get((k, place)) if place else None, rows[k]) for k, place in enumerate(places)]
        whole = pad(build, build.plus(*refs), axes, (*rows, *columns))
        padded.setdefault(offsets, []).append(whole)
    totals = {offsets: build.plus(*refs) for offsets, refs in padded.items()}
    found = [Band(offsets, ref) for offsets, ref in totals.items() if not build.is_zero(ref)]
    found.sort(key=lambda b: [(o is None, o or 0) for o in b.offsets])
    diagonal = [b.value for b in found if all(o == 0 for o in b.offsets)]
    partial = [b for b in found if None in b.offsets and not any(b.offsets)]
    bands = [b for b in found if any(b.offsets)]
    return Entry(
        diagonal=diagonal[0] if diagonal else None,
        partial=tuple((frozenset(k for k, o in enumerate(b.offsets) if o == 0), b.value) for b in partial),
        bands=tuple(bands),
    )


LOOP = 3
"""As many rows at least, and half of all rows, make single entries a band: a loop `for t in range(len(x) - 1)`."""


def _reach(ties: Sequence[_Tie | None], size: int) -> int:
    """How far slices and loops reach along an axis; 0 where some term does not tie it, or reaches further."""
    known = [t for t in ties if t is not None]
    rows: dict[int, set[int]] = {}
    for tie in known:
        if tie.single is not None and tie.offset > 0:
            rows.setdefault(tie.offset, set()).add(tie.single)
    reach = max((abs(t.offset) for t in known if t.single is None), default=0)
    loops = [offset for offset, found in rows.items() if len(found) >= max(LOOP, (size - offset) / 2)]
    reach = max([reach, *loops])
    fits = all(abs(t.offset) <= reach for t in known)
    return reach if fits and len(known) == len(ties) else 0


def _banded(
    space: Space,
    entry: Entry,
    groups: frozenset[int],
    reaches: dict[int, int],
    columns: Sequence[Sequence[_Tie | None]],
) -> Form:
    """The axis with the fewest entries in its band; the axes that are neither it nor chains are inside the blocks."""
    sizes = space.sizes[0]

    def entries(axis: int) -> int:
        inside = math.prod(s for k, s in enumerate(sizes) if k != axis and k not in groups)
        return (2 * reaches[axis] + 1) * inside

    axis = min(reaches, key=lambda k: (entries(k), k))
    offsets = sorted({t.offset for t in columns[axis] if t is not None})
    inside = [k for k in range(len(sizes)) if k != axis and k not in groups]
    reason = (
        f"every term ties axis {axis} of the variable to itself with offsets {', '.join(map(str, offsets))}"
    )
    if groups:
        reason += f", separately for each entry of {_listed(groups)}"
    if inside:
        reason += f"; inside a block: {_listed(inside)}"
    return Form(space, ((entry,),), "banded", reason, groups, Chain(axis, reaches[axis]))


def _listed(axes: Sequence[int] | frozenset[int]) -> str:
    text = ", ".join(map(str, sorted(axes)))
    return f"axis {text}" if len(axes) == 1 else f"axes {text}"
