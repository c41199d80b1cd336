"""Rules of products of matrices and vectors.

In: two values. Out: the sum over the shared dimension of their entrywise product. Next file: `create.py`.
"""

from __future__ import annotations

from typing import Any

import torch

from implicitdiff.graph.rules import pointwise
from implicitdiff.graph.translate import rule
from implicitdiff.graph.values import Dimension, Value, match, renamed

aten = torch.ops.aten


def contract(tr: Any, a: Value, b: Value, a_dim: int, b_dim: int, batch: int = 0) -> Value:
    """sum over a's dimension `a_dim` = b's dimension `b_dim`; the first `batch` dimensions run along together."""
    build = tr.build
    a, b = renamed(build, a), renamed(build, b)
    names: dict[int, int] = {}
    dims: list[Dimension] = []
    for d in range(batch):
        dims.append(a.dims[d] or b.dims[d])
        if a.dims[d] and b.dims[d]:
            names.update(match(build, a.dims[d], b.dims[d], [a, b]))
    ours, theirs = a.dims[a_dim], b.dims[b_dim]
    if ours and theirs:
        names.update(match(build, ours, theirs, [a, b]))
    summed = ours or theirs
    product = build.times(a.ref, b.ref.rename(names))
    rest_a = [dim for d, dim in enumerate(a.dims) if d >= batch and d != a_dim]
    rest_b = [
        tuple(names.get(k, k) for k in dim) for d, dim in enumerate(b.dims) if d >= batch and d != b_dim
    ]
    return Value(build.con(product, summed), (*dims, *rest_a, *rest_b))


@rule(aten.mm.default)
def mm(tr: Any, a: Value, b: Value) -> Value:
    return contract(tr, a, b, 1, 0)


@rule(aten.mv.default)
def mv(tr: Any, a: Value, b: Value) -> Value:
    return contract(tr, a, b, 1, 0)


@rule(aten.dot.default, aten.vdot.default)
def dot(tr: Any, a: Value, b: Value) -> Value:
    return contract(tr, a, b, 0, 0)


@rule(aten.bmm.default)
def bmm(tr: Any, a: Value, b: Value) -> Value:
    return contract(tr, a, b, 2, 1, batch=1)


@rule(aten.addmm.default, aten.addmv.default)
def addmm(tr: Any, c: Value, a: Value, b: Value, beta: float = 1, alpha: float = 1) -> Value:
    return pointwise.add(tr, pointwise.mul(tr, c, beta), contract(tr, a, b, 1, 0), alpha)


@rule(aten.baddbmm.default)
def baddbmm(tr: Any, c: Value, a: Value, b: Value, beta: float = 1, alpha: float = 1) -> Value:
    return pointwise.add(tr, pointwise.mul(tr, c, beta), bmm(tr, a, b), alpha)


@rule(aten.outer.default, aten.ger.default)
def outer(tr: Any, a: Value, b: Value) -> Value:
    column = Value(a.ref, (*a.dims, ()))
    row = Value(b.ref, ((), *b.dims))
    return pointwise.mul(tr, column, row)
