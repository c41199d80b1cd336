"""Above the memory limit no m x m matrix is formed: the ladder's last rung, and products with a low-rank H."""

import pytest
import torch

import implicitdiff as idf
import implicitdiff.kkt.route
import implicitdiff.plan
from implicitdiff.problems import RobustPooling


class LeastSquares(idf.Problem):
    """minimise over u  |X u - y|^2"""

    def objective(self, u: torch.Tensor, X: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return ((X @ u - y) ** 2).sum()

    def init(self, X: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(X[0])


@pytest.fixture(autouse=True)
def _low_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(implicitdiff.kkt.route, "DENSE_BYTES", 500)
    monkeypatch.setattr(implicitdiff.plan, "DENSE_BYTES", 500)


def test_low_rank_goes_to_conjugate_gradients() -> None:
    x = torch.randn(
        2, 12, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True
    )
    found = idf.explain(RobustPooling("pseudo-huber"), x)
    assert (found.hessian.kind, found.solver) == ("low-rank-plus-diagonal", "cg")
    assert any(name == "cholesky" and "GiB" in reason for name, reason in found.rejected)
    assert torch.autograd.gradcheck(idf.DeclarativeLayer(RobustPooling("pseudo-huber")), (x,), fast_mode=True)


def test_dense_goes_to_products_and_says_why() -> None:
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(2, 25, 12, dtype=torch.float64, generator=generator, requires_grad=True)
    y = torch.randn(2, 25, dtype=torch.float64, generator=generator, requires_grad=True)
    found = idf.explain(LeastSquares(), X, y)
    assert found.hessian.kind == "matrix-free"
    assert "12 x 12" in found.fallbacks[0].reason
    u = idf.DeclarativeLayer(LeastSquares())(X, y)
    v = torch.randn(u.shape, dtype=torch.float64, generator=generator)
    got = torch.autograd.grad(u, (X, y), v)
    closed_form = torch.linalg.lstsq(X, y.unsqueeze(-1)).solution.squeeze(-1)
    for a, b in zip(got, torch.autograd.grad(closed_form, (X, y), v), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
