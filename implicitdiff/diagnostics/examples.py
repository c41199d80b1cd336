"""Diagnostics, a problem's own example: the inputs to try it on, at the sizes that are asked for.

In: a problem and sizes by name. Out: its batched inputs. Used by `compare.py` and by the command line.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from implicitdiff.errors import OptionError, ProblemDefinitionError
from implicitdiff.problem import Problem, require_problem


def example_inputs(problem: Any, sizes: Mapping[str, Any] | None = None) -> tuple[Any, ...]:
    """`problem.example(**sizes)` as a tuple.

    Args:
        problem: A problem, or a discrete solver, with an `example`, as in `def example(self, batch=3, n=9): ...`.
        sizes: Some of its keywords; None or empty: its defaults.

    Raises:
        ProblemDefinitionError: It declares no example, or the example is no tuple of inputs.
        OptionError: `example` has no keyword of that name.
    """
    name, sizes = type(problem).__name__, dict(sizes or {})
    if isinstance(problem, Problem):
        require_problem(problem)
    has = problem.declares("example") if isinstance(problem, Problem) else hasattr(problem, "example")
    if not has:
        raise ProblemDefinitionError(
            f"{name} declares no example, so there are no inputs to try it on: add a method "
            "example(self, batch=3, n=9) that returns a tuple of batched inputs, or pass the inputs"
        )
    parameters = inspect.signature(problem.example).parameters.values()
    known = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
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
