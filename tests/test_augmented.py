"""The augmented Lagrangian method: known solutions, penalties that have to grow, samples and multipliers apart."""

from typing import Any

import pytest
import torch
from torch import Tensor

import implicitdiff as idf
from implicitdiff.optimizers import LBFGS, AugmentedLagrangian, Newton
from implicitdiff.optimizers.augmented import Penalised
from implicitdiff.status import Status
from tests.optimizer_problems import DOUBLE, Circle, Logistic, normal, system_of


class Sphere(idf.Problem):
    """minimise over u  -size c'u  s.t.  |u|^2 = 1; u = c / |c|, lambda = -size |c| / 2."""

    def __init__(self, size: float = 1.0) -> None:
        super().__init__()
        self.size = size

    def objective(self, u: Tensor, c: Tensor) -> Tensor:
        return -self.size * (c * u).sum()

    def equality(self, u: Tensor, c: Tensor) -> Tensor:
        return u.square().sum() - 1

    def init(self, c: Tensor) -> Tensor:
        return 2 * c.flip(0)


class Softmax(idf.Problem):
    """minimise over u  sum(u log u) - x'u  s.t.  sum(u) = 1."""

    def objective(self, u: Tensor, x: Tensor) -> Tensor:
        return (u * u.log()).sum() - x @ u

    def equality(self, u: Tensor, x: Tensor) -> Tensor:
        return u.sum() - 1

    def init(self, x: Tensor) -> Tensor:
        return torch.full_like(x, 1 / len(x))


class Hollow(idf.Problem):
    """minimise over u  -3 u_0 u_1 + |u_2.. - x|^2  s.t.  u_0 + u_1 = 1, u_2 = u_0; f has no minimum by itself."""

    def objective(self, u: Tensor, x: Tensor) -> Tensor:
        return -3 * u[0] * u[1] + ((u[2:] - x) ** 2).sum() + 0.1 * u[0]

    def equality(self, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return u[0] + u[1] - 1, u[2] - u[0]

    def init(self, x: Tensor) -> Tensor:
        return torch.zeros(len(x) + 2, dtype=x.dtype)


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_nonlinear_constraint(size: float, dtype: torch.dtype) -> None:
    c = normal(4, 3, dtype=dtype)
    found = idf.solve(Sphere(size), c, optimizer=AugmentedLagrangian())
    rtol = 1e-7 if dtype == torch.float64 else 1e-3
    torch.testing.assert_close(found.u, c / c.norm(dim=1, keepdim=True), rtol=rtol, atol=rtol)
    torch.testing.assert_close(found.equality_multipliers, -size * c.norm(dim=1) / 2, rtol=rtol, atol=0)
    assert (found.iterations < 60).all()


def test_entropy_over_the_simplex_is_softmax() -> None:
    x = 3 * normal(3, 5)
    found = idf.solve(Softmax(), x, optimizer=AugmentedLagrangian(tol=1e-10))
    torch.testing.assert_close(found.u, x.softmax(1), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(found.equality_multipliers, 1 - x.logsumexp(1), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("penalty", [None, 0.5, 50.0])
def test_a_penalty_that_is_too_small_grows(penalty: float | None) -> None:
    """Below rho = 3 / 2 the penalised objective falls for ever along u_0 = u_1."""
    x = normal(3, 2)
    found = idf.solve(Hollow(), x, optimizer=AugmentedLagrangian(penalty=penalty))
    torch.testing.assert_close(found.u, idf.solve(Hollow(), x, optimizer=Newton()).u, rtol=1e-6, atol=1e-6)


def test_a_maximum_on_the_constraint_is_left() -> None:
    c = normal(3, 4)
    top = -c / c.norm(dim=1, keepdim=True)
    found = idf.solve(Sphere(), c, init=top, optimizer=AugmentedLagrangian())
    torch.testing.assert_close(found.u, -top, rtol=1e-7, atol=1e-7)
    stay = idf.solve(Sphere(), c, init=top, optimizer=AugmentedLagrangian(restarts=0))
    torch.testing.assert_close(stay.u, top)


def test_contradicting_constraints_are_said_to_be_infeasible() -> None:
    class Torn(Softmax):
        def equality(self, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            return u.sum() - 1, u.sum() - 2

    with pytest.raises(idf.InfeasibleError, match=r"AugmentedLagrangian.*contradict each other"):
        idf.solve(Torn(), normal(2, 3), optimizer=AugmentedLagrangian(max_iter=15))


def test_dependent_constraints() -> None:
    class Twice(Circle):
        def equality(self, u: Tensor, x: Tensor, w: Tensor) -> Any:
            size = (u * u).sum() - 1 - (x * x).mean()
            return size, 2 * size

    class Once(Circle):
        def equality(self, u: Tensor, x: Tensor, w: Tensor) -> Any:
            return (u * u).sum() - 1 - (x * x).mean()

    x, w = normal(2, 5, seed=3), normal(5, seed=4).abs() + 0.5
    optimizer = AugmentedLagrangian(tol=1e-10)
    options: dict[str, Any] = {"in_dims": (0, None), "optimizer": optimizer}
    found, alone = idf.solve(Twice(), x, w, **options), idf.solve(Once(), x, w, **options)
    torch.testing.assert_close(found.u, alone.u, rtol=1e-7, atol=1e-8)
    one, two = found.equality_multipliers
    torch.testing.assert_close(one + 2 * two, alone.equality_multipliers, rtol=1e-6, atol=1e-7)


def test_without_constraints_it_is_l_bfgs() -> None:
    system = system_of(Logistic(), normal(3, 9, 4), normal(3, 9, seed=1).sign())
    start = torch.zeros(3, 4, dtype=DOUBLE)
    mine = AugmentedLagrangian().minimize(system, start, 1e-9)
    theirs = LBFGS().minimize(system, start, 1e-9)
    assert torch.equal(mine.point.u, theirs.point.u)
    assert torch.equal(mine.iterations, theirs.iterations)


def test_the_penalised_gradient_is_that_of_the_penalised_value() -> None:
    x, w = normal(3, 5, seed=3), normal(5, seed=4).abs() + 0.5
    system = system_of(Circle(), x, w, in_dims=(0, None))
    u, lam = normal(3, 5, seed=5), normal(3, 2, seed=6)
    penalty = torch.tensor([0.5, 3.0, 20.0], dtype=DOUBLE)
    penalised = Penalised(
        system.plan, system.theta, system.variable_shapes, system.constraint_shapes, lam, penalty
    )
    at, direction = penalised.evaluate(u, lam[:, :0]), normal(3, 5, seed=7)
    ahead, behind = (penalised.evaluate(u + step * direction, lam[:, :0]).value for step in (1e-6, -1e-6))
    torch.testing.assert_close(
        (ahead - behind) / 2e-6, (at.gradient * direction).sum(1), rtol=1e-7, atol=1e-7
    )
    h = system.evaluate(u, lam).constraint
    value = system.evaluate(u, lam).value - (lam * h).sum(1) + 0.5 * penalty * h.square().sum(1)
    torch.testing.assert_close(at.value, value)
    assert penalised.constraints == 0
    for mine in (penalised, system):  # one reverse pass of the trial points, against the emitted code
        point = mine.evaluate(u, lam[:, :0] if mine is penalised else torch.zeros_like(lam))
        trial = mine.trial(u, point)
        torch.testing.assert_close(trial.value, point.value)
        torch.testing.assert_close(trial.gradient, point.gradient)
        torch.testing.assert_close(trial.residual, point.residual)


def test_each_sample_has_its_own_end() -> None:
    c = normal(4, 3) * torch.tensor([1.0, 1.0, 30.0, 1.0], dtype=DOUBLE)[:, None]
    system = system_of(Sphere(), c)
    start = 2 * c.flip(1)
    start[1] = c[1] / c[1].norm()  # a solution
    together = AugmentedLagrangian().minimize(system, start, 1e-9)
    assert together.iterations[1] == 0
    assert len(set(together.iterations.tolist())) > 2
    for index in range(4):
        alone = AugmentedLagrangian().minimize(system.sample(index), start[index : index + 1], 1e-9)
        torch.testing.assert_close(alone.point.u[0], together.point.u[index], rtol=1e-9, atol=1e-10)
        assert alone.iterations[0] == together.iterations[index]


def test_inner_limits_hold() -> None:
    c = normal(2, 3)
    optimizer = AugmentedLagrangian(max_iter=3, inner=LBFGS(max_iter=2))
    found = idf.solve(Sphere(), c, optimizer=optimizer, on_failure="zero")
    assert found.status.tolist() == [Status.NOT_CONVERGED] * 2
    assert (found.iterations <= 6).all()
