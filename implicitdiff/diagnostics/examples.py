"""Diagnostics, a problem's own example: the inputs to try it on, at the sizes that are asked for.

In: a problem and sizes by name. Out: its batched inputs. Used by `compare.py` and by the command line.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from implicitdiff.errors import OptionError, ProblemDefinitionError
from implicitdiff.problem import Problem, require_problem


def example_sizes(problem: Problem) -> dict[str, Any]:
    """The sizes that `problem.example` takes, with their defaults (None where there is none)."""
    if not problem.declares("example"):
        return {}
    parameters = inspect.signature(problem.example).parameters.values()
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {p.name: None if p.default is p.empty else p.default for p in parameters if p.kind in named}


def example_inputs(problem: Problem, sizes: Mapping[str, Any] | None = None) -> tuple[Any, ...]:
    """`problem.example(**sizes)` as a tuple.

    Args:
        problem: A problem that declares `example`, as in `def example(self, batch=3, n=9): ...`.
        sizes: Some of its keywords; None or empty: its defaults.

    Raises:
        ProblemDefinitionError: It declares no example, or the example is no tuple of inputs.
        OptionError: `example` has no keyword of that name.
    """
    require_problem(problem)
    name, sizes = type(problem).__name__, dict(sizes or {})
    if not problem.declares("example"):
        raise ProblemDefinitionError(
            f"{name} declares no example, so there are no inputs to try it on: add a method "
            "example(self, batch=3, n=9) that returns a tuple of batched inputs, or pass the inputs"
        )
    parameters = inspect.signature(problem.example).parameters.values()
    known = example_sizes(problem)
    unknown = [size for size in sizes if size not in known]
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters):
        takes = f"it takes {', '.join(known)}" if known else "it takes no sizes"
        raise OptionError(
            f"example of {name} has no size {', '.join(map(repr, unknown))}: {takes}; a size is a keyword of the "
            "method, as in def example(self, batch=3, n=9)"
        )
    made: Any = problem.example(**sizes)
    if not isinstance(made, tuple):
        raise ProblemDefinitionError(
            f"example of {name} returned a {type(made).__name__}, not a tuple of inputs: return (x,) for one input"
        )
    return made
