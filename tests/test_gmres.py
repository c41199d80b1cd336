"""GMRES against dense inverses: batches, shared matrices, singular ones, right-hand sides that are 0."""

import pytest
import torch

import implicitdiff as idf
from implicitdiff.operators import Dense
from implicitdiff.solvers import GMRES, LU, choose
from implicitdiff.solvers.gmres import gmres
from implicitdiff.status import Status
from tests.equation_problems import draw


@pytest.mark.parametrize("size", [1, 3, 7, 90])
def test_solutions_are_those_of_the_inverse(size: int) -> None:
    matrix = draw(2, size, size, seed=size) / size**0.5 + 1.5 * torch.eye(size, dtype=torch.float64)
    rhs = draw(3, 2, size, seed=1)
    factor = GMRES().factor(Dense(matrix, symmetric=False))
    truth = torch.einsum("bij,rbj->rbi", torch.linalg.inv(matrix), rhs)
    torch.testing.assert_close(factor.solve(rhs), truth, rtol=1e-9, atol=1e-10)
    assert factor.status.tolist() == [0, 0]
    lu = LU().factor(Dense(matrix, symmetric=False))
    transposed = torch.einsum("bji,rbj->rbi", torch.linalg.inv(matrix), rhs)
    torch.testing.assert_close(lu.solve_transposed(rhs), transposed, rtol=1e-11, atol=1e-12)
    other = GMRES().factor(Dense(matrix, symmetric=False).transpose()).solve(rhs)
    torch.testing.assert_close(other, transposed, rtol=1e-9, atol=1e-10)


def test_a_shared_matrix_serves_every_sample() -> None:
    matrix = draw(1, 4, 4, seed=2) + 3 * torch.eye(4, dtype=torch.float64)
    rhs = draw(2, 5, 4, seed=3)
    factor = GMRES().factor(Dense(matrix, symmetric=False))
    torch.testing.assert_close(
        factor.solve(rhs), rhs @ torch.linalg.inv(matrix[0]).mT, rtol=1e-10, atol=1e-11
    )
    assert factor.status.shape == (1,)


def test_singular_systems_do_not_count_as_solved_though_they_are_consistent() -> None:
    matrix = torch.diag_embed(torch.tensor([[1.0, 2.0, 0.0], [1.0, 2.0, 3.0]], dtype=torch.float64))
    matrix[:, 0, 1] = 0.5
    rhs = torch.tensor([[[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]]], dtype=torch.float64)
    solution, converged = gmres(Dense(matrix, symmetric=False).matvec, rhs)
    assert converged.tolist() == [[False, True]]
    torch.testing.assert_close(solution[0, 1], torch.tensor([0.75, 0.5, 0.0], dtype=torch.float64))
    factor = GMRES().factor(Dense(matrix, symmetric=False))
    factor.solve(rhs)
    assert factor.status.tolist() == [Status.NOT_CONVERGED, Status.OK]
    nothing, converged = gmres(Dense(matrix, symmetric=False).matvec, 0 * rhs)
    assert not bool(nothing.any())
    assert bool(converged.all())


def test_it_is_chosen_by_name() -> None:
    operator = Dense(draw(1, 3, 3), symmetric=False)
    assert choose(operator, "gmres").solver.name == "gmres"
    with pytest.raises(idf.OptionError, match="zero"):
        choose(idf.operators.Zero(3, 1, torch.float64, torch.device("cpu")), "gmres")
