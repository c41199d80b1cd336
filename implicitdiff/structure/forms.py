"""Symbolic matrices: labelled terms, and what kind of matrix they make, with its parameters as refs.

In: nothing. Out: frozen terms and forms. Rows and columns are tuples of labels per block (a block is one leaf of the
variables, or one constraint). Numbers appear only when the emitted code runs. Next file: `analyze.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from implicitdiff.graph.ir import Label, Ref
from implicitdiff.graph.maps import Place
from implicitdiff.graph.onehot import IndexMap


@dataclass(frozen=True)
class Space:
    """The coordinates of a matrix side: per block the labels of its axes, once for rows and once for columns."""

    names: tuple[str, ...]
    rows: tuple[tuple[Label, ...], ...]
    columns: tuple[tuple[Label, ...], ...]
    sizes: tuple[tuple[int, ...], ...]

    def entries(self, block: int) -> int:
        """Length of a block as a vector."""
        out = 1
        for size in self.sizes[block]:
            out *= size
        return out

    @property
    def size(self) -> int:
        """Length of all blocks joined."""
        return sum(self.entries(k) for k in range(len(self.names)))


@dataclass(frozen=True)
class Contribution:
    """One term of a matrix: sum over `summed` of the product of `factors`.

    `rows` are of block `block[0]`, `columns` of block `block[1]`; a label in both is a delta. A label with a place runs
    along a slice of its axis.
    """

    block: tuple[int, int]
    rows: tuple[Label, ...]
    columns: tuple[Label, ...]
    factors: tuple[Ref, ...]
    summed: tuple[Label, ...]
    row_places: tuple[Place | None, ...] = ()
    column_places: tuple[Place | None, ...] = ()

    @property
    def has_places(self) -> bool:
        """Whether some axis is a slice."""
        return any(place is not None for place in (*self.row_places, *self.column_places))


@dataclass(frozen=True)
class LowRankTerm:
    """left diag(weights) right' : `left` over (rows, rank), `right` over (columns, rank)."""

    left: Ref
    weights: Ref
    right: Ref
    rank: tuple[Label, ...]


@dataclass(frozen=True)
class Band:
    """A term with column = row + offset along each tied axis; an offset None leaves rows and columns of an axis free.

    `value` is over the rows and the columns of the free axes, and zero in rows that no column belongs to.
    """

    offsets: tuple[int | None, ...]
    value: Ref


@dataclass(frozen=True)
class Entry:
    """One block of the grid: the sum of its parts; every part may be absent.

    `diagonal` (over the rows) only where both sides are the same axes; `partial` are terms whose deltas tie some axes
    (positions) and leave the others dense; `bands` tie some axes with offsets, not all 0; `dense` terms are over rows
    and columns.
    """

    diagonal: Ref | None = None
    partial: tuple[tuple[frozenset[int], Ref], ...] = ()
    low_rank: tuple[LowRankTerm, ...] = ()
    dense: tuple[Ref, ...] = ()
    bands: tuple[Band, ...] = ()

    @property
    def empty(self) -> bool:
        """Whether the block is zero."""
        return self.diagonal is None and not self._coupled

    @property
    def is_diagonal(self) -> bool:
        """Whether only a diagonal is there."""
        return self.diagonal is not None and not self._coupled

    @property
    def _coupled(self) -> bool:
        return bool(self.partial or self.low_rank or self.dense or self.bands)

    def tied(self, axes: int) -> list[Band]:
        """Every term that ties some of the `axes` axes, as a `Band`: the diagonal and the partial ones too."""
        found = [] if self.diagonal is None else [Band((0,) * axes, self.diagonal)]
        found += [
            Band(tuple(0 if k in tied else None for k in range(axes)), ref) for tied, ref in self.partial
        ]
        return [*found, *self.bands]


@dataclass(frozen=True)
class KroneckerFactor:
    """One factor of a Kronecker product: the axes (positions) it couples, and the terms whose sum it is."""

    axes: tuple[int, ...]
    terms: tuple[Band, ...]


@dataclass(frozen=True)
class Chain:
    """Along which axis (position) a matrix is banded, and how far it reaches to both sides."""

    axis: int
    reach: int


@dataclass(frozen=True)
class Position:
    """Where an entry of a sparse term lies along one axis: start + step * (the entry of `label`), or what `index` says.

    With neither a label nor an index it is the one place `start`.
    """

    label: Label | None
    start: int
    step: int
    index: Ref | None = None
    where: IndexMap | None = None


@dataclass(frozen=True)
class SparseTerm:
    """`value` over `labels`; entry (labels) lies in the row and in the column that the positions of the axes name.

    Entries whose place is outside of the matrix are zero for every value of the inputs.
    """

    block: tuple[int, int]
    labels: tuple[Label, ...]
    value: Ref
    rows: tuple[Position, ...]
    columns: tuple[Position, ...]


@dataclass(frozen=True)
class Form:
    """A symmetric block matrix over a space, its kind by the contract's name, and why it is that kind."""

    space: Space
    grid: tuple[tuple[Entry, ...], ...]
    kind: str
    reason: str
    shared: frozenset[int] = frozenset()
    """For block-diagonal: the axes (positions) that number the blocks; for banded: those that number the chains."""
    chain: Chain | None = None
    """For banded."""
    factors: tuple[KroneckerFactor, ...] = ()
    """For kronecker; the axes of no factor carry an identity."""
    pattern: tuple[SparseTerm, ...] = ()
    """The same matrix entry by entry, where every term is sparse; for kind sparse there is no other form."""
    grouped: tuple[LowRankTerm, ...] = ()
    """For block-diagonal: the blocks as low rank beside the entry's diagonal; the shared axes are on all sides."""
    base: Form | None = None
    """For kind sum: the form of what the low-rank terms of the entry are added to."""

    @property
    def parts(self) -> tuple[str, ...]:
        """For kind sum: the kinds of the summands."""
        return () if self.base is None else (self.base.kind, "low-rank")

    @property
    def entry(self) -> Entry:
        """The only block, where there is one variable."""
        return self.grid[0][0]
