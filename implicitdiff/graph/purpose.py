"""What each emitted value is for: the step of the derivation that it is, or the steps that it serves.

In: the nodes of one function and the steps that some of them are. Out: a `Purpose` for each node, from which names and
comments of the emitted code are made. Next file: `naming.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from implicitdiff.graph.ir import Node

MOST = 3
"""Steps that a comment lists; what serves more of them is of general use."""


@dataclass(frozen=True)
class Step:
    """A value of the derivation: the name that it has in the literature ("" for none), and its equation.

    `title` is what the values that it is computed from are said to be for; its name where it is left out.
    """

    name: str
    equation: str
    title: str = ""


@dataclass(frozen=True)
class Purpose:
    """The step that a value is, if it is one, and the names of those that are computed from it."""

    step: Step | None = None
    serves: tuple[str, ...] = ()

    @property
    def comment(self) -> str:
        """What a person would write beside the statement; "" where nothing is known."""
        if self.step is not None:
            return self.step.equation
        if not self.serves:
            return ""
        return f"for {', '.join(self.serves[:MOST])}{' and more' if len(self.serves) > MOST else ''}"

    @property
    def titles(self) -> tuple[str, ...]:
        """What a value that only this one is computed from serves."""
        title = "" if self.step is None else self.step.title or self.step.name
        return (title,) if title else self.serves


def behind(node: Node) -> Node:
    """The node whose value this one holds: itself, unless it only marks another's."""
    while node.op == "hold":
        node = node.args[0].node
    return node


NO_PURPOSE = Purpose()


def joined(parts: Iterable[Purpose]) -> Purpose:
    """The purpose of a value that several others are computed from."""
    return Purpose(None, tuple(dict.fromkeys(title for part in parts for title in part.titles)))


def purposes(nodes: Sequence[Node], steps: Mapping[int, Step]) -> dict[int, Purpose]:
    """The purpose of every node, by id.

    Args:
        nodes: children before parents.
        steps: the nodes that are steps, by id.
    """
    readers: dict[int, list[Purpose]] = {}
    found: dict[int, Purpose] = {}
    for node in reversed(nodes):
        serves = joined(reversed(readers.get(node.id, []))).serves
        found[node.id] = Purpose(steps.get(node.id), serves)
        for arg in node.args:
            readers.setdefault(arg.node.id, []).append(found[node.id])
    return found
