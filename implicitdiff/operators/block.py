"""A grid of blocks: a Schur complement over several constraints, a KKT matrix over several variables.

In: operators on the diagonal, dense tensors or nothing off it, and null vectors that were proved from the
declared constraints. Out: ``Block``; solvers/schur.py eliminates its diagonal corners. Next file:
``dense.py``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from implicitdiff.errors import StructureError
from implicitdiff.operators.base import LinearOperator, check_parameters
from implicitdiff.operators.diagonal import Diagonal
from implicitdiff.operators.products import batched_matvec


class NullVectors(tuple[Tensor, ...]):
    """Null vectors that outlive one matrix: a plan states the same ones at each call.

    Attributes:
        derived: what solvers computed from them once, by a key of their own.
    """

    derived: dict[object, object]

    def __new__(cls, vectors: Sequence[Tensor] = ()) -> "NullVectors":
        """Keep the vectors and start with nothing derived."""
        made = super().__new__(cls, vectors)
        made.derived = {}
        return made

    def like(self, dtype: torch.dtype, device: torch.device) -> "NullVectors":
        """Return the same vectors of that dtype and on that device, converted once."""
        found = self.derived.get((dtype, device))
        if not isinstance(found, NullVectors):
            same = all(vector.dtype == dtype and vector.device == device for vector in self)
            found = self if same else NullVectors([v.to(dtype=dtype, device=device) for v in self])
            self.derived[dtype, device] = found
        return found


@dataclass(frozen=True, eq=False)
class Block(LinearOperator):
    """A square grid of blocks, with operators on its diagonal.

    Attributes:
        blocks: the rows of the grid. blocks[i][i] is a LinearOperator of size sizes[i]; blocks[i][j] off the
            diagonal is a tensor (B or 1, sizes[i], sizes[j]), or None for zero. Both triangles are given; the
            lower one is normally a transposed view of the upper.
        sizes: the sizes of the diagonal blocks; m is their sum.
        null_vectors: vectors (m,), tensors or sequences of numbers, proved to span the kernel of the matrix
            of each sample. Only for symmetric matrices, whose range is then the orthogonal complement.
        symmetric: whether the whole matrix is symmetric.
    """

    blocks: tuple[tuple[Tensor | LinearOperator | None, ...], ...]
    sizes: tuple[int, ...]
    null_vectors: tuple[Tensor | Sequence[float], ...] = ()
    symmetric: bool = True
    kind: ClassVar[str] = "block"

    def __post_init__(self) -> None:
        if not self._is_plain_pair():
            self._check()

    def _is_plain_pair(self) -> bool:
        """Whether there is nothing to check: two diagonal corners, their coupling, all of one batch size."""
        sizes, given = self.sizes, self.null_vectors
        if (
            len(sizes) != 2
            or len(self.blocks) != 2
            or not isinstance(given, NullVectors)
            or not self.symmetric
        ):
            return False
        (first, upper), (lower, second) = self.blocks
        if type(first) is not Diagonal or type(second) is not Diagonal:
            return False
        if not isinstance(upper, Tensor) or not isinstance(lower, Tensor):
            return False
        batch, dtype = upper.shape[0], upper.dtype
        fitting = (
            upper.shape == (batch, *sizes)
            and lower.shape == (batch, sizes[1], sizes[0])
            and first.diagonal.shape == (batch, sizes[0])
            and second.diagonal.shape == (batch, sizes[1])
            and dtype == lower.dtype == first.diagonal.dtype == second.diagonal.dtype
        )
        key = (dtype, upper.device)
        if not fitting or any(vector.shape[0] != sizes[0] + sizes[1] for vector in given):
            return False
        object.__setattr__(self, "null_vectors", given.derived.get(key) or given.like(*key))
        return True

    def _check(self) -> None:
        number = len(self.sizes)
        if number == 0 or len(self.blocks) != number or any(len(row) != number for row in self.blocks):
            raise StructureError(
                f"{self.kind}: {number} sizes need a grid of as many rows and columns, got rows of lengths "
                f"{[len(row) for row in self.blocks]}."
            )
        for i, size in enumerate(self.sizes):
            corner = self.blocks[i][i]
            if not isinstance(corner, LinearOperator) or corner.size != size:
                raise StructureError(
                    f"{self.kind}: blocks[{i}][{i}] must be a LinearOperator of size {size}, got "
                    f"{_describe(corner)}."
                )
        couplings, corners = self.couplings, self.corners
        batches = {corner.batch for corner in corners} | {block.shape[0] for _, _, block in couplings}
        dtypes = {block.dtype for _, _, block in couplings}
        fitting = all(block.shape[1:] == (self.sizes[i], self.sizes[j]) for i, j, block in couplings)
        if not fitting or len(dtypes) > 1 or any(block.dim() != 3 for _, _, block in couplings):
            check_parameters(
                self.kind, {f"blocks[{i}][{j}]": (t, (self.sizes[i], self.sizes[j])) for i, j, t in couplings}
            )
        if len(batches - {1}) > 1:
            raise StructureError(
                f"{self.kind}: the blocks have batch sizes {sorted(batches)}; give each B, or 1 to share it."
            )
        if self.null_vectors and not self.symmetric:
            raise StructureError(f"{self.kind}: null_vectors are only meant for a symmetric matrix.")
        # Sequences become tensors once, here; the field is otherwise as it was given.
        given = self.null_vectors
        if isinstance(given, NullVectors):
            vectors = given.like(self.dtype, self.device)
        else:
            vectors = NullVectors([torch.as_tensor(v, dtype=self.dtype, device=self.device) for v in given])
        for vector in vectors:
            if vector.shape != (self.size,):
                raise StructureError(
                    f"{self.kind}: a null vector has shape {tuple(vector.shape)}, expected ({self.size},): "
                    "it spans all blocks and is the same for all samples."
                )
        object.__setattr__(self, "null_vectors", vectors)

    @cached_property
    def corners(self) -> tuple[LinearOperator, ...]:
        """The operators on the diagonal of the grid."""
        corners = [row[i] for i, row in enumerate(self.blocks)]
        return tuple([corner for corner in corners if isinstance(corner, LinearOperator)])

    @cached_property
    def couplings(self) -> tuple[tuple[int, int, Tensor], ...]:
        """The tensors off the diagonal that are not zero, each with its row and column in the grid."""
        return tuple(
            (i, j, block)
            for i, row in enumerate(self.blocks)
            for j, block in enumerate(row)
            if i != j and isinstance(block, Tensor)
        )

    @cached_property
    def size(self) -> int:
        """m, the sum of the sizes."""
        return sum(self.sizes)

    @cached_property
    def batch(self) -> int:
        """B, or 1 where every block is shared."""
        batches = [corner.batch for corner in self.corners] + [t.shape[0] for _, _, t in self.couplings]
        return next((batch for batch in batches if batch != 1), 1)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first corner."""
        return self.corners[0].dtype

    @property
    def device(self) -> torch.device:
        """The device of the first corner."""
        return self.corners[0].device

    @cached_property
    def slices(self) -> tuple[slice, ...]:
        """Where each block lies in the flat vector."""
        ends = [sum(self.sizes[: i + 1]) for i in range(len(self.sizes))]
        return tuple(slice(end - size, end) for end, size in zip(ends, self.sizes, strict=True))

    def matvec(self, vector: Tensor) -> Tensor:
        """Return the product (..., B, m); the sum of the costs of the blocks."""
        parts = [vector[..., where] for where in self.slices]
        rows = [corner.matvec(part) for corner, part in zip(self.corners, parts, strict=True)]
        for i, j, block in self.couplings:
            rows[i] = rows[i] + batched_matvec(block, parts[j])
        batch = vector.shape[-2] if self.batch == 1 else self.batch
        return torch.cat([row.expand(*row.shape[:-2], batch, -1) for row in rows], dim=-1)

    def transpose(self) -> "Block":
        """Return the transposed grid of transposed blocks; itself where it is symmetric."""
        if self.symmetric:
            return self
        number = range(len(self.sizes))
        grid: list[list[Tensor | LinearOperator | None]] = [[None for _ in number] for _ in number]
        for i, corner in enumerate(self.corners):
            grid[i][i] = corner.transpose()
        for i, j, block in self.couplings:
            grid[j][i] = block.mT
        return Block(tuple(map(tuple, grid)), self.sizes, symmetric=False)

    def to_dense(self) -> Tensor:
        """Return (B, m, m)."""
        dense = torch.zeros(self.batch, self.size, self.size, dtype=self.dtype, device=self.device)
        where = self.slices
        for i, corner in enumerate(self.corners):
            dense[:, where[i], where[i]] = corner.to_dense()
        for i, j, block in self.couplings:
            dense[:, where[i], where[j]] = block
        return dense


def _describe(block: object) -> str:
    if isinstance(block, LinearOperator):
        return f"{block.kind} of size {block.size}"
    return type(block).__name__
