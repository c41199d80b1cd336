"""Low rank plus diagonal: the Hessian of a sum over k terms, each of which sees all variables at once.

In: a diagonal, two factors and the weights between them. Out: ``LowRankPlusDiagonal``; solvers/woodbury.py
inverts it when k < m. Next file: ``block.py``.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from implicitdiff.errors import StructureError
from implicitdiff.operators.base import StoredOperator, check_parameters
from implicitdiff.operators.products import batched_matvec, weighted_product


@dataclass(frozen=True, eq=False)
class LowRankPlusDiagonal(StoredOperator):
    """D + U diag(c) V' with weights c of any sign, or zero.

    Attributes:
        diagonal: D, (B or 1, m), or (B or 1, 1) for a multiple of the identity.
        left: U, (B or 1, m, k)
        weights: c, (B or 1, k)
        right: V, (B or 1, m, k); None means V = U, which makes the matrix symmetric.
    """

    diagonal: Tensor
    left: Tensor
    weights: Tensor
    right: Tensor | None = None
    kind: ClassVar[str] = "low-rank-plus-diagonal"

    def __post_init__(self) -> None:
        shape, own, weights = self.left.shape, self.diagonal.shape, self.weights
        plain = len(shape) == 3 and self.right is None and own in ((shape[0], 1), (shape[0], shape[1]))
        plain = plain and weights.shape == (shape[0], shape[2])
        if plain and weights.dtype == self.left.dtype == self.diagonal.dtype:
            return
        if self.left.dim() != 3:
            raise StructureError(
                f"{self.kind}: left has shape {tuple(self.left.shape)}, expected (batch, m, k). The batch "
                "axis comes first and has size B, or 1 where the parameter is shared by all samples."
            )
        size, rank = self.left.shape[1:]
        width = 1 if self.diagonal.dim() == 2 and self.diagonal.shape[1] == 1 else size
        expected = {
            "diagonal": (self.diagonal, (width,)),
            "left": (self.left, (size, rank)),
            "weights": (self.weights, (rank,)),
        }
        if self.right is not None:
            expected["right"] = (self.right, (size, rank))
        check_parameters(self.kind, expected)

    @property
    def size(self) -> int:
        """m."""
        return self.left.shape[-2]

    @property
    def rank(self) -> int:
        """k, the number of columns of the factors."""
        return self.left.shape[-1]

    @property
    def symmetric(self) -> bool:
        """True where both factors are the same tensor."""
        return self.right is None

    @property
    def right_factor(self) -> Tensor:
        """V, (B or 1, m, k): ``right`` where it was given, else ``left``."""
        return self.left if self.right is None else self.right

    def parameters(self) -> tuple[Tensor, ...]:
        """Return the diagonal, the left factor, the weights, and the right factor if it differs."""
        own = (self.diagonal, self.left, self.weights)
        return own if self.right is None else (*own, self.right)

    def matvec(self, vector: Tensor) -> Tensor:
        """Return D x + U (c * (V' x)), (..., B, m); 4 m k flops a vector."""
        inner = batched_matvec(self.right_factor.mT, vector) * self.weights
        return batched_matvec(self.left, inner) + self.diagonal * vector

    def transpose(self) -> "LowRankPlusDiagonal":
        """Return D + V diag(c) U'."""
        if self.right is None:
            return self
        return LowRankPlusDiagonal(self.diagonal, self.right, self.weights, self.left)

    def to_dense(self) -> Tensor:
        """Return (B, m, m); 2 m^2 k flops a sample and one scaled copy of a factor."""
        dense = weighted_product(self.left, self.weights, self.right_factor)
        if dense.shape[0] != self.batch:  # the factors are shared, the diagonal is not
            dense = dense.repeat(self.batch, 1, 1)
        dense.diagonal(dim1=-2, dim2=-1).add_(self.diagonal)
        return dense
