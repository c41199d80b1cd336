"""LDL' with Bunch-Kaufman pivoting: symmetric indefinite matrices, a KKT matrix above all.

In: a symmetric operator that can be written down. Out: ``LDL``, ``LDLFactorization``. torch has no
derivative of it, so it serves values only, inside a Function with rules of its own. Next file:
``cholesky.py``.
"""

from typing import ClassVar

import torch
from torch import Tensor

from implicitdiff.operators import LinearOperator
from implicitdiff.solvers.base import PANEL, Cost, Factorization, LinearSolver
from implicitdiff.solvers.formation import dense_rejection, formation_cost
from implicitdiff.solvers.kernel import factor_off_kernel
from implicitdiff.solvers.scaled import SymmetricallyScaledFactorization


class LDLFactorization(SymmetricallyScaledFactorization):
    """T A T = L D L' with 1 x 1 and 2 x 2 blocks in D.

    The signs of the blocks' eigenvalues are those of the eigenvalues of A (Sylvester).

    Attributes:
        negative: (B,) int64, the number of negative eigenvalues: p for a regular KKT matrix at a strict
            minimum; 0 for a sample that is NONFINITE.
    """

    def __init__(self, matrix: Tensor) -> None:
        """Factor symmetric matrices (B, m, m)."""
        super().__init__(matrix, symmetric=True)
        eigenvalues = self._block_eigenvalues()
        self.negative = (eigenvalues < 0).sum(-1)
        self.definite = (eigenvalues > 0).all(-1)
        if self.lost is not None:
            self.definite &= ~self.lost
        if self._rescued is not None:
            self.negative[self._rescued] = self._rescue.negative
            self.definite[self._rescued] = self._rescue.proved_definite

    def _factor_scaled(self, scaled: Tensor) -> tuple[Tensor, Tensor]:
        self._factor, self._pivots, info = torch.linalg.ldl_factor_ex(scaled)
        pivots = self._block_eigenvalues().abs()
        if pivots.numel() == 0:
            return pivots.sum(-1), info > 0
        return pivots.amin(-1) / pivots.amax(-1).clamp(min=1), info > 0

    def _block_eigenvalues(self) -> Tensor:
        """Return the eigenvalues (B, m) of the blocks of D."""
        diagonal = self._factor.diagonal(dim1=-2, dim2=-1)
        if diagonal.shape[-1] < 2:
            return diagonal
        # LAPACK marks the two rows of a 2 x 2 block by equal negative pivots; the odd ones of a run come
        # first.
        paired = self._pivots < 0
        first = paired & (paired.cumsum(-1) % 2 == 1)
        a, d = diagonal[..., :-1], diagonal[..., 1:]
        b = self._factor.diagonal(offset=-1, dim1=-2, dim2=-1)
        radius = torch.hypot((a - d) / 2, b)
        lower, upper = (a + d) / 2 - radius, (a + d) / 2 + radius
        starts = first[..., :-1]
        values = diagonal.clone()
        values[..., :-1] = torch.where(starts, lower, values[..., :-1])
        values[..., 1:] = torch.where(starts, upper, values[..., 1:])
        return values

    def _solve_scaled(self, columns: Tensor) -> Tensor:
        return torch.linalg.ldl_solve(self._factor, self._pivots, columns)


class LDL(LinearSolver):
    """A x = b by P A P' = L D L'. Half the flops of LU; on a CPU not faster."""

    name: ClassVar[str] = "ldl"

    def reject(self, operator: LinearOperator) -> str | None:
        """Refuse matrices that are not symmetric or cannot be written down."""
        return dense_rejection(operator)

    def cost(self, operator: LinearOperator) -> Cost:
        """1/3 m^3 flops to factor, 12 m^2 to scale, 2 m^2 to solve; three m x m matrices."""
        size, item = operator.size, operator.dtype.itemsize
        entries = operator.batch * size * size
        panels = operator.batch * size // PANEL
        own = Cost(entries * (size + 42) // 3, 30 * entries * item, 3 * entries * item, 50 + panels)
        return formation_cost(operator) + own

    def _factor(self, operator: LinearOperator) -> Factorization:
        return factor_off_kernel(operator, LDLFactorization)
