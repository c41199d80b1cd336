"""A structured matrix plus one of low rank: neighbours and a sum over all of them.

In: an operator, and the factors of the rest. Out: ``LowRankUpdate``, the kind `sum`. solvers/woodbury_update.py solves
with the first and corrects. Next file: ``matrix_free.py``.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from implicitdiff.errors import StructureError
from implicitdiff.operators.base import LinearOperator, check_parameters, common_batch
from implicitdiff.operators.products import batched_matvec


@dataclass(frozen=True, eq=False)
class LowRankUpdate(LinearOperator):
    """base + left diag(weights) right'.

    Attributes:
        base: any other kind.
        left: (B or 1, m, k)
        weights: (B or 1, k), of any sign.
        right: (B or 1, m, k); None where it is ``left``, and the sum symmetric if ``base`` is.
    """

    base: LinearOperator
    left: Tensor
    weights: Tensor
    right: Tensor | None = None
    kind: ClassVar[str] = "sum"

    def __post_init__(self) -> None:
        expected = {
            "left": (self.left, (self.base.size, -1)),
            "weights": (self.weights, (self.left.shape[-1],)),
        }
        if self.right is not None:
            expected["right"] = (self.right, (self.base.size, self.left.shape[-1]))
        check_parameters(self.kind, expected)
        if len({self.base.batch, common_batch(*self._tensors)} - {1}) > 1:
            raise StructureError(
                f"{self.kind}: the base has batch {self.base.batch}, the factors {common_batch(*self._tensors)}; give "
                "each the batch size B, or 1 to share it."
            )

    @property
    def _tensors(self) -> tuple[Tensor, ...]:
        return (self.left, self.weights) if self.right is None else (self.left, self.weights, self.right)

    @property
    def parts(self) -> tuple[str, ...]:
        """The kinds of the summands."""
        return (self.base.kind, "low-rank")

    @property
    def size(self) -> int:
        """m."""
        return self.base.size

    @property
    def rank(self) -> int:
        """k."""
        return self.left.shape[-1]

    @property
    def batch(self) -> int:
        """B, or 1 where all parameters are shared."""
        return max(self.base.batch, common_batch(*self._tensors)) if 0 not in self._batches else 0

    @property
    def _batches(self) -> tuple[int, ...]:
        return (self.base.batch, *(t.shape[0] for t in self._tensors))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return self.left.dtype

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self.left.device

    @property
    def symmetric(self) -> bool:
        """Whether the matrix is symmetric by construction."""
        return self.right is None and self.base.symmetric

    @property
    def right_factor(self) -> Tensor:
        """The factor on the right."""
        return self.left if self.right is None else self.right

    def matvec(self, vector: Tensor) -> Tensor:
        """Return the product (..., B, m); 4 m k flops a vector beside those of the base."""
        inner = batched_matvec(self.right_factor.mT, vector) * self.weights
        return self.base.matvec(vector) + batched_matvec(self.left, inner)

    def transpose(self) -> "LowRankUpdate":
        """Return the transposed matrix; itself where it is symmetric."""
        if self.symmetric:
            return self
        right = None if self.right is None else self.left
        return LowRankUpdate(self.base.transpose(), self.right_factor, self.weights, right)

    def to_dense(self) -> Tensor:
        """Return (B, m, m)."""
        return self.base.to_dense() + (self.left * self.weights[:, None]) @ self.right_factor.mT
