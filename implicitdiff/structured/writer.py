"""Emitted functions of one problem: written on first use, kept, run.

In: outputs as refs. Out: results. A function lists only the arguments that it uses. Next file: `outputs.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from implicitdiff import operators, solvers
from implicitdiff.graph.calls import Emitted, Output
from implicitdiff.graph.emit import Emitter
from implicitdiff.graph.ir import Node, Ref, reachable
from implicitdiff.graph.record import LOCK
from implicitdiff.kkt import entries, indexed, saddle
from implicitdiff.operators.block import NullVectors
from implicitdiff.structured.arguments import Arguments

FAILING = frozenset("log log1p exp expm1".split())
"""Functions that are not finite at some finite argument, or whose products with 0 are not."""


@dataclass(frozen=True)
class Written:
    """An emitted function and the arguments it takes."""

    emitted: Emitted
    arguments: tuple[str, ...]
    fragile: frozenset[str] = frozenset()
    """The results whose expressions may be infinite or NaN at finite arguments: logarithms, negative powers."""

    def __call__(self, values: Mapping[str, Any]) -> tuple[Any, ...]:
        """The results for the tensors of a call (and objects that are given), by name."""
        return self.emitted.call(*(values[name] for name in self.arguments))


@dataclass(frozen=True)
class Recipe:
    """What a function returns; the refs `first` are computed before anything else.

    `given` are objects that the function takes as arguments, by name, where it would otherwise make them.
    """

    outputs: list[Output]
    first: list[Ref]
    given: dict[str, Ref] = field(default_factory=dict)


class Writer:
    """The functions of one problem by key. Writing is done under a lock: the builder is shared."""

    def __init__(
        self, arguments: Arguments, constants: dict[str, Tensor], null_vectors: tuple[Tensor, ...]
    ) -> None:
        self.arguments = arguments
        self.namespace: dict[str, Any] = {
            "torch": torch,
            "operators": operators,
            "solvers": solvers,
            "saddle": saddle,
            "indexed": indexed,
            "entries": entries,
            **constants,
        }
        if null_vectors:
            self.namespace["null_vectors"] = NullVectors(null_vectors)
        self.known: dict[Hashable, Written] = {}

    def function(self, key: Hashable, name: str, document: str, recipe: Callable[[], Recipe]) -> Written:
        """The function of a key, written now if it is new."""
        found = self.known.get(key)
        if found is None:
            with LOCK:
                if key not in self.known:
                    self.known[key] = self._write(name, document, recipe())
                found = self.known[key]
        return found

    def _write(self, name: str, document: str, recipe: Recipe) -> Written:
        declared = self.arguments.declared
        given = {argument: ref.node for argument, ref in recipe.given.items()}
        known = {node.id for node in given.values()}
        nodes = reachable([*(o.ref.node for o in recipe.outputs), *(ref.node for ref in recipe.first)], known)
        leaves = {node.data[0]: node for node in nodes if node.op == "leaf"}
        like = declared.variables[0].name
        names = tuple(n for n in self.arguments.order() if n in leaves or n == like)
        preamble = [
            line
            for n in names
            if n in leaves
            for line in [*self._reshape(n, leaves[n].sizes, leaves[n].prefix), *self._cast(n, like)]
        ]
        names = (*names, *given)
        emitter = Emitter(declared.build, like)
        emitted = emitter.function(
            name, names, recipe.outputs, self.namespace, preamble, document, recipe.first, given
        )
        fragile = (o.name for o in recipe.outputs if any(map(_may_fail, reachable([o.ref.node]))))
        return Written(emitted, names, frozenset(fragile))

    def _reshape(self, name: str, sizes: tuple[int, ...], prefix: int) -> list[str]:
        """The statement that gives an argument the finer axes of its leaf, where they differ from its dimensions."""
        if self.arguments.shape(name) == tuple(sizes):
            return []
        parts = ([f"*{name}.shape[:{prefix}]"] if prefix else []) + [str(size) for size in sizes]
        return [f"{name} = {name}.reshape(({', '.join(parts)}{',' if len(parts) == 1 else ''}))"]

    def _cast(self, name: str, like: str) -> list[str]:
        """A Parameter or buffer may be of another floating dtype than the variables (float32 beside float64)."""
        declared = self.arguments.declared
        own = declared.variables[0].placeholder.dtype
        for leaf in declared.theta:
            if (
                leaf.name == name
                and leaf.placeholder.dtype.is_floating_point
                and leaf.placeholder.dtype != own
            ):
                return [f"{name} = {name}.to({like}.dtype)"]
        return []


def _may_fail(node: Node) -> bool:
    if node.op == "fn":
        return node.data[0] in FAILING
    return node.op == "prod" and any(power < 0.0 or power != int(power) for power in node.data[1])
