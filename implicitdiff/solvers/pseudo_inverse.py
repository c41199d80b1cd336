"""The minimum-norm answer of a singular symmetric matrix: the last resort of the dense solvers.

In: symmetric matrices, singular or nearly so. Out: ``PseudoInverse``, ``EigenFactorization``. It is no
choice of the user's: scaled.py calls it for the samples it finds singular. Next file: ``scaled.py``.
"""

from typing import ClassVar

import torch
from torch import Tensor

from implicitdiff.operators import LinearOperator
from implicitdiff.solvers.base import ColumnFactorization, Cost, LinearSolver
from implicitdiff.solvers.condition import symmetric_scaling
from implicitdiff.solvers.formation import dense_rejection, formation_cost
from implicitdiff.status import Status


class EigenFactorization(ColumnFactorization):
    """T A T = Q diag(w) Q' with a diagonal scaling T; eigenvalues below max(m, 10) eps max|w| count as zero.

    The scaling makes the cut independent of the units of the variables, but it distorts lengths. So the
    right-hand side is first projected onto the range of A and the answer onto the complement of its kernel,
    which is spanned by the columns T q of the zero eigenvalues: what comes out is the answer of least norm to
    the nearest consistent right-hand side, A^+ b.

    Attributes:
        rank: (B,) int64, the number of eigenvalues that count.
        negative: (B,) int64, the number of them that are negative.
    """

    def __init__(self, matrix: Tensor, magnitude: Tensor | None = None) -> None:
        """Decompose the matrices.

        Args:
            matrix: (B, m, m), symmetric.
            magnitude: (B, m, m), the size of the terms from which each entry was computed; None means
                |matrix|.
        """
        size = matrix.shape[-1]
        magnitude = matrix.abs() if magnitude is None else magnitude
        finite = (
            torch.isfinite(magnitude.amax((-1, -2)))
            if matrix.numel()
            else matrix.new_ones(0, dtype=torch.bool)
        )
        self.lost = None if bool(finite.all()) else ~finite
        if self.lost is not None:
            matrix = torch.where(finite[:, None, None], matrix, 0.0)
            magnitude = torch.where(finite[:, None, None], magnitude, 0.0)
        scale = symmetric_scaling(magnitude)
        values, vectors = torch.linalg.eigh(matrix * scale[:, :, None] * scale[:, None, :])
        sizes = values.abs()
        # Entries of the scaled matrix were about 1 before cancellation, so what is far below 1 is rounding.
        largest = sizes.amax(-1, keepdim=True).clamp(min=1)
        counts = sizes > max(size, 10) * torch.finfo(matrix.dtype).eps * largest
        self.rank = counts.sum(-1)
        self.negative = (counts & (values < 0)).sum(-1)
        self.proved_definite = (self.rank == size) & (values > 0).all(-1) & finite
        self.definite = self.proved_definite
        self.status = torch.where(self.rank < size, int(Status.SINGULAR), int(Status.OK)).to(torch.int8)
        self.status[~finite] = int(Status.NONFINITE)
        self._inverse = torch.where(counts, 1 / values, 0.0)
        self._vectors = vectors * scale[:, :, None]
        self._kernel = _kernel_basis(self._vectors, sizes, size - self.rank)

    def solve_columns(self, columns: Tensor) -> Tensor:
        """Return A^+ columns, (B, m, C)."""
        columns = self._project(columns)
        return self._project(self._vectors @ (self._inverse[:, :, None] * (self._vectors.mT @ columns)))

    def _project(self, columns: Tensor) -> Tensor:
        return columns - self._kernel @ (self._kernel.mT @ columns)


def _kernel_basis(vectors: Tensor, sizes: Tensor, deficiency: Tensor) -> Tensor:
    """Return orthonormal columns (B, m, m) that span each sample's kernel, padded by zero columns.

    All m of them, since the bits of a product may depend on their number, and one sample's must not on another's.
    """
    order = sizes.argsort(-1)
    chosen = vectors.gather(-1, order[:, None, :].expand(-1, vectors.shape[1], -1))
    basis = torch.linalg.qr(chosen)[0]
    # Each sample's own null vectors come first, and Q's leading columns span the leading columns of its
    # input.
    own = torch.arange(sizes.shape[-1], device=vectors.device) < deficiency[:, None]
    return basis * own[:, None, :]


class PseudoInverse(LinearSolver):
    """A^+ b for a symmetric matrix. About 10 m^3 flops a sample, tens of times a Cholesky factorisation."""

    name: ClassVar[str] = "eigh"

    def reject(self, operator: LinearOperator) -> str | None:
        """Refuse matrices that are not symmetric or cannot be formed."""
        return dense_rejection(operator)

    def cost(self, operator: LinearOperator) -> Cost:
        """9 m^3 flops for the eigenvectors, 4 m^2 for the solve; three m x m matrices."""
        size, item = operator.size, operator.dtype.itemsize
        entries = operator.batch * size * size
        own = Cost(entries * (9 * size + 4), 12 * entries * item, 3 * entries * item)
        return formation_cost(operator) + own

    def _factor(self, operator: LinearOperator) -> EigenFactorization:
        return EigenFactorization(operator.to_dense())
