"""The lean iterations: few steps where eigenvalues lie together, a direct solver where they do not, nothing missed."""

import pytest
import torch
from torch import Tensor

from implicitdiff.operators import Block, Diagonal, LowRankPlusDiagonal
from implicitdiff.solvers import SOLVERS, ConjugateGradients, SchurConjugateGradients
from implicitdiff.solvers.low_rank_cg import LowRankIteration
from implicitdiff.solvers.schur_cg import SchurIteration
from implicitdiff.status import Status
from tests.solver_checks import plan_block, statuses


def low_rank(
    batch: int, size: int, rank: int, weight: float, dtype: torch.dtype = torch.float64
) -> LowRankPlusDiagonal:
    generator = torch.Generator().manual_seed(size + rank)
    left = torch.randn(batch, size, rank, generator=generator, dtype=dtype)
    weights = weight * (0.5 + torch.rand(batch, rank, generator=generator, dtype=dtype)) / rank
    return LowRankPlusDiagonal(torch.full((batch, 1), 2.0, dtype=dtype), left, weights)


def error(operator: LowRankPlusDiagonal | Block, solution: Tensor, rhs: Tensor) -> float:
    residual = operator.matvec(solution.double() if operator.dtype == torch.float64 else solution) - rhs
    return float(residual.abs().max() / rhs.abs().max())


@pytest.mark.parametrize("lead", [(), (2,)])
def test_close_eigenvalues_take_few_steps(lead: tuple[int, ...]) -> None:
    operator = low_rank(3, 40, 400, -0.01)
    rhs = torch.randn(*lead, 3, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rhs[..., 1, :] = 0.0
    factorization = ConjugateGradients().factor(operator)
    assert isinstance(factorization, LowRankIteration)
    solution = factorization.solve(rhs)
    assert factorization.steps <= 8
    assert error(operator, solution, rhs) < 1e-12
    assert solution[..., 1, :].eq(0).all()
    assert set(statuses(factorization)) == {Status.OK}


def test_the_shortcut_of_the_last_step_loses_no_digits() -> None:
    """float32: two steps and the free one are as good as the direct solver."""
    operator = low_rank(1, 128, 1024, -0.01, torch.float32)
    rhs = torch.randn(1, 128, generator=torch.Generator().manual_seed(1))
    factorization = ConjugateGradients().factor(operator)
    exact = SOLVERS["cholesky"].factor(
        LowRankPlusDiagonal(operator.diagonal.double(), operator.left.double(), operator.weights.double())
    )
    expected = exact.solve(rhs.double())
    found = float((factorization.solve(rhs) - expected).abs().max() / expected.abs().max())
    direct = float(
        (SOLVERS["cholesky"].factor(operator).solve(rhs) - expected).abs().max() / expected.abs().max()
    )
    assert isinstance(factorization, LowRankIteration)
    assert factorization.steps <= 3
    assert found <= 2 * direct


def test_samples_that_need_many_steps_go_to_the_direct_solver_alone() -> None:
    operator = low_rank(3, 40, 400, -0.01)
    weights = operator.weights.clone()
    weights[1] = 1e4 * torch.rand(400, generator=torch.Generator().manual_seed(3), dtype=torch.float64) ** 6
    mixed = LowRankPlusDiagonal(operator.diagonal, operator.left, weights)
    rhs = torch.randn(3, 40, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    factorization = ConjugateGradients().factor(mixed)
    solution = factorization.solve(rhs)
    assert error(mixed, solution, rhs) < 1e-10
    assert set(statuses(factorization)) == {Status.OK}


@pytest.mark.parametrize("rank", [5, 60])
def test_a_singular_matrix_is_not_missed_for_a_side_in_its_range(rank: int) -> None:
    """H e = 0 for one e, and a right-hand side without e: the iteration alone would converge and see nothing."""
    size = 40
    basis = torch.linalg.qr(
        torch.randn(size, size, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    )[0]
    left = torch.zeros(1, size, rank, dtype=torch.float64)
    left[0, :, 0] = basis[:, 0]
    weights = torch.zeros(1, rank, dtype=torch.float64)
    weights[0, 0] = -2.0
    operator = LowRankPlusDiagonal(torch.full((1, 1), 2.0, dtype=torch.float64), left, weights)
    factorization = ConjugateGradients().factor(operator)
    factorization.solve(basis[:, 1][None].clone())
    assert statuses(factorization) == [Status.SINGULAR]


def transport(rows: int, columns: int, spread: float, batch: int = 1) -> Tensor:
    """Something like a plan: positive, its entries over several orders of magnitude."""
    generator = torch.Generator().manual_seed(rows)
    return torch.exp(-spread * torch.rand(batch, rows, columns, generator=generator, dtype=torch.float64))


@pytest.mark.parametrize("spread", [0.5, 5.0, 60.0])
@pytest.mark.parametrize("shape", [(30, 50), (50, 30)])
def test_schur_iteration_agrees_with_the_direct_one(shape: tuple[int, int], spread: float) -> None:
    operator = plan_block(transport(*shape, spread, batch=2))
    rhs = torch.randn(3, 2, 80, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    iterative, direct = SchurConjugateGradients().factor(operator), SOLVERS["schur"].factor(operator)
    found, expected = iterative.solve(rhs), direct.solve(rhs)
    assert isinstance(iterative, SchurIteration)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-10
    assert statuses(iterative) == statuses(direct) == [Status.OK, Status.OK]
    assert iterative.steps >= (2 if spread < 1 else 3)


def test_schur_iteration_sees_a_dependence_that_nobody_stated() -> None:
    """Two plans side by side: each has a null vector of its own, and the stated one is their sum."""
    plan = torch.zeros(1, 20, 24, dtype=torch.float64)
    plan[0, :10, :12], plan[0, 10:, 12:] = transport(10, 12, 1.0)[0], transport(10, 12, 2.0)[0]
    operator = plan_block(plan)
    factorization = SchurConjugateGradients().factor(operator)
    rhs = operator.matvec(torch.randn(1, 44, generator=torch.Generator().manual_seed(6), dtype=torch.float64))
    solution = factorization.solve(rhs)
    assert statuses(factorization) == [Status.SINGULAR]
    assert float((operator.matvec(solution) - rhs).abs().max()) < 1e-10


def test_corners_that_are_not_positive_go_to_the_direct_solver() -> None:
    coupling = 0.1 * transport(6, 4, 1.0)
    corners = (
        Diagonal(torch.ones(1, 6, dtype=torch.float64)),
        Diagonal(-torch.ones(1, 4, dtype=torch.float64)),
    )
    operator = Block(((corners[0], coupling), (coupling.mT, corners[1])), (6, 4))
    factorization = SchurConjugateGradients().factor(operator)
    rhs = torch.randn(1, 10, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    assert error(operator, factorization.solve(rhs), rhs) < 1e-12
