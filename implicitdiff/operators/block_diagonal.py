"""A block-diagonal matrix: groups of variables that are coupled only among themselves.

In: one s x s block for each group, and the axes of the variable that number the groups. Out:
``BlockDiagonal``. Next file: ``banded.py``.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from implicitdiff.errors import StructureError
from implicitdiff.operators.base import StoredOperator, check_parameters
from implicitdiff.operators.products import batched_matvec


@dataclass(frozen=True, eq=False)
class BlockDiagonal(StoredOperator):
    """Blocks on the diagonal after a permutation of the entries.

    The flat vector is read as an array of ``shape`` (row-major). The axes in ``block_axes`` number the
    blocks, in the order given; the other axes, in ascending order, number the entries inside a block. Rows of
    a matrix variable (n, s) that are coupled only within the row: shape (n, s), block_axes (0,); its columns:
    (1,).

    Attributes:
        blocks: (B or 1, nb, s, s), symmetric blocks unless ``symmetric`` is False.
        shape: sizes whose product is m = nb * s.
        block_axes: axes of ``shape`` whose sizes multiply to nb.
        symmetric: whether each block is symmetric.
    """

    blocks: Tensor
    shape: tuple[int, ...]
    block_axes: tuple[int, ...]
    symmetric: bool = True
    kind: ClassVar[str] = "block-diagonal"

    def __post_init__(self) -> None:
        rank = len(self.shape)
        if len(set(self.block_axes)) != len(self.block_axes) or not all(
            0 <= a < rank for a in self.block_axes
        ):
            raise StructureError(
                f"{self.kind}: block_axes {self.block_axes} must be different axes of shape {self.shape}, "
                "counted from 0."
            )
        number = math.prod(self.shape[axis] for axis in self.block_axes)
        inside = math.prod(self.shape[axis] for axis in self.inside_axes)
        check_parameters(self.kind, {"blocks": (self.blocks, (number, inside, inside))})

    @property
    def size(self) -> int:
        """m = nb * s."""
        return math.prod(self.shape)

    @property
    def inside_axes(self) -> tuple[int, ...]:
        """The axes of ``shape`` that number the entries inside a block."""
        return tuple(axis for axis in range(len(self.shape)) if axis not in self.block_axes)

    def parameters(self) -> tuple[Tensor, ...]:
        """Return (blocks,)."""
        return (self.blocks,)

    def split(self, vector: Tensor) -> Tensor:
        """Return the vector (..., m) with its entries sorted by block: (..., nb, s)."""
        lead = vector.dim() - 1
        axes = [lead + axis for axis in (*self.block_axes, *self.inside_axes)]
        grid = vector.reshape(*vector.shape[:-1], *self.shape).permute(*range(lead), *axes)
        return grid.reshape(*vector.shape[:-1], *self.blocks.shape[1:3])

    def join(self, parts: Tensor) -> Tensor:
        """Return the vector (..., m) with the entries ``parts`` (..., nb, s) by block: undoes split."""
        lead = parts.dim() - 2
        order = (*self.block_axes, *self.inside_axes)
        back = [lead + order.index(axis) for axis in range(len(self.shape))]
        grid = parts.reshape(*parts.shape[:lead], *(self.shape[axis] for axis in order))
        return grid.permute(*range(lead), *back).reshape(*parts.shape[:lead], self.size)

    def matvec(self, vector: Tensor) -> Tensor:
        """Return the product (..., B, m); 2 m s flops a vector."""
        batch, number, inside, _ = self.blocks.shape
        parts = self.split(vector)
        if batch == 1:
            # A shared set of blocks: the samples are further right-hand sides of each block.
            stacked = parts.movedim(-2, 0).reshape(number, -1, inside)
            product = (stacked @ self.blocks[0].mT).reshape(number, *vector.shape[:-1], inside).movedim(0, -2)
            return self.join(product)
        parts = parts.expand(*parts.shape[:-3], batch, number, inside)
        product = batched_matvec(self.blocks.flatten(0, 1), parts.flatten(-3, -2))
        return self.join(product.reshape(parts.shape))

    def transpose(self) -> "BlockDiagonal":
        """Return the operator of the transposed blocks; itself where they are symmetric."""
        if self.symmetric:
            return self
        return BlockDiagonal(self.blocks.mT, self.shape, self.block_axes, symmetric=False)

    def to_dense(self) -> Tensor:
        """Return (B, m, m)."""
        dense = self.blocks.new_zeros(self.batch, self.size, self.size)
        places = self.split(torch.arange(self.size, device=self.device))
        dense[:, places[:, :, None], places[:, None, :]] = self.blocks
        return dense
