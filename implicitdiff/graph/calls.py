"""What the emitter is given and what it gives: named outputs, calls that print as a template, and the function.

In: refs. Out: `Output`, `Emitted` and the node of a `call`. Next file: `emit.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from implicitdiff.graph.build import Builder
from implicitdiff.graph.ir import Label, Ref


@dataclass(frozen=True)
class Output:
    """A result: its ref, the order of its axes, how many leading axes it has at least (-1: a Python object)."""

    name: str
    ref: Ref
    order: tuple[Label, ...]
    prefix: int = 1


@dataclass(frozen=True)
class Emitted:
    """A function as text, and compiled."""

    source: str
    call: Callable[..., Any] = field(repr=False)
    results: tuple[str, ...] = ()


def call(
    build: Builder,
    template: str,
    args: Sequence[tuple[Ref, Sequence[Label], int]],
    out: Sequence[Label],
    prefix: int,
    name: str | None = None,
) -> Ref:
    """A node that prints as `template`: {k} is argument k with the given axes and at least the given prefix.

    Prefix -1 passes a Python object (a factorisation) on as it is.
    """
    bound = list(dict.fromkeys(k for _, order, _ in args for k in order if k not in out))
    own = [*out, *bound]
    orders = tuple((tuple(own.index(k) for k in order), least) for _, order, least in args)
    return build.make(
        "call",
        (template, orders, name),
        [ref for ref, _, _ in args],
        out,
        bound,
        prefix=prefix,
        leaves=frozenset(),
    )
