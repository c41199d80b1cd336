"""Whether a matrix is a Kronecker product: an identity along some axes, or one term whose factors part the axes.

In: the parts of one block. Out: for each group of axes the value of its factor, or None. Next file: `banded.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

from implicitdiff.graph.build import Builder
from implicitdiff.graph.ir import Label, Ref
from implicitdiff.structure.forms import Band, Entry, KroneckerFactor


def factors_of(
    build: Builder, entry: Entry, rows: Sequence[Label], columns: Sequence[Label]
) -> tuple[KroneckerFactor, ...]:
    """The factors of a block over one variable, none where it is no Kronecker product of two or more.

    An axis that every term ties to itself, and on which no coefficient depends, carries an identity: the rest is one
    factor. A single term whose coefficient is a product without a common axis has a factor for each part.
    """
    count = len(rows)
    terms = [*entry.tied(count), *(Band((None,) * count, ref) for ref in entry.dense)]
    if len(entry.low_rank) == 1 and not terms:
        ((left, weights, right, rank),) = [(t.left, t.weights, t.right, t.rank) for t in entry.low_rank]
        terms = [Band((None,) * count, build.con(build.times(left, weights, right), rank))]
    elif entry.low_rank or not terms:
        return ()
    if any(offset not in (0, None) for term in terms for offset in term.offsets):
        return ()
    free = [
        k for k in range(count) if all(t.offsets[k] == 0 and rows[k] not in t.value.labels for t in terms)
    ]
    rest = tuple(k for k in range(count) if k not in free)
    if not rest:
        return ()
    if len(terms) == 1:
        found = _parted(build, terms[0], rest, rows, columns)
    else:
        found = (KroneckerFactor(rest, tuple(terms)),)
    return found if len(found) + bool(free) > 1 else ()


def _parted(
    build: Builder, term: Band, axes: Sequence[int], rows: Sequence[Label], columns: Sequence[Label]
) -> tuple[KroneckerFactor, ...]:
    """One term by the groups of axes that share no factor."""
    coefficient, powers, summed = _opened(build, term.value)
    place = {label: k for side in (rows, columns) for k, label in enumerate(side)}
    place |= {label: -1 - k for k, label in enumerate(summed)}
    groups: list[tuple[set[int], list[tuple[Ref, float]]]] = []
    plain: list[tuple[Ref, float]] = []
    for ref, power in powers:
        touched = {place[label] for label in ref.labels if label in place}
        if not touched:
            plain.append((ref, power))
            continue
        joined, members = touched, [(ref, power)]
        for known in [g for g in groups if g[0] & touched]:
            joined, members = joined | known[0], [*known[1], *members]
            groups.remove(known)
        groups.append((joined, members))
    parts = [(tuple(sorted(k for k in group if k >= 0)), group, members) for group, members in groups]
    covered = {k for own, _, _ in parts for k in own}
    if not parts or covered != set(axes) or not all(own for own, _, _ in parts):
        return ()  # ones along an axis have no inverse, and a sum by itself belongs to no axis
    out = []
    for number, (own, group, members) in enumerate(sorted(parts)):
        value = build.mul([*members, *plain], coefficient) if number == 0 else build.mul(members, 1.0)
        value = build.con(value, [label for k, label in enumerate(summed) if -1 - k in group])
        offsets = tuple(offset if k in own else None for k, offset in enumerate(term.offsets))
        out.append(KroneckerFactor(own, (Band(offsets, value),)))
    return tuple(out)


def _opened(build: Builder, value: Ref) -> tuple[float, Sequence[tuple[Ref, float]], Sequence[Label]]:
    """A product as (number, factors with powers, summed labels), a sum over a product among the factors opened."""
    coefficient, powers = build.split(value)
    sums = [k for k, (ref, power) in enumerate(powers) if ref.node.op == "con" and power == 1.0]
    if len(sums) != 1 or powers[sums[0]][0].node.data:
        return coefficient, powers, ()
    (body,), bound = build.open(powers[sums[0]][0])
    inner, opened = build.split(body)
    return coefficient * inner, [*(p for k, p in enumerate(powers) if k != sums[0]), *opened], bound
