"""Brings a raw graph into the form the rest of the library reads: every tensor a placeholder, no dead or idle
nodes.

Comes in: the graph of ``record.py``, with constants and captured tensors as attributes. Goes out: a pure
graph of one sample. Next file to read: ``trace.py``.
"""

from collections.abc import Sequence
from typing import Any

import torch

from implicitdiff.errors import CapturedTensorError
from implicitdiff.torch_private import pytree

aten = torch.ops.aten

_LIFTS = (aten.lift_fresh.default, aten.lift_fresh_copy.default)
_IDENTITIES = (*_LIFTS, aten.alias.default, aten.clone.default)
_VIEWS = (aten.view.default, aten._unsafe_view.default)
# What functionalisation makes of writes, and what has no derivative or no batching rule.
_FILLS = (aten.copy.default, aten.fill.Scalar, aten.fill.Tensor, aten.zero.default)
META_KEYS = ("val", "user_line")


class Captured:
    """The tensors the functions use that are neither inputs nor found in the Problem, in the order they were
    met.

    Args:
        known: The tensors of the graph's own placeholders that may also be met as attributes (through a bound
            method of the live Problem, say): position by identity.
    """

    def __init__(self, known: Sequence[tuple[int, torch.Tensor]]) -> None:
        self.known = {id(tensor): position for position, tensor in known}
        self.tensors: list[
            torch.Tensor
        ] = []  # detached: they share the memory, so that later changes are seen
        self._originals: list[torch.Tensor] = []

    def position(self, tensor: torch.Tensor) -> int:
        """The number of a captured tensor, a new one if it was not met before."""
        for index, other in enumerate(self._originals):
            if other is tensor:
                return index
        self._originals.append(tensor)
        self.tensors.append(tensor.detach() if tensor.requires_grad else tensor)
        return len(self.tensors) - 1


def lift_attributes(name: str, raw: torch.fx.GraphModule, captured: Captured) -> None:
    """Replace the attributes of a raw graph, in place.

    A tensor of the Problem becomes its placeholder, a literal such as ``torch.tensor(2.0)`` whose entries are
    all equal becomes ``aten.full``, and everything else becomes a further placeholder, registered in
    ``captured``.

    Raises:
        CapturedTensorError: A captured tensor requires grad; it would silently get none.
    """
    graph = raw.graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node in [n for n in graph.nodes if n.op == "get_attr"]:
        tensor = getattr(raw, node.target)
        if not isinstance(tensor, torch.Tensor):
            continue  # a branch of torch.cond
        if id(tensor) in captured.known:
            replacement = placeholders[captured.known[id(tensor)]]
        elif tensor.requires_grad and not all(_stops_gradient(user) for user in node.users):
            raise CapturedTensorError(_captured_message(name, node, tensor))
        elif _is_uniform_literal(node, tensor):
            with graph.inserting_before(node):
                replacement = _full(graph, tensor)
        else:
            replacement = _extra(graph, placeholders, captured.position(tensor), tensor)
        node.replace_all_uses_with(replacement)
        graph.erase_node(node)


def finish(raw: torch.fx.GraphModule, arguments: int, captured: Captured) -> torch.fx.GraphModule:
    """The final module of one function.

    Args:
        raw: The graph after ``lift_attributes``.
        arguments: The number of placeholders before the captured ones.
        captured: All captured tensors, also those that only other functions use: all modules take the same
            arguments.

    Returns:
        A module without attributes. Views are ``aten.reshape``, so that it runs on inputs of any strides;
        gradients that the user stopped by ``no_grad`` are stopped by ``aten.detach``.
    """
    graph = raw.graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for position, tensor in enumerate(captured.tensors):
        _extra(graph, placeholders, position, tensor)
    _order_placeholders(graph, arguments)
    _stop_gradients(graph)
    for node in list(graph.nodes):
        if node.target in _VIEWS:
            node.target = aten.reshape.default
        elif node.target is aten.as_strided.default:
            _make_contiguous(graph, node)
        elif node.target in _FILLS:
            _spell_out(graph, node)
        elif node.target is aten.slice_scatter.default:
            _bound_end(node, first=2)
        elif node.target in _IDENTITIES or _is_full_slice(node) or _is_second_detach(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target is aten.slice.Tensor:
            _bound_end(node, first=1)
    graph.eliminate_dead_code()
    for node in graph.nodes:
        node.meta = {key: _without_mode(node.meta[key]) for key in META_KEYS if key in node.meta}
    root = torch.nn.Module()
    for node in graph.nodes:
        if node.op == "get_attr":
            setattr(root, node.target, getattr(raw, node.target))
    graph.lint()
    return torch.fx.GraphModule(root, graph)


def depends_on(module: torch.fx.GraphModule, output: Any, placeholders: Sequence[int]) -> bool:
    """Whether the value of a node depends on one of the placeholders in a way that can have a derivative."""
    nodes = [node for node in module.graph.nodes if node.op == "placeholder"]
    targets = {nodes[position] for position in placeholders}
    queue, seen = [output], set()
    while queue:
        node = queue.pop()
        if not isinstance(node, torch.fx.Node) or node in seen:
            continue
        seen.add(node)
        if node in targets:
            return True
        value = node.meta.get("val")
        constant = isinstance(value, torch.Tensor) and not (value.is_floating_point() or value.is_complex())
        if node.target is not aten.detach.default and not constant:
            queue.extend(node.all_input_nodes)
    return False


def outputs(module: torch.fx.GraphModule) -> tuple[torch.fx.Node, ...]:
    """The nodes a module returns."""
    result = next(node for node in module.graph.nodes if node.op == "output").args[0]
    return tuple(result) if isinstance(result, tuple | list) else (result,)


def _captured_message(name: str, node: torch.fx.Node, tensor: torch.Tensor) -> str:
    line = next((str(user.meta["user_line"]) for user in node.users if user.meta.get("user_line")), "")
    at = f" at {line}" if line else ""
    return (
        f"{name} uses a tensor of shape {tuple(tensor.shape)} that requires grad{at}, but it is neither an "
        "input nor reachable from the Problem, so it would get no gradient: make it an attribute (self.w = "
        "w), pass it as an input, or use w.detach() if it is a constant"
    )


def _stops_gradient(node: torch.fx.Node) -> bool:
    return node.target is aten.detach.default or bool(node.meta.get("no_grad"))


def _is_uniform_literal(node: torch.fx.Node, tensor: torch.Tensor) -> bool:
    """Whether the tensor was made inside the function from Python numbers that are all equal."""
    literal = bool(node.users) and all(user.target in _LIFTS for user in node.users)
    return literal and tensor.numel() > 0 and bool((tensor == tensor.reshape(-1)[0]).all())


def _full(graph: torch.fx.Graph, tensor: torch.Tensor) -> torch.fx.Node:
    kwargs: dict[str, Any] = {"dtype": tensor.dtype, "device": tensor.device, "pin_memory": False}
    node = graph.call_function(aten.full.default, (list(tensor.shape), tensor.reshape(-1)[0].item()), kwargs)
    node.meta["val"] = tensor
    return node


def _extra(
    graph: torch.fx.Graph, placeholders: Sequence[torch.fx.Node], position: int, tensor: torch.Tensor
) -> torch.fx.Node:
    """The placeholder of a captured tensor; found again by its name."""
    target = f"captured_{position}"
    for node in graph.nodes:
        if node.op == "placeholder" and node.target == target:
            return node
    with graph.inserting_after(placeholders[-1]):
        node = graph.placeholder(target)
    node.meta["val"] = tensor
    return node


def _order_placeholders(graph: torch.fx.Graph, arguments: int) -> None:
    """Move the captured placeholders behind the others, in the order of their numbers."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    own, extra = placeholders[:arguments], placeholders[arguments:]
    last = own[-1]
    for node in sorted(extra, key=lambda n: int(str(n.target).rpartition("_")[2])):
        if last.next is not node:
            last.append(node)
        last = node


def _stop_gradients(graph: torch.fx.Graph) -> None:
    """Insert ``aten.detach`` where a value leaves a region in which the user switched gradients off."""
    for node in list(graph.nodes):
        if not node.meta.get("no_grad"):
            continue
        leaving = [user for user in node.users if not user.meta.get("no_grad")]
        if not leaving or not isinstance(node.meta.get("val"), torch.Tensor):
            continue
        with graph.inserting_after(node):
            stopped = graph.call_function(aten.detach.default, (node,))
        stopped.meta.update(node.meta)
        for user in leaving:
            user.replace_input_with(node, stopped)


def _is_full_slice(node: torch.fx.Node) -> bool:
    """``aten.slice`` over a whole axis, which torch 2.6 writes for ``u[:, None]``."""
    if node.target is not aten.slice.Tensor:
        return False
    value = node.args[0].meta.get("val") if isinstance(node.args[0], torch.fx.Node) else None
    if not isinstance(value, torch.Tensor):
        return False
    given: tuple[Any, ...] = tuple(node.args[1:])
    defaults: tuple[Any, ...] = (0, None, None, 1)
    dim, start, end, step = given + defaults[len(given) :]
    size = value.shape[dim] if value.dim() else 0
    return bool(start in (None, 0) and (end is None or end >= size) and step == 1)


def _is_second_detach(node: torch.fx.Node) -> bool:
    """``aten.detach`` of a detached value; torch 2.6 writes several for one ``detach()``."""
    first = node.args[0] if node.args else None
    stops = aten.detach.default
    return node.target is stops and isinstance(first, torch.fx.Node) and first.target is stops


def _bound_end(node: torch.fx.Node, first: int) -> None:
    """Replace an end behind the axis: torch writes one for ``u[::2]``, its batching rules overflow on it."""
    arguments: list[Any] = list(node.args)
    value = arguments[0].meta.get("val")
    if len(arguments) > first + 2 and isinstance(value, torch.Tensor) and arguments[first + 2] is not None:
        arguments[first + 2] = min(arguments[first + 2], value.shape[arguments[first]])
        node.args = tuple(arguments)


def _spell_out(graph: torch.fx.Graph, node: torch.fx.Node) -> None:
    """Write a fill or a copy of the whole tensor as a plain broadcast of what is written."""
    value = node.meta["val"]
    written: Any = node.args[1] if len(node.args) > 1 else 0.0
    with graph.inserting_before(node):
        if not isinstance(written, torch.fx.Node):
            target = node.args[0]
            assert isinstance(target, torch.fx.Node)
            result = graph.call_function(aten.full_like.default, (target, written))
        else:
            result = graph.call_function(aten.expand.default, (written, list(value.shape)))
            if written.meta["val"].dtype != value.dtype:
                result.meta.update(node.meta)
                result = graph.call_function(aten._to_copy.default, (result,), {"dtype": value.dtype})
    result.meta.update(node.meta)
    node.replace_all_uses_with(result)
    graph.erase_node(node)


def _make_contiguous(graph: torch.fx.Graph, node: torch.fx.Node) -> None:
    """as_strided counts in the memory of its argument: give it the memory it had in the trace."""
    source = node.args[0]
    assert isinstance(source, torch.fx.Node)
    with graph.inserting_before(node):
        copy = graph.call_function(aten.clone.default, (source,), {"memory_format": torch.contiguous_format})
    copy.meta.update(source.meta)
    node.replace_input_with(source, copy)


def _without_mode(value: Any) -> Any:
    """Shapes and dtypes without the fake mode they came from, so that modules can be copied and kept."""

    def plain(item: Any) -> Any:
        if not isinstance(item, torch.Tensor):
            return item
        return torch.empty_strided(tuple(item.shape), item.stride(), dtype=item.dtype, device="meta")

    return pytree.tree_map(plain, value)
