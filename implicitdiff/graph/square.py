"""The residual of a system of equations as a graph: of ``residual`` as it is, of ``step`` subtracted from the variable.

Comes in: what the hook returned while it was traced, or its raw graph. Goes out: named errors where it does not fit the
variables, and a graph that returns the residual. Used by ``trace.py``.
"""

import math
from collections.abc import Sequence

import torch

from implicitdiff.errors import ProblemDefinitionError
from implicitdiff.graph.arguments import Arguments
from implicitdiff.graph.clean import depends_on, outputs
from implicitdiff.problem import Problem
from implicitdiff.pytrees import Spec, describe

aten = torch.ops.aten


def check_fits(problem: Problem, arguments: Arguments, spec: Spec, shapes: Sequence[tuple[int, ...]]) -> None:
    """Raise unless there are as many equations as unknowns.

    Args:
        problem: A ``Root`` or a ``FixedPoint``.
        arguments: With the structure and the shapes of the variables.
        spec: The structure of what the hook returned.
        shapes: The shapes of its leaves.

    Raises:
        ProblemDefinitionError: A step is not like the variables, leaf by leaf, or a residual has more or fewer
            entries than they have.
    """
    name, wanted = (
        f"{type(problem).__name__}.{problem.MAIN}",
        [f.shape for f in arguments.facts[: arguments.variables]],
    )
    assert arguments.variable_spec is not None
    if problem.MAIN == "step" and describe(spec) != describe(arguments.variable_spec):
        raise ProblemDefinitionError(
            f"{name} returned the structure {describe(spec)}, expected that of the variable, "
            f"{describe(arguments.variable_spec)} (a star stands for a tensor)"
        )
    if problem.MAIN == "step" and list(shapes) != wanted:
        raise ProblemDefinitionError(
            f"{name} returned {_shown(shapes)}, but the variable is {_shown(wanted)}: a step takes u to another u"
        )
    have, need = (sum(math.prod(shape) for shape in group) for group in (shapes, wanted))
    if have != need:
        raise ProblemDefinitionError(
            f"{name} returned {have} equations ({_shown(shapes)}) for {need} unknowns ({_shown(wanted)}): a root "
            "needs as many of each; where there are more equations, minimise their sum of squares in an idf.Problem"
        )


def check_used(problem: Problem, arguments: Arguments, module: torch.fx.GraphModule) -> None:
    """Raise if an output depends on no variable, or a variable is in no output: J would have a zero row or column.

    Raises:
        ProblemDefinitionError: Naming it.
    """
    name = f"{type(problem).__name__}.{problem.MAIN}"
    results, positions = outputs(module), range(arguments.variables)
    for index, result in enumerate(results):
        if result.meta["val"].numel() and not depends_on(module, result, positions):
            which = f" (output {index})" if len(results) > 1 else ""
            raise ProblemDefinitionError(
                f"{name}{which} does not depend on the variable in a differentiable way, so it cannot be made zero by "
                "choosing it: check that it uses its first argument, outside of detach() and no_grad()"
            )
    for position, fact in enumerate(arguments.facts[: arguments.variables]):
        if not any(depends_on(module, result, [position]) for result in results):
            raise ProblemDefinitionError(
                f"{name} does not depend on the variable {fact.name}, so any value of it is a solution: leave it out "
                "of what init returns"
            )


def subtract_from_variables(raw: torch.fx.GraphModule) -> None:
    """Make the raw graph of ``step`` that of u - step(u), in place."""
    graph = raw.graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    output = next(node for node in graph.nodes if node.op == "output")
    residuals = []
    with graph.inserting_before(output):
        for variable, after in zip(placeholders, output.args[0], strict=False):
            node = graph.call_function(aten.sub.Tensor, (variable, after))
            node.meta.update(after.meta)
            residuals.append(node)
    output.args = (tuple(residuals),)
    raw.recompile()


def _shown(shapes: Sequence[Sequence[int]]) -> str:
    return ", ".join(str(tuple(shape)) for shape in shapes)
