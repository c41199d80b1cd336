"""Normal forms of `where(condition, a, b)`: what the condition says inside its own branches, and where numbers stand.

In: refs. Out: refs. Only numbers are put in the place of masks: a branch that is not taken stays as finite as it was.
Next file: `build.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from implicitdiff.graph.ir import Ref

if TYPE_CHECKING:
    from implicitdiff.graph.build import Builder

ENTRYWISE = ("prod", "add", "fn")


def where(build: Builder, args: Sequence[Ref]) -> Ref | None:
    """The normal form of where(condition, a, b); None where it is that already."""
    condition, a, b = args
    decided = build.as_number(condition)
    if a == b or decided is not None:
        return a if a == b or decided else b
    high, low = build.as_number(a), build.as_number(b)
    if high is not None and low is not None:
        if not math.isfinite(high - low) or (high, low) == (1.0, 0.0):
            return None
        mask = build.fn("where", [condition, build.number(1.0), build.number(0.0)])
        return build.add([(high - low, mask)], low)
    inside = [assuming(build, a, condition, 1.0, {}), assuming(build, b, condition, 0.0, {})]
    if inside != [a, b]:
        return build.fn("where", [condition, *inside])
    for k, (number, other) in enumerate(((high, b), (low, a))):
        coefficient = build.split(other)[0]
        if number == 0.0 and coefficient not in (1.0, 0.0) and math.isfinite(coefficient):
            # k x where the condition holds and 0 elsewhere is k times the same of x
            rest = build.scale(1.0 / coefficient, other)
            if build.split(rest)[0] == 1.0:
                pair = [build.number(0.0), rest] if k == 0 else [rest, build.number(0.0)]
                return build.scale(coefficient, build.fn("where", [condition, *pair]))
    return None


def assuming(build: Builder, ref: Ref, condition: Ref, value: float, memo: dict[Ref, Ref]) -> Ref:
    """An entrywise expression with the mask where(condition, 1, 0) replaced by its value."""
    if ref.node.op not in ENTRYWISE or not ref.node.args:
        return ref
    if ref not in memo:
        args, bound = build.open(ref)
        if ref.node.op == "fn" and ref.node.data[0] == "where" and args[0] == condition:
            numbers = [build.as_number(a) for a in args[1:]]
            memo[ref] = build.number(value) if numbers == [1.0, 0.0] else ref
        else:
            new = [assuming(build, a, condition, value, memo) for a in args]
            memo[ref] = ref if list(args) == new else build.rebuilt(ref.node, new, bound)
    return memo[ref]


def scaled(build: Builder, coefficient: float, ref: Ref) -> Ref | None:
    """k where(c, n, x / k) as where(c, k n, x); None where that is no gain."""
    if ref.node.op != "fn" or ref.node.data[0] != "where":
        return None
    (condition, a, b), _ = build.open(ref)
    high, low = build.as_number(a), build.as_number(b)
    number, other = (high, b) if high is not None else (low, a)
    if not number or build.split(other)[0] * coefficient != 1.0:
        return None
    pair = [build.scale(coefficient, a), build.scale(coefficient, b)]
    return build.fn("where", [condition, *pair])
