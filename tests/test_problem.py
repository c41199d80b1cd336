"""The declaration: which hooks are declared, what is refused, and the errors' family tree."""

import inspect
from typing import Any

import pytest
import torch

import implicitdiff as idf
from implicitdiff import errors
from implicitdiff.problem import require_problem


class Declared(idf.Problem):
    def objective(self, u, x):
        return (u - x).square().sum()

    def init(self, x):
        return x.clone()


def test_declares_sees_overrides_in_classes_and_instances() -> None:
    class Child(Declared):
        def equality(self, u, x):
            return u.sum()

    assert [name for name in idf.Problem.HOOKS if Child().declares(name)] == ["objective", "equality", "init"]
    problem = Declared()
    assert not problem.declares("solve")
    problem.solve = lambda x: x
    assert problem.declares("solve")
    with pytest.raises(idf.ProblemDefinitionError, match="no hook named 'step'"):
        problem.declares("step")


@pytest.mark.parametrize("hook", idf.Problem.HOOKS)
def test_an_undeclared_hook_says_so(hook: str) -> None:
    parameters = inspect.signature(getattr(idf.Problem(), hook)).parameters.values()
    arguments = [0 for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    with pytest.raises(idf.ProblemDefinitionError, match=f"Problem does not declare {hook}"):
        getattr(idf.Problem(), hook)(*arguments)


def test_calling_a_problem_points_to_the_layer() -> None:
    with pytest.raises(idf.ProblemDefinitionError, match=r"wrap it in idf\.DeclarativeLayer"):
        Declared()(torch.zeros(2, 3))


def test_hooks_are_documented() -> None:
    for hook in idf.Problem.HOOKS:
        assert inspect.getdoc(getattr(idf.Problem, hook)), hook
    first_line = (inspect.getdoc(idf.Problem.solve) or "").splitlines()[0]
    assert "hook, not the thing to call" in first_line


def test_a_complete_problem_is_handed_back() -> None:
    problem = Declared()
    assert require_problem(problem) is problem

    class Solved(idf.Problem):
        def objective(self, u, x):
            return u.sum()

        def solve(self, x):
            return x

    require_problem(Solved())


class WithoutObjective(idf.Problem):
    def init(self, x):
        return x


class WithoutStart(idf.Problem):
    def objective(self, u, x):
        return u.sum()


class WithoutSuper(Declared):
    def __init__(self) -> None:
        pass


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        (lambda x: x, "expected a Problem, got function"),
        (torch.nn.Linear(2, 2), "expected a Problem, got Linear"),
        (None, "expected a Problem, got NoneType"),
        (Declared, r"got a class: write Declared\(\.\.\.\)"),
        (WithoutObjective(), "WithoutObjective does not declare objective"),
        (WithoutStart(), "declares neither init nor solve"),
        (WithoutSuper(), r"does not call super\(\).__init__\(\)"),
    ],
)
def test_incomplete_declarations(thing: Any, message: str) -> None:
    with pytest.raises(idf.ProblemDefinitionError, match=message):
        require_problem(thing)


def test_solution_is_frozen_and_defaults_to_nothing() -> None:
    solution = idf.Solution(torch.zeros(2))
    assert solution.equality_multipliers is None
    assert solution.status is None
    with pytest.raises(AttributeError):
        solution.u = torch.ones(2)  # type: ignore[misc]


def test_status_fits_int8_and_ok_is_zero() -> None:
    names = "OK NOT_CONVERGED NOT_OPTIMAL INFEASIBLE SINGULAR INDEFINITE NONFINITE WEAKLY_ACTIVE DAMPED"
    assert [status.name for status in idf.Status] == [*names.split(), "NOT_REGULAR"]
    tensor = torch.tensor(list(idf.Status), dtype=torch.int8)
    assert [idf.Status(int(value)) for value in tensor] == list(idf.Status)
    assert idf.Status.OK == 0


def test_every_error_has_the_root_and_a_builtin() -> None:
    classes = [c for c in vars(errors).values() if inspect.isclass(c) and c.__module__ == errors.__name__]
    for kind in classes:
        assert kind.__doc__
        if issubclass(kind, Warning):
            assert issubclass(kind, idf.ImplicitDiffWarning)
            continue
        assert issubclass(kind, idf.ImplicitDiffError)
        if kind is not idf.ImplicitDiffError:
            assert any(base.__module__ == "builtins" for base in kind.__mro__[1:-3]), kind
        assert kind.__name__ in idf.__all__ or kind is idf.ImplicitDiffError
    assert issubclass(idf.InputError, ValueError)
    assert issubclass(idf.NotSupportedYetError, NotImplementedError)
    assert issubclass(idf.ControlFlowError, idf.TraceError)
