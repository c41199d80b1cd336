"""Index tensors: a gather or a scatter is a product with a matrix of zeros and ones that nobody writes down.

In: an index tensor (a leaf of integers) and the axis that it points into. Out: the node `hot`, 1 where an entry of the
index tensor points at an entry of the axis: u[i] is the sum over k of hot_ek u_k, so that derivatives, slices and sums
need no rule of their own. Next file: `emit_indexed.py`, which writes such sums as gathers and scatters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from implicitdiff.graph.ir import Label, Ref, Unsupported

if TYPE_CHECKING:
    from implicitdiff.graph.build import Builder

Factors = Sequence[tuple[Ref, float]]


@dataclass(frozen=True)
class IndexMap:
    """Where an entry i of an index tensor points: start + step ((i // divisor) mod part); from the end if i < 0.

    Attributes:
        length: the entries of the dimension that the index tensor points into.
        divisor, part: the axis is one of several that are merged to this dimension; 1 and `length` if it is all of it.
        start, step: the axis is a slice of a longer one, in which the place is meant.
        size: the entries of the axis pointed into.
        partial: whether places outside of the axis may occur; such an entry points nowhere.
    """

    length: int
    divisor: int
    part: int
    start: int
    step: int
    size: int
    partial: bool = False

    @staticmethod
    def whole(size: int) -> IndexMap:
        """An index into an axis of its own."""
        return IndexMap(size, 1, size, 0, 1, size)

    @property
    def plain(self) -> bool:
        """Whether the index tensor itself is the place, but for negative entries."""
        return (self.divisor, self.start, self.step) == (1, 0, 1) and self.part == self.length == self.size


def hot(build: Builder, index: Ref, where: IndexMap, column: Label | None) -> Ref:
    """1 where an entry of `index` points at the entry `column` (None: at the only one), else 0."""
    out = [*index.labels, *([] if column is None else [column])]
    return build.make("hot", where, [index], out, prefix=index.node.prefix, leaves=frozenset())


def is_hot(ref: Ref) -> bool:
    """Whether a factor is such a matrix (with an axis that it points into)."""
    return ref.node.op == "hot" and len(ref.labels) > len(ref.node.args[0].labels)


def column_of(ref: Ref) -> Label:
    """The axis that the matrix points into."""
    return ref.labels[-1]


def index_of(ref: Ref) -> Ref:
    """The index tensor, in the labels of this use."""
    return ref.node.args[0].rename(dict(zip(ref.node.axes, ref.labels, strict=True)))


def has_hot(build: Builder, body: Ref) -> bool:
    """Whether such a matrix is a factor of `body`."""
    return any(is_hot(ref) for ref, _ in build.split(body)[1])


def is_one(ref: Ref, bound: Sequence[Label]) -> bool:
    """Whether the sum of the matrix over `bound` is 1: every entry points at one place."""
    return is_hot(ref) and not ref.node.data.partial and list(bound) == [column_of(ref)]


def sliced(build: Builder, ref: Ref, spec: Sequence[object], new: Label | None) -> Ref:
    """The matrix with its last axis restricted to a slice or to a single entry (`new` None)."""
    where: IndexMap = ref.node.data
    start, step = (int(str(spec[1])), 1) if spec[0] == "index" else (int(str(spec[1])), int(str(spec[2])))
    if step != 1:
        raise Unsupported("every other entry of what an index tensor points at has no rule")
    size = 1 if new is None else build.labels.sizes[new]
    moved = replace(where, start=where.start - start, size=size, partial=True)
    return hot(build, index_of(ref), moved, new)


def padded(build: Builder, ref: Ref, start: int, step: int, outer: Label) -> Ref:
    """The matrix whose last axis is a slice of `outer`, along the whole of it."""
    where: IndexMap = ref.node.data
    moved = replace(
        where,
        start=start + step * where.start,
        step=step * where.step,
        size=build.labels.sizes[outer],
    )
    if where.partial:
        raise Unsupported("a slice of what an index tensor points at, put back into its axis")
    return hot(build, index_of(ref), moved, outer)
