"""Rules of operations that move no number: reshapes, permutations, broadcasts, copies.

In: a value. Out: the same ref under other dimensions. Next file: `index.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from implicitdiff.graph.ir import Unsupported
from implicitdiff.graph.translate import rule
from implicitdiff.graph.values import Value, reshaped

aten = torch.ops.aten


@rule(aten.view.default, aten._unsafe_view.default, aten.reshape.default)
def view(tr: Any, a: Value, sizes: Sequence[int]) -> Value:
    return reshaped(tr.build, a, list(sizes))


@rule(aten.expand.default)
def expand(tr: Any, a: Value, sizes: Sequence[int], implicit: bool = False) -> Value:
    missing = len(sizes) - len(a.dims)
    dims = [(), *a.dims] if missing == 1 else [()] * missing + list(a.dims)
    out = []
    for dim, wanted in zip(dims, sizes, strict=True):
        out.append(dim if dim or wanted in (-1, 1) else (tr.build.labels.new(wanted),))
    return Value(a.ref, tuple(out))


@rule(aten.permute.default)
def permute(tr: Any, a: Value, order: Sequence[int]) -> Value:
    return Value(a.ref, tuple(a.dims[d] for d in order))


@rule(aten.t.default, aten.t_.default)
def transposed(tr: Any, a: Value) -> Value:
    return Value(a.ref, a.dims[::-1])


@rule(aten.transpose.int, aten.transpose_.default)
def transpose(tr: Any, a: Value, first: int, second: int) -> Value:
    dims = list(a.dims)
    if dims:
        dims[first], dims[second] = dims[second], dims[first]
    return Value(a.ref, tuple(dims))


@rule(aten.unsqueeze.default, aten.unsqueeze_.default)
def unsqueeze(tr: Any, a: Value, dim: int) -> Value:
    dims = list(a.dims)
    dims.insert(dim % (len(dims) + 1), ())
    return Value(a.ref, tuple(dims))


@rule(aten.squeeze.default, aten.squeeze_.default)
def squeeze(tr: Any, a: Value) -> Value:
    return Value(a.ref, tuple(d for d in a.dims if d))


@rule(aten.squeeze.dim, aten.squeeze.dims, aten.squeeze_.dim, aten.squeeze_.dims)
def squeeze_dim(tr: Any, a: Value, dim: int | Sequence[int]) -> Value:
    rank = max(len(a.dims), 1)
    gone = [d % rank for d in ([dim] if isinstance(dim, int) else dim)]
    return Value(a.ref, tuple(d for k, d in enumerate(a.dims) if d or k not in gone))


@rule(
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.lift_fresh_copy.default,
    aten.lift_fresh.default,
)
def same(tr: Any, a: Value, memory_format: Any = None) -> Value:
    return a


@rule(aten.detach.default)
def detach(tr: Any, a: Value) -> Value:
    return Value(tr.build.fn("detach", [a.ref]), a.dims)


@rule(aten._to_copy.default)
def to_copy(
    tr: Any,
    a: Value,
    dtype: Any = None,
    layout: Any = None,
    device: Any = None,
    pin_memory: Any = None,
    non_blocking: bool = False,
    memory_format: Any = None,
) -> Value:
    own = next(p.dtype for p in tr.trace.placeholders if p.dtype.is_floating_point)
    if dtype is None or dtype == own:
        is_condition = a.ref.node.op == "fn" and not a.ref.node.leaves
        return Value(tr.build.fn("cast", [a.ref]), a.dims) if is_condition else a
    raise Unsupported(f"a conversion to {dtype}")
