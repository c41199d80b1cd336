"""The optimality rule: what passes, what is refused, and what each refusal is called."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from implicitdiff.errors import OptionError
from implicitdiff.optimality import check, irreducible, measure, tolerance
from implicitdiff.status import Status
from tests.plan_double import PlanDouble

DOUBLE = torch.float64


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE).to(dtype)


def plan_of(
    objective: Callable[..., Tensor], equality: Callable[..., Tensor] | None, *theta: Tensor
) -> PlanDouble:
    return PlanDouble(objective, equality, theta[0][0], theta, (True,) * len(theta))


def entropy(u: Tensor, x: Tensor) -> Tensor:
    return torch.special.xlogy(u, u).sum() - x @ u


def sums_to_one(u: Tensor, x: Tensor) -> Tensor:
    return u.sum() - 1


def softmax_case(x: Tensor) -> tuple[PlanDouble, Tensor, tuple[Tensor, ...]]:
    return plan_of(entropy, sums_to_one, x), x.softmax(1), (1 - x.logsumexp(1),)


def pooling_case(x: Tensor) -> tuple[PlanDouble, Tensor, tuple[Tensor, ...]]:
    # The weighted mean of three shifted copies of x, in closed form.
    def objective(u: Tensor, x: Tensor) -> Tensor:
        return (u - x).square().sum() + 2 * (u - 3 * x).square().sum() + 0.5 * (u + x + 1).square().sum()

    return plan_of(objective, None, x), (x + 6 * x - 0.5 * (x + 1)) / 3.5, ()


def sphere_case(x: Tensor) -> tuple[PlanDouble, Tensor, tuple[Tensor, ...]]:
    plan = plan_of(lambda u, x: -(x * u).sum(), lambda u, x: u.square().sum() - 1, x)
    return plan, x / x.norm(dim=1, keepdim=True), (-x.norm(dim=1) / 2,)


CASES = pytest.mark.parametrize("case", [softmax_case, pooling_case, sphere_case])
Case = Callable[[Tensor], tuple[PlanDouble, Tensor, tuple[Tensor, ...]]]


@CASES
def test_a_thousand_float32_solutions_pass(case: Case) -> None:
    x = normal(1000, 4, dtype=torch.float32)
    plan, u, lam = case(x)
    found = check(plan, (u,), lam, (x,), tolerance(torch.float32))
    assert found.status.tolist() == [Status.OK] * 1000
    assert found.residuals.relative.max() < 0.1 * tolerance(torch.float32)


@CASES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_percent_off_is_refused(case: Case, dtype: torch.dtype) -> None:
    x = normal(100, 4, dtype=dtype)
    plan, u, lam = case(x)
    step = normal(100, 4, seed=1, dtype=dtype)
    off = u + 0.01 * u.norm(dim=1, keepdim=True) * step / step.norm(dim=1, keepdim=True)
    found = check(plan, (off.clamp_min(1e-30) if case is softmax_case else off,), lam, (x,), tolerance(dtype))
    assert found.status.tolist() == [Status.NOT_OPTIMAL] * 100


def test_residuals_name_the_worst_constraint_leaf() -> None:
    x = normal(2, 3)
    plan = plan_of(lambda u, x: (u - x).square().sum(), lambda u, x: (u[0] - 1, u[1:] - x[1:] ** 2), x)
    u = x.clone()
    u[:, 0] = 1
    u[0, 1:] = x[0, 1:] ** 2
    u[1, 1:] = x[1, 1:] ** 2 + torch.tensor([0.0, 0.3])
    u[0, 0] = 1.5
    lam = (torch.zeros(2).double(), torch.zeros(2, 2).double())
    found = measure(plan, (u,), lam, (x,))
    assert found.leaf.tolist() == [0, 1]
    torch.testing.assert_close(found.constraint, torch.tensor([0.5, 0.3], dtype=DOUBLE))
    expected = torch.stack([(2 * (u - x)).abs().amax(1), found.gradient]).amax(0)
    torch.testing.assert_close(found.gradient, expected)
    assert (found.relative >= found.violation).all()


def test_an_exact_zero_is_optimal_even_against_a_zero_scale() -> None:
    x = torch.zeros(2, 3, dtype=DOUBLE)
    plan = plan_of(lambda u, x: (u - x).square().sum(), None, x)
    found = check(plan, (x,), (), (x,), 1e-8)
    assert found.status.tolist() == [Status.OK, Status.OK]
    assert found.residuals.relative.tolist() == [0.0, 0.0]


class OneTerm(PlanDouble):
    """A plan that sees D_u L as a single term, so that nothing cancels in it."""

    def stationarity(self, u, lam, theta):  # type: ignore[no-untyped-def]
        found = super().stationarity(u, lam, theta)
        return dataclasses.replace(found, gradient_scale=found.gradient[0].abs().amax(1))


def test_a_single_term_is_held_against_its_linear_part() -> None:
    x = normal(2, 3)
    plan = OneTerm(lambda u, x: (u - x).square().sum(), None, x[0], (x,), (True,))
    rounded = x * (1 + 4e-16)
    assert not torch.equal(rounded, x)
    assert check(plan, (rounded,), (), (x,), 1e-8).status.tolist() == [Status.OK] * 2
    assert check(plan, (1.01 * x,), (), (x,), 1e-8).status.tolist() == [Status.NOT_OPTIMAL] * 2


class InfiniteScale(PlanDouble):
    """A plan whose scale is infinite, as with the logarithm of an underflowed entry."""

    def stationarity(self, u, lam, theta):  # type: ignore[no-untyped-def]
        found = super().stationarity(u, lam, theta)
        return type(found)(
            found.gradient,
            torch.full_like(found.gradient_scale, torch.inf),
            found.constraint,
            found.constraint_scale,
        )


def test_an_infinite_scale_excuses_nothing() -> None:
    x = normal(2, 3)
    plan = InfiniteScale(lambda u, x: (u - x).square().sum(), None, x[0], (x,), (True,))
    assert check(plan, (x + 1,), (), (x,), 1e-8).status.tolist() == [Status.NOT_OPTIMAL] * 2
    assert check(plan, (x,), (), (x,), 1e-8).status.tolist() == [Status.OK] * 2


def test_not_finite_is_told_apart() -> None:
    x = normal(4, 3)
    plan, u, lam = sphere_case(x)
    u, nu = u.clone(), lam[0].clone()
    u[1, 0], nu[2], u[3, 1] = torch.nan, torch.inf, torch.inf
    found = check(plan, (u,), (nu,), (x,), 1e-8)
    assert found.status.tolist() == [Status.OK, Status.NONFINITE, Status.NONFINITE, Status.NONFINITE]


def test_one_bad_sample_changes_no_other_bits() -> None:
    x = normal(3, 4)
    plan, u, lam = softmax_case(x)
    before = check(plan, (u,), lam, (x,), 1e-8)
    hurt = u.clone()
    hurt[1] = torch.nan
    after = check(plan, (hurt,), lam, (x,), 1e-8)
    assert torch.equal(before.residuals.relative[[0, 2]], after.residuals.relative[[0, 2]])
    assert after.status.tolist() == [Status.OK, Status.NONFINITE, Status.OK]


# Entries that underflowed


def test_underflowed_entries_leave_the_check() -> None:
    x = torch.tensor([[0.0, -1.0, -500.0], [0.0, -1.0, -2.0]], dtype=torch.float32)
    plan, u, lam = softmax_case(x)
    assert u[0, 2] == 0
    found = check(plan, (u,), lam, (x,), tolerance(torch.float32))
    assert found.status.tolist() == [Status.OK, Status.OK]
    plain = check(plan, (u[1:],), (lam[0][1:],), (x[1:],), tolerance(torch.float32))
    assert torch.equal(found.residuals.gradient[1:], plain.residuals.gradient)


def test_the_entries_that_did_not_underflow_are_still_checked() -> None:
    x = torch.tensor([[0.0, -1.0, -500.0]], dtype=torch.float32)
    plan, u, lam = softmax_case(x)
    off = u + torch.tensor([[0.01, -0.01, 0.0]])
    assert check(plan, (off,), lam, (x,), tolerance(torch.float32)).status.tolist() == [Status.NOT_OPTIMAL]


def test_a_zero_with_a_finite_gradient_stays_in_the_check() -> None:
    x = torch.ones(1, 2, dtype=DOUBLE)
    plan = plan_of(lambda u, x: (u - x).square().sum(), None, x)
    u = torch.tensor([[1.0, 0.0]], dtype=DOUBLE)
    assert check(plan, (u,), (), (x,), 1e-8).status.tolist() == [Status.NOT_OPTIMAL]


# Constraints that cannot be met


@pytest.mark.parametrize("start", [0.0, 0.5, 30.0])
def test_contradicting_linear_constraints_are_proved_anywhere(start: float) -> None:
    x = normal(2, 3)
    plan = plan_of(lambda u, x: (u - x).square().sum(), lambda u, x: (u.sum() - 1, u.sum() - 2), x)
    u = torch.full((2, 3), start, dtype=DOUBLE)
    found = check(plan, (u,), (torch.zeros(2).double(), torch.zeros(2).double()), (x,), 1e-8)
    assert found.status.tolist() == [Status.INFEASIBLE] * 2


def test_a_violation_that_a_step_removes_is_not_infeasible() -> None:
    x = normal(2, 3)
    plan = plan_of(lambda u, x: (u - x).square().sum(), lambda u, x: (u.sum() - 1, 2 * u.sum() - 2), x)
    u = torch.zeros(2, 3, dtype=DOUBLE)
    found = check(plan, (u,), (torch.zeros(2).double(), torch.zeros(2).double()), (x,), 1e-8)
    assert found.status.tolist() == [Status.NOT_OPTIMAL] * 2


def test_a_nonlinear_constraint_is_infeasible_only_where_no_step_helps() -> None:
    x = torch.tensor([[0.0, 0.0], [1e-9, 0.0], [1.0, 0.5]], dtype=DOUBLE)
    plan = plan_of(lambda u, x: (u - x).square().sum(), lambda u, x: u.square().sum() + 1, x)
    assert irreducible(plan, (x,), (x,), 1e-8).tolist() == [True, True, False]


def test_a_sample_that_is_not_finite_does_not_stop_the_others() -> None:
    x = normal(3, 3)
    plan = plan_of(lambda u, x: (u - x).square().sum(), lambda u, x: (u.sum() - 1, u.sum() - 2), x)
    u = x.clone()
    u[1] = torch.nan
    assert irreducible(plan, (u,), (x,), 1e-8).tolist() == [True, False, True]


def test_tolerance_follows_the_dtype_and_may_be_overridden() -> None:
    assert tolerance(torch.float64) == torch.finfo(torch.float64).eps ** 0.5
    assert tolerance(torch.float32) == torch.finfo(torch.float32).eps ** 0.5
    assert tolerance(torch.float32, 1e-2) == 1e-2
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(OptionError, match="optimality_tol"):
            tolerance(torch.float32, wrong)
