"""Watches the operations of a declared function while it is traced.

Comes in: every aten operation the user's code calls. Goes out: the same operation, its graph nodes marked
with the user's line and with whether gradients were switched off; what cannot be traced faithfully is refused
at the very line. Used by ``record.py``.
"""

from types import CodeType
from typing import Any

import torch

from implicitdiff.errors import ControlFlowError, RandomnessError, TraceError
from implicitdiff.graph.lines import Origin, origin
from implicitdiff.torch_private import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    HigherOrderOperator,
    TorchDispatchMode,
    current_graph,
    is_fake,
    pytree,
    schema_of,
)

# Random operations that torch does not tag as such.
_RANDOM = frozenset(["binomial", "_sample_dirichlet", "_dirichlet_grad"])

VALUE_REMEDY = (
    "the function is turned into a graph once and has to be the same for all values: use torch.where, "
    "torch.clamp, torch.minimum or torch.maximum in place of if, and keep tensors tensors in place of "
    "float() or .item()"
)
SHAPE_REMEDY = (
    "shapes have to be the same for all values: use torch.where(mask, value, 0) or multiply by the mask in "
    "place of value[mask], and keep index tensors as inputs or attributes"
)


class Recorder(TorchDispatchMode):
    """The dispatch mode around one call of one hook.

    Args:
        hook: The name of the hook for messages, ``GeometricMedian.objective``.
        entry: The code of the function that calls the hook; the user's frames lie above it.
    """

    supports_higher_order_operators = True  # so that torch.cond arrives here

    def __init__(self, hook: str, entry: CodeType) -> None:
        super().__init__()
        self._hook = hook
        self._entry = entry

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            raise ControlFlowError(
                self._message("calls a control flow operator", func, origin(self._entry), VALUE_REMEDY)
            )
        if func.namespace == "prim":  # queries such as prim.device make no node
            return func(*args, **kwargs)
        place = origin(self._entry)
        self._refuse(func, args, kwargs, place)
        graph = current_graph()
        last = None if graph is None else _last(graph)
        try:
            result = func(*args, **kwargs)
        except DynamicOutputShapeException as error:
            raise ControlFlowError(
                self._message("makes a tensor whose shape depends on values", func, place, SHAPE_REMEDY)
            ) from error
        except DataDependentOutputException as error:
            raise ControlFlowError(self._value_message(func, place)) from error
        except RuntimeError as error:
            if torch.Tag.data_dependent_output in func.tags:
                raise ControlFlowError(self._value_message(func, place)) from error
            raise
        if graph is not None:
            # The forward of an autograd.Function always runs without gradients; that is no statement of the
            # user's.
            stopped = place.function is None and not torch.is_grad_enabled()
            for node in _since(graph, last):
                node.meta["user_line"] = place.line
                node.meta["no_grad"] = stopped
        return result

    def _refuse(self, func: Any, args: Any, kwargs: Any, place: Origin) -> None:
        if place.function is not None and place.function.__module__.partition(".")[0] != "torch":
            raise TraceError(
                f"{self._hook} calls the autograd.Function {place.function.__name__}{_at(place)}: its own "
                "backward cannot be seen in the graph and would be ignored; write it in torch operations"
            )
        if _is_random(func, args, kwargs):
            raise RandomnessError(
                self._message(
                    "draws random numbers",
                    func,
                    place,
                    "a declared function has to give the same result each time: draw before the layer and "
                    "pass the result as an input; for dropout call problem.eval()",
                )
            )
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if torch.Tag.data_dependent_output in func.tags and not all(is_fake(x) for x in tensors):
            raise ControlFlowError(self._value_message(func, place))
        if any(not is_fake(x) for x in _written(func, args)):
            raise TraceError(
                self._message(
                    "changes a captured tensor in place", func, place, "write into a copy, .clone()"
                )
            )

    def _value_message(self, func: Any, place: Origin) -> str:
        return self._message("reads the value of a tensor in Python", func, place, VALUE_REMEDY)

    def _message(self, what: str, func: Any, place: Origin, remedy: str) -> str:
        return f"{self._hook} {what} ({func}){_at(place)}: {remedy}"


def _at(place: Origin) -> str:
    return f" at {place.line}" if place.line else ""


def _last(graph: torch.fx.Graph) -> torch.fx.Node | None:
    return next(iter(reversed(graph.nodes)), None)


def _since(graph: torch.fx.Graph, last: torch.fx.Node | None) -> list[torch.fx.Node]:
    """The nodes added after ``last``."""
    new = []
    for node in reversed(graph.nodes):
        if node is last:
            break
        new.append(node)
    return new


def _written(func: Any, args: Any) -> list[torch.Tensor]:
    """The arguments an operation writes into."""
    schema = schema_of(func)
    if not schema.is_mutable:
        return []
    pairs = zip(schema.arguments, args, strict=False)
    return [
        x
        for a, x in pairs
        if a.alias_info is not None and a.alias_info.is_write and isinstance(x, torch.Tensor)
    ]


def _is_random(func: Any, args: Any, kwargs: Any) -> bool:
    schema = schema_of(func)
    name = schema.name.partition("::")[2]
    if torch.Tag.nondeterministic_seeded not in func.tags and name not in _RANDOM:
        return False
    for position, argument in enumerate(schema.arguments):
        value = args[position] if position < len(args) else kwargs.get(argument.name, argument.default_value)
        if argument.name in ("p", "dropout_p", "dropout") and isinstance(value, int | float) and value == 0:
            return False  # attention and dropout operations carry the tag even where they draw nothing
        if argument.name in ("train", "training") and value is False:
            return False
    return True
