"""Rules of reductions, and of the losses and norms that are made of them.

In: a value and dimensions. Out: a value with these dimensions summed. logsumexp, softmax and norms keep their own
rules: their usual decompositions lose the structure or differentiate through a maximum. Next file: `view.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from implicitdiff.graph.ir import Label, Unsupported
from implicitdiff.graph.rules import pointwise
from implicitdiff.graph.translate import rule
from implicitdiff.graph.values import Dimension, Value, shape

aten = torch.ops.aten


def positions(value: Value, dim: int | Sequence[int] | None) -> list[int]:
    """The dimensions meant by torch's `dim` argument (None or empty: all)."""
    if dim is None or (not isinstance(dim, int) and len(dim) == 0):
        return list(range(len(value.dims)))
    rank = max(len(value.dims), 1)
    return [d % rank for d in ([dim] if isinstance(dim, int) else dim) if value.dims]


def kept(value: Value, reduced: Sequence[int], keepdim: bool) -> tuple[Dimension, ...]:
    """Dimensions after a reduction."""
    if keepdim:
        return tuple(() if d in reduced else dim for d, dim in enumerate(value.dims))
    return tuple(dim for d, dim in enumerate(value.dims) if d not in reduced)


def labels_of(value: Value, reduced: Sequence[int]) -> list[Label]:
    """All labels along the reduced dimensions."""
    return [label for d in reduced for label in value.dims[d]]


@rule(aten.sum.default, aten.sum.dim_IntList)
def total(tr: Any, a: Value, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Value:
    if dtype is not None:
        raise Unsupported("a sum in another dtype")
    reduced = positions(a, dim)
    return Value(tr.build.con(a.ref, labels_of(a, reduced)), kept(a, reduced, keepdim))


@rule(aten.mean.default, aten.mean.dim)
def mean(tr: Any, a: Value, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Value:
    count = math.prod(shape(tr.build, a)[d] for d in positions(a, dim))
    summed = total(tr, a, dim, keepdim, dtype)
    return Value(tr.build.scale(1.0 / count, summed.ref), summed.dims)


@rule(aten.var.correction)
def variance(
    tr: Any, a: Value, dim: Any = None, correction: float | None = None, keepdim: bool = False
) -> Value:
    reduced = positions(a, dim)
    count = math.prod(shape(tr.build, a)[d] for d in reduced)
    centred = pointwise.sub(tr, a, mean(tr, a, dim, True))
    summed = total(tr, pointwise.square(tr, centred), dim, keepdim)
    return Value(
        tr.build.scale(1.0 / (count - (1 if correction is None else correction)), summed.ref), summed.dims
    )


def shifted_exponentials(tr: Any, a: Value, reduced: Sequence[int]) -> tuple[Value, Value, Value]:
    """exp(a - m), its sum, and m = max a, a constant for differentiation: its derivative cancels identically."""
    build = tr.build
    top = Value(build.amax(a.ref, labels_of(a, reduced)), kept(a, reduced, True))
    below = Value(build.minus(a.ref, top.ref), a.dims)
    exponentials = pointwise.unary(tr, "exp", below)
    return exponentials, total(tr, exponentials, list(reduced), True), top


@rule(aten.logsumexp.default)
def logsumexp(tr: Any, a: Value, dim: Any, keepdim: bool = False) -> Value:
    reduced = positions(a, dim)
    _, summed, top = shifted_exponentials(tr, a, reduced)
    out = tr.build.plus(tr.build.fn("log", [summed.ref]), top.ref)
    return Value(out, kept(a, reduced, keepdim))


@rule(aten._softmax.default)
def softmax(tr: Any, a: Value, dim: int, half_to_float: bool = False) -> Value:
    exponentials, summed, _ = shifted_exponentials(tr, a, positions(a, dim))
    return Value(tr.build.mul([(exponentials.ref, 1.0), (summed.ref, -1.0)]), a.dims)


@rule(aten._log_softmax.default)
def log_softmax(tr: Any, a: Value, dim: int, half_to_float: bool = False) -> Value:
    return pointwise.sub(tr, a, logsumexp(tr, a, dim, True))


@rule(aten.linalg_vector_norm.default)
def vector_norm(
    tr: Any, a: Value, order: float = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None
) -> Value:
    if dtype is not None:
        raise Unsupported("a norm in another dtype")
    if order == 2:
        squared = total(tr, pointwise.square(tr, a), dim, keepdim)
        return pointwise.sqrt(tr, squared)
    if order == 1:
        return total(tr, pointwise.unary(tr, "abs", a), dim, keepdim)
    raise Unsupported(f"a norm of order {order}")


def reduction(tr: Any, a: Value, how: int) -> Value:
    """torch's reduction codes of losses: 0 none, 1 mean, 2 sum."""
    return a if how == 0 else mean(tr, a) if how == 1 else total(tr, a)


@rule(aten.mse_loss.default)
def mse_loss(tr: Any, a: Value, b: Value, how: int = 1) -> Value:
    return reduction(tr, pointwise.square(tr, pointwise.sub(tr, a, b)), how)


@rule(aten.huber_loss.default)
def huber_loss(tr: Any, a: Value, b: Value, how: int = 1, delta: float = 1.0) -> Value:
    error = pointwise.sub(tr, a, b)
    size = pointwise.unary(tr, "abs", error)
    inside = tr.build.scale(0.5, tr.build.power(error.ref, 2.0))
    outside = tr.build.add([(delta, size.ref)], -0.5 * delta * delta)
    small = pointwise.compare(tr, "le", size, delta)
    return reduction(
        tr, pointwise.where(tr, small, Value(inside, error.dims), Value(outside, size.dims)), how
    )


@rule(aten.smooth_l1_loss.default)
def smooth_l1_loss(tr: Any, a: Value, b: Value, how: int = 1, beta: float = 1.0) -> Value:
    scaled = huber_loss(tr, a, b, 0, beta)
    return reduction(tr, Value(tr.build.scale(1.0 / beta, scaled.ref), scaled.dims), how)
