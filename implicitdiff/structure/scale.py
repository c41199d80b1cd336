"""The terms that cancel in an expression: against their size a residual is judged.

In: a ref. Out: the refs of its summands: the terms of an addition, and the entries under a sum. Next file: `report.py`.
"""

from __future__ import annotations

from implicitdiff.graph.build import Builder
from implicitdiff.graph.ir import Ref


def cancelling(build: Builder, ref: Ref) -> list[Ref]:
    """The summands of `ref`, one level of additions and sums deep."""
    if ref.node.op == "add":
        constant, coefficients = ref.node.data  # type: ignore[misc]
        args, _ = build.open(ref)
        terms = [build.scale(c, a) for c, a in zip(coefficients, args, strict=True)]
        return [t for term in terms for t in _inside(build, term)] + ([build.number(constant)] if constant else [])
    return _inside(build, ref)


def _inside(build: Builder, ref: Ref) -> list[Ref]:
    """A product with one sum: that product with the sum's entries instead (where that makes no larger tensor)."""
    coefficient, factors = build.split(ref)
    sums = [f for f in factors if f[0].node.op == "con" and f[1] == 1.0 and not f[0].node.data]
    if len(sums) != 1:
        return [ref]
    (body,), _ = build.open(sums[0][0])
    rest = [f for f in factors if f is not sums[0]]
    widest = max(_entries(build, [r]) for r, _ in build.split(body)[1] or [(body, 1.0)])
    whole = [body, *(r for r, _ in rest)]
    if _entries(build, whole) > widest:
        return [ref]
    return [build.mul([*rest, (body, 1.0)], coefficient)]


def _entries(build: Builder, refs: list[Ref]) -> int:
    out = 1
    for label in {k for ref in refs for k in ref.labels}:
        out *= build.labels.sizes[label]
    return out
