"""Index maps: where the entries of a slice lie in the axis that it is taken from.

In: a ref over the entries of a slice. Out: the same numbers at their places along the whole axis, zero elsewhere
(`pad`, the transposed of a view), and the matrices that do it (`selection`, `shift`) where a product needs one.
Next file: `derivatives/jacobian.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

from implicitdiff.graph import onehot
from implicitdiff.graph.build import Builder, Spec
from implicitdiff.graph.ir import UNBATCHED, Label, Ref

Place = Spec
"""("slice", start, step, count): entry r lies at start + step r. ("index", k): the only entry lies at k."""


def start_and_step(place: Place | None) -> tuple[int, int]:
    """Where entry 0 lies and how far apart the entries are; None is the whole axis."""
    if place is None:
        return 0, 1
    return int(place[1]), int(place[2]) if place[0] == "slice" else 1


def pad(
    build: Builder,
    ref: Ref,
    axes: Sequence[tuple[Place | None, Label | None, Label]],
    order: Sequence[Label] = (),
) -> Ref:
    """`ref` with axes put into longer ones, zero outside.

    Args:
        build: the builder.
        ref: the values; an axis that it lacks is constant along the slice.
        axes: (place, label of the slice or None for a single entry, label of the whole axis); place None: unchanged.
        order: the order of axes wanted, for the layout in memory; axes of `ref` that are not in it come last.
    """
    changed = {outer: (place, inner) for place, inner, outer in axes if place is not None}
    coefficient, factors = build.split(ref)
    if not changed or coefficient == 0.0:
        return ref
    hots, factors, changed = _hot_padded(build, factors, changed)
    # what has no axis stands in front: +x and -x are then one padded tensor
    plain = [*hots, *(f for f in factors if not f[0].labels)]
    body = build.mul([f for f in factors if f[0].labels])
    if not changed:
        return build.mul([*plain, (body, 1.0)], coefficient)
    gone = {inner for _, inner in changed.values()}
    out = [k for k in order if k in changed or k in body.labels]
    out += [k for k in (*body.labels, *changed) if k not in out and k not in gone]
    specs: list[Spec] = []
    bound: list[Label] = []
    for label in out:
        place, inner = changed.get(label, (None, None))
        specs.append(("all",) if place is None else place)
        if place is not None:
            bound.append(build.labels.new(1) if inner is None or place[0] == "index" else inner)
    padded = build.make("pad", tuple(specs), [body], out, bound)
    return build.mul([*plain, (padded, 1.0)], coefficient)


def _hot_padded(
    build: Builder, factors: list[tuple[Ref, float]], changed: dict[Label, tuple[Place, Label | None]]
) -> tuple[list[tuple[Ref, float]], list[tuple[Ref, float]], dict[Label, tuple[Place, Label | None]]]:
    """One-hot matrices that point into a slice point into the whole axis; what else runs along it is left."""
    hots: list[tuple[Ref, float]] = []
    rest, left = list(factors), dict(changed)
    for outer, (place, inner) in changed.items():
        own = [f for f in rest if onehot.is_hot(f[0]) and onehot.column_of(f[0]) == inner]
        if own and place[0] == "slice":
            rest = [f for f in rest if f not in own]
            hots += [(onehot.padded(build, f[0], int(place[1]), int(place[2]), outer), 1.0) for f in own]
            if not any(inner in ref.labels for ref, _ in rest):
                del left[outer]
    return hots, rest, left


def selection(build: Builder, place: Place, row: Label | None, column: Label) -> Ref:
    """d slice / d whole along one axis: rows of the identity, or a unit vector where there is a single entry."""
    size = build.labels.sizes[column]
    if place[0] == "index" or row is None:
        return pad(build, build.number(1.0), [(place, None, column)])
    return build.make("select", (place, size), (), [row, column], prefix=UNBATCHED)


def shift(build: Builder, row: Label, column: Label, offset: int) -> Ref:
    """The matrix over two whole axes of equal size with ones where column = row + offset."""
    return (
        build.eye(row, column)
        if offset == 0
        else build.make("shift", offset, (), [row, column], prefix=UNBATCHED)
    )
