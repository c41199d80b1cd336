"""Structure, shapes and dtype of the variables: from `init`, or from what `solve` returned."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch

import implicitdiff as idf
from implicitdiff.graph.trace import solution_example, trace_problem, variable_example
from implicitdiff.inputs import bind
from tests.tracing import data, declare

X = data(5, 3)


def example_of(init: Any, x: torch.Tensor = X) -> Any:
    problem = declare(lambda u, x: x.sum(), init=init)
    return variable_example(problem, bind(problem, (x,)))


def test_variables_come_from_init() -> None:
    leaves, spec = example_of(lambda x: {"a": x.mean(), "b": (x.new_zeros(2, 4),)})
    assert [tuple(leaf.shape) for leaf in leaves] == [(), (2, 4)]
    assert all(leaf.is_meta and leaf.dtype == torch.float64 for leaf in leaves)
    assert spec.num_leaves == 2


def test_init_may_read_values_where_there_are_some() -> None:
    def init(x):
        return torch.as_tensor(np.sort(x.numpy()))[: 2 if x.sum() < 1e9 else 3]

    assert [tuple(leaf.shape) for leaf in example_of(init).leaves] == [(2,)]
    for x in (X.to("meta"), X[:0]):
        with pytest.raises(idf.TraceError, match=r"Declared\.init"):
            example_of(init, x)


def test_init_is_run_once_per_signature_unless_it_reads_values() -> None:
    calls = itertools.count()  # a list would be part of the signature

    def init(x):
        next(calls)
        return x[: x.shape[0] - 1].clone()

    problem = declare(lambda u, x: x.sum(), init=init)
    for x in (X, X + 1, data(4, 3)):
        assert variable_example(problem, bind(problem, (x,))).leaves[0].shape == (2,)
    assert next(calls) == 1
    assert variable_example(problem, bind(problem, (data(5, 4),))).leaves[0].shape == (3,)
    assert next(calls) == 3
    problem = declare(lambda u, x: x.sum(), init=lambda x: x[: int(x[0])].clone())
    for count in (1.0, 2.0):
        x = torch.full((5, 3), count, dtype=torch.float64)
        assert variable_example(problem, bind(problem, (x,))).leaves[0].shape == (int(count),)


@pytest.mark.parametrize(
    ("init", "error", "message"),
    [
        (lambda x: torch.zeros(3, dtype=torch.int64), idf.InputError, "torch.int64 for u"),
        (lambda x: {"a": x > 0}, idf.InputError, r"torch.bool for u\['a'\]"),
        (lambda x: torch.zeros(3), idf.InputError, "torch.float32 for u, but the inputs are torch.float64"),
        (lambda x: None, idf.ProblemDefinitionError, "init returned None for u"),
        (lambda x: 0.0, idf.ProblemDefinitionError, "the float 0.0 for u"),
        (lambda x: (), idf.ProblemDefinitionError, "without entries"),
        (lambda x: x[:0], idf.ProblemDefinitionError, "without entries"),
        (lambda x, y: x, idf.ProblemDefinitionError, "init raised TypeError"),
        (lambda x: x @ x[:2], idf.ProblemDefinitionError, r"init raised RuntimeError.*x \(3,\)"),
    ],
)
def test_wrong_starts(init: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        example_of(init)


def test_variables_come_from_solve_where_there_is_no_init() -> None:
    class Solved(idf.Problem):
        def objective(self, u, x):
            return (u["a"] - x).square().sum() + u["b"] ** 2

        def solve(self, x):
            return {"a": x, "b": x.sum(1)}

    problem = Solved()
    bound = bind(problem, (X,))
    with pytest.raises(idf.ProblemDefinitionError, match="declares no init"):
        variable_example(problem, bound)
    trace = trace_problem(problem, solution_example(problem, problem.solve(X), bound), bound)
    assert [(p.name, p.shape) for p in trace.variables] == [("u['a']", (3,)), ("u['b']", ())]
    for wrong, message in (
        (X[:4], r"shape \(4, 3\).*of size 5"),
        (X.sum(), "first axis has to be the batch axis"),
        (X.long(), "torch.int64"),
        (X.float(), "torch.float32"),
    ):
        with pytest.raises(idf.SolutionError, match=message):
            solution_example(problem, wrong, bound)
    with pytest.raises(idf.ProblemDefinitionError, match="returned None"):
        solution_example(problem, None, bound)
