"""From the declared functions to graphs: aten level, functional, one sample, every tensor a placeholder.

Comes in: a Problem, an example of its variables and its bound inputs. Goes out: a ``Trace``. The steps are
``record.py`` (run the function under make_fx), ``clean.py`` (every tensor a placeholder) and ``checks.py``.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch

from implicitdiff.attributes import scan
from implicitdiff.graph.arguments import Arguments, arguments_of
from implicitdiff.graph.checks import Result, check_captured, check_dependence
from implicitdiff.graph.clean import Captured, finish, lift_attributes, outputs
from implicitdiff.graph.example import Example, solution_example, variable_example
from implicitdiff.graph.record import LOCK, record
from implicitdiff.graph.square import check_fits, check_used, subtract_from_variables
from implicitdiff.inputs import Bound
from implicitdiff.problem import Problem
from implicitdiff.pytrees import Spec
from implicitdiff.torch_private import clean_context

__all__ = [
    "Example",
    "Placeholder",
    "Trace",
    "TracedFunction",
    "solution_example",
    "trace_problem",
    "variable_example",
]


@dataclasses.dataclass(frozen=True)
class Placeholder:
    """One argument of the traced functions.

    Attributes:
        name: For messages and emitted code: ``u``, ``x['cost']``, ``self.eps``, ``captured[0]``.
        role: 'variable', 'input' or 'tensor' (of the Problem, or captured).
        shape: The shape of ONE sample; of the whole tensor if it is shared.
        dtype: Its dtype.
        batched: Whether it carries the batch axis at run time.
    """

    name: str
    role: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    batched: bool


@dataclasses.dataclass(frozen=True, eq=False)
class TracedFunction:
    """One declared function as a graph.

    Attributes:
        name: The hook: 'objective' or 'equality' ('residual' or 'step' for a system of equations).
        module: Called with all leaves of one sample, in the order of ``Trace.placeholders``; returns a 0-dim
            tensor for the objective, a tuple of tensors for the constraints.
        output_shapes: The shapes of one sample's outputs.
    """

    name: str
    module: torch.fx.GraphModule
    output_shapes: tuple[tuple[int, ...], ...]

    def line(self, node: torch.fx.Node) -> str:
        """The user's line that called this operation, as ``file.py:12: source text``; empty if unknown."""
        return str(node.meta.get("user_line", ""))


@dataclasses.dataclass(frozen=True, eq=False)
class Trace:
    """The declared functions of one signature.

    Attributes:
        placeholders: The arguments of both modules: variables, inputs, tensors of the Problem, captured
            tensors.
        objective: f.
        equality: h; None if none is declared, or if it has no entries.
        variable_spec: The structure of u.
        input_spec: The structure of the tuple of inputs, constants included.
        equality_spec: The structure of what ``equality`` returns.
        constants: (position in ``input_spec``, value) of the inputs that are no tensors; they are baked in.
        captured: Tensors that the functions use without the Problem holding them; the last placeholders.
        square: For a system of equations the hook that its residual comes from, 'residual' or 'step'; the residual is
            ``equality`` then, and the objective 0. Empty for an optimisation problem.
    """

    placeholders: tuple[Placeholder, ...]
    objective: TracedFunction
    equality: TracedFunction | None
    variable_spec: Spec
    input_spec: Spec
    equality_spec: Spec | None
    constants: tuple[tuple[int, Any], ...]
    captured: tuple[torch.Tensor, ...]
    square: str = ""
    hessian: object = None
    """The hook `hessian` as `structured.hook` records it; None where none is declared."""

    @property
    def variables(self) -> tuple[Placeholder, ...]:
        """The placeholders of the variables."""
        return tuple(p for p in self.placeholders if p.role == "variable")

    @property
    def inputs(self) -> tuple[Placeholder, ...]:
        """The placeholders of the inputs."""
        return tuple(p for p in self.placeholders if p.role == "input")

    @property
    def tensors(self) -> tuple[Placeholder, ...]:
        """The placeholders of the Problem's tensors, then of the captured ones."""
        return tuple(p for p in self.placeholders if p.role == "tensor")

    def theta(self, bound: Bound) -> tuple[torch.Tensor, ...]:
        """The values of all placeholders after the variables, for one call."""
        return (*bound.leaves, *bound.tensors, *self.captured)


def trace_problem(problem: Problem, variables: tuple[Sequence[torch.Tensor], Spec], bound: Bound) -> Trace:
    """Turn the declared functions into graphs.

    It can be called anywhere, also inside vmap, grad, jvp or a fake mode of the caller, and from several
    threads: it works on fresh fake tensors made from shapes, with all modes and levels switched off, under
        one lock.

    Args:
        problem: The Problem.
        variables: Leaves of one sample, of which shape and dtype count, and their structure: an ``Example``.
        bound: The inputs.

    Returns:
        The graphs. Cost: two runs of each function, about 0.4 ms for each operation in it.

    Raises:
        ControlFlowError: A function reads the value of a tensor in Python.
        RandomnessError: A function draws random numbers, or does something else when it is run again.
        CapturedTensorError: A function uses a tensor that requires grad and that nobody passes in.
        TraceError: It takes data out of tensors, writes into its arguments, or has a backward of its own.
        ProblemDefinitionError: It fails, returns something else than it should, or does not depend on u.
        InputError: It mixes devices.
    """
    example = Example(tuple(variables[0]), variables[1])
    with LOCK, clean_context():
        check_captured(problem, scan(problem).captured)
        arguments = arguments_of(problem, example.leaves, example.spec, bound)
        tensors = enumerate(bound.tensors, start=arguments.variables + len(bound.leaves))
        captured = Captured(list(tensors))
        square = problem.MAIN if problem.square else ""
        second = square or "equality"
        declared = [hook for hook in ("objective", second) if problem.declares(hook)]
        results = {hook: Result(problem, hook) for hook in declared}
        raw = {hook: record(problem, hook, arguments, results[hook].check) for hook in declared}
        for hook, module in raw.items():
            lift_attributes(results[hook].name, module, captured)
        if square:
            spec = results[square].spec
            assert spec is not None
            shapes = [tuple(node.meta["val"].shape) for node in outputs(raw[square])]
            check_fits(problem, arguments, spec, shapes)
        if square == "step":
            subtract_from_variables(raw[square])
        functions = {
            hook: _function(hook, finish(module, len(arguments.facts), captured))
            for hook, module in raw.items()
        }
        objective, equality = functions["objective"], functions.get(second)
        if square and equality is not None:
            check_used(problem, arguments, equality.module)
        elif equality is not None and not any(math.prod(shape) for shape in equality.output_shapes):
            equality = None
        if not square:
            check_dependence(
                problem, arguments, objective.module, None if equality is None else equality.module
            )
        return Trace(
            placeholders=_placeholders(arguments, captured.tensors),
            objective=objective,
            equality=equality,
            variable_spec=example.spec,
            input_spec=bound.spec,
            equality_spec=None if equality is None or square else results["equality"].spec,
            constants=bound.constants,
            captured=tuple(captured.tensors),
            square=square,
        )


def _function(hook: str, module: torch.fx.GraphModule) -> TracedFunction:
    nodes = outputs(module)
    if hook == "objective":
        # The objective is one tensor, not a tuple of one.
        output = next(node for node in module.graph.nodes if node.op == "output")
        output.args = (nodes[0],)
        module.recompile()
    return TracedFunction(hook, module, tuple(tuple(node.meta["val"].shape) for node in nodes))


def _placeholders(arguments: Arguments, captured: Sequence[torch.Tensor]) -> tuple[Placeholder, ...]:
    bound = arguments.bound
    counts = {"variable": arguments.variables, "input": len(bound.leaves), "tensor": len(bound.tensors)}
    roles = [role for role, count in counts.items() for _ in range(count)]
    batched = [True] * arguments.variables + list(bound.batched) + [False] * len(bound.tensors)
    facts = zip(arguments.facts, roles, batched, strict=True)
    return (
        *(Placeholder(f.name, role, f.shape, f.dtype, flag) for f, role, flag in facts),
        *(
            Placeholder(f"captured[{i}]", "tensor", tuple(t.shape), t.dtype, False)
            for i, t in enumerate(captured)
        ),
    )
