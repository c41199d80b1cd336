"""A dense matrix: what is left when no structure could be proved.

In: the matrix. Out: ``Dense``. Next file: ``matrix_free.py``.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from implicitdiff.errors import StructureError
from implicitdiff.operators.base import StoredOperator, check_parameters
from implicitdiff.operators.products import batched_matvec


@dataclass(frozen=True, eq=False)
class Dense(StoredOperator):
    """A stored matrix.

    Attributes:
        matrix: (B or 1, m, m)
        symmetric: whether it equals its transpose; the solvers may then read one triangle only.
    """

    matrix: Tensor
    symmetric: bool = True
    kind: ClassVar[str] = "dense"

    def __post_init__(self) -> None:
        check_parameters(self.kind, {"matrix": (self.matrix, (-1, -1))})
        if self.matrix.shape[-1] != self.matrix.shape[-2]:
            raise StructureError(
                f"{self.kind}: matrix has shape {tuple(self.matrix.shape)}, expected (batch, m, m)."
            )

    @property
    def size(self) -> int:
        """m."""
        return self.matrix.shape[-1]

    def parameters(self) -> tuple[Tensor, ...]:
        """Return (matrix,)."""
        return (self.matrix,)

    def matvec(self, vector: Tensor) -> Tensor:
        """Return the product (..., B, m); 2 m^2 flops a vector."""
        return batched_matvec(self.matrix, vector)

    def transpose(self) -> "Dense":
        """Return the transposed view; the operator itself where it is symmetric."""
        return self if self.symmetric else Dense(self.matrix.mT, symmetric=False)

    def to_dense(self) -> Tensor:
        """Return the stored matrix itself (B, m, m)."""
        return self.matrix
