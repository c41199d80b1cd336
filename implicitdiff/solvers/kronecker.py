"""A Kronecker product, factor by factor.

In: a ``Kronecker`` matrix. Out: ``KroneckerSolver``. Next file: ``cyclic.py``.
"""

from typing import ClassVar

import torch
from torch import Tensor

from implicitdiff.operators import Kronecker, LinearOperator
from implicitdiff.solvers.base import PANEL, ColumnFactorization, Cost, Factorization, LinearSolver, blank
from implicitdiff.solvers.cholesky import CholeskyFactorization
from implicitdiff.solvers.lu import LUFactorization


class KroneckerFactorization(Factorization):
    """Cholesky of each factor, LU where one is not positive definite (a symmetric product may have skew factors)."""

    def __init__(self, operator: Kronecker) -> None:
        """Factor the factors."""
        self._operator = operator
        self._factors: list[ColumnFactorization] = [
            CholeskyFactorization(factor) if operator.symmetric else LUFactorization(factor, symmetric=False)
            for factor in operator.factors
        ]
        # Of two different failures the larger code; the product is definite for sure if every factor is.
        self.status = self._worst([factor.status for factor in self._factors])
        proofs = [factor.definite for factor in self._factors]
        known = [proof for proof in proofs if proof is not None]
        if len(known) == len(proofs):
            self.definite = ~self._worst([~proof for proof in known])
        lost = [factor.lost for factor in self._factors if factor.lost is not None]
        self._lost = self._worst(lost) if lost else None

    def _worst(self, flags: list[Tensor]) -> Tensor:
        return torch.stack(torch.broadcast_tensors(*flags)).amax(0).expand(self._operator.batch)

    def solve(self, rhs: Tensor) -> Tensor:
        """Return the solution (..., B, m); 2 m (s_1 + s_2 + ...) flops a vector."""
        operator = self._operator
        samples = rhs.shape[-2] if operator.batch == 1 else operator.batch
        solution = rhs.expand(*rhs.shape[:-2], samples, rhs.shape[-1])
        for factor, group in zip(self._factors, operator.axes, strict=True):
            parts = operator.along(solution, group)
            # A factor that all samples share sees the samples as columns too.
            own = factor.status.shape[0]
            front = parts.movedim(-3, 0) if own != 1 else parts[None]
            columns = front.reshape(own, -1, parts.shape[-1]) if parts.numel() else front.flatten(1, -2)
            solved = factor.solve_columns(columns.mT).mT.reshape(front.shape)
            solution = operator.back(solved.movedim(0, -3) if own != 1 else solved[0], group)
        return solution if self._lost is None else blank(solution, rhs.expand_as(solution), self._lost)


class KroneckerSolver(LinearSolver):
    """(F_1 x F_2)^-1 = F_1^-1 x F_2^-1: the factors are solved with one after the other."""

    name: ClassVar[str] = "kronecker"

    def reject(self, operator: LinearOperator) -> str | None:
        """Refuse every kind but Kronecker products."""
        if isinstance(operator, Kronecker):
            return None
        return f"the matrix is {operator.kind}, not a Kronecker product"

    def cost(self, operator: LinearOperator) -> Cost:
        """1/3 s^3 flops a factor, and 2 m s for a vector."""
        assert isinstance(operator, Kronecker)
        item, vectors = operator.dtype.itemsize, operator.batch * operator.size
        total = Cost(0, 0, 0)
        for factor in operator.factors:
            own, side = factor.shape[0], factor.shape[-1]
            entries = own * side**2
            total += Cost(
                entries * (side + 6) // 3 + 2 * vectors * side,
                (4 * entries + 6 * vectors) * item,
                entries * item,
                16 + own * side // PANEL,
            )
        return Cost(total.flops, total.bytes, total.peak + 3 * vectors * item, total.operations)

    def _factor(self, operator: LinearOperator) -> KroneckerFactorization:
        assert isinstance(operator, Kronecker)
        return KroneckerFactorization(operator)
