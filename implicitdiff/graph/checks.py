"""What a declared function has to return, and what it has to depend on.

Comes in: what the user's function returned while it was traced, and the finished graphs. Goes out: its
tensors, or a named error that says how to mend it. Used by ``trace.py``.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from implicitdiff.errors import CapturedTensorError, ProblemDefinitionError
from implicitdiff.graph.arguments import Arguments
from implicitdiff.graph.bounds import bounds_of
from implicitdiff.graph.clean import depends_on, outputs
from implicitdiff.problem import Problem
from implicitdiff.pytrees import Spec, flatten, leaf_names
from implicitdiff.torch_private import is_wrapped


class Traced(Protocol):
    """A function with its graph: a ``trace.TracedFunction``."""

    @property
    def name(self) -> str: ...
    @property
    def module(self) -> torch.fx.GraphModule: ...


class Result:
    """Checks what one hook returns, and remembers its structure.

    Args:
        problem: The Problem.
        hook: 'objective', 'equality', 'inequality' or 'bounds'.
        arguments: What the hook may read; its variables say what bounds have to fit.
    """

    def __init__(self, problem: Problem, hook: str, arguments: Arguments) -> None:
        self.name = f"{type(problem).__name__}.{hook}"
        self.spec: Spec | None = None
        self.bounded: tuple[tuple[bool, bool], ...] = ()
        self._hook, self._arguments = hook, arguments

    def check(self, result: Any) -> list[torch.Tensor]:
        """The tensors of a result.

        Raises:
            ProblemDefinitionError: The objective is no 0-dim real floating tensor, or a constraint is no real
                floating tensor.
        """
        if self._hook == "bounds":
            found, self.bounded = bounds_of(self.name, result, self._arguments)
            return found
        leaves, self.spec = flatten(result)
        if self._hook == "objective":
            return [self._objective(result)]
        if not leaves:
            raise ProblemDefinitionError(
                f"{self.name} returned {result!r}, which holds no tensors: return a tensor or a pytree of "
                "tensors"
            )
        return [
            self._real(leaf, name) for leaf, name in zip(leaves, leaf_names(self.spec, "output"), strict=True)
        ]

    def _objective(self, result: Any) -> torch.Tensor:
        value = self._real(result, "")
        if value.dim() == 0:
            return value
        remedy = "add .squeeze()" if value.numel() == 1 else "reduce it, for instance by .sum()"
        raise ProblemDefinitionError(
            f"{self.name} returned a tensor of shape {tuple(value.shape)}, but the objective of one sample "
            f"is a scalar of shape (): {remedy}"
        )

    def _real(self, value: Any, output: str) -> torch.Tensor:
        which = f" for {output}" if output not in ("", "output") else ""
        if not isinstance(value, torch.Tensor):
            forgotten = " (is the return statement missing?)" if value is None else ""
            raise ProblemDefinitionError(
                f"{self.name} returned {describe_value(value)}{which}{forgotten}: return a real floating "
                "tensor that depends on the variable"
            )
        if not value.is_floating_point():
            raise ProblemDefinitionError(
                f"{self.name} returned a tensor of dtype {value.dtype}{which}: return a real floating tensor"
            )
        return value


def check_captured(problem: Problem, captured: Sequence[torch.Tensor]) -> None:
    """Raise if a function reads a tensor of a surrounding torch.func transform: it would get no derivative.

    Raises:
        CapturedTensorError: Such a tensor is in a closure, or a global.
    """
    for tensor in captured:
        if is_wrapped(tensor):
            raise CapturedTensorError(
                f"a function of {type(problem).__name__} uses a tensor of shape {tuple(tensor.shape)} that "
                "belongs to a surrounding torch.func transform, but is neither an input nor reachable from "
                "the Problem: pass it as an input, or make it an attribute of the Problem"
            )


def check_dependence(
    problem: Problem, arguments: Arguments, objective: Traced, *constraints: Traced | None
) -> None:
    """Raise unless the objective, and each constraint, depends on the variables, and each variable is used.

    Raises:
        ProblemDefinitionError: Naming what does not depend on what.
    """
    kind = type(problem).__name__
    names = [fact.name for fact in arguments.facts[: arguments.variables]]
    positions = range(arguments.variables)
    whole = ", ".join(names)
    (value,) = outputs(objective.module)
    if not depends_on(objective.module, value, positions):
        raise ProblemDefinitionError(
            f"{kind}.objective does not depend on {whole} in a differentiable way, so it has no minimiser: "
            "check that it uses its first argument, and uses it outside of detach() and no_grad()"
        )
    pairs = [(f, node) for f in constraints if f is not None for node in outputs(f.module)]
    for function, constraint in pairs:
        several = outputs(function.module)
        if constraint.meta["val"].numel() and not depends_on(function.module, constraint, positions):
            which = f" (output {several.index(constraint)})" if len(several) > 1 else ""
            raise ProblemDefinitionError(
                f"{kind}.{function.name}{which} does not depend on {whole}, so it cannot be fulfilled by choosing "
                "it: leave it out, or check that it uses its first argument"
            )
    for position, name in zip(positions, names, strict=True):
        used = depends_on(objective.module, value, [position]) or any(
            depends_on(function.module, constraint, [position]) for function, constraint in pairs
        )
        if not used:
            raise ProblemDefinitionError(
                f"neither objective nor equality of {kind} depends on the variable {name}, so any value of "
                "it is a solution: leave it out of what init returns"
            )


def describe_value(value: Any) -> str:
    """What a user returned that should have been a tensor: 'None', 'the float 1.5', 'a tuple'."""
    if value is None:
        return "None"
    if isinstance(value, bool | int | float | str):
        return f"the {type(value).__name__} {value!r}"
    return f"an object of type {type(value).__name__}"
