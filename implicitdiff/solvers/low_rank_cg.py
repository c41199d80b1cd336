"""Conjugate gradients on D + U diag(c) U': U is applied, U'U or U U' never formed.

In: a symmetric low-rank-plus-diagonal matrix; in robust pooling its eigenvalues lie close together (2 or 3 steps).
Out: ``LowRankIteration``, which ``ConjugateGradients`` returns for this kind. Next file: ``select.py``.
"""

from functools import lru_cache

import torch
from torch import Tensor

from implicitdiff.memory import over_limit
from implicitdiff.operators import LinearOperator, LowRankPlusDiagonal, select_samples
from implicitdiff.operators.products import rows_times
from implicitdiff.solvers.base import Cost, Factorization, LinearSolver, from_rows, to_rows
from implicitdiff.solvers.cholesky import Cholesky
from implicitdiff.solvers.iteration import (
    PREDICTED_STEPS,
    STEP_OPERATIONS,
    break_even,
    iterate,
    lost_samples,
    probe_row,
    step_tolerance,
)
from implicitdiff.solvers.woodbury import Woodbury
from implicitdiff.status import all_ok


def direct_solver(operator: LowRankPlusDiagonal) -> LinearSolver | None:
    """Return the direct solver for this kind, None where its matrix would be too large."""
    if operator.rank < operator.size:
        return Woodbury()
    return None if over_limit("H", operator.size, operator.dtype.itemsize) else Cholesky()


class LowRankIteration(Factorization):
    """Nothing is factored: U, c and D are kept for ``solve``, which falls back on a direct solver.

    An answer of the iteration is taken only where a probe converged beside it (``iteration.probe_row``), so a singular
    matrix does not pass for a regular one. Samples that do not converge within the steps that a direct solver would
    pay for are solved by it, and their status is its.
    """

    def __init__(self, operator: LowRankPlusDiagonal, direct: LinearSolver, tolerance: float) -> None:
        """Keep the operator and the direct solver for what does not converge."""
        self._operator, self._direct, self._tolerance = operator, direct, tolerance
        width = operator.diagonal.shape[1]
        self._limit = _step_limit(operator.batch, operator.size, operator.rank, width, operator.dtype)
        self._inverse: Tensor | None = None
        self._unfit: Tensor | None = None
        self._whole: Factorization | None = None
        if operator.diagonal.shape[1] > 1:
            positive = operator.diagonal > 0
            self._inverse = operator.diagonal.reciprocal()[:, None]
            if not bool(positive.all()):
                self._unfit = ~positive.all(1)
                if len(positive) == 1 or bool(self._unfit.all()):
                    self._whole = direct.factor(operator)
        self.steps = 0
        self.status = all_ok(operator.batch, operator.device)
        if self._whole is not None:
            self.status = self._whole.status

    def solve(self, rhs: Tensor) -> Tensor:
        """Return the solution (..., B, m); 4 m k flops a step for each right-hand side and for the probe."""
        if self._whole is not None:
            return self._whole.solve(rhs)
        operator = self._operator
        own = operator.batch
        batch = rhs.shape[-2] if own == 1 else own
        rhs = rhs.expand(*rhs.shape[:-2], batch, operator.size)
        if rhs.numel() == 0:
            return rhs.clone()
        rows = to_rows(rhs, own)
        probe = probe_row(operator.size, operator.dtype, operator.device)
        given = torch.cat([rows, probe.expand(own, 1, -1)], dim=1)
        if self._unfit is not None:
            given = torch.where(self._unfit[:, None, None], 0.0, given)
        found = iterate(self._product, given, self._inverse, self._tolerance, self._limit)
        self.steps = found.steps
        solution = from_rows(found.solution[:, :-1], rhs.shape)
        if found.converged is None and self._unfit is None:
            return solution
        return self._solve_directly(rhs, solution, lost_samples(found, self._unfit))

    def _product(self, rows: Tensor) -> Tensor:
        operator = self._operator
        inner = rows_times(rows, operator.left).mul_(operator.weights[:, None])
        return rows_times(inner, operator.left.mT).addcmul_(operator.diagonal[:, None], rows)

    def _solve_directly(self, rhs: Tensor, solution: Tensor, lost: Tensor) -> Tensor:
        """Solve the samples that did not converge by the direct solver, and keep its verdict."""
        if bool(lost.all()):
            self._whole = self._direct.factor(self._operator)
            self.status = self._whole.status
            return self._whole.solve(rhs)
        samples = lost.nonzero()[:, 0]
        some = self._direct.factor(select_samples(self._operator, samples))
        self.status = self.status.index_copy(0, samples, some.status)
        return solution.index_copy(-2, samples, some.solve(rhs[..., samples, :]))


@lru_cache(maxsize=256)
def _step_limit(batch: int, size: int, rank: int, width: int, dtype: torch.dtype) -> int:
    """Return the steps that take as long as the direct solver."""
    shapes = ((batch, width), (batch, size, rank), (batch, rank))
    operator = LowRankPlusDiagonal(*(torch.empty(shape, dtype=dtype, device="meta") for shape in shapes))
    direct = direct_solver(operator)
    assert direct is not None
    return break_even(direct.cost(operator), step_cost(operator))


def step_cost(operator: LowRankPlusDiagonal) -> Cost:
    """Return the cost of one step: two products with U for the right-hand side and for the probe."""
    batch, size, rank, item = operator.batch, operator.size, operator.rank, operator.dtype.itemsize
    entries, vectors = batch * size * rank, 2 * batch * size
    moved = (2 * entries + 24 * vectors) * item
    return Cost(
        8 * entries + 14 * vectors, moved, (8 * vectors + 2 * batch * rank) * item, STEP_OPERATIONS + 4
    )


def low_rank_cost(operator: LowRankPlusDiagonal) -> Cost:
    """Return the predicted cost of factor and solve."""
    return step_cost(operator) * PREDICTED_STEPS


def low_rank_iteration(operator: LinearOperator, tolerance: float | None) -> LowRankIteration | None:
    """Return the iteration for a symmetric matrix of this kind; None where no direct solver could take over."""
    if not isinstance(operator, LowRankPlusDiagonal) or not operator.symmetric:
        return None
    direct = direct_solver(operator)
    if direct is None:
        return None
    return LowRankIteration(
        operator, direct, step_tolerance(operator.dtype) if tolerance is None else tolerance
    )
