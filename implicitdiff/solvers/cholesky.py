"""Cholesky for matrices that are expected to be positive definite, LU for the samples that are not.

In: a symmetric operator that can be written down. Out: ``Cholesky``, ``CholeskyFactorization``, which the
block-diagonal and Schur solvers use too. Next file: ``block_cholesky.py``.
"""

from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from implicitdiff.operators import LinearOperator
from implicitdiff.solvers.base import PANEL, ColumnFactorization, Cost, Factorization, LinearSolver, numbers
from implicitdiff.solvers.condition import inverse_norm, reciprocal_condition, singular_level, suspicion_level
from implicitdiff.solvers.formation import dense_rejection, formation_cost
from implicitdiff.solvers.kernel import factor_off_kernel
from implicitdiff.solvers.lu import LUFactorization
from implicitdiff.status import all_ok


class CholeskyFactorization(ColumnFactorization):
    """A = L L' where A is positive definite, P A = L U for the other samples.

    A success proves little (it succeeds on most singular matrices), so small pivots are looked into: a sample
    is definite only if its condition number is below 1 / (10 eps) after scaling to a unit diagonal.
    """

    def __init__(self, matrix: Tensor, original_diagonal: Tensor | None = None) -> None:
        """Factor the matrices; only the lower triangle is read where they are definite.

        Args:
            matrix: (B, m, m), symmetric.
            original_diagonal: (B, m), the size of the diagonal before terms were subtracted from it (a Schur
                complement): a pivot far below it is rounding. None: the diagonal itself.
        """
        factor, info = torch.linalg.cholesky_ex(matrix)
        pivots = factor.diagonal(dim1=-2, dim2=-1)
        diagonal = matrix.diagonal(dim1=-2, dim2=-1)
        if original_diagonal is not None:
            diagonal = torch.maximum(diagonal, original_diagonal)
        self._factor = factor
        self._others: Tensor | None = None
        self._regular: Tensor | None = None
        self.status = all_ok(matrix.shape[0], matrix.device)
        if _is_plainly_sound(pivots, diagonal, info):
            return
        smallest = (
            (pivots / diagonal.sqrt()).amin(-1).square()
            if pivots.shape[-1]
            else torch.ones_like(pivots.sum(-1))
        )
        sound = (info == 0) & (smallest > suspicion_level(matrix.dtype))
        self._regular = sound
        suspects = ((info == 0) & (smallest > 0) & ~sound).nonzero()[:, 0]
        if len(suspects):
            sound[suspects] = _is_regular(matrix[suspects], factor[suspects], diagonal[suspects].sqrt())
        if bool(sound.all()):
            return
        self._others = (~sound).nonzero()[:, 0]
        rest = matrix[self._others]
        magnitude = rest.abs()
        magnitude.diagonal(dim1=-2, dim2=-1).copy_(diagonal[self._others].abs())
        self._fallback = LUFactorization(rest, symmetric=True, magnitude=magnitude)
        self.status = torch.zeros_like(info, dtype=torch.int8)
        self.status[self._others] = self._fallback.status
        if self._fallback.lost is not None:
            self.lost = torch.zeros_like(sound)
            self.lost[self._others] = self._fallback.lost
        # The triangular solves below run over the whole batch: keep these samples free of inf and NaN.
        factor[self._others] = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)

    @cached_property
    def definite(self) -> Tensor:  # type: ignore[override]
        """Whether a sample was proved positive definite, (B,)."""
        return torch.ones_like(self.status, dtype=torch.bool) if self._regular is None else self._regular

    @property
    def lower(self) -> Tensor:
        """L of A = L L', (B, m, m); the identity in the samples of ``rest``."""
        return self._factor

    @property
    def rest(self) -> tuple[Tensor, Factorization] | None:
        """The samples (n,) that are not positive definite and their own factorisation; None where all are."""
        return None if self._others is None else (self._others, self._fallback)

    def solve_columns(self, columns: Tensor) -> Tensor:
        """Return the solutions (B, m, C); 2 m^2 flops a column."""
        solution = _solve_cholesky(self._factor, columns)
        if self._others is not None:
            solution[self._others] = self._fallback.solve_columns(columns[self._others])
        return solution


def _is_plainly_sound(pivots: Tensor, diagonal: Tensor, info: Tensor) -> bool:
    """Whether no pivot of any sample is suspicious: l_ii^2 > sqrt(eps) a_ii, in few operations.

    A NaN anywhere in the pivots or in the diagonal makes it False.
    """
    if not pivots.numel():
        return False
    margin = torch.addcmul(diagonal, pivots, pivots, value=-1.0 / suspicion_level(pivots.dtype)).amax()
    read = numbers(margin)
    return (read is None or read[0] < 0) and not bool(info.any())


def _solve_cholesky(factor: Tensor, columns: Tensor) -> Tensor:
    # For one column two triangular solves take a quarter of the time of cholesky_solve on a CPU (m = 1000).
    half = torch.linalg.solve_triangular(factor, columns, upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True)


def _is_regular(matrix: Tensor, factor: Tensor, scale: Tensor) -> Tensor:
    """Return whether T^-1 A T^-1 is regular, (B,) bool, with T = diag(scale) and A = L L'."""

    def solve(columns: Tensor) -> Tensor:
        return scale[:, :, None] * _solve_cholesky(factor, scale[:, :, None] * columns)

    scaled = matrix / scale[:, :, None] / scale[:, None, :]
    condition = reciprocal_condition(scaled, inverse_norm(solve, solve, scale))
    return condition > singular_level(matrix.dtype)


class Cholesky(LinearSolver):
    """A x = b by A = L L'; samples that are not positive definite go to LU, and ``definite`` says which."""

    name: ClassVar[str] = "cholesky"

    def reject(self, operator: LinearOperator) -> str | None:
        """Refuse matrices that are not symmetric or cannot be written down."""
        return dense_rejection(operator)

    def cost(self, operator: LinearOperator) -> Cost:
        """1/3 m^3 flops to factor, 2 m^2 to solve; one m x m factor beside the matrix."""
        size, item = operator.size, operator.dtype.itemsize
        entries = operator.batch * size * size
        panels = operator.batch * size // PANEL
        own = Cost(entries * (size + 6) // 3, 4 * entries * item, entries * item, 20 + panels)
        return formation_cost(operator) + own

    def _factor(self, operator: LinearOperator) -> Factorization:
        return factor_off_kernel(operator, CholeskyFactorization)
