"""`check`: every row holds for sound problems, and the right row fails for each kind of unsound one."""

import math

import pytest
import torch
from torch import Tensor

import implicitdiff as idf
from implicitdiff.diagnostics import CheckReport, check
from implicitdiff.problems import OptimalTransport, RobustPooling
from tests.test_explain import Median, Portfolio

# The function hides the module of the same name.
CHECK_MODULE = check.__globals__


def verdicts(report: CheckReport) -> dict[str, str]:
    return {row.name: row.verdict for row in report.rows}


def failed(report: CheckReport) -> list[str]:
    return [row.name for row in report.rows if row.verdict.startswith("fail")]


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


# Sound problems


def test_an_unconstrained_problem():
    report = check(Median(), normal(3, 4, 6).float())
    assert report.ok
    assert [row.name for row in report.rows] == [
        "solve",
        "stationarity",
        "refined in float64",
        "second order",
        "finite differences: x",
        "finite differences: Parameter eps",
        "structured against dense",
    ]
    assert all(row.value <= row.tolerance or row.name == "second order" for row in report.rows)


def test_a_constrained_problem_with_a_shared_input():
    Q = normal(4, 4)
    report = check(Portfolio(), Q @ Q.mT + torch.eye(4), normal(3, 4), in_dims=(None, 0))
    assert report.ok
    assert {"feasibility", "multipliers", "LICQ", "finite differences: Q"} <= verdicts(report).keys()


def test_one_sample():
    assert check(Median(), normal(4, 6).float(), in_dims=None).ok


def test_dependent_constraints_that_are_proved_are_no_failure():
    report = check(OptimalTransport(gamma=3.0), *OptimalTransport().example())
    assert report.ok
    assert "1 dependent row, proved" in verdicts(report)["LICQ"]
    assert verdicts(report)["vjp against dense"] == "ok"
    assert "continued" not in str(report)


def test_a_hand_written_vjp_that_leaves_an_input_out():
    report = check(RobustPooling(alpha=None), *RobustPooling(alpha=None).example())
    assert report.ok
    assert verdicts(report)["vjp against dense"] == "ok: it gives nothing for alpha"


def test_the_report_is_readable():
    text = str(check(Median(), normal(3, 4, 6).float()))
    assert text.startswith("check of Median")
    assert text.endswith("all is well")
    assert max(map(len, text.splitlines())) <= 110


# Unsound ones


class Off(Median):
    """Its solve returns a point beside the solution."""

    def solve(self, x: Tensor) -> Tensor:
        return x.mean(2) + 1


def test_a_solve_that_returns_another_point():
    report = check(Off(), normal(3, 4, 6).float())
    assert not report.ok
    assert failed(report)[:2] == ["solve", "stationarity"]
    assert "NOT_OPTIMAL" in verdicts(report)["solve"]
    assert "failed: solve, stationarity" in str(report)


class Broken(Median):
    """Its solve raises."""

    def solve(self, x: Tensor) -> Tensor:
        raise idf.ConvergenceError("no luck")


def test_a_solve_that_raises():
    report = check(Broken(), normal(3, 4, 6).float())
    assert failed(report) == ["solve"]
    assert "no luck" in verdicts(report)["solve"]
    assert math.isnan(report.rows[0].value)


class WrongVjp(Median):
    """Its vjp is off by a factor."""

    def __init__(self) -> None:
        super().__init__(1.0)
        self.eps.requires_grad_(False)

    def vjp(self, u: Tensor, v: Tensor, x: Tensor) -> Tensor:
        return v[:, :, None].expand_as(x) / x.shape[2]


class BadShape(WrongVjp):
    """Its vjp returns a wrong shape."""

    def vjp(self, u: Tensor, v: Tensor, x: Tensor) -> Tensor:
        return v @ x


def test_a_wrong_vjp_and_one_that_raises():
    assert failed(check(WrongVjp(), normal(3, 4, 6))) == ["vjp against dense"]
    report = check(BadShape(), normal(3, 4, 7))
    assert failed(report) == ["vjp against dense"]
    assert "(3, 3, 7), expected shape (3, 4, 7)" in verdicts(report)["vjp against dense"]


class Saddle(idf.Problem):
    """Stationary at x, but a maximum in one direction."""

    def objective(self, u: Tensor, x: Tensor) -> Tensor:
        return ((u - x) ** 2 * torch.tensor([1.0, -1.0, 2.0], dtype=x.dtype)).sum()

    def solve(self, x: Tensor) -> Tensor:
        return x.clone()

    def init(self, x: Tensor) -> Tensor:
        return x


def test_a_point_that_is_no_minimum():
    report = check(Saddle(), normal(2, 3))
    assert failed(report) == ["second order"]
    (row,) = [row for row in report.rows if row.name == "second order"]
    assert row.value < 0


class Tangent(Saddle):
    """The same with the bad direction fixed by a constraint: now a minimum."""

    def equality(self, u: Tensor, x: Tensor) -> Tensor:
        return u[1] - x[1]


def test_curvature_counts_along_the_constraints_only():
    assert check(Tangent(), normal(2, 3)).ok


class Repeated(idf.Problem):
    """Constraints whose rows depend on each other through the data only."""

    def objective(self, u: Tensor, A: Tensor, x: Tensor) -> Tensor:
        return ((u - x) ** 2).sum()

    def equality(self, u: Tensor, A: Tensor, x: Tensor) -> Tensor:
        return A @ u

    def init(self, A: Tensor, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    def solve(self, A: Tensor, x: Tensor) -> Tensor:
        return x - (torch.linalg.pinv(A) @ (A @ x[:, :, None]))[:, :, 0]


def test_dependent_constraints_that_are_not_proved_fail_licq():
    A = normal(2, 2, 4)
    A = torch.cat([A, A.sum(1, keepdim=True)], 1)
    report = check(Repeated(), A, normal(2, 4))
    assert "LICQ" in failed(report)
    assert "1 dependent row, not proved" in verdicts(report)["LICQ"]


class Shifted(Portfolio):
    """Its solve violates the constraint."""

    def solve(self, Q: Tensor, mu: Tensor) -> Tensor:
        return torch.full_like(mu, 1 / mu.shape[1]) + 0.1


def test_a_solution_that_violates_a_constraint():
    report = check(Shifted(), torch.eye(4).double(), torch.ones(3, 4).double(), in_dims=(None, 0))
    assert failed(report) == ["solve", "feasibility"]


# The rows about gradients can fail


def test_a_wrong_gradient_is_seen_by_finite_differences_and_by_the_dense_formula(monkeypatch):
    right = CHECK_MODULE["_layer_gradients"]
    monkeypatch.setitem(CHECK_MODULE, "_layer_gradients", lambda *args: [1.001 * g for g in right(*args)])
    report = check(Median(), normal(3, 4, 6))
    names = ["finite differences: x", "finite differences: Parameter eps", "structured against dense"]
    assert failed(report) == names


def test_a_missing_term_of_one_input_is_seen(monkeypatch):
    right = CHECK_MODULE["_layer_gradients"]
    monkeypatch.setitem(
        CHECK_MODULE, "_layer_gradients", lambda *args: [g * (g.dim() > 0) for g in right(*args)]
    )
    assert failed(check(Median(), normal(3, 4, 6))) == [
        "finite differences: Parameter eps",
        "structured against dense",
    ]


def test_large_problems_are_checked_as_far_as_possible():
    report = check(RobustPooling("quadratic"), torch.ones(1, 3500, 2))
    assert report.ok
    assert verdicts(report)["derivatives"].startswith("not run: m + p = 3500")


def test_the_problem_is_left_alone():
    problem = Median()
    check(problem, normal(3, 4, 6).float())
    assert problem.eps.dtype == torch.float32
    assert problem.eps.grad is None
    assert not problem.declares("solve")


def test_what_is_no_problem_is_refused():
    with pytest.raises(idf.ProblemDefinitionError):
        check(torch.nn.Linear(2, 2), torch.ones(2, 2))
    with pytest.raises(idf.InputError, match="x"):
        check(Median(), torch.full((2, 3, 4), math.nan))
