"""Tensors of the traced graph as refs: which label runs along which dimension.

In: refs. Out: `Value`s and the operations that only relabel. A dimension is a product of labels (row-major), so that
merging and splitting dimensions costs nothing; a dimension of size 1 has no label, and a label that the ref lacks is a
broadcast. Where a split needs a finer axis than an input has, `Refine` asks for it and translation starts again.
Next file: `translate.py`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from implicitdiff.graph import onehot
from implicitdiff.graph.build import REBUILT, Builder, Spec
from implicitdiff.graph.ir import Label, Ref, Unsupported

Dimension = tuple[Label, ...]


class Refine(Exception):
    """Axes of inputs have to be split: (input name, axis) -> sizes of its parts."""

    def __init__(self, requests: Mapping[tuple[str, int], tuple[int, ...]]) -> None:
        super().__init__(str(requests))
        self.requests = dict(requests)


@dataclass(frozen=True)
class Value:
    """A tensor: the expression and the labels along each dimension."""

    ref: Ref
    dims: tuple[Dimension, ...]


def feeders(build: Builder, ref: Ref, label: Label) -> set[tuple[str, int]]:
    """The axes of inputs that `label` of `ref` runs along."""
    if label not in ref.labels:
        return set()
    if ref.node.op == "leaf":
        return {(ref.node.data[0], ref.labels.index(label))}
    if ref.node.op == "eye":
        return {(ref.node.data, 0)}
    if ref.node.op == "view":
        (leaf,), _ = build.open(ref)
        if any(row == label and spec[0] != "all" for spec, _, row in build.view_axes(ref, leaf)):
            raise Unsupported("an axis of a slice cannot be split")
        return feeders(build, leaf, label)  # an axis that is not sliced is the leaf's own
    if ref.node.op not in REBUILT:
        raise Unsupported(f"an axis of a {ref.node.op} cannot be split")
    found: set[tuple[str, int]] = set()
    for a in build.open(ref)[0]:
        found |= feeders(build, a, label)
    return found


def size(build: Builder, dim: Dimension) -> int:
    """Entries along a dimension."""
    return math.prod(build.labels.sizes[k] for k in dim)


def shape(build: Builder, value: Value) -> tuple[int, ...]:
    """The shape that the tensor had in the traced graph."""
    return tuple(size(build, dim) for dim in value.dims)


def renamed(build: Builder, value: Value) -> Value:
    """The same tensor under labels that nobody else uses."""
    names = build.labels.fresh(dict.fromkeys([*(k for dim in value.dims for k in dim), *value.ref.labels]))
    return Value(value.ref.rename(names), tuple(tuple(names[k] for k in dim) for dim in value.dims))


def match(build: Builder, ours: Dimension, theirs: Dimension, values: Sequence[Value]) -> dict[Label, Label]:
    """Renames the labels of `theirs` to those of `ours`; both run along one dimension of equal size."""
    sizes = build.labels.sizes
    a, b = [sizes[k] for k in ours], [sizes[k] for k in theirs]
    if a == b:
        return dict(zip(theirs, ours, strict=True))
    parts = common_parts(a, b)
    if parts is None:
        raise Unsupported(f"dimensions of sizes {a} and {b} have no common refinement")
    requests: dict[tuple[str, int], tuple[int, ...]] = {}
    for dim in (ours, theirs):
        remaining = list(parts)
        for label in dim:
            taken: list[int] = []
            while math.prod(taken) < sizes[label]:
                taken.append(remaining.pop(0))
            if len(taken) > 1:
                for value in values:
                    requests.update({axis: tuple(taken) for axis in feeders(build, value.ref, label)})
    if not requests:
        raise Unsupported("a broadcast dimension would have to be split")
    raise Refine(requests)


def common_parts(a: Sequence[int], b: Sequence[int]) -> list[int] | None:
    """The coarsest factorisation of a size that refines both `a` and `b`, if there is one."""

    def cuts(parts: Sequence[int]) -> list[int]:
        out, total = [], 1
        for part in reversed(parts):
            total *= part
            out.append(total)
        return out

    marks = sorted({1, *cuts(a), *cuts(b)})
    if any(high % low for low, high in itertools.pairwise(marks)):
        return None
    return [high // low for low, high in itertools.pairwise(marks)][::-1]


def aligned(build: Builder, values: Sequence[Value]) -> tuple[list[Ref], tuple[Dimension, ...]]:
    """Broadcasts values together: refs in common labels, and the common dimensions."""
    rank = max(len(v.dims) for v in values)
    fresh = [renamed(build, v) for v in values]
    common: list[Dimension] = [()] * rank
    names: list[dict[Label, Label]] = [{} for _ in values]
    for position in range(1, rank + 1):
        target: Dimension = ()
        for k, value in enumerate(fresh):
            dim = value.dims[-position] if position <= len(value.dims) else ()
            if dim and not target:
                target = dim
            elif dim:
                names[k].update(match(build, target, dim, fresh))
        common[-position] = target
    return [v.ref.rename(n) for v, n in zip(fresh, names, strict=True)], tuple(common)


def reshaped(build: Builder, value: Value, new_shape: Sequence[int]) -> Value:
    """`view`: labels are taken in row-major order; one that straddles a boundary has to be split."""
    total = math.prod(shape(build, value))
    if -1 in new_shape:
        known = math.prod(s for s in new_shape if s != -1)
        new_shape = [total // known if s == -1 else s for s in new_shape]
    queue = [k for dim in value.dims for k in dim]
    sizes = build.labels.sizes
    requests: dict[tuple[str, int], tuple[int, ...]] = {}
    dims: list[Dimension] = []
    for wanted in new_shape:
        dim: list[Label] = []
        have = 1
        while have < wanted:
            label = queue.pop(0)
            if wanted % (have * sizes[label]) == 0:
                dim.append(label)
                have *= sizes[label]
                continue
            need = wanted // have
            if wanted % have or sizes[label] % need:
                raise Unsupported(
                    f"view from {shape(build, value)} to {tuple(new_shape)} cuts across dimensions"
                )
            rest = sizes[label] // need
            if label in value.ref.labels:
                requests.update(dict.fromkeys(feeders(build, value.ref, label), (need, rest)))
            first, second = build.labels.new(need), build.labels.new(rest)
            dim.append(first)
            have *= need
            queue.insert(0, second)
        dims.append(tuple(dim))
    if requests:
        raise Refine(requests)
    return Value(value.ref, tuple(dims))


def restricted(build: Builder, ref: Ref, label: Label, spec: Spec, new: Label | None) -> Ref:
    """A slice (or one entry, `new` None) of an expression along `label`: the same expression of sliced leaves."""
    if label not in ref.labels:
        return ref
    node = ref.node
    if node.op == "leaf":
        position = ref.labels.index(label)
        specs = [spec if k == position else ("all",) for k in range(len(ref.labels))]
        made = build.view(ref, specs)
        names = [k if k in ref.labels else new for k in made.labels]
        return Ref(made.node, tuple(k for k in names if k is not None))
    if node.op == "view":
        return _view_of_view(build, ref, label, spec, new)
    if node.op == "hot":
        return _hot_sliced(build, ref, label, spec, new)
    if node.op not in REBUILT:
        raise Unsupported(f"a slice of a {node.op} has no rule")
    args, bound = build.open(ref)
    return build.rebuilt(node, [restricted(build, a, label, spec, new) for a in args], bound)


def _hot_sliced(build: Builder, ref: Ref, label: Label, spec: Spec, new: Label | None) -> Ref:
    """A slice of what an index tensor points at, or of the index tensor itself."""
    if onehot.is_hot(ref) and label == onehot.column_of(ref):
        return onehot.sliced(build, ref, spec, new)
    column = onehot.column_of(ref) if onehot.is_hot(ref) else None
    index = restricted(build, onehot.index_of(ref), label, spec, new)
    return onehot.hot(build, index, ref.node.data, column)


def taken(build: Builder, value: Value, dim: int, index: Ref) -> Ref:
    """value[..., index, ...] along a dimension, which may be a product of axes: summed against one-hot matrices."""
    labels, sizes = value.dims[dim], build.labels.sizes
    length, factors, gone = size(build, labels), [], []
    divisor = length
    for label in labels:
        divisor //= sizes[label]
        where = onehot.IndexMap(
            length, divisor, sizes[label] if len(labels) > 1 else length, 0, 1, sizes[label]
        )
        if label in value.ref.labels:
            factors.append(onehot.hot(build, index, where, label))
            gone.append(label)
    return build.con(build.times(*factors, value.ref), gone)


def _view_of_view(build: Builder, ref: Ref, label: Label, spec: Spec, new: Label | None) -> Ref:
    """Slices of slices compose: start and step multiply through."""
    specs: list[Spec] = []
    names: list[Label | None] = []
    for old, _, row in build.view_axes(ref):
        if row != label:
            specs.append(old)
            names.append(row)
            continue
        start, step = (0, 1) if old[0] == "all" else (int(old[1]), int(old[2]))
        if spec[0] == "index":
            specs.append(("index", start + step * int(spec[1])))
        else:
            specs.append(("slice", start + step * int(spec[1]), step * int(spec[2]), spec[3]))
        names.append(new)
    (leaf,), _ = build.open(ref)
    made = build.view(leaf, specs)
    return Ref(made.node, tuple(n for n in names if n is not None))
