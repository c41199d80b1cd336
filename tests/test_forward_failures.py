"""Failures of the forward pass: which samples are named, which error it is, what each policy leaves alone."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

import implicitdiff as idf
from implicitdiff.errors import (
    ConvergenceError,
    InfeasibleError,
    NotOptimalError,
    OptimalityWarning,
    OptionError,
    SolutionError,
)
from implicitdiff.optimizers import Newton
from implicitdiff.records import record
from implicitdiff.status import Status
from tests.test_forward import DOUBLE, Softmax, Solved, forward, normal


def off(x: Tensor) -> Tensor:
    """The solution, but 1 % off in sample 1."""
    u = x.softmax(1)
    u[1] *= 1.01
    return u


def test_a_point_that_is_not_optimal_is_refused_by_name() -> None:
    with pytest.raises(NotOptimalError, match=r"^sample 1 of 3: \|h\| of equality = 1\.0e-02") as caught:
        forward(Solved(off), normal(3, 4))
    assert "solve of Solved" in str(caught.value)


def test_the_wrong_sign_of_multipliers_is_recognised() -> None:
    x = normal(3, 4)
    turned = lambda x: idf.Solution(x.softmax(1), equality_multipliers=x.logsumexp(1) - 1)  # noqa: E731
    with pytest.raises(NotOptimalError, match="multipliers have the wrong sign"):
        forward(Solved(turned), x)
    other = lambda x: idf.Solution(x.softmax(1), equality_multipliers=x.logsumexp(1) + 3)  # noqa: E731
    with pytest.raises(NotOptimalError, match="optimal, but not with these multipliers"):
        forward(Solved(other), x)


def test_a_nan_in_one_sample_is_that_samples_failure() -> None:
    def answer(x: Tensor) -> Tensor:
        u = x.softmax(1)
        u[2, 1] = torch.nan
        return u

    with pytest.raises(SolutionError, match=r"^sample 2 of 3: solve of Solved gave NaN or inf"):
        forward(Solved(answer), normal(3, 4))
    found = forward(Solved(answer), normal(3, 4), on_failure="nan")
    assert found.status.tolist() == [Status.OK, Status.OK, Status.NONFINITE]
    assert found.failed.tolist() == [False, False, True]


def test_solve_may_say_why() -> None:
    said = torch.tensor([0, int(Status.NOT_CONVERGED), 0])
    with pytest.raises(ConvergenceError, match=r"^sample 1 of 3"):
        forward(Solved(lambda x: idf.Solution(off(x), status=said)), normal(3, 4))


def test_newton_that_runs_out_of_steps() -> None:
    x = 5 * normal(3, 4)
    with pytest.raises(ConvergenceError, match=r"^samples 0, 1, 2 of 3: .* after Newton; raise max_iter"):
        forward(Softmax(), x, optimizer=Newton(max_iter=1))


class Bad(idf.Problem):
    """Outside the domain of its objective at the start of sample 1."""

    def objective(self, u: Tensor, x: Tensor) -> Tensor:
        return x @ u - u.log().sum()

    def init(self, x: Tensor) -> Tensor:
        return 3 / x


def test_a_start_outside_the_domain_is_said_to_be_one() -> None:
    x = normal(3, 4).abs() + 0.5
    x[1, 0] = -1.0
    with pytest.raises(ConvergenceError, match=r"^sample 1 of 3: .* not finite at the start"):
        forward(Bad(), x)


def test_a_flat_overflow_is_no_solution() -> None:
    class Far(Bad):
        def objective(self, u: Tensor, x: Tensor) -> Tensor:
            return (1 + (u - x).square().sum()).sqrt()  # infinite at u = 1e300, with slope 0

    x = normal(2, 3)
    start = torch.stack([x[0], torch.full((3,), 1e300, dtype=DOUBLE)])
    found = forward(Far(), x, init=(start,), on_failure="nan")
    assert found.status.tolist() == [Status.OK, Status.NONFINITE]


class Contradiction(idf.Problem):
    def objective(self, u: Tensor, x: Tensor) -> Tensor:
        return (u - x).square().sum()

    def equality(self, u: Tensor, x: Tensor) -> dict[str, Tensor]:
        return {"a": u[0] - x[0], "b": u.sum() - 1, "c": 2 * u.sum() - 4}

    def init(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def test_contradicting_constraints_are_named_with_their_residual() -> None:
    pattern = r"^samples 0, 1 of 2: \|h\| of equality\['[bc]'\] = \d\.\de-01 > .*"
    pattern += r": equality\['b'\], equality\['c'\] contradict each other there"
    with pytest.raises(InfeasibleError, match=pattern):
        forward(Contradiction(), normal(2, 3))
    own = type("Own", (Contradiction,), {"solve": lambda self, x: torch.zeros_like(x)})
    with pytest.raises(InfeasibleError, match=r"equality\['c'\] = 4\.0e"):
        forward(own(), normal(2, 3))


@contextmanager
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("policy", ["warn", "nan", "zero", "damp"])
def test_policies_leave_the_solutions_alone(policy: str) -> None:
    x = normal(3, 4)
    with record() as log, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = forward(Solved(off), x, on_failure=policy)
    assert torch.equal(found.u[0], off(x))
    assert len(caught) == (policy in ("warn", "damp"))
    assert all(warning.category is OptimalityWarning for warning in caught)
    assert found.status[1] == (Status.DAMPED if policy == "damp" else Status.NOT_OPTIMAL)
    assert found.failed.tolist() == [False, policy != "damp", False]
    assert [(event.kind, event.samples) for event in log] == [("NOT_OPTIMAL", (1,))]


def test_one_bad_sample_leaves_the_others_bit_identical() -> None:
    x = 4 * normal(4, 5)
    good = forward(Softmax(), x)
    start = torch.full_like(x, 0.2)
    start[2, 3] = -1.0
    hurt = forward(Softmax(), x, init=(start,), on_failure="zero")
    keep = [0, 1, 3]
    assert hurt.failed.tolist() == [False, False, True, False]
    for mine, theirs in ((hurt.u[0], good.u[0]), (hurt.multipliers[0], good.multipliers[0])):
        assert torch.equal(mine[keep], theirs[keep])
    assert torch.equal(hurt.residual[keep], good.residual[keep])
    assert torch.equal(hurt.iterations[keep], good.iterations[keep])


def test_a_thousand_float32_calls_give_no_warning() -> None:
    x = 2 * normal(1000, 3, dtype=torch.float32)
    with no_warnings(), record() as log:
        found = forward(Solved(), x, on_failure="warn")
    assert not found.failed.any()
    assert log.events == ()


def test_the_tolerance_is_the_callers() -> None:
    x = normal(3, 4)
    assert not forward(Solved(off), x, tol=0.1).failed.any()
    with pytest.raises(OptionError, match="optimality_tol"):
        forward(Solved(off), x, tol=-1.0)
    with pytest.raises(OptionError, match="on_failure"):
        forward(Solved(off), x, on_failure="ignore")


def test_entries_that_underflow_need_no_multipliers_from_solve() -> None:
    x = torch.tensor([[0.0, -1.0, -500.0], [0.3, -1.0, -2.0]], dtype=torch.float32)
    found = forward(Solved(), x)
    assert found.u[0][0, 2] == 0
    assert found.status.tolist() == [Status.OK, Status.OK]
    torch.testing.assert_close(found.multipliers[0], 1 - x.logsumexp(1))
