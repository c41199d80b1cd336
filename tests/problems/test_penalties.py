"""The penalties: Table 1 from autodiff of rho, no NaN at s = 0, and penalties of one's own."""

import math

import pytest
import torch
from torch import Tensor, nn

import implicitdiff as idf
from implicitdiff.problems import PENALTIES, RobustPooling
from implicitdiff.problems.penalties import slopes
from tests.problems.test_robust_pooling import NAMES, points, pooling, relative_gradient
from tests.reference import fig2

# Table 1


@pytest.mark.parametrize("alpha", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("name", NAMES)
def test_autodiff_of_rho_gives_table_1(name: str, alpha: float) -> None:
    z = torch.cat([torch.tensor([0.0, 1e-8, 1e-3]), torch.linspace(0.1, 9, 60)]).double()
    first, second = slopes(PENALTIES[name].rho, z**2, torch.tensor(alpha).double())
    kappa1, kappa2 = fig2.kappa(name, z, float(torch.tensor(alpha)))
    torch.testing.assert_close(2 * first, kappa1, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(4 * second, kappa2, rtol=1e-12, atol=1e-15)


def test_values_are_those_of_table_1() -> None:
    alpha, z = 2.0, torch.tensor([0.0, 0.5, 2.0, 3.0]).double()
    expected = {
        "quadratic": [0, 0.125, 2, 4.5],
        "pseudo-huber": [4 * (math.sqrt(1 + (t / 2) ** 2) - 1) for t in (0, 0.5, 2, 3)],
        "huber": [0, 0.125, 2, 4],
        "welsch": [1 - math.exp(-(t**2) / 8) for t in (0, 0.5, 2, 3)],
        "truncated-quadratic": [0, 0.125, 2, 2],
    }
    for name, values in expected.items():
        found = PENALTIES[name].rho(z**2, torch.tensor(alpha).double())
        torch.testing.assert_close(found, torch.tensor(values, dtype=torch.float64), rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("name", NAMES)
def test_no_nan_leaks_at_s_zero(name: str) -> None:
    s = torch.zeros(3, requires_grad=True)
    alpha = torch.tensor(1.5, requires_grad=True)
    for order_one in torch.autograd.grad(
        PENALTIES[name].rho(s, alpha).sum(), (s, alpha), create_graph=True, materialize_grads=True
    ):
        assert torch.isfinite(order_one).all()
        if order_one.requires_grad:
            for order_two in torch.autograd.grad(
                order_one.sum(), (s, alpha), retain_graph=True, materialize_grads=True
            ):
                assert torch.isfinite(order_two).all()


# Penalties of one's own


class LearnedPenalty(nn.Module):
    """(1 + s)^power with a learned power."""

    def __init__(self) -> None:
        super().__init__()
        self.power = nn.Parameter(torch.tensor(0.5))

    def forward(self, s: Tensor, alpha: Tensor) -> Tensor:
        return (1 + s / alpha**2) ** self.power


def test_function_as_penalty_is_the_named_one() -> None:
    x = points(2, 3, 10)
    for name in NAMES:
        own = RobustPooling(PENALTIES[name].rho, alpha=1.7).double()
        torch.testing.assert_close(own.solve(x).u, pooling(name).solve(x).u, rtol=1e-10, atol=1e-10)


def test_module_as_penalty_is_part_of_the_problem() -> None:
    x, problem = points(2, 3, 10), RobustPooling(LearnedPenalty(), alpha=2.0).double()
    assert [name for name, _ in problem.named_parameters()] == ["rho.power"]
    assert relative_gradient(problem, problem.solve(x).u.detach(), x).max() < 1e-12


def test_penalty_that_is_not_concave_in_s() -> None:
    # Reweighting diverges for s^2: Newton takes over.
    x = points(2, 3, 10)
    problem = RobustPooling(lambda s, alpha: s**2, alpha=1.0).double()
    solution = problem.solve(x)
    assert not solution.status.any()
    assert relative_gradient(problem, solution.u, x).max() < 1e-10


def test_unknown_penalty() -> None:
    with pytest.raises(idf.OptionError, match="pseudo-huber"):
        RobustPooling("huberr")
    with pytest.raises(idf.OptionError, match="rho"):
        RobustPooling(3.0)  # type: ignore[arg-type]
