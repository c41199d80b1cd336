"""A banded matrix: entries coupled with their neighbours along one axis, as finite differences couple them.

In: the band, and which axis of the variable it runs along, which axes number independent chains. Out: ``Banded``;
solvers/tridiagonal.py and solvers/banded_cholesky.py invert it. Next file: ``low_rank.py``.
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
class Banded(StoredOperator):
    """Independent chains of T blocks, each coupled with the blocks -lower to +upper places away.

    The flat vector is read as an array of ``shape`` (row-major). ``band_axis``, of length T, numbers the places of a
    chain; the axes in ``group_axes``, in the order given, number the G chains; the other axes, in ascending order,
    number the s entries inside a block. Second differences down the columns of a variable (n, c): shape (n, c),
    band_axis 0, group_axes (1,), lower = upper = 1, s = 1. Coupled rows: group_axes (), s = c.

    Attributes:
        bands: (B or 1, G, W, T, s, s) with W = lower + 1 + upper. bands[:, g, k, t] is the block in row t and column
            t + k - lower of chain g; where that column does not exist, the entry is never read.
        shape: sizes whose product is m = G T s.
        band_axis: the axis of ``shape`` along which the blocks are coupled.
        group_axes: the axes of ``shape`` that number the chains; may be empty.
        lower: how many places before its own a row reaches.
        upper: how many places after its own.
        symmetric: whether the matrix is symmetric: bands[:, g, lower - d, t + d] is the transposed
            bands[:, g, lower + d, t]. It is stated, not checked; it needs lower = upper.
    """

    bands: Tensor
    shape: tuple[int, ...]
    band_axis: int
    group_axes: tuple[int, ...]
    lower: int
    upper: int
    symmetric: bool = True
    kind: ClassVar[str] = "banded"

    def __post_init__(self) -> None:
        axes = (*self.group_axes, self.band_axis)
        if len(set(axes)) != len(axes) or not all(0 <= axis < len(self.shape) for axis in axes):
            raise StructureError(
                f"{self.kind}: band_axis {self.band_axis} and group_axes {self.group_axes} must be different axes of "
                f"shape {self.shape}, counted from 0."
            )
        if min(self.lower, self.upper) < 0 or (self.symmetric and self.lower != self.upper):
            raise StructureError(
                f"{self.kind}: lower {self.lower} and upper {self.upper} count the places before and after the "
                "diagonal; they are not negative, and equal if the matrix is symmetric."
            )
        inside, width = math.prod(self.shape[axis] for axis in self.inside_axes), self.lower + 1 + self.upper
        wanted = (self.groups, width, self.length, inside, inside)
        check_parameters(self.kind, {"bands": (self.bands, wanted)})

    @property
    def size(self) -> int:
        """m = G T s."""
        return math.prod(self.shape)

    @property
    def length(self) -> int:
        """T, the number of places of a chain."""
        return self.shape[self.band_axis]

    @property
    def groups(self) -> int:
        """G, the number of chains."""
        return math.prod(self.shape[axis] for axis in self.group_axes)

    @property
    def inside_axes(self) -> tuple[int, ...]:
        """The axes of ``shape`` that number the entries inside a block."""
        outside = (*self.group_axes, self.band_axis)
        return tuple(axis for axis in range(len(self.shape)) if axis not in outside)

    def parameters(self) -> tuple[Tensor, ...]:
        """Return (bands,)."""
        return (self.bands,)

    def split(self, vector: Tensor) -> Tensor:
        """Return the vector (..., m) with its entries sorted by chain, place and entry: (..., G, T, s)."""
        lead = vector.dim() - 1
        axes = [lead + axis for axis in self._order]
        grid = vector.reshape(*vector.shape[:-1], *self.shape).permute(*range(lead), *axes)
        return grid.reshape(*vector.shape[:-1], self.groups, self.length, self.bands.shape[-1])

    def join(self, parts: Tensor) -> Tensor:
        """Return the vector (..., m) with the entries ``parts`` (..., G, T, s): undoes split."""
        lead = parts.dim() - 3
        back = [lead + self._order.index(axis) for axis in range(len(self.shape))]
        grid = parts.reshape(*parts.shape[:lead], *(self.shape[axis] for axis in self._order))
        return grid.permute(*range(lead), *back).reshape(*parts.shape[:lead], self.size)

    @property
    def _order(self) -> tuple[int, ...]:
        return (*self.group_axes, self.band_axis, *self.inside_axes)

    def diagonals(self) -> list[tuple[Tensor, slice, slice]]:
        """Return each diagonal of blocks: (B, G, n, s, s) without the places outside, its rows, its columns."""
        found = []
        for k in range(self.bands.shape[2]):
            offset = k - self.lower
            first, end = max(0, -offset), min(self.length, self.length - offset)
            if first < end:
                rows, columns = slice(first, end), slice(first + offset, end + offset)
                found.append((self.bands[:, :, k, rows], rows, columns))
        return found

    def matvec(self, vector: Tensor) -> Tensor:
        """Return the product (..., B, m); 2 m s W flops a vector."""
        batch = vector.shape[-2] if self.batch == 1 else self.batch
        parts = self.split(vector)
        product = parts.new_zeros(*vector.shape[:-2], batch, *parts.shape[-3:])
        for blocks, rows, columns in self.diagonals():
            taken = parts[..., columns, :]
            if blocks.shape[-1] == 1:
                product[..., rows, :].addcmul_(blocks[..., 0], taken)
            else:
                product[..., rows, :] += self._blockwise(blocks, taken)
        return self.join(product)

    @staticmethod
    def _blockwise(blocks: Tensor, parts: Tensor) -> Tensor:
        """Return blocks (B or 1, G, n, s, s) times parts (..., B, G, n, s), block by block."""
        if blocks.shape[0] == 1:
            # Shared blocks: the samples are further right-hand sides of each block.
            return batched_matvec(blocks[0].flatten(0, 1), parts.flatten(-3, -2)).reshape(parts.shape)
        parts = parts.expand(*parts.shape[:-4], blocks.shape[0], *parts.shape[-3:])
        return batched_matvec(blocks.flatten(0, 2), parts.flatten(-4, -2)).reshape(parts.shape)

    def transpose(self) -> "Banded":
        """Return the transposed matrix; itself where it is symmetric, else a copy, for the rows are other ones."""
        if self.symmetric:
            return self
        bands = torch.zeros_like(self.bands)
        for blocks, rows, columns in self.diagonals():
            bands[:, :, self.upper + rows.start - columns.start, columns] = blocks.mT
        return Banded(
            bands, self.shape, self.band_axis, self.group_axes, self.upper, self.lower, symmetric=False
        )

    def to_dense(self) -> Tensor:
        """Return (B, m, m)."""
        dense = self.bands.new_zeros(self.batch, self.size, self.size)
        places = self.split(torch.arange(self.size, device=self.device))
        for blocks, rows, columns in self.diagonals():
            dense[:, places[:, rows, :, None], places[:, columns, None, :]] = blocks
        return dense
