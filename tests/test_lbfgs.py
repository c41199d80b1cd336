"""L-BFGS and its line search on an independent plan: known solutions, the conditions on a step, samples apart."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import implicitdiff as idf
from implicitdiff.optimizers import LBFGS, Newton, Wolfe
from implicitdiff.optimizers.iterate import Outcome, System, dot
from implicitdiff.optimizers.lbfgs import Memory
from tests.optimizer_problems import DOUBLE, Logistic, normal, system_of
from tests.plan_double import PlanDouble


def system(objective: Callable[..., Tensor], u: Tensor, *theta: Tensor) -> System:
    return System.of(PlanDouble(objective, None, u[0], theta, (True,) * len(theta)), theta)  # type: ignore[arg-type]


def solve(objective: Callable[..., Tensor], start: Tensor, *theta: Tensor, **options: Any) -> Outcome:
    return LBFGS(**options).minimize(system(objective, start, *theta), start, 1.5e-8)


def valley(u: Tensor, c: Tensor) -> Tensor:
    return (c * (u[1:] - u[:-1] ** 2) ** 2).sum() + ((1 - u[:-1]) ** 2).sum()


# Known solutions


def test_a_quadratic_ends_at_the_linear_solution() -> None:
    q, x = normal(3, 4, 4), normal(3, 4, seed=1)
    q = q @ q.mT + torch.eye(4, dtype=DOUBLE)
    found = solve(lambda u, q, x: 0.5 * u @ q @ u - x @ u, torch.zeros(3, 4, dtype=DOUBLE), q, x, tol=1e-13)
    expected = torch.cholesky_solve(x[..., None], torch.linalg.cholesky(q))[..., 0]
    torch.testing.assert_close(found.point.u, expected, rtol=1e-11, atol=1e-11)


def test_the_scale_of_the_problem_does_not_matter() -> None:
    c, start = normal(2, 3).abs() + 1, torch.full((2, 4), -0.5, dtype=DOUBLE)
    for size in (1e-6, 1.0, 1e6):
        found = solve(lambda u, c, size=size: size * valley(u, c), start, c)
        torch.testing.assert_close(found.point.u, torch.ones_like(start), rtol=1e-6, atol=0)
        assert (found.iterations < 60).all()


def test_a_step_out_of_the_domain_is_shortened() -> None:
    x = normal(4, 3).abs() + 0.5
    found = solve(lambda u, x: x @ u - u.log().sum(), 10 / x, x, tol=1e-11)
    torch.testing.assert_close(found.point.u, 1 / x, rtol=1e-9, atol=0)


def test_rounding_is_reached_and_the_walk_ends() -> None:
    x = normal(3, 4, 7)
    objective = lambda u, x: ((u[:, None] - x).square().sum(0) + 1e-3).sqrt().sum()  # noqa: E731
    found = solve(objective, x.mean(2), x, tol=1e-30)
    pull = found.point.u[:, :, None] - x
    gradient = (pull / (pull.square().sum(1, keepdim=True) + 1e-3).sqrt()).sum(2)
    assert gradient.abs().max() < 1e-12
    assert (found.iterations < 300).all()


@pytest.mark.parametrize("offset", [0.0, 1e-3])
def test_a_saddle_is_left(offset: float) -> None:
    c = normal(2, 3)
    start = torch.tensor([[0.0, offset, 1.0]] * 2, dtype=DOUBLE)
    start[:, 2] = c[:, 2]
    objective = lambda u, c: u[0] ** 2 - u[1] ** 2 + u[1] ** 4 + (u[2] - c[2]).square()  # noqa: E731
    found = solve(objective, start, c)
    torch.testing.assert_close(found.point.u[:, 1].abs(), torch.full((2,), 0.5**0.5, dtype=DOUBLE))
    if not offset:
        stay = solve(objective, start, c, restarts=0)
        assert torch.equal(stay.point.u, start)


def test_an_unbounded_problem_ends() -> None:
    c = normal(2, 3)
    found = solve(lambda u, c: -(c * u).sum(), c, c)
    assert found.iterations.tolist() == [1, 1]
    assert found.point.finite.all()
    squares = solve(lambda u, c: -(c * u).square().sum(), c.float(), c.float())
    assert (squares.iterations <= 2).all()


def test_a_gradient_of_one_term_is_recognised_as_optimal() -> None:
    # The plan sees 2 (u - x) as one term, which is its own scale: only |H u| tells that it is small.
    class Near(idf.Problem):
        def objective(self, u: Tensor, x: Tensor) -> Tensor:
            return ((u - x) ** 2).sum() + 0.1 * ((u - x) ** 4).sum()

        def init(self, x: Tensor) -> Tensor:
            return torch.zeros_like(x)

    x = normal(3, 4)
    found = idf.solve(Near(), x, optimizer=LBFGS())
    torch.testing.assert_close(found.u, x, rtol=1e-6, atol=1e-6)
    assert (found.iterations < 15).all()


def test_many_variables_agree_with_newton() -> None:
    a, b = normal(2, 50, 120) / 4, normal(2, 50, seed=1).sign()
    mine = idf.solve(Logistic(), a, b, optimizer=LBFGS(tol=1e-11))
    torch.testing.assert_close(
        mine.u, idf.solve(Logistic(), a, b, optimizer=Newton()).u, rtol=1e-8, atol=1e-9
    )


# The pieces


@pytest.mark.parametrize("curvature", [0.1, 0.9])
def test_steps_have_the_strong_wolfe_conditions(curvature: float) -> None:
    c = 5 * normal(6, 3).abs() + 1
    start = normal(6, 4, seed=1)
    searched = system(valley, start, c)
    point = searched.evaluate(start, start[:, :0])
    direction = -point.gradient * (10.0 ** torch.arange(-4, 2, dtype=DOUBLE))[:, None]
    wanted = torch.tensor([True, True, True, False, True, True])
    rule = Wolfe(curvature=curvature)
    moved, found, endless = rule.search(searched, point, direction, torch.ones(6, dtype=DOUBLE), wanted)
    assert moved.tolist() == wanted.tolist()
    assert not endless.any()
    assert torch.equal(found.u[3], start[3])
    along = (found.u - start)[wanted] / direction[wanted]
    torch.testing.assert_close(along, along[:, :1].expand_as(along))
    length, slope = along[:, 0], dot(point.gradient, direction)[wanted]
    assert (length > 0).all()
    assert (found.value[wanted] <= point.value[wanted] + 1e-4 * length * slope).all()
    assert (dot(found.gradient, direction)[wanted].abs() <= curvature * slope.abs()).all()


def test_the_two_loops_are_the_bfgs_matrix() -> None:
    # B+ = V' B V + s s' / s'y with V = I - y s' / s'y, from B = gamma I, multiplied out.
    h = torch.diag(torch.tensor([1.0, 3.0, 0.5, 8.0], dtype=DOUBLE)) + 0.1
    memory = Memory(3, torch.zeros(1, 4, dtype=DOUBLE))
    pairs = [(s, h @ s) for s in normal(5, 4)]
    for s, y in pairs:
        memory.push(s[None], y[None], torch.tensor([True]))
    s, y = pairs[-1]
    matrix = (s @ y) / (y @ y) * torch.eye(4, dtype=DOUBLE)
    for s, y in pairs[-3:]:
        v = torch.eye(4, dtype=DOUBLE) - torch.outer(y, s) / (s @ y)
        matrix = v.mT @ matrix @ v + torch.outer(s, s) / (s @ y)
    g = normal(4, seed=7)
    torch.testing.assert_close(memory.direction(g[None])[0], -(matrix @ g))


def test_pairs_without_curvature_and_forgotten_ones_do_not_count() -> None:
    memory = Memory(4, torch.zeros(2, 3, dtype=DOUBLE))
    s, g = normal(2, 3), normal(2, 3, seed=1)
    memory.push(s, torch.stack([2 * s[0], -s[1]]), torch.tensor([True, True]))
    torch.testing.assert_close(memory.direction(g), torch.stack([-g[0] / 2, -g[1]]))
    memory.forget(torch.tensor([True, False]))
    torch.testing.assert_close(memory.direction(g), -g)


def test_each_sample_is_solved_as_if_alone() -> None:
    c = 5 * normal(4, 4).abs() + 1
    begin = torch.full((4, 5), -0.5, dtype=DOUBLE)
    begin[0] = 1.0  # the solution
    together = solve(valley, begin, c)
    assert together.iterations[0] == 0
    assert len(set(together.iterations.tolist())) > 2, "all samples take equally long: nothing is tested"
    for index in range(4):
        alone = solve(valley, begin[index : index + 1], c[index : index + 1])
        assert torch.equal(alone.point.u[0], together.point.u[index])
        assert alone.iterations[0] == together.iterations[index]


def test_a_sample_does_not_feel_that_another_has_no_curvature() -> None:
    """Sample 1 skips pairs where it is concave; the memory of sample 0 must not shrink with it."""
    objective = lambda u, x: (1 - torch.exp(-(u - x).square() / 2)).sum() + 0.02 * u.square().sum()  # noqa: E731
    x = normal(2, 5)
    start = x + torch.tensor([0.5, 2.5], dtype=DOUBLE)[:, None]
    together = solve(objective, start, x, history=2, tol=1e-12)
    alone = solve(objective, start[:1], x[:1], history=2, tol=1e-12)
    assert torch.equal(alone.point.u[0], together.point.u[0])


def test_a_nan_does_not_move_the_zeros_of_others() -> None:
    """Where f is not finite it is asked again with the zeros of u moved off the edge: for that sample alone."""

    class Roots(idf.Problem):
        def objective(self, u: Tensor, x: Tensor) -> Tensor:
            return 1e300 * u.sqrt().sum() - (x * u).sum()

        def init(self, x: Tensor) -> Tensor:
            return torch.zeros_like(x)

    x, zeros = normal(2, 3), torch.zeros(2, 3, dtype=DOUBLE)
    plan = system_of(Roots(), x).plan
    assert plan.value((zeros + torch.finfo(DOUBLE).tiny,), (x,))[0] > 0, "the move cannot be seen"
    hurt = zeros.clone()
    hurt[1] = torch.nan
    assert plan.value((hurt,), (x,))[0] == 0


def test_no_matrix_is_formed_on_a_large_problem() -> None:
    a, b = normal(1, 3, 2000) / 10, normal(1, 3, seed=1).sign()
    searched = system_of(Logistic(), a, b)

    class Refused:
        def __getattr__(self, name: str) -> Any:
            if name in ("hessian", "kkt_solve", "kkt_factor", "constraint_jacobian"):
                raise AssertionError(f"{name} of a problem with 2000 variables was asked for")
            return getattr(searched.plan, name)

    bare = System(Refused(), searched.theta, searched.variable_shapes, ())  # type: ignore[arg-type]
    start = normal(1, 2000, seed=2)
    found = LBFGS().minimize(bare, start, 1e-6)
    assert (found.point.residual <= 1e-6).all()
