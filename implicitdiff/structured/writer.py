"""Emitted functions of one problem: written on first use, kept, run.

In: outputs as refs. Out: results. A function lists only the arguments that it uses. Next file: `outputs.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from implicitdiff import operators, solvers
from implicitdiff.graph.calls import Emitted, Output
from implicitdiff.graph.emit import Emitter
from implicitdiff.graph.ir import Node, Ref, reachable
from implicitdiff.graph.purpose import Step
from implicitdiff.graph.record import LOCK
from implicitdiff.kkt import entries, indexed, saddle
from implicitdiff.operators.block import NullVectors
from implicitdiff.structured.arguments import Arguments
from implicitdiff.structured.compiled import Compiled
from implicitdiff.structured.steps import steps_of

FAILING = frozenset("log log1p exp expm1".split())
"""Functions that are not finite at some finite argument, or whose products with 0 are not."""

YIELDING = re.compile(r"(?:lam|v|v_lam|rhs_u|rhs_h)\d*|w|s|status|cancelled|kkt|factor|schur|shift")
"""Names of the emitted code that get an underscore where the user has an argument of that name."""

COMPILED = frozenset(("backward", "stationarity", "value", "kkt_solve"))
"""The functions that run at every call, or every step of a solver: compiling what runs once is no gain."""


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
    steps: list[tuple[Ref, Step]] = field(default_factory=list)
    """What values are in the derivation, beside what the calls of solvers say."""


class Writer:
    """The functions of one problem by key. Writing is done under a lock: the builder is shared."""

    def __init__(
        self,
        arguments: Arguments,
        constants: dict[str, Tensor],
        null_vectors: tuple[Tensor, ...],
        *,
        compiled: bool = False,
    ) -> None:
        self.arguments, self.compiled = arguments, compiled
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
        steps, shown = steps_of(nodes, recipe.steps), self._shown(names)
        emitted = emitter.function(
            name, names, recipe.outputs, self.namespace, preamble, document, recipe.first, given, steps, shown
        )
        if self.compiled and name in COMPILED:
            emitted = replace(emitted, call=Compiled(emitted, self.namespace))
        fragile = (o.name for o in recipe.outputs if any(map(_may_fail, reachable([o.ref.node]))))
        return Written(emitted, names, frozenset(fragile))

    def _reshape(self, name: str, sizes: tuple[int, ...], prefix: int) -> list[str]:
        """The statement that gives an argument the finer axes of its leaf, where they differ from its dimensions."""
        if self.arguments.shape(name) == tuple(sizes):
            return []
        parts = ([f"*{name}.shape[:{prefix}]"] if prefix else []) + [str(size) for size in sizes]
        return [
            f"{name} = {name}.reshape(({', '.join(parts)}{',' if len(parts) == 1 else ''}))  # by its axes"
        ]

    def _shown(self, names: Sequence[str]) -> dict[str, str]:
        """Arguments under another name than the user's, because emitted code uses that name itself: w_in for w."""
        declared = self.arguments.declared
        own = {
            leaf.name: leaf.placeholder.name.removeprefix("self.")
            for leaf in (*declared.variables, *declared.theta)
        }
        return {n: own[n] for n in names if n in own and n == f"{own[n]}_in" and YIELDING.fullmatch(own[n])}

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
                return [f"{name} = {name}.to({like}.dtype)  # as the variables"]
        return []


def _may_fail(node: Node) -> bool:
    if node.op == "fn":
        return node.data[0] in FAILING
    return node.op == "prod" and any(power < 0.0 or power != int(power) for power in node.data[1])
