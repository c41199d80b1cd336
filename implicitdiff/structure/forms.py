"""Symbolic matrices: what kind of matrix the labelled terms make, with its parameters as refs.

In: nothing. Out: frozen forms, one a kind. Rows and columns are tuples of labels per block (a block is one leaf of the
variables, or one constraint). Numbers appear only when the emitted code runs. Next file: `analyze.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from implicitdiff.graph.ir import Label, Ref


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
class LowRankTerm:
    """left diag(weights) right' : `left` over (rows, rank), `right` over (columns, rank)."""

    left: Ref
    weights: Ref
    right: Ref
    rank: tuple[Label, ...]


@dataclass(frozen=True)
class Entry:
    """One block of the grid: the sum of its parts; every part may be absent.

    `diagonal` (over the rows) only where both sides are the same axes; `partial` are terms whose deltas tie some axes
    (positions) and leave the others dense; `dense` terms are over rows and columns. `separable` has the same terms as
    `low_rank` for whoever wants the product form.
    """

    diagonal: Ref | None = None
    partial: tuple[tuple[frozenset[int], Ref], ...] = ()
    low_rank: tuple[LowRankTerm, ...] = ()
    dense: tuple[Ref, ...] = ()

    @property
    def empty(self) -> bool:
        """Whether the block is zero."""
        return self.diagonal is None and not (self.partial or self.low_rank or self.dense)

    @property
    def is_diagonal(self) -> bool:
        """Whether only a diagonal is there."""
        return self.diagonal is not None and not (self.partial or self.low_rank or self.dense)


@dataclass(frozen=True)
class Form:
    """A symmetric block matrix over a space, its kind by the contract's name, and why it is that kind."""

    space: Space
    grid: tuple[tuple[Entry, ...], ...]
    kind: str
    reason: str
    shared: frozenset[int] = frozenset()
    """For block-diagonal: the axes (positions) that number the blocks."""

    @property
    def entry(self) -> Entry:
        """The only block, where there is one variable."""
        return self.grid[0][0]
