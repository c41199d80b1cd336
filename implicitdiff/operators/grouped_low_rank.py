"""Blocks on the diagonal that are of low rank plus diagonal themselves: one Woodbury factorisation for each group.

In: D, U, c and V of every block. Out: ``GroupedLowRank``, another way to store a block-diagonal matrix. The groups are
a batch axis, so that cost and memory are linear in their number. Next file: ``banded.py``.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from torch import Tensor

from implicitdiff.operators.base import StoredOperator, check_parameters, common_batch
from implicitdiff.operators.block_diagonal import BlockDiagonal
from implicitdiff.operators.low_rank import LowRankPlusDiagonal


@dataclass(frozen=True, eq=False)
class GroupedLowRank(StoredOperator):
    """D_g + U_g diag(c_g) V_g' for each block g; how blocks lie in the flat vector is as in ``BlockDiagonal``.

    Attributes:
        diagonal: (B or 1, nb, s), or (B or 1, nb, 1) for multiples of the identity.
        left: (B or 1, nb, s, k)
        weights: (B or 1, nb, k)
        right: (B or 1, nb, s, k); None where it is ``left``, which makes the matrix symmetric.
        shape: sizes whose product is m = nb * s.
        block_axes: the axes of ``shape`` that number the blocks.
    """

    diagonal: Tensor
    left: Tensor
    weights: Tensor
    right: Tensor | None
    shape: tuple[int, ...]
    block_axes: tuple[int, ...]
    kind: ClassVar[str] = "block-diagonal"

    def __post_init__(self) -> None:
        number = math.prod(self.shape[axis] for axis in self.block_axes)
        inside, rank = self.size // max(1, number), self.left.shape[-1]
        width = 1 if self.diagonal.shape[-1] == 1 else inside
        expected = {
            "diagonal": (self.diagonal, (number, width)),
            "left": (self.left, (number, inside, rank)),
            "weights": (self.weights, (number, rank)),
        }
        if self.right is not None:
            expected["right"] = (self.right, (number, inside, rank))
        check_parameters(self.kind, expected)

    @property
    def size(self) -> int:
        """m = nb * s."""
        return math.prod(self.shape)

    @property
    def symmetric(self) -> bool:
        """Whether the matrix is symmetric by construction."""
        return self.right is None

    @property
    def rank(self) -> int:
        """k, in each block."""
        return self.left.shape[-1]

    def parameters(self) -> tuple[Tensor, ...]:
        """Return D, U, c and V."""
        own = (self.diagonal, self.left, self.weights)
        return own if self.right is None else (*own, self.right)

    @cached_property
    def blocks(self) -> LowRankPlusDiagonal:
        """The blocks of all samples as one batch, B nb (or nb where all parameters are shared)."""
        batch = common_batch(*self.parameters())

        def merged(parameter: Tensor) -> Tensor:
            return parameter.expand(batch, *parameter.shape[1:]).flatten(0, 1)

        right = None if self.right is None else merged(self.right)
        return LowRankPlusDiagonal(merged(self.diagonal), merged(self.left), merged(self.weights), right)

    @property
    def _places(self) -> BlockDiagonal:
        """The same blocks without numbers: it knows where they lie."""
        number, inside = self.left.shape[1:3]
        return BlockDiagonal(
            self.left.new_empty(1).expand(1, number, inside, inside), self.shape, self.block_axes
        )

    def split(self, vector: Tensor) -> Tensor:
        """Return the vector (..., B, m) with its entries sorted by block, as ``blocks`` takes it: (..., B nb, s)."""
        return self._places.split(vector).flatten(-3, -2)

    def join(self, parts: Tensor) -> Tensor:
        """Return the vector (..., B, m) with the entries ``parts`` (..., B nb, s): undoes split."""
        return self._places.join(parts.unflatten(-2, (-1, self.left.shape[1])))

    def matvec(self, vector: Tensor) -> Tensor:
        """Return the product (..., B, m); 4 m k flops a vector."""
        batch = self.batch
        if batch == 1:
            # a shared matrix: the samples are further vectors
            return self.matvec_each(vector[..., None, :])[..., 0, :]
        return self.matvec_each(vector.expand(*vector.shape[:-2], batch, vector.shape[-1]))

    def matvec_each(self, vector: Tensor) -> Tensor:
        """The product for a vector whose batch is that of the matrix."""
        return self.join(self.blocks.matvec(self.split(vector)))

    def transpose(self) -> "GroupedLowRank":
        """Return the transposed matrix, U and V exchanged; itself where it is symmetric."""
        if self.right is None:
            return self
        return GroupedLowRank(self.diagonal, self.right, self.weights, self.left, self.shape, self.block_axes)

    def written(self) -> BlockDiagonal:
        """The same matrix with its blocks written down."""
        dense = self.blocks.to_dense().unflatten(0, (-1, self.left.shape[1]))
        return BlockDiagonal(dense, self.shape, self.block_axes, symmetric=self.symmetric)

    def to_dense(self) -> Tensor:
        """Return (B, m, m)."""
        return self.written().to_dense()
