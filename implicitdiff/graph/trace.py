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
        role: 'variable', 'input', 'tensor' (of the Problem, or captured) or 'mask' (see ``active.py``).
        shape: The shape of ONE sample; of the whole tensor if it is shared.
        dtype: Its dtype.
        batched: Whether it carries the batch axis at run time.
    """

    name: str
    role: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    batched: bool

    @property
    def moves(self) -> bool:
        """Whether it can have a derivative: floating, and no mask."""
        return self.dtype.is_floating_point and self.role != "mask"


@dataclasses.dataclass(frozen=True, eq=False)
class TracedFunction:
    """One declared function as a graph.

    Attributes:
        name: The hook: 'objective', 'equality', 'inequality' or 'bounds'; 'residual' or 'step' for a system of
            equations.
        module: Called with all leaves of one sample, in the order of ``Trace.placeholders``; returns a 0-dim
            tensor for the objective, a tuple of tensors for the constraints and the bounds.
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
        captured: Tensors that the functions use without the Problem holding them; the last placeholders but
            for the masks.
        inequality: g; None if none is declared, or if it has no entries.
        inequality_spec: The structure of what ``inequality`` returns.
        bounds: The bounds that are there, lower and upper of the first leaf of u, then of the next; None if
            there are none.
        bounded: For each leaf of u, whether it has a lower and an upper bound; () if there are no bounds.
        corner: Of a trace from ``active.py``: for each output of ``equality`` the placeholder of D in
            K = [[H, -A'], [-A, -diag(D)]], or None where D = 0.
        declared: Of a trace from ``active.py``: the trace that it was made from.
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
    inequality: TracedFunction | None = None
    inequality_spec: Spec | None = None
    bounds: TracedFunction | None = None
    bounded: tuple[tuple[bool, bool], ...] = ()
    corner: tuple[int | None, ...] = ()
    declared: "Trace | None" = None
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
        """The placeholders of the Problem's tensors, then of the captured ones, then of the masks."""
        return tuple(p for p in self.placeholders if p.role in ("tensor", "mask"))

    @property
    def masks(self) -> tuple[Placeholder, ...]:
        """The placeholders that ``active.py`` adds."""
        return tuple(p for p in self.placeholders if p.role == "mask")

    @property
    def origin(self) -> "Trace":
        """The trace as it was declared, with the flags of this one; itself, unless it is from ``active.py``."""
        if self.declared is None:
            return self
        return dataclasses.replace(
            self.declared, placeholders=tuple(p for p in self.placeholders if p.role != "mask")
        )

    @property
    def limited(self) -> bool:
        """Whether there are inequalities or bounds."""
        return self.inequality is not None or self.bounds is not None

    def theta(self, bound: Bound) -> tuple[torch.Tensor, ...]:
        """The values of all placeholders after the variables but for the masks, for one call."""
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
        declared = [hook for hook in ("objective", second, "inequality", "bounds") if problem.declares(hook)]
        results = {hook: Result(problem, hook, arguments) for hook in declared}
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
        objective = functions["objective"]
        equality, inequality, bounds = (
            _unless_empty(functions.get(hook)) for hook in (second, "inequality", "bounds")
        )
        if square:
            check_used(problem, arguments, functions[square].module)
        else:
            check_dependence(problem, arguments, objective, equality, inequality)
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
            inequality=inequality,
            inequality_spec=None if inequality is None else results["inequality"].spec,
            bounds=bounds,
            bounded=() if bounds is None else results["bounds"].bounded,
        )


def _unless_empty(function: TracedFunction | None) -> TracedFunction | None:
    """The function, if it has an entry."""
    if function is None or not any(math.prod(shape) for shape in function.output_shapes):
        return None
    return function


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
