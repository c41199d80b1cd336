"""A sparse matrix: the places of the entries that may differ from zero, and their values.

In: a pattern for all samples, or one for each, and values in its order. Out: ``Sparse``. The pattern comes from index
tensors and slices; it is sorted once and kept. solvers/sparse_lu.py inverts it. Next file: ``matrix_free.py``.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from implicitdiff.errors import StructureError
from implicitdiff.operators.base import StoredOperator, check_parameters


@dataclass(frozen=True, eq=False)
class Pattern:
    """Different places in an m x m matrix, column by column.

    Attributes:
        size: m.
        rows, columns: (nnz,) int64, sorted by column, then by row.
        derived: what solvers computed from it once (orderings, permutations), by a key of their own.
    """

    size: int
    rows: Tensor
    columns: Tensor
    derived: dict[str, Any] = field(default_factory=dict, repr=False)

    @staticmethod
    def of(size: int, rows: Tensor, columns: Tensor) -> tuple["Pattern", Tensor]:
        """Return the pattern of places that may repeat, and for each its number in it; -1 is no place: see ``sums``.

        Args:
            size: m.
            rows, columns: (N,) int64. A place outside of the matrix belongs to no entry.
        """
        good = (rows >= 0) & (rows < size) & (columns >= 0) & (columns < size)
        flat = torch.where(good, columns * size + rows, size * size)
        places, slots = torch.unique(flat, return_inverse=True)
        if len(places) and int(places[-1]) == size * size:
            places = places[:-1]
        found = Pattern(size, places.remainder(size), places.div(size, rounding_mode="floor"))
        return found, slots

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True, eq=False)
class Sparse(StoredOperator):
    """The entries of a sparse matrix.

    Attributes:
        values: (B or 1, nnz) in the order of the patterns; with a pattern for each sample, as wide as the widest.
        patterns: one for all samples, or one for each.
        symmetric: whether the matrix is symmetric. It is stated, not checked.
    """

    values: Tensor
    patterns: tuple[Pattern, ...]
    symmetric: bool = True
    kind: ClassVar[str] = "sparse"

    def __post_init__(self) -> None:
        widest = max((len(p) for p in self.patterns), default=0)
        check_parameters(self.kind, {"values": (self.values, (widest,))})
        sizes = {p.size for p in self.patterns}
        if len(sizes) != 1 or (len(self.patterns) > 1 and len(self.patterns) != self.values.shape[0]):
            raise StructureError(
                f"{self.kind}: {len(self.patterns)} patterns of sizes {sorted(sizes)} for values of shape "
                f"{tuple(self.values.shape)}; give one pattern, or one of the same size for each sample."
            )

    @property
    def size(self) -> int:
        """m."""
        return self.patterns[0].size

    def parameters(self) -> tuple[Tensor, ...]:
        """Return (values,)."""
        return (self.values,)

    def matvec(self, vector: Tensor) -> Tensor:
        """Return the product (..., B, m); 2 nnz flops a vector."""
        if len(self.patterns) == 1:
            return _product(self.patterns[0], self.values, vector)
        vector = vector.expand(*vector.shape[:-2], len(self.patterns), self.size)
        parts = [
            _product(p, self.values[b : b + 1, : len(p)], vector[..., b : b + 1, :])
            for b, p in enumerate(self.patterns)
        ]
        return torch.cat(parts, dim=-2)

    def transpose(self) -> "Sparse":
        """Return the transposed matrix; itself where it is symmetric."""
        if self.symmetric:
            return self
        values, patterns = torch.zeros_like(self.values), []
        for b, p in enumerate(self.patterns):
            turned, slots = Pattern.of(p.size, p.columns, p.rows)
            rows = slice(None) if len(self.patterns) == 1 else slice(b, b + 1)
            values[rows, slots] = self.values[rows, : len(p)]
            patterns.append(turned)
        return Sparse(values, tuple(patterns), symmetric=False)

    def to_dense(self) -> Tensor:
        """Return (B, m, m)."""
        dense = self.values.new_zeros(self.batch, self.size, self.size)
        for b, p in enumerate(self.patterns):
            rows = slice(None) if len(self.patterns) == 1 else slice(b, b + 1)
            dense[rows, p.rows, p.columns] = self.values[rows, : len(p)]
        return dense


def _product(pattern: Pattern, values: Tensor, vector: Tensor) -> Tensor:
    terms = values * vector[..., pattern.columns]
    return terms.new_zeros(*terms.shape[:-1], pattern.size).index_add_(-1, pattern.rows, terms)
