"""Rules of gathers and scatters by index tensors.

In: a value and index tensors, which are inputs, attributes or constants of integers, or slices of such. Out: sums of
products with one-hot matrices (`graph/onehot.py`). Next file: `matmul.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from implicitdiff.graph import onehot
from implicitdiff.graph.calls import call
from implicitdiff.graph.ir import Label, Ref, Unsupported
from implicitdiff.graph.translate import WHOLE, rule
from implicitdiff.graph.values import Dimension, Value, aligned, renamed, restricted, shape, taken

aten = torch.ops.aten


@rule(aten.index.Tensor, aten._unsafe_index.Tensor)
def index(tr: Any, a: Value, indices: Sequence[Value | None]) -> Value:
    given = [(dim, _index(tr, i)) for dim, i in enumerate(indices) if i is not None]
    refs, where = aligned(tr.build, [i for _, i in given])
    dims = [dim for dim, _ in given]
    a = renamed(tr.build, a)
    ref = a.ref
    for dim, own in zip(dims, refs, strict=True):
        ref = _taken(tr, Value(ref, a.dims), dim, own)
    kept = [d for k, d in enumerate(a.dims) if k not in dims]
    # torch puts the axes of the index tensors first, unless these stand side by side
    first = dims[0] if dims == list(range(dims[0], dims[0] + len(dims))) else 0
    return Value(ref, (*kept[:first], *where, *kept[first:]))


@rule(aten.index_select.default)
def index_select(tr: Any, a: Value, dim: int, which: Value) -> Value:
    dim %= len(a.dims)
    return index(tr, a, [None] * dim + [which])


@rule(aten.take.default)
def take(tr: Any, a: Value, which: Value) -> Value:
    return index(tr, Value(a.ref, (tuple(k for d in a.dims for k in d),)), [which])


@rule(aten.embedding.default)
def embedding(tr: Any, a: Value, which: Value, *_: Any) -> Value:
    return index(tr, a, [which])


@rule(aten.gather.default)
def gather(tr: Any, a: Value, dim: int, which: Value, **_: Any) -> Value:
    rank = len(a.dims)
    if rank == 0:
        raise Unsupported("a gather from a single number")
    dim %= rank
    which = renamed(tr.build, _index(tr, which))
    if any(
        x != y
        for k, (x, y) in enumerate(zip(shape(tr.build, a), shape(tr.build, which), strict=True))
        if k != dim
    ):
        raise Unsupported("a gather whose index tensor is shorter along another dimension")
    a = renamed(tr.build, a)
    names = {k: j for d in range(rank) if d != dim for k, j in _paired(a.dims[d], which.dims[d])}
    ref = _taken(tr, Value(a.ref.rename(names), a.dims), dim, which.ref)
    dims = [which.dims[d] or (a.dims[d] if d != dim else ()) for d in range(rank)]
    return Value(ref, tuple(dims))


def _paired(ours: Dimension, theirs: Dimension) -> list[tuple[Label, Label]]:
    if ours and theirs and len(ours) != len(theirs):
        raise Unsupported("a gather along one of several dimensions that are products of axes")
    return list(zip(ours, theirs, strict=False))


def _taken(tr: Any, a: Value, dim: int, which: Ref) -> Ref:
    """a[..., which, ...] as a ref; an index tensor of equal entries is one entry."""
    number = tr.build.as_number(which)
    if number is None:
        return taken(tr.build, a, dim, which)
    if not a.dims[dim]:
        return a.ref
    (label,) = a.dims[dim] if len(a.dims[dim]) == 1 else (tr._single(a, dim),)
    return restricted(tr.build, a.ref, label, ("index", int(number) % shape(tr.build, a)[dim]), None)


def _index(tr: Any, which: Any) -> Value:
    """An index tensor that is known by name: integers that are an input, an attribute or a constant."""
    value = tr.value(which)
    ref = value.ref
    if tr.build.as_number(ref) is not None:
        return value
    leaf = ref.node.args[0].node if ref.node.op == "view" else ref.node
    if leaf.op == "call" and leaf.data[-1] == WHOLE:
        return value
    if leaf.op != "leaf" or leaf.leaves:
        raise Unsupported(
            "an index tensor that is computed inside of the function: make it an attribute or an input"
        )
    if leaf.data[0] in tr.whole_numbers:
        return value
    raise Unsupported("indices that are no integers (a mask: use torch.where, or multiply by it)")


@rule(WHOLE)
def arithmetic(tr: Any, node: fx.Node, *args: Any) -> Value:
    """Index tensors made of index tensors, entry by entry: i + 1, i % n. torch's own operation, in the emitted code."""
    values = [a for a in args if isinstance(a, Value)]
    refs, dims = aligned(tr.build, values)
    out = tr.build.union(refs)
    numbers = iter(range(len(refs)))
    texts = [f"{{{next(numbers)}}}" if isinstance(a, Value) else repr(a) for a in args]
    if node.kwargs or any(tr.build.as_number(r) is not None for r in refs):
        raise Unsupported("arithmetic with an index tensor of equal entries, or with options")
    text = f"torch.ops.{node.target}({', '.join(texts)})"
    prefix = max(r.node.prefix for r in refs)
    return Value(call(tr.build, text, [(r, out, r.node.prefix) for r in refs], out, prefix, WHOLE), dims)


# -------------------------------------------------------------------- scatters


@rule(aten.index_add.default)
def index_add(tr: Any, a: Value, dim: int, which: Value, source: Value, alpha: float = 1) -> Value:
    return _scattered(tr, a, dim % max(len(a.dims), 1), which, source, float(alpha))


@rule(aten.scatter_add.default)
def scatter_add(tr: Any, a: Value, dim: int, which: Value, source: Value) -> Value:
    if len(a.dims) != 1 or shape(tr.build, which) != shape(tr.build, source):
        raise Unsupported("a scatter of more than one dimension, or of a part of its source: use index_add")
    return _scattered(tr, a, 0, which, source, 1.0)


@rule(aten.index_put.default, aten._unsafe_index_put.default)
def index_put(
    tr: Any, a: Value, indices: Sequence[Value | None], source: Value, accumulate: bool = False
) -> Value:
    if not accumulate or len(indices) != 1 or indices[0] is None or len(a.dims) != 1:
        raise Unsupported(
            "entries that are overwritten by index, or added along several dimensions: use index_add"
        )
    return _scattered(tr, a, 0, indices[0], source, 1.0)


def _scattered(tr: Any, a: Value, dim: int, which: Value, source: Value, alpha: float) -> Value:
    """a + alpha * (the entries of `source` along `dim` added up at the places that `which` names)."""
    build = tr.build
    which = _index(tr, which)
    if build.as_number(which.ref) is not None or len(which.dims) != 1 or len(a.dims[dim]) != 1:
        raise Unsupported("a scatter to a single place, or along a dimension that is a product of axes")
    rank = len(a.dims)
    source = tr.value(source)
    if len(source.dims) not in (0, rank):
        raise Unsupported("a scatter of a source of another rank")
    # the source's dimension and the index tensor run together: align them as two tensors of one shape
    lifted = Value(which.ref, tuple(which.dims[0] if d == dim else () for d in range(rank)))
    (own, values), dims = aligned(build, [lifted, source])
    label = build.labels.new(shape(build, a)[dim])
    where = onehot.IndexMap.whole(build.labels.sizes[label])
    summed = list(dims[dim])
    moved = build.con(build.times(onehot.hot(build, own, where, label), values), summed)
    scattered = Value(moved, tuple((label,) if d == dim else dims[d] for d in range(rank)))
    (base, added), out = aligned(build, [a, scattered])
    return Value(build.add([(1.0, base), (alpha, added)]), out)
