"""The zero matrix: the Hessian of a linear objective, the corner of a KKT matrix.

In: sizes only. Out: ``Zero``. Next file: ``scaled_identity.py``.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from implicitdiff.operators.base import LinearOperator


@dataclass(frozen=True, eq=False)
class Zero(LinearOperator):
    """The m x m zero matrix; it stores no numbers.

    Attributes:
        size: m.
        batch: B or 1.
        dtype: dtype of the products.
        device: device of the products.
    """

    size: int
    batch: int
    dtype: torch.dtype
    device: torch.device
    kind: ClassVar[str] = "zero"

    def matvec(self, vector: Tensor) -> Tensor:
        """Return zeros (..., B, m)."""
        batch = vector.shape[-2] if self.batch == 1 else self.batch
        return vector.new_zeros(*vector.shape[:-2], batch, self.size)

    def transpose(self) -> "Zero":
        """Return the operator itself."""
        return self

    def to_dense(self) -> Tensor:
        """Return zeros (B, m, m)."""
        return torch.zeros(self.batch, self.size, self.size, dtype=self.dtype, device=self.device)
