"""Above the memory limit no m x m matrix is formed: the ladder's last rung, and products with a low-rank H."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import implicitdiff as idf
from implicitdiff.problems import RobustPooling


class LeastSquares(idf.Problem):
    """minimise over u  |X u - y|^2"""

    def objective(self, u: Tensor, X: Tensor, y: Tensor) -> Tensor:
        return ((X @ u - y) ** 2).sum()

    def init(self, X: Tensor, y: Tensor) -> Tensor:
        return torch.zeros_like(X[0])


class Constrained(LeastSquares):
    """minimise over u  |X u - y|^2 + |X u - y|^4 / 9   s.t.  X_0 u = y_0, sinh(X_1 u / 5) = y_1"""

    def objective(self, u: Tensor, X: Tensor, y: Tensor) -> Tensor:
        squares = super().objective(u, X, y)
        return squares + squares**2 / 9

    def equality(self, u: Tensor, X: Tensor, y: Tensor) -> Tensor:
        return torch.stack([X[0] @ u - y[0], torch.sinh(X[1] @ u / 5) - y[1]])


@pytest.fixture(autouse=True)
def _low_limit() -> Iterator[None]:
    with idf.set_memory_limit(500):
        yield


def draws() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(2, 25, 12, dtype=torch.float64, generator=generator, requires_grad=True)
    return X, torch.randn(2, 25, dtype=torch.float64, generator=generator, requires_grad=True)


def test_low_rank_goes_to_conjugate_gradients() -> None:
    x = torch.randn(
        2, 12, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True
    )
    found = idf.explain(RobustPooling("pseudo-huber"), x)
    assert (found.hessian.kind, found.solver) == ("low-rank-plus-diagonal", "cg")
    assert any(name == "cholesky" and "limit is 500 bytes" in reason for name, reason in found.rejected)
    assert torch.autograd.gradcheck(idf.DeclarativeLayer(RobustPooling("pseudo-huber")), (x,), fast_mode=True)


def test_dense_goes_to_products_and_says_why() -> None:
    X, y = draws()
    found = idf.explain(LeastSquares(), X, y)
    assert (found.hessian.kind, found.solver) == ("matrix-free", "minres")
    assert "12 x 12" in found.fallbacks[0].reason
    ((solver, reason),) = found.rejected
    assert (solver, reason) == (
        "lu",
        "K, 12 x 12, would take 1.1 KiB a sample; the memory limit is 500 bytes",
    )
    assert "lu: K, 12 x 12" in str(found)
    u = idf.DeclarativeLayer(LeastSquares())(X, y)
    v = torch.cos(torch.arange(24.0, dtype=torch.float64)).reshape(2, 12)
    got = torch.autograd.grad(u, (X, y), v)
    closed_form = torch.linalg.lstsq(X, y.unsqueeze(-1)).solution.squeeze(-1)
    for a, b in zip(got, torch.autograd.grad(closed_form, (X, y), v), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_constraints_above_the_limit_are_solved_by_products_too() -> None:
    X, y = draws()
    found = idf.explain(Constrained(), X, y)
    assert found.hessian.kind == "matrix-free", found.hessian
    assert "K, 14 x 14" in found.rejected[0][1]
    layer = idf.DeclarativeLayer(Constrained())
    u = layer(X, y)
    v = torch.sin(torch.arange(24.0, dtype=torch.float64)).reshape(2, 12)
    got = torch.autograd.grad(u, (X, y), v)
    with idf.set_memory_limit(2**20):
        below = idf.explain(Constrained(), X, y)
        assert below.hessian.kind == "dense"
        other = layer(X, y)
    torch.testing.assert_close(u, other)
    for a, b in zip(got, torch.autograd.grad(other, (X, y), v), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
    assert torch.autograd.gradcheck(layer, (X, y), fast_mode=True)


def test_structures_that_need_no_matrix_are_not_concerned() -> None:
    x = torch.rand(2, 40, 3, dtype=torch.float64)
    assert idf.explain(RobustPooling("pseudo-huber"), x).solver == "woodbury"
    assert idf.explain(RobustPooling("quadratic"), x).solver == "divide"


def test_a_solver_that_was_asked_for_is_taken() -> None:
    X, y = draws()
    layer = idf.DeclarativeLayer(LeastSquares(), linear_solver="cholesky")
    v = torch.ones(2, 12, dtype=torch.float64)
    got = torch.autograd.grad(layer(X, y), (y,), v)[0]
    with idf.set_memory_limit(2**20):
        expected = torch.autograd.grad(idf.DeclarativeLayer(LeastSquares())(X, y), (y,), v)[0]
    torch.testing.assert_close(got, expected)


def test_the_limit_is_a_function_and_a_context() -> None:
    assert idf.memory_limit() == 500
    with idf.set_memory_limit(1000):
        assert idf.memory_limit() == 1000
        with idf.set_memory_limit(7):
            assert idf.memory_limit() == 7
        assert idf.memory_limit() == 1000
        idf.set_memory_limit(9)
        assert idf.memory_limit() == 9
    assert idf.memory_limit() == 500
    for wrong in (0, -1, 1.5, True, None, "1 GiB"):
        with pytest.raises(idf.OptionError, match="memory limit"):
            idf.set_memory_limit(wrong)
    assert idf.memory_limit() == 500
