"""Rules of slices, selections and concatenations.

In: a value and positions along a dimension. Out: the same expression of sliced leaves: a slice of `u + x` is the sum of
two slices, so that only leaves carry index maps. Next file: `matmul.py`.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Sequence
from typing import Any

import torch

from implicitdiff.graph.ir import Unsupported
from implicitdiff.graph.rules import view
from implicitdiff.graph.translate import Pieces, rule
from implicitdiff.graph.values import Value, shape

aten = torch.ops.aten


@rule(aten.slice.Tensor)
def slice_tensor(
    tr: Any, a: Value, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Value:
    dim %= len(a.dims)
    length = shape(tr.build, a)[dim]
    first, last, _ = slice(start, None if end == sys.maxsize else end).indices(length)
    count = max(0, -(-(last - first) // step))
    if count == length and first == 0:
        return a
    if count == 0:
        raise Unsupported("an empty slice")
    return tr.slice(a, dim, first, step, count)


@rule(aten.flip.default)
def flip(tr: Any, a: Value, dims: Sequence[int]) -> Value:
    for dim in {d % len(a.dims) for d in dims}:
        length = shape(tr.build, a)[dim]
        a = tr.slice(a, dim, length - 1, -1, length) if length > 1 else a
    return a


@rule(aten.select.int)
def select(tr: Any, a: Value, dim: int, index: int) -> Value:
    dim %= len(a.dims)
    length = shape(tr.build, a)[dim]
    one = a if length == 1 else tr.slice(a, dim, index % length, 1, 1)
    return Value(one.ref, one.dims[:dim] + one.dims[dim + 1 :])


@rule(aten.unbind.int)
def unbind(tr: Any, a: Value, dim: int = 0) -> tuple[Value, ...]:
    return tuple(select(tr, a, dim, k) for k in range(shape(tr.build, a)[dim]))


@rule(aten.split.Tensor)
def split(tr: Any, a: Value, width: int, dim: int = 0) -> tuple[Value, ...]:
    length = shape(tr.build, a)[dim]
    return tuple(slice_tensor(tr, a, dim, k, min(k + width, length)) for k in range(0, length, width))


@rule(aten.split_with_sizes.default)
def split_with_sizes(tr: Any, a: Value, widths: Sequence[int], dim: int = 0) -> tuple[Value, ...]:
    starts = [sum(widths[:k]) for k in range(len(widths))]
    return tuple(slice_tensor(tr, a, dim, s, s + w) for s, w in zip(starts, widths, strict=True))


def _getitem(tr: Any, a: Sequence[Any], index: int) -> Any:
    return a[index]


rule(operator.getitem)(_getitem)


@rule(aten.cat.default)
def cat(tr: Any, values: Sequence[Value], dim: int = 0) -> Value | Pieces:
    if len(values) == 1:
        return values[0]
    if any(isinstance(v, Pieces) for v in values):
        raise Unsupported("a concatenation of concatenations")
    return Pieces(tuple(values), dim % len(values[0].dims))


@rule(aten.stack.default)
def stack(tr: Any, values: Sequence[Value], dim: int = 0) -> Value | Pieces:
    return cat(tr, [view.unsqueeze(tr, v, dim) for v in values], dim)
