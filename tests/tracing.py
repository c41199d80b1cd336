"""Shorthand for tests of the trace: a Problem from plain functions, and its graphs for given inputs."""

from collections.abc import Callable
from typing import Any

import torch

import implicitdiff as idf
from implicitdiff.graph.trace import Trace, trace_problem, variable_example
from implicitdiff.inputs import bind


def declare(
    objective: Callable[..., Any],
    equality: Callable[..., Any] | None = None,
    init: Callable[..., Any] = lambda x: x.clone(),
) -> idf.Problem:
    """A Problem with these functions of (u, x) and (x), none of which takes self."""
    hooks: dict[str, Any] = {"objective": staticmethod(objective), "init": staticmethod(init)}
    if equality is not None:
        hooks["equality"] = staticmethod(equality)
    return type("Declared", (idf.Problem,), hooks)()


def traced(problem: idf.Problem, *inputs: Any, in_dims: Any = 0) -> Trace:
    """The graphs of a Problem for these inputs."""
    bound = bind(problem, inputs, in_dims)
    return trace_problem(problem, variable_example(problem, bound), bound)


def data(*shape: int, seed: int = 0) -> torch.Tensor:
    """Float64 numbers without symmetry."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def targets(trace: Trace) -> list[str]:
    """The operations of the objective, in order."""
    return [str(node.target) for node in trace.objective.module.graph.nodes if node.op == "call_function"]
