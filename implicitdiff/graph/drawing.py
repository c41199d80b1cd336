"""The traced operations as a drawing: what a report shows where the labelled algebra does not reach.

In: a `Trace` and the operations without a rule. Out: `DrawnNode`s. Next file: `structure/drawing.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from implicitdiff.graph.trace import Placeholder, Trace, TracedFunction


@dataclass(frozen=True)
class DrawnNode:
    """One expression of the declared functions.

    Attributes:
        key: its name among the nodes of a drawing.
        role: "variable", "input", "tensor", "constant", "operation", "result" or "uncovered" (no rule for it).
        title: the operation or the name, short.
        formula: the whole expression in index notation, or the user's line for an operation without a rule.
        axes: the index letters with their sizes, "i = 4, j = 6"; "" for a scalar.
        structure: what its derivative by the variables is, in one line.
        arguments: the keys of what it is computed from.
    """

    key: str
    role: str
    title: str
    formula: str
    axes: str
    structure: str
    arguments: tuple[str, ...]


def traced_nodes(trace: Trace, uncovered: Sequence[tuple[str, str]]) -> tuple[DrawnNode, ...]:
    """The graphs of `objective` and `equality`; the pairs (operation, line) in `uncovered` are marked."""
    drawn: dict[str, DrawnNode] = {}
    for function in (trace.objective, trace.equality):
        if function is not None:
            for node in function.module.graph.nodes:
                for made in _drawn(node, function, trace.placeholders, set(uncovered)):
                    drawn.setdefault(made.key, made)
    used = {key for node in drawn.values() for key in node.arguments}
    return tuple(node for node in drawn.values() if node.role == "result" or node.key in used)


def _drawn(
    node: fx.Node,
    function: TracedFunction,
    placeholders: Sequence[Placeholder],
    uncovered: set[tuple[str, str]],
) -> list[DrawnNode]:
    graph = list(node.graph.nodes)
    if node.op == "placeholder":
        given = placeholders[graph.index(node)]
        return [DrawnNode(_key(node, function), given.role, given.name, given.name, _axes(node), "", ())]
    arguments = tuple(_key(argument, function) for argument in node.all_input_nodes)
    if node.op == "output":
        results = node.args[0] if isinstance(node.args[0], list | tuple) else (node.args[0],)
        names = ["f"] if function.name == "objective" else [f"equality[{k}]" for k in range(len(results))]
        return [
            DrawnNode(
                f"result-{name}",
                "result",
                name,
                name,
                "",
                "objective" if name == "f" else "= 0",
                (_key(made, function),),
            )
            for name, made in zip(names, results, strict=True)
            if isinstance(made, fx.Node)
        ]
    operation, line = str(node.target), function.line(node)
    missing = (operation, line) in uncovered
    said = "no rule for this operation" if missing else ""
    title = (
        operation.removeprefix("aten.").removesuffix(".default") if node.op == "call_function" else node.name
    )
    role = "uncovered" if missing else "operation" if arguments else "constant"
    return [DrawnNode(_key(node, function), role, _plain(title), line, _axes(node), said, arguments)]


def _key(node: fx.Node, function: TracedFunction) -> str:
    # The placeholders of both functions are the same tensors.
    return node.name if node.op == "placeholder" else f"{function.name}-{node.name}"


def _plain(title: str) -> str:
    return "item of a pair" if title.startswith("<built-in function getitem") else title


def _axes(node: fx.Node) -> str:
    value: Any = node.meta.get("val")
    several = value if isinstance(value, list | tuple) else (value,)
    return ", ".join(" x ".join(map(str, v.shape)) for v in several if isinstance(v, torch.Tensor))
