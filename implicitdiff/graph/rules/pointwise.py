"""Rules of operations that act entry by entry.

In: values that broadcast. Out: one value. Functions with kinks become `where`, so that both branches stay visible.
Next file: `reduce.py`.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from implicitdiff.graph.build import Builder
from implicitdiff.graph.ir import Ref, Unsupported
from implicitdiff.graph.translate import rule
from implicitdiff.graph.values import Value, aligned

aten = torch.ops.aten


def lift(tr: Any, *args: Any) -> tuple[list[Ref], Any]:
    """Arguments broadcast together."""
    return aligned(tr.build, [tr.value(a) for a in args])


def unary(tr: Any, name: str, a: Any) -> Value:
    """A function of one argument."""
    return Value(tr.build.fn(name, [a.ref]), a.dims)


@rule(aten.add.Tensor, aten.add.Scalar)
def add(tr: Any, a: Any, b: Any, alpha: float = 1) -> Value:
    (x, y), dims = lift(tr, a, b)
    return Value(tr.build.add([(1.0, x), (float(alpha), y)]), dims)


@rule(aten.sub.Tensor, aten.sub.Scalar)
def sub(tr: Any, a: Any, b: Any, alpha: float = 1) -> Value:
    return add(tr, a, b, -alpha)


@rule(aten.rsub.Scalar, aten.rsub.Tensor)
def rsub(tr: Any, a: Any, b: Any, alpha: float = 1) -> Value:
    return add(tr, b, a, -alpha)


@rule(aten.mul.Tensor, aten.mul.Scalar)
def mul(tr: Any, a: Any, b: Any) -> Value:
    refs, dims = lift(tr, a, b)
    return Value(tr.build.times(*refs), dims)


@rule(aten.div.Tensor, aten.div.Scalar)
def div(tr: Any, a: Any, b: Any) -> Value:
    (x, y), dims = lift(tr, a, b)
    return Value(tr.build.mul([(x, 1.0), (y, -1.0)]), dims)


@rule(aten.neg.default)
def neg(tr: Any, a: Value) -> Value:
    return Value(tr.build.scale(-1.0, a.ref), a.dims)


@rule(aten.pow.Tensor_Scalar)
def power(tr: Any, a: Value, exponent: float) -> Value:
    return Value(tr.build.power(a.ref, float(exponent)), a.dims)


@rule(aten.pow.Tensor_Tensor)
def power_of(tr: Any, a: Value, b: Value) -> Value:
    exponent = tr.build.as_number(b.ref)
    if exponent is None:
        raise Unsupported("a power whose exponent is no number")
    (x, _), dims = lift(tr, a, b)
    return Value(tr.build.power(x, exponent), dims)


@rule(aten.pow.Scalar)
def exponential(tr: Any, base: float, a: Value) -> Value:
    if base <= 0.0:
        raise Unsupported("a power of a non-positive number")
    return Value(tr.build.fn("exp", [tr.build.scale(math.log(base), a.ref)]), a.dims)


@rule(aten.square.default)
def square(tr: Any, a: Value) -> Value:
    return power(tr, a, 2.0)


@rule(aten.sqrt.default)
def sqrt(tr: Any, a: Value) -> Value:
    return power(tr, a, 0.5)


@rule(aten.rsqrt.default)
def rsqrt(tr: Any, a: Value) -> Value:
    return power(tr, a, -0.5)


@rule(aten.reciprocal.default)
def reciprocal(tr: Any, a: Value) -> Value:
    return power(tr, a, -1.0)


def _register_unary(operation: Any, name: str) -> None:
    @rule(operation)
    def apply(tr: Any, a: Value) -> Value:
        return unary(tr, name, a)


for _name in ("exp", "log", "log1p", "expm1", "tanh", "sigmoid", "sin", "cos", "atan", "erf", "abs", "sign"):
    _register_unary(getattr(aten, _name).default, _name)


@rule(aten.exp2.default)
def exp2(tr: Any, a: Value) -> Value:
    return exponential(tr, 2.0, a)


@rule(aten.log2.default)
def log2(tr: Any, a: Value) -> Value:
    return Value(tr.build.scale(1.0 / math.log(2.0), tr.build.fn("log", [a.ref])), a.dims)


@rule(aten.log10.default)
def log10(tr: Any, a: Value) -> Value:
    return Value(tr.build.scale(1.0 / math.log(10.0), tr.build.fn("log", [a.ref])), a.dims)


def hyperbolic(build: Builder, a: Ref, sign: float) -> Ref:
    """(e^a + sign e^-a) / 2."""
    return build.scale(
        0.5, build.add([(1.0, build.fn("exp", [a])), (sign, build.fn("exp", [build.scale(-1.0, a)]))])
    )


@rule(aten.cosh.default)
def cosh(tr: Any, a: Value) -> Value:
    return Value(hyperbolic(tr.build, a.ref, 1.0), a.dims)


@rule(aten.sinh.default)
def sinh(tr: Any, a: Value) -> Value:
    return Value(hyperbolic(tr.build, a.ref, -1.0), a.dims)


@rule(aten.softplus.default)
def softplus(tr: Any, a: Value, beta: float = 1, threshold: float = 20) -> Value:
    if beta != 1 or threshold != 20:
        raise Unsupported("softplus with its own beta or threshold")
    return unary(tr, "softplus", a)


@rule(aten.log_sigmoid_forward.default)
def log_sigmoid(tr: Any, a: Value) -> tuple[Value, None]:
    build = tr.build
    return Value(build.scale(-1.0, build.fn("softplus", [build.scale(-1.0, a.ref)])), a.dims), None


@rule(aten.silu.default)
def silu(tr: Any, a: Value) -> Value:
    return Value(tr.build.times(a.ref, tr.build.fn("sigmoid", [a.ref])), a.dims)


def compare(tr: Any, name: str, a: Any, b: Any) -> Value:
    """A condition: it has no derivative."""
    refs, dims = lift(tr, a, b)
    return Value(tr.build.fn(name, refs), dims)


def _register_comparison(name: str) -> None:
    @rule(getattr(aten, name).Tensor, getattr(aten, name).Scalar)
    def apply(tr: Any, a: Any, b: Any) -> Value:
        return compare(tr, name, a, b)


for _name in ("gt", "ge", "lt", "le", "eq", "ne"):
    _register_comparison(_name)


@rule(aten.logical_and.default, aten.bitwise_and.Tensor)
def logical_and(tr: Any, a: Value, b: Value) -> Value:
    return compare(tr, "and", a, b)


@rule(aten.logical_or.default, aten.bitwise_or.Tensor)
def logical_or(tr: Any, a: Value, b: Value) -> Value:
    return compare(tr, "or", a, b)


@rule(aten.logical_not.default, aten.bitwise_not.default)
def logical_not(tr: Any, a: Value) -> Value:
    return unary(tr, "not", a)


@rule(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)
def where(tr: Any, condition: Value, a: Any, b: Any) -> Value:
    refs, dims = lift(tr, condition, a, b)
    return Value(tr.build.fn("where", refs), dims)


@rule(aten.relu.default)
def relu(tr: Any, a: Value) -> Value:
    return where(tr, compare(tr, "gt", a, 0.0), a, 0.0)


@rule(aten.clamp.default, aten.clamp.Tensor, aten.hardtanh.default)
def clamp(tr: Any, a: Value, low: Any = None, high: Any = None) -> Value:
    out = a
    if low is not None:
        out = where(tr, compare(tr, "lt", a, low), low, out)
    if high is not None:
        out = where(tr, compare(tr, "gt", a, high), high, out)
    return out


@rule(aten.clamp_min.default, aten.clamp_min.Tensor)
def clamp_min(tr: Any, a: Value, low: Any) -> Value:
    return clamp(tr, a, low)


@rule(aten.clamp_max.default, aten.clamp_max.Tensor)
def clamp_max(tr: Any, a: Value, high: Any) -> Value:
    return clamp(tr, a, None, high)


@rule(aten.maximum.default)
def maximum(tr: Any, a: Value, b: Value) -> Value:
    return where(tr, compare(tr, "gt", a, b), a, b)


@rule(aten.minimum.default)
def minimum(tr: Any, a: Value, b: Value) -> Value:
    return where(tr, compare(tr, "lt", a, b), a, b)


@rule(aten.xlogy.Tensor)
def xlogy(tr: Any, a: Value, b: Value) -> Value:
    (x, y), dims = lift(tr, a, b)
    return Value(tr.build.times(x, tr.build.fn("log", [y])), dims)


@rule(aten.special_entr.default)
def entr(tr: Any, a: Value) -> Value:
    return Value(tr.build.mul([(a.ref, 1.0), (tr.build.fn("log", [a.ref]), 1.0)], -1.0), a.dims)


@rule(aten.addcmul.default)
def addcmul(tr: Any, a: Value, b: Value, c: Value, value: float = 1) -> Value:
    return add(tr, a, mul(tr, b, c), value)


@rule(aten.addcdiv.default)
def addcdiv(tr: Any, a: Value, b: Value, c: Value, value: float = 1) -> Value:
    return add(tr, a, div(tr, b, c), value)


@rule(aten.lerp.Scalar, aten.lerp.Tensor)
def lerp(tr: Any, a: Value, b: Value, weight: Any) -> Value:
    return add(tr, a, mul(tr, weight, sub(tr, b, a)))
