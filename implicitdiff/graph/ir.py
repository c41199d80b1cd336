"""The intermediate representation in which all the algebra is done.

In: nothing. Out: `Node` (one expression, hash-consed), `Ref` (one use of it, with labels) and `Label` bookkeeping.
A node has axes but no axis names of its own: whoever uses it names the axes by labels, so that `u_i - u_j` is two uses
of one node. The batch is no axis: `prefix` says whether a value carries it in front. Next file: `build.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

Label = int

UNBATCHED, BATCHED, STACKED = 0, 1, 2
"""Prefix of a value: none, the batch axis, or (right-hand sides, batch)."""


class Unsupported(Exception):
    """The algebra does not cover something; the caller steps down the ladder and reports why."""

    def __init__(self, reason: str, operation: str = "", line: str = "") -> None:
        super().__init__(reason)
        self.reason, self.operation, self.line = reason, operation, line


@dataclass(eq=False)
class Node:
    """One expression. `args` use this node's own labels: its `axes` for what remains, `bound` for what it sums over."""

    id: int
    op: str
    data: Any
    args: tuple[Ref, ...]
    axes: tuple[Label, ...]
    bound: tuple[Label, ...]
    sizes: tuple[int, ...]
    prefix: int
    leaves: frozenset[int]
    """Ids of the leaves on which the value depends differentiably."""

    def __repr__(self) -> str:
        inner = ", ".join(map(repr, self.args))
        return f"{self.op}{self.id}[{self.data}]({inner})" if inner else f"{self.op}{self.id}[{self.data}]"


@dataclass(frozen=True)
class Ref:
    """A node together with the labels that this use gives to its axes."""

    node: Node
    labels: tuple[Label, ...]

    def rename(self, names: Mapping[Label, Label]) -> Ref:
        """The same value with labels replaced; two axes may not fall together (that would be a diagonal)."""
        labels = tuple(names.get(label, label) for label in self.labels)
        if len(set(labels)) != len(labels):
            raise Unsupported("a diagonal of a value (the same index twice) has no rule")
        return Ref(self.node, labels)

    def __repr__(self) -> str:
        return f"{self.node.op}{self.node.id}{list(self.labels)}"


@dataclass
class Labels:
    """Hands out labels and remembers their sizes."""

    sizes: dict[Label, int] = field(default_factory=dict)
    counter: Iterator[int] = field(default_factory=itertools.count)

    def new(self, size: int) -> Label:
        """A label never used before, for an axis of `size` entries."""
        label = next(self.counter)
        self.sizes[label] = size
        return label

    def fresh(self, labels: Iterable[Label]) -> dict[Label, Label]:
        """A renaming of `labels` to new ones of the same sizes."""
        return {label: self.new(self.sizes[label]) for label in labels}


def reachable(roots: Iterable[Node], given: Container[int] = ()) -> list[Node]:
    """All nodes below `roots`, children before parents (ids grow with construction).

    The search does not go below the nodes with the ids `given`, nor are these returned: their values are known.
    """
    seen: dict[int, Node] = {}
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node.id not in seen and node.id not in given:
            seen[node.id] = node
            stack.extend(ref.node for ref in node.args)
    return [seen[key] for key in sorted(seen)]
