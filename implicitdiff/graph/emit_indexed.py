"""How sums of products with one-hot matrices are written: as gathers and scatters, else with the matrix itself.

In: a `con` node with a one-hot factor (`graph/onehot.py`). Out: statements that call `kkt/indexed.py`. Summed over the
axis pointed into it is a gather of the other factors; summed over the index tensor's own axes, a scatter.
Next file: `tidy.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from implicitdiff.graph import onehot
from implicitdiff.graph.contraction import contract
from implicitdiff.graph.ir import Label, Node, Ref
from implicitdiff.graph.onehot import IndexMap
from implicitdiff.graph.text import Operand, tuple_body

if TYPE_CHECKING:
    from implicitdiff.graph.emit import Emitter, Variable


@dataclass(frozen=True)
class Pointer:
    """The places that an index tensor names, as an operand over its own labels, and the map they come by."""

    operand: Operand
    where: IndexMap


def places(emitter: Emitter, ref: Ref, *, signed: bool = False) -> Pointer:
    """The places that a one-hot matrix points at; `signed`: where torch itself counts negative ones from the end."""
    index, where = emitter.operand(onehot.index_of(ref)), ref.node.data
    text = index.text
    if not where.plain:
        numbers = ", ".join(map(str, (where.length, where.divisor, where.part, where.start, where.step)))
        text = f"indexed.places({text}, {numbers})"
    elif not signed:
        text = f"indexed.counted_from_zero({text}, {where.length})"
    return Pointer(Operand(text, index.labels, index.prefix), where)


def emit_hot(emitter: Emitter, node: Node) -> Variable:
    """The matrix written down."""
    ref = Ref(node, node.axes)
    pointer = places(emitter, ref)
    text = f"indexed.one_hot({pointer.operand.text}, {pointer.where.size}, {emitter.like})"
    if onehot.is_hot(ref):
        return emitter.store(node, text, (*pointer.operand.labels, node.axes[-1]))
    return emitter.store(node, f"{text}[..., 0]", pointer.operand.labels)


def emit_sum(emitter: Emitter, node: Node) -> Variable:
    """A sum whose body has one-hot factors."""
    (body,) = node.args
    coefficient, factors = emitter.build.split(body)
    hots = [ref for ref, _ in factors if onehot.is_hot(ref)]
    rest = [emitter.factor_operand(ref, power) for ref, power in factors if not onehot.is_hot(ref)]
    if coefficient != 1.0:
        rest.append(Operand(repr(coefficient), (), 0))
    gathered: dict[Label, Pointer] = {}
    scattered: dict[Label, Pointer] = {}
    for ref in hots:
        column = onehot.column_of(ref)
        own = [k for k in ref.labels if k != column]
        alone = sum(onehot.column_of(other) == column for other in hots) == 1
        if column in node.bound and column not in gathered:
            gathered[column] = places(emitter, ref, signed=True)
        elif alone and column not in node.bound and all(k in node.bound for k in own):
            scattered[column] = places(emitter, ref)
        else:
            rest.append(emitter.operand(ref))
    rest += [_inside(emitter, pointer) for pointer in gathered.values() if pointer.where.partial]
    rest = [taken(emitter, operand, gathered) for operand in rest]
    bound = [k for k in node.bound if k not in gathered]
    if not scattered:
        return _contracted(emitter, node, rest, bound)
    index = [k for k in node.bound if any(k in p.operand.labels for p in scattered.values())]
    return _scattered(emitter, node, rest, bound, index, scattered)


def _inside(emitter: Emitter, pointer: Pointer) -> Operand:
    """1 where the place lies on the axis, else 0."""
    operand = pointer.operand
    text = f"indexed.inside({operand.text}, {pointer.where.size}, {emitter.like})"
    return Operand(text, operand.labels, operand.prefix)


def _contracted(emitter: Emitter, node: Node, rest: Sequence[Operand], bound: Sequence[Label]) -> Variable:
    sizes = emitter.build.labels.sizes
    missing = 1
    for k in bound:
        missing *= 1 if any(k in o.labels for o in rest) else sizes[k]
    present = [k for k in bound if any(k in o.labels for o in rest)]
    operands = [*rest, *([Operand(str(float(missing)), (), 0)] if missing != 1 or not rest else [])]
    text, layout = contract(operands, node.axes, present, bool(node.data), sizes, emitter.temporary)
    return emitter.store(node, text, layout)


def _scattered(
    emitter: Emitter,
    node: Node,
    rest: Sequence[Operand],
    bound: Sequence[Label],
    index: Sequence[Label],
    scattered: dict[Label, Pointer],
) -> Variable:
    sizes = emitter.build.labels.sizes
    batched = any(p.operand.prefix for p in scattered.values())
    over_batch = bool(node.data) and not batched
    own = [k for k in bound if k not in index]
    out = [k for k in node.axes if k not in scattered]
    if rest:
        text, layout = contract([*rest], [*index, *out], own, over_batch, sizes, emitter.temporary)
        prefix = max(o.prefix for o in rest) - over_batch
    else:
        text, layout, prefix = f"{emitter.like}.new_ones(())", (), 0
    kept = [k for k in out if k in layout]
    values = Operand(emitter.temporary(text), tuple(layout), prefix).aligned([*index, *kept])
    where = ", ".join(p.operand.aligned(list(index)) for p in scattered.values())
    numbers = tuple_body([sizes[k] for k in index])
    into = tuple_body([sizes[k] for k in scattered])
    text = (
        f"indexed.scatter({values}, {prefix}, ({where},), {int(batched)}, ({numbers}), ({into}), {len(kept)})"
    )
    if bool(node.data) and batched:
        text = f"{text}.sum(0)"
    return emitter.store(node, text, [*scattered, *kept])


def taken(emitter: Emitter, operand: Operand, gathered: dict[Label, Pointer]) -> Operand:
    """An operand with the axes that are pointed into replaced by those of the index tensors."""
    pointers = {k: p for k, p in gathered.items() if k in operand.labels}
    if not pointers:
        return operand
    index: list[Label] = []
    for pointer in pointers.values():
        index += [k for k in pointer.operand.labels if k not in index]
    shared = [k for k in index if k in operand.labels]
    batched = any(p.operand.prefix for p in pointers.values())
    prefix = max(operand.prefix, int(batched))
    first = next(iter(pointers.values()))
    if len(pointers) == 1 and not shared and not batched and not first.where.partial:
        (column,) = pointers
        at = operand.labels.index(column)
        after = ", :" * (len(operand.labels) - at - 1)
        text = f"{_atom(operand.text)}[..., {first.operand.text}{after}]"
        layout = (*operand.labels[:at], *first.operand.labels, *operand.labels[at + 1 :])
        return Operand(emitter.temporary(text), layout, prefix)
    size = emitter.build.labels.sizes
    where = {k: _clamped(p).aligned(index) for k, p in pointers.items()}
    for k in shared:
        steps = Operand(f"torch.arange({size[k]}, device={emitter.like}.device)", (k,), 0)
        where[k] = steps.aligned(index)
    dims = tuple(operand.labels.index(k) for k in where)
    text = (
        f"indexed.take({operand.text}, {operand.prefix}, ({tuple_body(dims)}), ({', '.join(where.values())},), "
        f"{int(batched)})"
    )
    layout = (*index, *(k for k in operand.labels if k not in where))
    return Operand(emitter.temporary(text), layout, prefix)


def _clamped(pointer: Pointer) -> Operand:
    operand = pointer.operand
    if not pointer.where.partial:
        return operand
    return Operand(
        f"{_atom(operand.text)}.clamp(0, {pointer.where.size - 1})", operand.labels, operand.prefix
    )


def _atom(text: str) -> str:
    return (
        text
        if text.replace("_", "").isalnum() or (text.endswith((")", "]")) and " " not in text)
        else f"({text})"
    )
