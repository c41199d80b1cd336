"""Newton's method on an independent plan: known solutions, hard starts, samples that must not interact."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from implicitdiff.errors import OptionError
from implicitdiff.optimality import tolerance
from implicitdiff.optimizers import Newton
from implicitdiff.optimizers.iterate import Outcome, System
from implicitdiff.optimizers.merit import merit_of, slope_along
from tests.plan_double import PlanDouble

DOUBLE = torch.float64
TOL = tolerance(DOUBLE)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE).to(dtype)


def plan_of(
    objective: Callable[..., Tensor], equality: Callable[..., Any] | None, u: Tensor, *theta: Tensor
) -> PlanDouble:
    return PlanDouble(objective, equality, u[0], theta, (True,) * len(theta))


def minimize(plan: PlanDouble, start: Tensor, *theta: Tensor, newton: Newton | None = None) -> Outcome:
    return (newton or Newton()).minimize(System.of(plan, theta), start, tolerance(start.dtype))


def solve(
    objective: Callable[..., Tensor],
    equality: Callable[..., Any] | None,
    start: Tensor,
    *theta: Tensor,
    newton: Newton | None = None,
) -> Outcome:
    return minimize(plan_of(objective, equality, start, *theta), start, *theta, newton=newton)


def sphere(u: Tensor, c: Tensor) -> Tensor:
    return u.square().sum() - 1


def linear(u: Tensor, c: Tensor) -> Tensor:
    return -(c * u).sum()


def to_the_sum(u: Tensor, x: Tensor) -> Tensor:
    return u.sum() - 1


def entropy(u: Tensor, x: Tensor) -> Tensor:
    return (u * u.log()).sum() - x @ u


# Known solutions


def test_a_quadratic_takes_one_step() -> None:
    q, x = normal(3, 4, 4), normal(3, 4, seed=1)
    q = q @ q.mT + torch.eye(4, dtype=DOUBLE)
    found = solve(lambda u, q, x: 0.5 * u @ q @ u - x @ u, None, torch.zeros(3, 4, dtype=DOUBLE), q, x)
    expected = torch.cholesky_solve(x[..., None], torch.linalg.cholesky(q))[..., 0]
    torch.testing.assert_close(found.point.u, expected, rtol=1e-13, atol=1e-13)
    assert (found.iterations <= 2).all()


def test_a_convex_problem_reaches_rounding() -> None:
    x = normal(3, 4, 7)
    start = x.mean(2)
    found = solve(lambda u, x: ((u[:, None] - x).square().sum(0) + 1e-3).sqrt().sum(), None, start, x)
    pull = found.point.u[:, :, None] - x
    gradient = (pull / (pull.square().sum(1, keepdim=True) + 1e-3).sqrt()).sum(2)
    assert gradient.abs().max() < 1e-14
    assert (found.iterations < 10).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_linear_constraint(dtype: torch.dtype) -> None:
    x = normal(4, 3, dtype=dtype)
    found = solve(lambda u, x: (u - x).square().sum(), to_the_sum, torch.zeros(4, 3, dtype=dtype), x)
    excess = (x.sum(1) - 1) / 3
    torch.testing.assert_close(found.point.u, x - excess[:, None])
    torch.testing.assert_close(found.point.multipliers[:, 0], -2 * excess)  # lambda'A = D_u f = 2 (u - x)
    assert found.point.u.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_nonlinear_constraint_from_anywhere(dtype: torch.dtype) -> None:
    c, start = normal(8, 3, dtype=dtype), 2 * normal(8, 3, seed=1, dtype=dtype)
    found = solve(linear, sphere, start, c)
    torch.testing.assert_close(found.point.u, c / c.norm(dim=1, keepdim=True))
    torch.testing.assert_close(found.point.multipliers[:, 0], -c.norm(dim=1) / 2)


def test_the_full_step_survives_on_a_curved_constraint() -> None:
    # Nocedal and Wright, example 15.4: every full Newton step raises both f and |h| (the Maratos effect).
    angle = torch.tensor([0.5, 0.2, -0.4], dtype=DOUBLE)
    start = torch.stack([angle.cos(), angle.sin()], 1)
    none = torch.zeros(3, dtype=DOUBLE)
    found = solve(
        lambda u, c: 2 * (u.square().sum() - 1) - u[0], lambda u, c: u.square().sum() - 1, start, none
    )
    expected = torch.tensor([1.0, 0.0], dtype=DOUBLE).expand(3, 2)
    torch.testing.assert_close(found.point.u, expected, rtol=0, atol=1e-14)
    assert (found.iterations <= 8).all()


@pytest.mark.parametrize("size", [1.0, 3.0, 10.0])
def test_entropy_over_the_simplex_is_softmax(size: float) -> None:
    x = size * normal(3, 5)
    found = solve(entropy, to_the_sum, torch.full((3, 5), 0.2, dtype=DOUBLE), x)
    torch.testing.assert_close(found.point.u, x.softmax(1), rtol=1e-11, atol=1e-15)


def test_a_step_out_of_the_domain_is_shortened() -> None:
    x = normal(4, 3).abs() + 0.5
    found = solve(
        lambda u, x: x @ u - u.log().sum(), None, 10 / x, x
    )  # the first full step makes all u negative
    torch.testing.assert_close(found.point.u, 1 / x, rtol=1e-13, atol=0)


def test_least_squares_with_more_rows_than_columns() -> None:
    a, b = normal(3, 6, 4), normal(3, 6, seed=1)
    found = solve(lambda u, a, b: (a @ u - b).square().sum(), None, torch.zeros(3, 4, dtype=DOUBLE), a, b)
    torch.testing.assert_close(found.point.u, torch.linalg.lstsq(a, b[..., None]).solution[..., 0])


def test_least_squares_without_a_unique_solution_still_fits() -> None:
    a, b = normal(3, 2, 4), normal(3, 2, seed=1)
    found = solve(lambda u, a, b: (a @ u - b).square().sum(), None, normal(3, 4, seed=2), a, b)
    torch.testing.assert_close((a @ found.point.u[..., None])[..., 0], b, rtol=1e-10, atol=1e-10)
    assert (found.point.residual <= TOL).all()


def test_leaves_of_several_shapes() -> None:
    x, y = normal(3, 2, 2), normal(3, seed=1)

    def objective(u: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return (u["a"] - x).square().sum() + (u["b"] - y).pow(4) + (u["b"] - u["a"].sum()).square()

    def equality(u: dict[str, Tensor], x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"rows": u["a"].sum(1) - 1, "free": u["b"] - 2}

    example = {"a": x[0], "b": y[0]}
    plan = PlanDouble(objective, equality, example, (x, y), (True, True))
    found = minimize(plan, torch.zeros(3, 5, dtype=DOUBLE), x, y)
    a = x - (x.sum(2, keepdim=True) - 1) / 2
    torch.testing.assert_close(found.point.u, torch.cat([a.flatten(1), torch.full((3, 1), 2.0)], 1))
    assert [
        tuple(leaf.shape)
        for leaf in System.of(plan, (x, y)).leaves(found.point.u, found.point.multipliers)[0]
    ] == [
        (3, 2, 2),
        (3,),
    ]


# Hard starts


def test_an_indefinite_start_still_goes_down() -> None:
    x = normal(4, 3, 6)
    start = x.mean(2) + 2  # outside the hump of the Welsch penalty, where H is negative
    objective = lambda u, x: (1 - torch.exp(-(u[:, None] - x).square().sum(0) / 2)).sum()  # noqa: E731
    plan = plan_of(objective, None, start, x)
    found = minimize(plan, start, x)
    assert (found.point.residual <= TOL).all()
    assert any(shift is not None for shift in plan.shifts), "the start was meant to need damping"
    before = torch.stack([objective(u, v) for u, v in zip(start, x, strict=True)])
    assert (found.point.value < before).all()


@pytest.mark.parametrize("offset", [0.0, 1e-3, 0.2])
def test_a_saddle_is_left(offset: float) -> None:
    c = normal(2, 3)
    start = torch.tensor([[1.0, offset, 0.0]] * 2, dtype=DOUBLE)
    found = solve(lambda u, c: u[0] ** 2 - u[1] ** 2 + u[1] ** 4 + (u[2] - c[2]).square(), None, start, c)
    assert (found.point.value < -0.2499).all()
    torch.testing.assert_close(found.point.u[:, 1].abs(), torch.full((2,), 0.5**0.5, dtype=DOUBLE))


def test_a_maximum_on_a_constraint_is_left() -> None:
    c = normal(3, 4)
    start = -c / c.norm(dim=1, keepdim=True)
    found = solve(linear, sphere, start, c)
    torch.testing.assert_close(found.point.u, -start)
    stay = solve(linear, sphere, start, c, newton=Newton(restarts=0))
    torch.testing.assert_close(stay.point.u, start)  # without restarts a stationary point is the end


def test_dependent_constraints() -> None:
    x = normal(3, 4)
    twice = lambda u, x: (u.sum() - 1, 2 * u.sum() - 2)  # noqa: E731
    found = solve(lambda u, x: (u - x).square().sum() + u.pow(4).sum(), twice, torch.zeros(3, 4).double(), x)
    alone = solve(
        lambda u, x: (u - x).square().sum() + u.pow(4).sum(), to_the_sum, torch.zeros(3, 4).double(), x
    )
    torch.testing.assert_close(found.point.u, alone.point.u)
    # The representative of least norm: lambda (1, 2) with 5 lambda = the single multiplier.
    torch.testing.assert_close(
        found.point.multipliers, alone.point.multipliers * torch.tensor([0.2, 0.4]).double()
    )


def test_contradicting_constraints_stop_where_the_violation_is_least() -> None:
    x = normal(2, 3)
    found = solve(
        lambda u, x: (u - x).square().sum(),
        lambda u, x: (u.sum() - 1, u.sum() - 2),
        torch.zeros(2, 3).double(),
        x,
    )
    torch.testing.assert_close(found.point.u.sum(1), torch.full((2,), 1.5, dtype=DOUBLE))
    assert (found.point.violation > 0.1).all()


def test_a_constraint_that_nothing_meets_stops_where_the_violation_is_least() -> None:
    x = normal(2, 3)
    found = solve(lambda u, x: (u - x).square().sum(), lambda u, x: u.square().sum() + 1, x, x)
    assert found.point.u.abs().max() < 1e-3
    assert (found.iterations <= Newton().max_iter).all()


def test_an_unbounded_problem_ends() -> None:
    c = normal(2, 3)
    found = solve(linear, None, c, c, newton=Newton(max_iter=7))
    assert (found.iterations == 7).all()
    assert found.point.finite.all()


def test_a_step_onto_the_edge_of_the_domain_is_no_step() -> None:
    # The first step is halved once, to u = 0, where u log u is 0 but has no slope.
    x = torch.tensor([[-1.0], [-1.0]], dtype=DOUBLE)
    found = solve(lambda u, x: (torch.special.xlogy(u, u) - x * u).sum(), None, torch.ones_like(x), x)
    torch.testing.assert_close(found.point.u, torch.full_like(x, -2.0).exp())


def test_the_slope_is_that_of_the_merit() -> None:
    c, u, lam = normal(3, 4), normal(3, 4, seed=1), normal(3, 1, seed=2)
    plan = plan_of(lambda u, c: (u - c).pow(4).sum(), sphere, u, c)
    system = System.of(plan, (c,))
    point = system.evaluate(u, lam)
    w, s, _ = system.solve(point, -point.gradient, point.constraint, None)
    slope, penalty = slope_along(point, w, s, torch.full((3,), 1e3, dtype=DOUBLE))
    step = 1e-7
    ahead = merit_of(system.evaluate(u + step * w, lam), penalty)
    torch.testing.assert_close((ahead - merit_of(point, penalty)) / step, slope, rtol=1e-4, atol=0)
    assert (penalty == 250).all()  # a quarter of the old one, which exceeds the multipliers


# Options and bookkeeping


def test_extra_steps_bring_the_residual_to_rounding() -> None:
    x = normal(4, 3)
    objective = lambda u, x: (u - x).square().sum() + u.pow(4).sum()  # noqa: E731
    coarse = solve(objective, None, x, x, newton=Newton(extra=0, tol=1e-3))
    fine = solve(objective, None, x, x, newton=Newton(tol=1e-3))
    assert (coarse.point.residual <= 1e-3).all()
    assert coarse.point.residual.max() > 1e-10
    assert fine.point.residual.max() < 1e-14
    assert (fine.iterations > coarse.iterations).all()


def test_a_solution_is_a_fixed_point() -> None:
    x = normal(3, 5)
    first = solve(entropy, to_the_sum, torch.full((3, 5), 0.2, dtype=DOUBLE), x)
    again = solve(entropy, to_the_sum, first.point.u, x)
    assert torch.equal(first.point.u, again.point.u)
    assert (again.iterations == 0).all()


def test_options_are_checked_and_frozen() -> None:
    for name, value in {"max_iter": 0, "extra": -1, "max_halvings": 1.5, "tol": 0.0, "decrease": 0.7}.items():
        with pytest.raises(OptionError, match=name):
            Newton(**{name: value})  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        Newton().max_iter = 3  # type: ignore[misc]


# Samples on their own


def hump(u: Tensor, x: Tensor) -> Tensor:
    return (1 - torch.exp(-(u - x).square() / 2)).sum() + 0.02 * u.square().sum()


@pytest.mark.parametrize(
    ("objective", "equality", "start"),
    [
        (lambda u, x: (u - x).square().sum() + u.pow(4).sum(), None, lambda x: x),
        (entropy, to_the_sum, lambda x: torch.full_like(x, 0.2)),
        (linear, sphere, lambda x: 2 * x.flip(1)),
        (
            lambda u, x: u[0] ** 2 - u[1] ** 2 + u[1] ** 4 + (u[2:] - x[2:]).square().sum(),
            None,
            lambda x: 0 * x,
        ),
        (hump, None, lambda x: x + torch.tensor([0.1, 0.2, 1.5, 2.5], dtype=DOUBLE)[:, None]),
    ],
    ids=["convex", "log-domain", "sphere", "saddle", "damped"],
)
def test_each_sample_is_solved_as_if_alone(
    objective: Callable[..., Tensor], equality: Callable[..., Any] | None, start: Callable[[Tensor], Tensor]
) -> None:
    x = normal(4, 5) * torch.tensor([0.01, 1, 3, 8], dtype=DOUBLE)[:, None]
    begin = start(x)
    together = solve(objective, equality, begin, x)
    # Sample 0 starts at its solution.
    begin = torch.cat([together.point.u[:1], begin[1:]])
    together = solve(objective, equality, begin, x)
    assert together.iterations[0] == 0
    assert len(set(together.iterations.tolist())) > 1, "all samples take equally long: nothing is tested"
    for index in range(4):
        alone = solve(objective, equality, begin[index : index + 1], x[index : index + 1])
        assert torch.equal(alone.point.u[0], together.point.u[index])
        assert torch.equal(alone.point.multipliers[0], together.point.multipliers[index])
        assert alone.iterations[0] == together.iterations[index]


def test_a_sample_without_a_value_leaves_the_others_alone() -> None:
    x = normal(3, 4).abs() + 0.5
    start = 3 / x
    spoiled = start.clone()
    spoiled[1, 2] = -1.0  # outside the domain of the logarithm
    whole = solve(lambda u, x: x @ u - u.log().sum(), None, start, x)
    hurt = solve(lambda u, x: x @ u - u.log().sum(), None, spoiled, x)
    assert torch.equal(hurt.point.u[[0, 2]], whole.point.u[[0, 2]])
    assert torch.equal(hurt.point.u[1], spoiled[1])
    assert hurt.point.finite.tolist() == [True, False, True]
    assert hurt.iterations[1] == 0
