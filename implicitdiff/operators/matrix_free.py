"""A matrix known only by its product with a vector: too large, or too irregular, to be written down.

In: the product. Out: ``MatrixFree``; solvers/cg.py works with the product alone. Next: ``samples.py``,
which takes samples out of an operator, then the package ``solvers``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from implicitdiff.operators.base import LinearOperator


@dataclass(frozen=True, eq=False)
class MatrixFree(LinearOperator):
    """A linear map given as a function.

    Attributes:
        product: maps (..., B, m) to (..., B, m), linear in its argument, sample by sample.
        size: m.
        batch: B or 1.
        dtype: dtype of the vectors.
        device: device of the vectors.
        transposed_product: the same for the transposed matrix; None means that the matrix is symmetric.
    """

    product: Callable[[Tensor], Tensor]
    size: int
    batch: int
    dtype: torch.dtype
    device: torch.device
    transposed_product: Callable[[Tensor], Tensor] | None = None
    kind: ClassVar[str] = "matrix-free"

    @property
    def symmetric(self) -> bool:
        """True where no transposed product was given."""
        return self.transposed_product is None

    def matvec(self, vector: Tensor) -> Tensor:
        """Return product(vector), (..., B, m)."""
        batch = vector.shape[-2] if self.batch == 1 else self.batch
        return self.product(vector.expand(*vector.shape[:-2], batch, self.size))

    def transpose(self) -> "MatrixFree":
        """Return the operator with the two products exchanged; itself where it is symmetric."""
        if self.transposed_product is None:
            return self
        return MatrixFree(
            self.transposed_product,
            self.size,
            self.batch,
            self.dtype,
            self.device,
            transposed_product=self.product,
        )

    def to_dense(self) -> Tensor:
        """Return (B, m, m) by m products at once: m right-hand sides of every sample are alive together."""
        unit = torch.eye(self.size, dtype=self.dtype, device=self.device)
        columns = self.matvec(unit[:, None, :].expand(-1, self.batch, -1))
        return columns.permute(1, 2, 0)
