"""Rules of tensors made from the shape of another one, and of identity matrices.

In: sizes. Out: a broadcast number or an identity. Other tensors made from numbers alone are evaluated once
(`_Translator.constant`).
"""

from __future__ import annotations

from typing import Any

import torch

from implicitdiff.graph.translate import rule
from implicitdiff.graph.values import Value

aten = torch.ops.aten


@rule(aten.zeros_like.default, aten.new_zeros.default)
def zeros_like(tr: Any, a: Value, sizes: Any = None, **_: Any) -> Value:
    return _filled(tr, a, sizes, 0.0)


@rule(aten.ones_like.default, aten.new_ones.default)
def ones_like(tr: Any, a: Value, sizes: Any = None, **_: Any) -> Value:
    return _filled(tr, a, sizes, 1.0)


@rule(aten.full_like.default)
def full_like(tr: Any, a: Value, value: float, **_: Any) -> Value:
    return _filled(tr, a, None, float(value))


@rule(aten.new_full.default)
def new_full(tr: Any, a: Value, sizes: Any, value: float, **_: Any) -> Value:
    return _filled(tr, a, sizes, float(value))


def _filled(tr: Any, a: Value, sizes: Any, value: float) -> Value:
    if sizes is None:
        return Value(tr.build.number(value), a.dims)
    return tr.number(value, tuple(sizes))


@rule(aten.eye.default, aten.eye.m)
def eye(tr: Any, rows: int, columns: int | None = None, *, device: Any = None, **_: Any) -> Value:
    if rows == 1 or (columns is not None and columns != rows):
        return tr.constant(torch.eye(rows, rows if columns is None else columns, device=device))
    name, parts = tr.identity(rows)
    first, second = [[tr.build.labels.new(part) for part in parts] for _ in range(2)]
    deltas = [tr.build.eye(a, b, f"{name}:{k}") for k, (a, b) in enumerate(zip(first, second, strict=True))]
    return Value(tr.build.times(*deltas), (tuple(first), tuple(second)))
