"""Runs one declared function under ``make_fx`` and hands back its raw graph.

Comes in: a Problem, the shapes of everything the function may read, the name of the hook. Goes out: a
functional aten graph of one sample, with the user's line on every node. Next file to read: ``clean.py``.
"""

import os
import pickle
import random
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from implicitdiff.errors import (
    ControlFlowError,
    ImplicitDiffError,
    InputError,
    ProblemDefinitionError,
    RandomnessError,
    TraceError,
)
from implicitdiff.graph.arguments import Arguments, call_hook
from implicitdiff.graph.lines import raising_line
from implicitdiff.graph.recorder import SHAPE_REMEDY, VALUE_REMEDY, Recorder
from implicitdiff.problem import Problem
from implicitdiff.torch_private import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    clean_context,
    compiled_functions_inlined,
    make_fx,
    schema_of,
)

# What torch says when data is asked of a tensor that has none, in 2.6 to 2.13.
_NO_VALUE = ("trying to get value out of a tracing tensor", "FakeTensor.__format__")
_NO_DATA = (
    "not supported for tensor subclasses",
    "data is not allocated yet",
    "Cannot copy out of meta tensor",
    "Cannot access data pointer",
)
_NO_RULE = ("There was no rule registered for HOP", "There was no rule registered for HigherOrderOperator")
_DEVICES = ("FakeTensor Device Propagation", "Expected all tensors to be on the same device")

REPEATS = 20

aten = torch.ops.aten
_RESHAPES = {
    aten.squeeze_.default: aten.squeeze.default,
    aten.squeeze_.dim: aten.squeeze.dim,
    aten.squeeze_.dims: aten.squeeze.dims,
    aten.unsqueeze_.default: aten.unsqueeze.default,
    aten.transpose_.default: aten.transpose.int,
    aten.t_.default: aten.t.default,
}

Check = Callable[[Any], list[torch.Tensor]]


# make_fx and the fake tensor mode are not safe in threads. Whatever is made once and kept (graphs, plans, emitted
# functions) is kept under the same lock, so that it is the only one a fork can meet.
LOCK = threading.RLock()
if hasattr(os, "register_at_fork"):
    # A child forked while another thread holds the lock would wait for a thread that it does not have, and would
    # inherit half of what make_fx patches: the fork waits instead (the workers of a DataLoader are forked).
    os.register_at_fork(before=LOCK.acquire, after_in_parent=LOCK.release, after_in_child=LOCK.release)


def record(problem: Problem, hook: str, arguments: Arguments, check: Check) -> torch.fx.GraphModule:
    """The raw graph of a hook.

    It is run twice, so that a function that is not one (numpy's or Python's random numbers, the time) is
    noticed: the values it drew would be baked in.

    Args:
        problem: The Problem.
        hook: 'objective' or 'equality'.
        arguments: What it may read.
        check: Takes what the hook returned, raises if it is wrong, and returns its tensors.

    Returns:
        A graph without operations in place. Its attributes are constants and captured tensors.

    Raises:
        ControlFlowError, RandomnessError, CapturedTensorError, TraceError: It cannot be traced faithfully.
        ProblemDefinitionError: It raised an error of its own, or returned something else.
    """
    name = f"{type(problem).__name__}.{hook}"
    state = _generators()
    first = _run(problem, hook, arguments, check, functional=False)
    # Where a global generator has moved (another thread may have done it) the function is tried more often: a
    # draw between two branches is the same twice in every second case.
    for _ in range(1 if state == _generators() else REPEATS):
        _refuse_difference(name, first, _run(problem, hook, arguments, check, functional=False))
    writes = [node for node in first.graph.nodes if _writes(node)]
    if not writes:
        return first
    functional = _run(problem, hook, arguments, check, functional=True)
    _refuse_lasting_writes(name, [fact.name for fact in arguments.facts], functional, writes)
    return functional


def run_on_shapes(problem: Problem, hook: str, arguments: Arguments) -> Any:
    """What a hook returns on fake tensors, without a graph; used for ``init``, which may do as it likes."""
    try:
        with clean_context(), FakeTensorMode(allow_non_fake_inputs=True):
            return arguments.call(problem, hook, arguments.fakes())
    except ImplicitDiffError:
        raise
    except Exception as error:
        raise explain(f"{type(problem).__name__}.{hook}", arguments, error) from error


def _run(
    problem: Problem, hook: str, arguments: Arguments, check: Check, functional: bool
) -> torch.fx.GraphModule:
    name = f"{type(problem).__name__}.{hook}"

    def function(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        recorder = Recorder(name, call_hook.__code__)
        return tuple(check(arguments.call(problem, hook, values, recorder)))

    target = torch.func.functionalize(function) if functional else function
    try:
        # Gradients are on, but nothing requires them: the graph is that of no_grad, and a no_grad of the user
        # shows.
        with (
            torch.enable_grad(),
            clean_context(),
            compiled_functions_inlined(),
            FakeTensorMode(allow_non_fake_inputs=True),
        ):
            raw = make_fx(target, tracing_mode="real")(*arguments.fakes())
    except ImplicitDiffError:
        raise
    except Exception as error:
        raise explain(name, arguments, error) from error
    _spell_out_reshapes(raw.graph)
    return raw


def explain(name: str, arguments: Arguments, error: Exception) -> ImplicitDiffError:
    """The named error for an exception that came out of a user's function."""
    line = raising_line(error.__traceback__)
    at = f" at {line}" if line else ""
    text = str(error)
    if isinstance(error, DynamicOutputShapeException):
        return ControlFlowError(f"{name} makes a tensor whose shape depends on values{at}: {SHAPE_REMEDY}")
    if isinstance(error, DataDependentOutputException) or any(words in text for words in _NO_VALUE):
        return ControlFlowError(f"{name} reads the value of a tensor in Python{at}: {VALUE_REMEDY}")
    if any(words in text for words in _NO_RULE):
        operator = text.rpartition(" and mode")[0].rpartition(" ")[2]
        return ControlFlowError(f"{name} calls a control flow operator ({operator}){at}: {VALUE_REMEDY}")
    if any(words in text for words in _NO_DATA):
        return TraceError(
            f"{name} takes the data out of a tensor (numpy, torch.tensor of tensors){at}: the graph would "
            "keep the values of this one call; use torch operations, and torch.stack in place of "
            "torch.tensor([u[0], u[1]])"
        )
    if any(words in text for words in _DEVICES) and len({fact.device for fact in arguments.facts}) > 1:
        listed = ", ".join(f"{fact.name} {fact.device}" for fact in arguments.facts)
        return InputError(
            f"{name} mixes devices{at}: {listed}; move the inputs or the Problem with .to(device)"
        )
    shapes = ", ".join(f"{fact.name} {fact.shape}" for fact in arguments.facts)
    return ProblemDefinitionError(
        f"{name} raised {type(error).__name__}{at}: {text}. It was called on one sample, without the batch "
        f"axis, with {shapes}"
    )


_DRAW_BEFORE = (
    "a declared function has to give the same result each time; draw before the layer and pass the result "
    "as an input"
)


def _generators() -> bytes:
    """The state of the global generators of Python and, if it is in use, of numpy."""
    numpy_random = sys.modules.get("numpy.random")
    return pickle.dumps((random.getstate(), None if numpy_random is None else numpy_random.get_state()))


def _refuse_difference(name: str, first: torch.fx.GraphModule, second: torch.fx.GraphModule) -> None:
    nodes, others = list(first.graph.nodes), list(second.graph.nodes)
    for node, other in zip(nodes, others, strict=False):
        same = node.format_node() == other.format_node()
        if same and node.op == "get_attr":
            same = _same_constant(getattr(first, node.target), getattr(second, other.target))
        if not same:
            line = next(
                (str(n.meta["user_line"]) for n in (node, *node.users) if n.meta.get("user_line")), ""
            )
            at = f" at {line}" if line else ""
            raise RandomnessError(f"{name} does something else when it is called again{at}: {_DRAW_BEFORE}")
    if len(nodes) != len(others):
        raise RandomnessError(f"{name} has a varying number of operations: {_DRAW_BEFORE}")


def _same_constant(a: Any, b: Any) -> bool:
    if a is b or not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return True
    return a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def _spell_out_reshapes(graph: torch.fx.Graph) -> None:
    """Write operations that reshape their own argument as the ones that return a view.

    einsum and tensordot use them inside. No number changes, and whoever reads the tensor afterwards already
    reads the result's node, so that the name is all there is to change.
    """
    for node in graph.nodes:
        if node.op == "call_function" and node.target in _RESHAPES:
            node.target = _RESHAPES[node.target]


def _writes(node: torch.fx.Node) -> bool:
    schema = schema_of(node.target)
    return node.op == "call_function" and schema is not None and bool(schema.is_mutable)


def _refuse_lasting_writes(
    name: str, names: Sequence[str], functional: torch.fx.GraphModule, writes: Sequence[torch.fx.Node]
) -> None:
    """After functionalisation the only writes left are those that outlive the function."""
    for node in functional.graph.nodes:
        if not _writes(node):
            continue
        target = node.args[0]
        placeholders = [n for n in functional.graph.nodes if n.op == "placeholder"]
        what = "a captured tensor"
        if isinstance(target, torch.fx.Node) and target.op == "placeholder":
            what = names[placeholders.index(target)]
        lines = [str(n.meta.get("user_line", "")) for n in writes if what == _written(n, names)]
        at = f" at {lines[0]}" if lines and lines[0] else ""
        raise TraceError(f"{name} changes {what} in place{at}: write into a copy, {what}.clone()")


def _written(node: torch.fx.Node, names: Sequence[str]) -> str:
    """What an operation in place writes into, through views and further operations in place."""
    target: Any = node
    while isinstance(target, torch.fx.Node) and target.op == "call_function" and target.args:
        target = target.args[0]
    if isinstance(target, torch.fx.Node) and target.op == "placeholder":
        placeholders = [n for n in node.graph.nodes if n.op == "placeholder"]
        return names[placeholders.index(target)]
    return "a captured tensor"
