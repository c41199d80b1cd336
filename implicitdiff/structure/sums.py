"""Sums of kinds: neighbours, blocks or a sparse matrix, and beside them terms of low rank.

In: `Contribution`s of which some tie rows to columns and the others split into a row and a column side. Out: a `Form`
of kind `sum`, whose base has a form of its own; None where something is dense. Next file: `dependence.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from implicitdiff.graph.build import Builder
from implicitdiff.graph.ir import Label
from implicitdiff.graph.maps import Place, selection
from implicitdiff.structure import sparse
from implicitdiff.structure.forms import Contribution, Entry, Form, Space

Classify = Callable[..., Form]
EntryOf = Callable[..., Entry]

BASES = ("banded", "block-diagonal", "sparse", "kronecker")
"""Kinds that have a solver of their own, to which a part of low rank is added."""


def form_of(
    build: Builder, space: Space, terms: Sequence[Contribution], classify: Classify, entry_of: EntryOf
) -> Form | None:
    """base + U C V', or D + U C V' where the base is diagonal.

    Args:
        build: the builder.
        space: the coordinates, of one variable.
        terms: all terms, slices as deltas with places.
        classify, entry_of: the functions of `analyze.py`, which calls this one.
    """
    if len(space.names) != 1:
        return None
    tying: list[Contribution] = []
    rest: list[Contribution] = []
    for term in terms:
        (rest if sparse.terms_of(build, term) is None else tying).append(term)
    if not tying or not rest:
        return None
    split = entry_of(build, space, (0, 0), [without_places(build, space, t) for t in rest])
    if not split.low_rank or split.dense or split.partial or split.diagonal is not None:
        return None
    base = classify(build, space, tying, lambda: [without_places(build, space, t) for t in tying])
    rank = " + ".join(
        "1" if not t.rank else "*".join(str(build.labels.sizes[k]) for k in t.rank) for t in split.low_rank
    )
    if base.kind in ("diagonal", "scaled-identity"):
        entry = replace(split, diagonal=base.entry.diagonal)
        reason = f"a diagonal part, and terms that split into a row and a column side: rank {rank}"
        return Form(space, ((entry,),), "low-rank-plus-diagonal", reason)
    if base.kind not in BASES:
        return None
    reason = (
        f"a {base.kind} part ({base.reason}), and terms that split into a row and a column side: rank {rank}"
    )
    return Form(space, ((split,),), "sum", reason, base=base)


def without_places(build: Builder, space: Space, term: Contribution) -> Contribution:
    """The same term with its slices written as products with selection matrices."""
    if not term.has_places:
        return term
    factors, summed = list(term.factors), list(term.summed)
    none: tuple[Place | None, ...] = (None,) * max(len(term.rows), len(term.columns))
    ends = [
        (term.block[0], list(zip(term.rows, term.row_places or none, strict=False))),
        (term.block[1], list(zip(term.columns, term.column_places or none, strict=False))),
    ]
    whole_labels = {label for _, side in ends for label, place in side if place is None}
    sides: list[tuple[Label, ...]] = []
    for block, axes in ends:
        side: list[Label] = []
        for axis, (label, place) in enumerate(axes):
            if place is None:
                side.append(label)
                continue
            whole = build.labels.new(space.sizes[block][axis])
            factors.append(selection(build, place, None if place[0] == "index" else label, whole))
            if place[0] != "index" and label not in summed and label not in whole_labels:
                summed.append(label)
            side.append(whole)
        sides.append(tuple(side))
    return Contribution(term.block, sides[0], sides[1], tuple(factors), tuple(summed))
