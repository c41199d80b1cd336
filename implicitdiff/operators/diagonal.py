"""A diagonal matrix: the Hessian of a separable objective.

In: m numbers a sample. Out: ``Diagonal``. Next file: ``block_diagonal.py``.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from implicitdiff.operators.base import StoredOperator, check_parameters


@dataclass(frozen=True, eq=False)
class Diagonal(StoredOperator):
    """diag(diagonal).

    Attributes:
        diagonal: (B or 1, m)
    """

    diagonal: Tensor
    kind: ClassVar[str] = "diagonal"

    def __post_init__(self) -> None:
        if self.diagonal.dim() != 2:
            check_parameters(self.kind, {"diagonal": (self.diagonal, (-1,))})

    @property
    def size(self) -> int:
        """m."""
        return self.diagonal.shape[-1]

    def parameters(self) -> tuple[Tensor, ...]:
        """Return (diagonal,)."""
        return (self.diagonal,)

    def matvec(self, vector: Tensor) -> Tensor:
        """Return diagonal * vector, (..., B, m); m flops a vector."""
        return self.diagonal * vector

    def transpose(self) -> "Diagonal":
        """Return the operator itself."""
        return self

    def to_dense(self) -> Tensor:
        """Return (B, m, m)."""
        return torch.diag_embed(self.diagonal)
