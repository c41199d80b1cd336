"""From the traced aten graph to the intermediate representation.

In: a `Trace`. Out: `Program`: refs of the objective and of every constraint block, and the leaves. Each aten operation
has one rule, registered in `rules/`; an operation without a rule is `Unsupported`, named with the line of the user's
file that called it. Next files: `rules/*.py`.
"""

from __future__ import annotations

import keyword
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from implicitdiff.graph.build import Builder
from implicitdiff.graph.ir import BATCHED, UNBATCHED, Label, Node, Ref, Unsupported
from implicitdiff.graph.trace import Placeholder, Trace, TracedFunction
from implicitdiff.graph.values import Refine, Value, restricted, shape

Rule = Callable[..., Any]
RULES: dict[Any, Rule] = {}


def rule(*operations: Any) -> Callable[[Rule], Rule]:
    """Registers the translation of aten operations."""

    def register(function: Rule) -> Rule:
        for operation in operations:
            RULES[operation] = function
        return function

    return register


@dataclass(frozen=True)
class Pieces:
    """A concatenation: values one after the other along dimension `dim`."""

    values: tuple[Value, ...]
    dim: int


@dataclass(frozen=True)
class Leaf:
    """One placeholder as a leaf of the program: its axes may be finer than the tensor's dimensions."""

    placeholder: Placeholder
    name: str
    sizes: tuple[int, ...]
    node: Node


@dataclass(frozen=True)
class Block:
    """One piece of one output of `equality`: `value` lies at `offset` along dimension `dim` of output `output`."""

    output: int
    value: Value
    dim: int
    offset: int


@dataclass
class Program:
    """The declared functions as refs."""

    build: Builder
    leaves: tuple[Leaf, ...]
    objective: Ref
    blocks: tuple[Block, ...]
    constants: dict[str, Tensor] = field(default_factory=dict)


def translate(trace: Trace, *, attempts: int = 20) -> Program:
    """Translates objective and constraints, starting again with finer axes whenever a view asks for them.

    Raises:
        Unsupported: an operation has no rule; it carries the operation and the user's line.
    """
    names = identifiers([p.name for p in trace.placeholders])
    axes = [[s for s in p.shape if s != 1] for p in trace.placeholders]
    identities: dict[str, list[int]] = {}
    for _ in range(attempts):
        try:
            return _Translator(trace, names, axes, identities).program()
        except Refine as request:
            for (name, axis), sizes in sorted(request.requests.items(), reverse=True):
                identity, _, part = name.partition(":")
                if identity in identities:
                    identities[identity][int(part) : int(part) + 1] = sizes
                    continue
                if name not in names:
                    raise Unsupported("an axis of a constant would have to be split") from request
                axes[names.index(name)][axis : axis + 1] = sizes
    raise Unsupported("the views of the inputs have no common refinement")


def identifiers(names: list[str]) -> list[str]:
    """The placeholders' names as distinct Python identifiers that no name of the emitted code shadows."""
    out: list[str] = []
    for name in names:
        clean = re.sub(r"[\W_]+", "_", name.removeprefix("self."), flags=re.ASCII).strip("_") or "value"
        if clean[0].isdigit() or keyword.iskeyword(clean) or RESERVED.fullmatch(clean):
            clean = f"{clean}_in" if not clean[0].isdigit() else f"in_{clean}"
        candidate, k = clean, 2
        while candidate in out:
            candidate, k = f"{clean}_{k}", k + 1
        out.append(candidate)
    return out


RESERVED = re.compile(
    r"(?:lam|v|v_lam|rhs_u|rhs_h|t|constant_)\d*|w|s|status|cancelled|kkt|factor|schur|shift|null_vectors"
    r"|torch|operators|solvers|saddle|indexed|entries|places"
)
"""Names that the emitted code uses itself."""


class _Translator:
    """State of one attempt; rules get it as their first argument."""

    def __init__(
        self, trace: Trace, names: list[str], axes: list[list[int]], identities: dict[str, list[int]]
    ) -> None:
        self.trace = trace
        self.identities = identities
        self.seen_identities = 0
        self.build = Builder()
        self.constants: dict[str, Tensor] = {}
        self.leaves: list[Leaf] = []
        self.placeholder_values: list[Value] = []
        self.whole_numbers: set[str] = set()
        for placeholder, name, sizes in zip(trace.placeholders, names, axes, strict=True):
            prefix = BATCHED if placeholder.batched else UNBATCHED
            ref = self.build.leaf(name, sizes, prefix, differentiable=placeholder.moves)
            if not (placeholder.dtype.is_floating_point or placeholder.dtype == torch.bool):
                self.whole_numbers.add(name)
            self.leaves.append(Leaf(placeholder, name, tuple(sizes), ref.node))
            self.placeholder_values.append(Value(ref, self._grouped(ref, placeholder.shape)))

    def _grouped(self, ref: Ref, shape: tuple[int, ...]) -> tuple[tuple[Label, ...], ...]:
        dims, queue = [], list(ref.labels)
        for wanted in shape:
            dim: list[Label] = []
            while math.prod(self.build.labels.sizes[k] for k in dim) < wanted:
                dim.append(queue.pop(0))
            dims.append(tuple(dim))
        return tuple(dims)

    def program(self) -> Program:
        (objective,) = self._run(self.trace.objective)
        if not isinstance(objective, Value):
            raise Unsupported("the objective is a concatenation")
        blocks: list[Block] = []
        if self.trace.equality is not None:
            for index, output in enumerate(self._run(self.trace.equality)):
                blocks += self._blocks(index, output)
        self._refine_corner(blocks)
        return Program(self.build, tuple(self.leaves), objective.ref, tuple(blocks), self.constants)

    def _refine_corner(self, blocks: Sequence[Block]) -> None:
        """Ask for a corner with the axes of its constraint, where these are finer than the output's dimensions."""
        sizes = self.build.labels.sizes
        for block in blocks:
            place = self.trace.corner[block.output] if self.trace.corner else None
            if place is None or sum(b.output == block.output for b in blocks) > 1:
                continue
            leaf = self.leaves[place]
            wanted = tuple(sizes[k] for dim in block.value.dims for k in dim)
            if leaf.sizes != wanted:
                axes = [tuple(sizes[k] for k in dim) for dim in block.value.dims if dim]
                raise Refine({(leaf.name, axis): parts for axis, parts in enumerate(axes) if len(parts) > 1})

    def _blocks(self, index: int, output: Value | Pieces) -> list[Block]:
        if isinstance(output, Value):
            return [Block(index, output, 0, 0)]
        blocks, offset = [], 0
        for value in output.values:
            blocks.append(Block(index, value, output.dim, offset))
            offset += shape(self.build, value)[output.dim]
        return blocks

    def _run(self, function: TracedFunction) -> list[Any]:
        table: dict[fx.Node, Any] = {}
        inputs = iter(self.placeholder_values)
        for node in function.module.graph.nodes:
            if node.op == "placeholder":
                table[node] = next(inputs)
            elif node.op == "output":
                out = node.args[0]
                out = out if isinstance(out, (tuple, list)) else (out,)
                return [table[o] for o in out]
            elif node.op == "call_function":
                table[node] = self._call(function, node, table)
            else:
                raise Unsupported(f"a graph node of kind {node.op}", str(node.target), function.line(node))
        raise Unsupported("a graph without an output")

    def _call(self, function: TracedFunction, node: fx.Node, table: dict[fx.Node, Any]) -> Any:
        def lift(a: Any) -> Any:
            return table[a] if isinstance(a, fx.Node) else a

        args, kwargs = fx.node.map_aggregate(node.args, lift), fx.node.map_aggregate(node.kwargs, lift)
        rule_for = RULES.get(WHOLE if gives_whole_numbers(node) else node.target)
        if gives_whole_numbers(node):
            args, kwargs = (node, *args), {}
        try:
            if rule_for is not None:
                return rule_for(self, *args, **kwargs)
            if not node.all_input_nodes and callable(node.target):
                return self.constant(node.target(*node.args, **node.kwargs))
            raise Unsupported("no rule for this operation")
        except Unsupported as error:
            raise Unsupported(
                error.reason, error.operation or operation_name(node), error.line or function.line(node)
            ) from error
        except (TypeError, IndexError, KeyError, AttributeError) as error:
            # a rule met an argument it was not written for (a concatenation, an option): not covered
            reason = f"arguments not covered ({type(error).__name__}: {error})"
            raise Unsupported(reason, operation_name(node), function.line(node)) from error

    # ---------------------------------------------------------------- help for rules

    def constant(self, tensor: Any) -> Value:
        """A tensor made inside the function from numbers alone: folded to a number, or kept as a leaf of its own."""
        if not isinstance(tensor, Tensor):
            raise Unsupported("a constant that is no tensor")
        first = tensor.reshape(-1)[0].item() if tensor.numel() else 0.0
        if tensor.numel() and bool((tensor == first).all()):
            return self.number(float(first), tuple(tensor.shape))
        name = f"constant_{len(self.constants)}"
        self.constants[name] = tensor
        if not (tensor.is_floating_point() or tensor.dtype == torch.bool):
            self.whole_numbers.add(name)
        sizes = [s for s in tensor.shape if s != 1]
        ref = self.build.leaf(name, sizes, UNBATCHED, differentiable=False)
        return Value(ref, self._grouped(ref, tuple(tensor.shape)))

    def identity(self, rows: int) -> tuple[str, list[int]]:
        """Name of the next identity matrix of the functions, and the sizes into which its axis is split."""
        name = f"identity{self.seen_identities}"
        self.seen_identities += 1
        return name, self.identities.setdefault(name, [rows])

    def number(self, value: float, sizes: tuple[int, ...] = ()) -> Value:
        """A number, broadcast to `sizes`."""
        dims = tuple((self.build.labels.new(s),) if s != 1 else () for s in sizes)
        return Value(self.build.number(value), dims)

    def value(self, x: Any) -> Value:
        """An argument of an operation as a value."""
        if isinstance(x, Value):
            return x
        if isinstance(x, (int, float, bool)):
            return self.number(float(x))
        raise Unsupported(f"an argument of type {type(x).__name__}")

    def slice(self, value: Value, dim: int, start: int, step: int, count: int) -> Value:
        """Entries start, start + step, ... along a dimension."""
        (label,) = value.dims[dim] if len(value.dims[dim]) == 1 else (self._single(value, dim),)
        new = self.build.labels.new(count) if count != 1 else None
        spec = ("slice", start, step, count) if count != 1 else ("index", start)
        ref = restricted(self.build, value.ref, label, spec, new)
        dims = list(value.dims)
        dims[dim] = () if new is None else (new,)
        return Value(ref, tuple(dims))

    def _single(self, value: Value, dim: int) -> Label:
        raise Unsupported("a slice along a dimension that is a product of axes")


WHOLE = "places"
"""The key of the rule of arithmetic with index tensors."""


def gives_whole_numbers(node: fx.Node) -> bool:
    """Whether an entrywise operation makes an index tensor out of others."""
    value = node.meta.get("val")
    whole = isinstance(value, Tensor) and not (value.is_floating_point() or value.dtype == torch.bool)
    tags = getattr(node.target, "tags", ())
    return whole and torch.Tag.pointwise in tags and bool(node.all_input_nodes)


def operation_name(node: fx.Node) -> str:
    """`aten.cumsum.default` for a graph node."""
    return str(node.target)
