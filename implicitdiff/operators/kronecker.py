"""A Kronecker product: a matrix variable whose axes are coupled independently of each other.

In: one matrix for each group of axes. Out: ``Kronecker``. Next file: ``banded.py``.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from implicitdiff.errors import StructureError
from implicitdiff.operators.base import StoredOperator, check_parameters


@dataclass(frozen=True, eq=False)
class Kronecker(StoredOperator):
    """M[(i, j, ...), (i', j', ...)] = F_1[i, i'] F_2[j, j'] ..., an identity along the axes of no factor.

    The flat vector is read as an array of ``shape`` (row-major). Least squares with several outputs,
    |X U - Y|^2 with U (d, k), has shape (d, k) and one factor X'X along axis 0.

    Attributes:
        factors: matrices (B or 1, s_f, s_f).
        shape: sizes whose product is m.
        axes: for each factor the axes of ``shape`` it couples, whose sizes multiply to s_f; no axis twice.
        symmetric: whether the whole matrix is symmetric.
    """

    factors: tuple[Tensor, ...]
    shape: tuple[int, ...]
    axes: tuple[tuple[int, ...], ...]
    symmetric: bool = True
    kind: ClassVar[str] = "kronecker"

    def __post_init__(self) -> None:
        taken = [axis for group in self.axes for axis in group]
        if len(set(taken)) != len(taken) or not all(0 <= a < len(self.shape) for a in taken):
            raise StructureError(
                f"{self.kind}: axes {self.axes} must be different axes of shape {self.shape}, counted from 0."
            )
        if not self.factors or len(self.factors) != len(self.axes):
            raise StructureError(
                f"{self.kind}: got {len(self.factors)} factors for {len(self.axes)} groups of axes; give one each."
            )
        sides = [math.prod(self.shape[axis] for axis in group) for group in self.axes]
        expected = {
            f"factors[{k}]": (factor, (side, side))
            for k, (factor, side) in enumerate(zip(self.factors, sides, strict=True))
        }
        check_parameters(self.kind, expected)

    @property
    def size(self) -> int:
        """m, the product of the sizes."""
        return math.prod(self.shape)

    def parameters(self) -> tuple[Tensor, ...]:
        """Return the factors."""
        return self.factors

    def along(self, vector: Tensor, group: tuple[int, ...]) -> Tensor:
        """Return the vector (..., B, m) as (..., B, r, s), the axes of a group joined last."""
        lead = vector.shape[:-1]
        array = vector.reshape(*lead, *self.shape)
        rest = [axis for axis in range(len(self.shape)) if axis not in group]
        order = [*range(len(lead)), *(len(lead) + axis for axis in (*rest, *group))]
        side = math.prod(self.shape[axis] for axis in group)
        return array.permute(order).reshape(*lead, self.size // max(1, side), side)

    def back(self, parts: Tensor, group: tuple[int, ...]) -> Tensor:
        """Undo ``along``."""
        lead = parts.shape[:-2]
        rest = [axis for axis in range(len(self.shape)) if axis not in group]
        order = [*rest, *group]
        array = parts.reshape(*lead, *(self.shape[axis] for axis in order))
        undo = [len(lead) + order.index(axis) for axis in range(len(self.shape))]
        return array.permute(*range(len(lead)), *undo).reshape(*lead, self.size)

    def matvec(self, vector: Tensor) -> Tensor:
        """Return the product (..., B, m); 2 m (s_1 + s_2 + ...) flops."""
        for factor, group in zip(self.factors, self.axes, strict=True):
            vector = self.back(self.along(vector, group) @ factor.mT, group)
        return vector

    def transpose(self) -> "Kronecker":
        """Return the product of the transposed factors; itself where it is symmetric."""
        if self.symmetric:
            return self
        transposed = tuple(factor.mT for factor in self.factors)
        return Kronecker(transposed, self.shape, self.axes, symmetric=False)

    def to_dense(self) -> Tensor:
        """Return (B, m, m)."""
        eye = torch.eye(self.size, dtype=self.dtype, device=self.device)
        columns = self.matvec(eye[:, None].expand(-1, self.batch, -1))
        return columns.permute(1, 2, 0)
