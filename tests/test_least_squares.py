"""Gauss-Newton and Levenberg-Marquardt: which objectives are seen as sums of squares, and what comes out."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import implicitdiff as idf
from implicitdiff.optimizers import GaussNewton, LevenbergMarquardt, Newton
from implicitdiff.optimizers.least_squares import normal_of
from tests.optimizer_problems import Decay, Logistic, Rosenbrock, normal, system_of

F = torch.nn.functional


class Written(idf.Problem):
    """A sum of squares, written as the test says; u (4,), a (6, 4), b (6,), w (6,) positive."""

    def __init__(self, text: Callable[..., Tensor]) -> None:
        super().__init__()
        self.text = text
        self.scale = torch.nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def objective(self, u: Tensor, a: Tensor, b: Tensor, w: Tensor) -> Tensor:
        return self.text(self, u, a, b, w)

    def init(self, a: Tensor, b: Tensor, w: Tensor) -> Tensor:
        return torch.zeros_like(a[0])


def data(batch: int = 3) -> tuple[Tensor, ...]:
    return normal(batch, 6, 4), normal(batch, 6, seed=1), normal(batch, 6, seed=2).abs() + 0.2


SQUARES: dict[str, Callable[..., Tensor]] = {
    "power": lambda p, u, a, b, w: ((a @ u - b) ** 2).sum(),
    "product": lambda p, u, a, b, w: ((a @ u - b) * (a @ u - b)).sum(),
    "dot": lambda p, u, a, b, w: (r := a @ u - b) @ r,
    "norm": lambda p, u, a, b, w: (a @ u - b).norm() ** 2 + torch.linalg.vector_norm(u).square(),
    "mse": lambda p, u, a, b, w: F.mse_loss(a @ u, b) + 2 * F.mse_loss(u, b[:4], reduction="sum"),
    "half": lambda p, u, a, b, w: 0.5 * (a @ u - b).square().sum() / 3,
    "mean": lambda p, u, a, b, w: (a @ u - b).square().mean(),
    "ridge": lambda p, u, a, b, w: (a @ u - b).square().sum() + p.scale * u.square().sum(),
    "weights": lambda p, u, a, b, w: (w * (a @ u - b) ** 2).sum() * p.scale,
    "weights-first": lambda p, u, a, b, w: ((a @ u - b) ** 2 * w.exp()).mean(),
    "axes": lambda p, u, a, b, w: (a @ u[:, None] - b[:, None]).square().sum(0).sum() * 1.5,
    "matrix": lambda p, u, a, b, w: ((a * u - b[:, None]) ** 2).sum(),
    "constant": lambda p, u, a, b, w: ((a @ u - b) ** 2).sum() + b.sum() - (w**3).sum(),
    "minus": lambda p, u, a, b, w: 3 * (a @ u - b).square().sum() - 0.1 * u.square().sum(),
    "negated": lambda p, u, a, b, w: -(-2 * (a @ u - b).square().sum()),
    "nested": lambda p, u, a, b, w: (u.square().sum() - 1) ** 2 + (a @ u - b).square().sum(),
    "differences": lambda p, u, a, b, w: (u - b[:4]).square().sum() + ((u[1:] - u[:-1]) ** 2).sum(),
}


@pytest.mark.parametrize("name", SQUARES)
@pytest.mark.parametrize("make", [GaussNewton, LevenbergMarquardt])
def test_sums_of_squares_are_recognised(name: str, make: Any) -> None:
    problem, inputs = Written(SQUARES[name]), data()
    system = system_of(problem, *inputs)
    point = system.evaluate(normal(3, 4, seed=5), torch.zeros(3, 0).double())
    normal_matrix = normal_of("GaussNewton", system, None, point)
    torch.testing.assert_close(normal_matrix.slope(point.u), point.gradient)
    if name != "nested":  # the residuals are linear, so that the Gauss-Newton matrix is H
        hessian = system.plan.hessian((point.u,), (), system.theta).to_dense()
        torch.testing.assert_close(normal_matrix.at(point.u), hessian.expand(3, 4, 4))
    found = idf.solve(problem, *inputs, optimizer=make())
    expected = idf.solve(problem, *inputs, optimizer=Newton())
    torch.testing.assert_close(found.u, expected.u, rtol=1e-6, atol=1e-7)
    if name not in ("nested", "minus") and make is GaussNewton:
        assert (found.iterations <= 3).all()


OTHERS: dict[str, Callable[..., Tensor]] = {
    "cubic": lambda p, u, a, b, w: ((a @ u - b) ** 4).sum(),
    "linear term": lambda p, u, a, b, w: (a @ u - b).square().sum() + u.sum(),
    "weight of u": lambda p, u, a, b, w: (u.exp() * (u - b[:4]) ** 2).sum(),
    "logarithm": lambda p, u, a, b, w: (1 + (a @ u - b).square()).log().sum(),
    "product of two": lambda p, u, a, b, w: u[0] * u[1] + u.square().sum(),
    "weights of rows": lambda p, u, a, b, w: (w * (a * u - b[:, None]).square().sum(1)).sum(),
    "norm": lambda p, u, a, b, w: (a @ u - b).norm() + u.square().sum(),
    "broadcast": lambda p, u, a, b, w: ((u**2).sum() + w).sum(),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_objectives_are_refused_with_a_remedy(name: str) -> None:
    with pytest.raises(
        idf.OptionError, match=r"LevenbergMarquardt.*not written as a sum of squares.*residual="
    ):
        idf.solve(Written(OTHERS[name]), *data(), optimizer=LevenbergMarquardt())


def test_logistic_regression_is_no_sum_of_squares() -> None:
    with pytest.raises(idf.OptionError, match="or use Newton"):
        idf.solve(Logistic(), normal(2, 9, 4), normal(2, 9, seed=1).sign(), optimizer=GaussNewton())


def rows(u: Tensor, a: Tensor, b: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    return w.sqrt() * (a @ u - b).exp(), 0.5 * u


@pytest.mark.parametrize("factor", [1.0, 0.5, 7.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_residuals_may_be_given(factor: float, dtype: torch.dtype) -> None:
    """The objective hides its squares behind an exponential; the factor is found by itself."""

    class Hidden(Written):
        def objective(self, u: Tensor, a: Tensor, b: Tensor, w: Tensor) -> Tensor:
            return factor * ((w * (2 * (a @ u - b)).exp()).sum() + 0.25 * (u @ u)) + w.sum()

    problem, inputs = Hidden(SQUARES["power"]), tuple(value.to(dtype) for value in data())
    with pytest.raises(idf.OptionError, match="not written as a sum"):
        idf.solve(problem, *inputs, optimizer=GaussNewton())
    found = idf.solve(problem, *inputs, optimizer=GaussNewton(residual=rows))
    expected = idf.solve(problem, *inputs, optimizer=Newton())
    rtol = 1e-6 if dtype == torch.float64 else 1e-2
    torch.testing.assert_close(found.u, expected.u, rtol=rtol, atol=rtol)


def test_residuals_of_something_else_are_refused() -> None:
    problem = Written(SQUARES["weights"])
    for wrong in (lambda u, a, b, w: w * (a @ u - b), lambda u, a, b, w: b - a @ u):
        with pytest.raises(idf.OptionError, match="not the sum of squares of these residuals"):
            idf.solve(problem, *data(), optimizer=GaussNewton(residual=wrong))
    with pytest.raises(idf.OptionError, match="must return floating tensors, got int"):
        idf.solve(problem, *data(), optimizer=GaussNewton(residual=lambda u, a, b, w: 3))


def test_residuals_and_parameters_that_differ_between_samples() -> None:
    problem, (a, b, w) = Written(SQUARES["ridge"]), data()
    scales = torch.tensor([0.1, 2.0], dtype=torch.float64)

    def run(scale: Tensor, optimizer: Any) -> Tensor:
        layer = idf.DeclarativeLayer(problem, in_dims=None, optimizer=optimizer)
        return torch.func.functional_call(layer, {"problem.scale": scale}, (a[0], b[0], w[0]))

    seen = torch.func.vmap(lambda s: run(s, GaussNewton()))(scales)
    torch.testing.assert_close(seen, torch.stack([run(s, Newton()) for s in scales]), rtol=1e-7, atol=1e-8)
    with pytest.raises(idf.OptionError, match="pass them as inputs"):
        torch.func.vmap(lambda s: run(s, GaussNewton(residual=rows)))(scales)


@pytest.mark.parametrize("make", [GaussNewton, LevenbergMarquardt])
def test_dependent_residuals_are_damped(make: Any) -> None:
    """Six residuals of which u_3 is in none, and two equal columns: 2 J'J has rank 2."""
    a, b, w = data()
    a = torch.stack([a[..., 0], a[..., 0], a[..., 1], 0 * a[..., 0]], -1)
    found = idf.solve(Written(SQUARES["power"]), a, b, w, optimizer=make(), on_failure="warn")
    fit = torch.linalg.lstsq(a[..., [0, 2]], b[..., None]).solution[..., 0]
    mine = torch.stack([found.u[:, 0] + found.u[:, 1], found.u[:, 2]], 1)
    torch.testing.assert_close(mine, fit, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found.u[:, 3], torch.zeros(3).double())


def test_fewer_residuals_than_variables() -> None:
    """The matrix is made row by row then, and is singular."""
    text = lambda p, u, a, b, w: ((a @ u - b)[:2] ** 2).sum() + 1e-3 * u.square().sum()  # noqa: E731
    wide = lambda p, u, a, b, w: (a @ u - b)[:2].square().sum()  # noqa: E731
    found = idf.solve(Written(text), *data(), optimizer=GaussNewton())
    torch.testing.assert_close(found.u, idf.solve(Written(text), *data(), optimizer=Newton()).u)
    a, b, w = data()
    system = system_of(Written(wide), a, b, w)
    solved = LevenbergMarquardt().minimize(system, normal(3, 4, seed=8), 1e-10)
    torch.testing.assert_close((a @ solved.point.u[..., None])[:, :2, 0], b[:, :2], rtol=1e-8, atol=1e-8)


def test_a_large_residual_at_the_solution_is_no_trap() -> None:
    """H is almost twice 2 J'J there, so that full Gauss-Newton steps go to and fro."""
    t = normal(11).abs()
    y = 2 * torch.exp(-1.5 * t) + 0.3 + 0.3 * normal(4, 11, seed=1)
    w = normal(4, 11, seed=2).abs() + 0.3
    expected = idf.solve(Decay(), t, y, w, in_dims=(None, 0, 0), optimizer=Newton())
    for make in (GaussNewton, LevenbergMarquardt):
        found = idf.solve(Decay(), t, y, w, in_dims=(None, 0, 0), optimizer=make(tol=1e-10))
        torch.testing.assert_close(found.value, expected.value)
        torch.testing.assert_close(found.u, expected.u, rtol=1e-6, atol=1e-7)


def test_each_sample_is_solved_as_if_alone() -> None:
    c = 5 * normal(4, 4).abs() + 1
    system = system_of(Rosenbrock(), c)
    start = torch.full((4, 5), -0.5).double() * torch.arange(4).double()[:, None]
    together = LevenbergMarquardt().minimize(system, start, 1e-8)
    assert len(set(together.iterations.tolist())) > 1, "all samples take equally long: nothing is tested"
    for index in range(4):
        alone = LevenbergMarquardt().minimize(system.sample(index), start[index : index + 1], 1e-8)
        torch.testing.assert_close(alone.point.u[0], together.point.u[index], rtol=1e-11, atol=1e-12)
        assert alone.iterations[0] == together.iterations[index]
