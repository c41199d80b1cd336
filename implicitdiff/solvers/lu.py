"""LU with partial pivoting: any square matrix, symmetric or not, definite or not.

In: an operator that can be written down. Out: ``LU``, ``LUFactorization``. Next file: ``ldl.py``.
"""

from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from implicitdiff.operators import Block, LinearOperator
from implicitdiff.solvers.base import PANEL, Cost, Factorization, LinearSolver
from implicitdiff.solvers.formation import dense_rejection, formation_cost
from implicitdiff.solvers.kernel import factor_off_kernel
from implicitdiff.solvers.scaled import ScaledFactorization
from implicitdiff.solvers.substitution import (
    SubstitutionFactorization,
    divided,
    divides,
    substitution_order,
)


class LUFactorization(ScaledFactorization):
    """P R A C = L U."""

    def _factor_scaled(self, scaled: Tensor) -> tuple[Tensor, Tensor]:
        self._lu, self._pivots, info = torch.linalg.lu_factor_ex(scaled)
        pivots = self._lu.diagonal(dim1=-2, dim2=-1).abs()
        if pivots.numel() == 0:
            return pivots.sum(-1), info > 0
        # The scaled entries are at most about 1, so pivots are measured against 1 at least.
        return pivots.amin(-1) / pivots.amax(-1).clamp(min=1), info > 0

    def _solve_scaled(self, columns: Tensor) -> Tensor:
        return torch.linalg.lu_solve(self._lu, self._pivots, columns)

    def _solve_scaled_transposed(self, columns: Tensor) -> Tensor:
        return torch.linalg.lu_solve(self._lu, self._pivots, columns, adjoint=True)


class LU(LinearSolver):
    """A x = b by P A = L U. Needs nothing of the matrix; twice the work of Cholesky.

    A grid of blocks that is not symmetric and triangular in some order is solved block by block.
    """

    name: ClassVar[str] = "lu"

    def reject(self, operator: LinearOperator) -> str | None:
        """Refuse what cannot be written down."""
        return dense_rejection(operator, symmetric=False)

    def cost(self, operator: LinearOperator) -> Cost:
        """2/3 m^3 flops to factor, 2 m^2 to solve; three m x m matrices for scaling and the factor."""
        if (
            isinstance(operator, Block)
            and not operator.symmetric
            and substitution_order(operator) is not None
        ):
            return self._one_by_one_cost(operator)
        size, item = operator.size, operator.dtype.itemsize
        entries = operator.batch * size * size
        panels = operator.batch * size // PANEL
        own = Cost(entries * (2 * size + 9) // 3, 14 * entries * item, 3 * entries * item, 40 + panels)
        return formation_cost(operator) + own

    def _factor(self, operator: LinearOperator) -> Factorization:
        if isinstance(operator, Block) and not operator.symmetric:
            order = substitution_order(operator)
            if order is not None:
                corners = enumerate(operator.corners)
                factors = {i: divided(c) if divides(c) else self._factor(c) for i, c in corners}
                return SubstitutionFactorization(operator, order, factors)
        return factor_off_kernel(operator, partial(LUFactorization, symmetric=operator.symmetric))

    def _one_by_one_cost(self, operator: Block) -> Cost:
        """The corners one after the other, and two flops for each entry of a coupling."""
        item, total = operator.dtype.itemsize, Cost(0, 0, 0)
        for corner in operator.corners:
            own = corner.batch * corner.size
            total += Cost(own, 4 * own * item, own * item, 4) if divides(corner) else self.cost(corner)
        for _, _, block in operator.couplings:
            total += Cost(2 * block.numel(), block.numel() * item, 0, 2)
        return total + Cost(
            0, 2 * operator.batch * operator.size * item, 2 * operator.batch * operator.size * item, 4
        )
