"""The frame of the pivoted dense factorisations: scale, factor, look at the pivots, rescue what is singular.

In: matrices (B, m, m). Out: ``ScaledFactorization``, the base of the factorisations in lu.py and ldl.py,
which add their LAPACK calls only. Next file: ``lu.py``.
"""

import abc

import torch
from torch import Tensor

from implicitdiff.solvers.base import ColumnFactorization
from implicitdiff.solvers.condition import (
    inverse_norm,
    reciprocal_condition,
    row_column_scaling,
    singular_level,
    suspicion_level,
    symmetric_scaling,
)
from implicitdiff.solvers.pseudo_inverse import EigenFactorization
from implicitdiff.status import Status


class ScaledFactorization(ColumnFactorization):
    """A matrix factored as R A C with diagonal scalings R and C by powers of two, which round nothing.

    A sample is SINGULAR when the estimated condition number of the scaled matrix exceeds 1 / (10 eps). If the
    matrix is symmetric, its answer is then the one of least norm, by eigenvalues: right whenever the
    right-hand side is consistent. Else it is lost. A sample with NaN or inf is NONFINITE and lost.
    """

    def __init__(self, matrix: Tensor, *, symmetric: bool, magnitude: Tensor | None = None) -> None:
        """Factor the matrices.

        Args:
            matrix: (B, m, m)
            symmetric: whether they are symmetric.
            magnitude: (B, m, m), the size of the terms from which each entry was computed, where they may
                have cancelled; None means |matrix|.
        """
        batch, size, _ = matrix.shape
        self.status = torch.zeros(batch, dtype=torch.int8, device=matrix.device)
        self._rescued: Tensor | None = None
        if matrix.numel() == 0:
            self._rows = self._columns = matrix.new_ones(batch, size)
            self._factor_scaled(matrix)
            return
        sizes = matrix.abs() if magnitude is None else magnitude
        finite = torch.isfinite(sizes.amax((-1, -2)))
        if not bool(finite.all()):
            sizes = torch.where(finite[:, None, None], sizes, 1.0)
        self._rows, self._columns = self._scaling(sizes)
        scaled = (matrix * self._rows[:, :, None]).mul_(self._columns[:, None, :])
        self._replace_by_identity(scaled, ~finite)
        pivots, singular = self._factor_scaled(scaled)
        suspects = ~singular & (pivots <= suspicion_level(matrix.dtype))
        if bool(suspects.any()):
            inverse = inverse_norm(self._solve_scaled, self._solve_scaled_transposed, self._rows)
            singular |= suspects & ~(reciprocal_condition(scaled, inverse) > singular_level(matrix.dtype))
        bad = singular | ~finite
        if not bool(bad.any()):
            return
        self._replace_by_identity(scaled, bad)
        self._factor_scaled(scaled)
        self.status[singular] = int(Status.SINGULAR)
        self.status[~finite] = int(Status.NONFINITE)
        self.lost = bad
        if symmetric and bool(singular.any()):
            self._rescued = singular.nonzero()[:, 0]
            part = None if magnitude is None else magnitude[self._rescued]
            self._rescue = EigenFactorization(matrix[self._rescued], part)
            self.status[self._rescued] = self._rescue.status
            self.lost = ~finite if not bool(finite.all()) else None

    @staticmethod
    def _replace_by_identity(scaled: Tensor, samples: Tensor) -> None:
        # So that no inf or NaN arises in the other samples' batch; the answers of these come from elsewhere.
        if bool(samples.any()):
            scaled[samples] = torch.eye(scaled.shape[-1], dtype=scaled.dtype, device=scaled.device)

    def solve_columns(self, columns: Tensor) -> Tensor:
        """Return the solutions (B, m, C)."""
        solution = self._solve_scaled(columns * self._rows[:, :, None]) * self._columns[:, :, None]
        if self._rescued is not None:
            solution[self._rescued] = self._rescue.solve_columns(columns[self._rescued])
        return solution

    def solve_columns_transposed(self, columns: Tensor) -> Tensor:
        """Return the solutions (B, m, C) for the transposed matrices, by the same factors."""
        if self._rescued is not None:  # only symmetric matrices are rescued
            return self.solve_columns(columns)
        return self._solve_scaled_transposed(columns * self._columns[:, :, None]) * self._rows[:, :, None]

    def solve_transposed(self, rhs: Tensor) -> Tensor:
        """Return the solutions (..., B, m) for the transposed matrices: see ``Factorization.solve``."""
        return self._by_columns(rhs, self.solve_columns_transposed)

    def _scaling(self, magnitude: Tensor) -> tuple[Tensor, Tensor]:
        """Return the row and column scalings (B, m)."""
        return row_column_scaling(magnitude)

    @abc.abstractmethod
    def _factor_scaled(self, scaled: Tensor) -> tuple[Tensor, Tensor]:
        """Factor; return the smallest over the largest pivot, (B,), and whether one is zero, (B,) bool."""

    @abc.abstractmethod
    def _solve_scaled(self, columns: Tensor) -> Tensor:
        """Return the scaled matrix' inverse times the columns (B, m, C)."""

    @abc.abstractmethod
    def _solve_scaled_transposed(self, columns: Tensor) -> Tensor:
        """Return the inverse of its transpose times the columns (B, m, C)."""


class SymmetricallyScaledFactorization(ScaledFactorization):
    """The same with R = C, which keeps a symmetric matrix symmetric."""

    def _scaling(self, magnitude: Tensor) -> tuple[Tensor, Tensor]:
        scale = symmetric_scaling(magnitude)
        return scale, scale

    def _solve_scaled_transposed(self, columns: Tensor) -> Tensor:
        return self._solve_scaled(columns)
