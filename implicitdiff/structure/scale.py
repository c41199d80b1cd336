"""The terms that cancel in an expression: against their size a residual is judged.

In: a ref. Out: the refs of its summands: the terms of an addition, and the entries under a sum. Next file: `report.py`.
"""

from __future__ import annotations

from implicitdiff.graph import onehot
from implicitdiff.graph.build import Builder
from implicitdiff.graph.ir import Ref


def cancelling(build: Builder, ref: Ref) -> list[Ref]:
    """The summands of `ref`: of an addition, of a sum's entries, and of one addition that is a factor in them."""
    if ref.node.op == "add":
        return [t for term in _terms(build, ref) for t in _inside(build, term)]
    return _inside(build, ref)


def _terms(build: Builder, ref: Ref) -> list[Ref]:
    """The terms of an addition, its constant last."""
    constant, coefficients = ref.node.data
    args, _ = build.open(ref)
    terms = [build.scale(c, a) for c, a in zip(coefficients, args, strict=True)]
    return [*terms, build.number(constant)] if constant else terms


def _inside(build: Builder, ref: Ref) -> list[Ref]:
    """A product with one sum: that product with the sum's entries instead (where that makes no larger tensor)."""
    coefficient, factors = build.split(ref)
    sums = [f for f in factors if f[0].node.op == "con" and f[1] == 1.0 and not f[0].node.data]
    if len(factors) == 1 and factors[0][0].node.op == "pad" and factors[0][1] == 1.0:
        # what cancels in the entries of a slice; where they lie along the axis does not change the largest
        (values,), _ = build.open(factors[0][0])
        return [build.scale(coefficient, term) for term in cancelling(build, values)]
    if len(sums) != 1:
        return _distributed(build, ref)
    (body,), bound = build.open(sums[0][0])
    rest = [f for f in factors if f is not sums[0]]
    if onehot.has_hot(build, body):
        # a scatter is read where its terms come from; a gather has one term only
        columns = [onehot.column_of(ref) for ref, _ in build.split(body)[1] if onehot.is_hot(ref)]
        if set(columns) <= set(bound):
            return _distributed(build, ref)
        whole = build.con(build.mul([*rest, (body, 1.0)], coefficient), columns)
        return cancelling(build, whole)
    widest = max(_entries(build, [r]) for r, _ in build.split(body)[1] or [(body, 1.0)])
    if _entries(build, [body, *(r for r, _ in rest)]) > widest:
        return [ref]
    return _distributed(build, build.mul([*rest, (body, 1.0)], coefficient))


def _distributed(build: Builder, ref: Ref) -> list[Ref]:
    """2 (u - x) as 2 u and -2 x: the first addition among the factors multiplied out."""
    coefficient, factors = build.split(ref)
    for k, (factor, power) in enumerate(factors):
        if factor.node.op == "add" and power == 1.0:
            rest = [f for j, f in enumerate(factors) if j != k]
            return [build.mul([*rest, (term, 1.0)], coefficient) for term in _terms(build, factor)]
    return [ref]


def _entries(build: Builder, refs: list[Ref]) -> int:
    out = 1
    for label in {k for ref in refs for k in ref.labels}:
        out *= build.labels.sizes[label]
    return out
