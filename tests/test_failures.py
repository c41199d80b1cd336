"""The failure policy: which error, which line, which warning, what is recorded, and what stays as it is."""

import re
import warnings

import pytest
import torch
from torch import Tensor

from implicitdiff.errors import (
    ConvergenceError,
    ImplicitDiffError,
    InfeasibleError,
    NotOptimalError,
    OptimalityWarning,
    OptionError,
    SingularError,
    SolutionError,
)
from implicitdiff.failures import ON_FAILURE, enforce, failed, name_samples, validate_policy
from implicitdiff.optimality import Check, Residuals
from implicitdiff.records import record
from implicitdiff.status import Status

TOL = 1.5e-8


def found(
    *status: Status, gradient: list[float] | None = None, constraint: list[float] | None = None
) -> Check:
    count = len(status)
    g = torch.tensor(
        [2.1e-2 if s == Status.NOT_OPTIMAL else 0.0 for s in status] if gradient is None else gradient
    )
    h = torch.zeros(count) if constraint is None else torch.tensor(constraint)
    residuals = Residuals(
        g, torch.full((count,), 1.3), h, torch.full((count,), 2.0), torch.ones(count, dtype=torch.int64)
    )
    return Check(residuals, torch.tensor([int(s) for s in status], dtype=torch.int8), TOL)


def test_nothing_happens_when_all_is_well() -> None:
    check = found(Status.OK, Status.WEAKLY_ACTIVE, Status.DAMPED)
    with record() as log:
        for policy in ON_FAILURE:
            assert enforce(check, validate_policy(policy), "Newton") is check.status
    assert log.events == ()


def test_the_line_names_samples_numbers_and_a_remedy() -> None:
    check = found(Status.OK, Status.NOT_OPTIMAL, Status.OK, Status.NOT_OPTIMAL, gradient=[0, 2.1e-2, 0, 1e-3])
    with pytest.raises(NotOptimalError) as caught:
        enforce(check, "raise", "solve of Portfolio")
    assert str(caught.value) == (
        "samples 1, 3 of 4: |D_Y L| = 2.1e-02 > 1.5e-08 * 1.3 (worst: sample 1) after solve of Portfolio; "
        "let solve of Portfolio run further, or accept it with on_failure= or a larger optimality_tol="
    )


@pytest.mark.parametrize(
    ("status", "source", "error"),
    [
        (Status.NOT_OPTIMAL, "solve of P", NotOptimalError),
        (Status.NOT_CONVERGED, "Newton", ConvergenceError),
        (Status.NOT_CONVERGED, "solve of P", ConvergenceError),
        (Status.INFEASIBLE, "Newton", InfeasibleError),
        (Status.NONFINITE, "Newton", ConvergenceError),
        (Status.NONFINITE, "solve of P", SolutionError),
        (Status.SINGULAR, "solve of P", SingularError),
        (Status.INDEFINITE, "solve of P", NotOptimalError),
    ],
)
def test_each_status_has_its_error(status: Status, source: str, error: type[ImplicitDiffError]) -> None:
    with pytest.raises(error, match=r"^sample 1 of 2: ") as caught:
        enforce(found(Status.OK, status, gradient=[0.0, 1.0]), "raise", source)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)


def test_an_infeasible_sample_names_the_leaf_and_the_residual() -> None:
    check = found(Status.INFEASIBLE, Status.OK, constraint=[0.5, 0.0])
    with pytest.raises(InfeasibleError, match=re.escape("|h| of constraint leaf 1 = 5.0e-01 > 1.5e-08 * 2")):
        enforce(check, "raise", "Newton")


def test_a_violated_constraint_is_named_where_it_is_the_larger_residual() -> None:
    check = found(Status.NOT_OPTIMAL, gradient=[1e-7], constraint=[0.5])
    with pytest.raises(NotOptimalError, match=re.escape("|h| of constraint leaf 1")):
        enforce(check, "raise", "solve of P")
    check = found(Status.NOT_OPTIMAL, gradient=[0.9], constraint=[1e-7])
    with pytest.raises(NotOptimalError, match=re.escape("|D_Y L| = 9.0e-01")):
        enforce(check, "raise", "solve of P")


def test_several_kinds_share_one_line_and_the_gravest_gives_the_error() -> None:
    check = found(
        Status.NOT_CONVERGED, Status.INFEASIBLE, Status.OK, gradient=[1.0, 0, 0], constraint=[0, 1.0, 0]
    )
    with (
        pytest.raises(InfeasibleError, match=r"^sample 1 of 3: .*; and sample 0 of 3: ") as caught,
        record() as log,
    ):
        enforce(check, "raise", "Newton")
    assert "\n" not in str(caught.value)
    assert [(event.kind, event.where, event.samples) for event in log] == [
        ("INFEASIBLE", "forward", (1,)),
        ("NOT_CONVERGED", "forward", (0,)),
    ]


@pytest.mark.parametrize("policy", ["warn", "damp"])
def test_one_warning_per_call(policy: str) -> None:
    check = found(Status.NOT_OPTIMAL, Status.NOT_CONVERGED, Status.OK)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        enforce(check, validate_policy(policy), "Newton")
    assert [w.category for w in caught] == [OptimalityWarning]
    assert "\n" not in str(caught[0].message)


@pytest.mark.parametrize("policy", ["nan", "zero"])
def test_nan_and_zero_are_silent_but_recorded(policy: str) -> None:
    check = found(Status.NOT_OPTIMAL, Status.OK)
    with record() as log:
        status = enforce(check, validate_policy(policy), "Newton")
    assert torch.equal(status, check.status)
    assert failed(status).tolist() == [True, False]
    assert [event.samples for event in log] == [(0,)]


def test_damp_passes_finite_feasible_samples_on() -> None:
    check = found(Status.NOT_OPTIMAL, Status.NOT_CONVERGED, Status.INFEASIBLE, Status.NONFINITE, Status.OK)
    with pytest.warns(OptimalityWarning):
        status = enforce(check, "damp", "Newton")
    assert status.tolist() == [Status.DAMPED, Status.DAMPED, Status.INFEASIBLE, Status.NONFINITE, Status.OK]
    assert failed(status).tolist() == [False, False, True, True, False]
    assert check.status[0] == Status.NOT_OPTIMAL  # the check itself is not changed


def test_a_hint_comes_first() -> None:
    with pytest.raises(NotOptimalError, match="; turn the sign; let "):
        enforce(found(Status.NOT_OPTIMAL), "raise", "solve of P", "turn the sign")


def test_a_failure_that_only_solve_knows_of_is_said_to_be_so() -> None:
    check = found(Status.SINGULAR)
    with pytest.raises(SingularError, match=r"solve of P reports SINGULAR, though .* <= "):
        enforce(check, "raise", "solve of P")


def test_unknown_policies_are_refused() -> None:
    with pytest.raises(OptionError, match=r"on_failure='ignore' .* raise, warn, nan, zero, damp"):
        validate_policy("ignore")


def test_samples_are_named_briefly() -> None:
    assert name_samples([3], 32) == "sample 3 of 32"
    assert name_samples([3, 7], 32) == "samples 3, 7 of 32"
    assert name_samples(list(range(20)), 32) == "samples 0, 1, 2, 3, 4, 5, 6, 7, ... (20 in all) of 32"


def test_the_line_is_short_for_a_large_batch() -> None:
    status: Tensor = torch.full((5000,), int(Status.NOT_OPTIMAL), dtype=torch.int8)
    residuals = Residuals(*(torch.ones(5000) for _ in range(4)), torch.zeros(5000, dtype=torch.int64))
    with pytest.raises(NotOptimalError) as caught:
        enforce(Check(residuals, status, TOL), "raise", "Newton")
    assert len(str(caught.value)) < 300
