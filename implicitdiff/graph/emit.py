"""From refs to the torch source of one function that computes them for a whole batch.

In: named outputs. Out: `Emitted`: source text and the compiled function. One statement a node, children first; numbers,
leaves and single uses are written inline; a buffer is deleted after its last use. Next file: `contraction.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from implicitdiff.graph.build import Builder
from implicitdiff.graph.calls import Emitted, Output
from implicitdiff.graph.contraction import contract
from implicitdiff.graph.emit_indexed import emit_hot, emit_sum
from implicitdiff.graph.emit_squares import squares_of
from implicitdiff.graph.functions import PRINT
from implicitdiff.graph.ir import UNBATCHED, Label, Node, Ref, reachable
from implicitdiff.graph.listing import listing
from implicitdiff.graph.onehot import has_hot
from implicitdiff.graph.purpose import Step, behind, purposes
from implicitdiff.graph.statements import Shape
from implicitdiff.graph.text import (
    Operand,
    axis_list,
    bracket,
    flipped,
    forward,
    inverse_power,
    literal,
    product_text,
    raised,
    tuple_body,
)
from implicitdiff.graph.tidy import tidied

KEEPS_BATCH = re.compile(r"\{0\}(\.solve\(|\[|\.unflatten|\.flatten)|saddle\.beside")
"""Calls whose result has the batch where an argument has it."""


@dataclass
class Variable:
    """A materialised node: its name, the order of its axes (in the node's own labels)."""

    name: str
    layout: tuple[Label, ...]


class Emitter:
    """Writes one function. `arguments` are the names of its parameters, in order."""

    def __init__(self, build: Builder, like: str) -> None:
        self.build = build
        self.like = like
        self.lines: list[tuple[str, str]] = []
        self.variables: dict[int, Variable] = {}
        self.uses: dict[int, int] = {}
        self.shapes: dict[str, Shape] = {}
        self.certain: dict[int, bool] = {}
        self.made: dict[str, int] = {}
        self.pending: list[str] = []
        self.count = 0

    # ---------------------------------------------------------------- driver

    def function(
        self,
        name: str,
        arguments: Sequence[str],
        outputs: Sequence[Output],
        namespace: Mapping[str, Any],
        preamble: Sequence[str] = (),
        document: str = "",
        first: Sequence[Ref] = (),
        given: Mapping[str, Node] | None = None,
        steps: Mapping[int, Step] | None = None,
        shown: Mapping[str, str] | None = None,
    ) -> Emitted:
        """Emits `def name(*arguments)`, which returns the outputs as a tuple; the refs `first` are written first.

        The nodes `given` are Python objects that come as arguments of these names instead of being computed; `steps`
        says what nodes are in the derivation; `shown` gives arguments that stand for another name that other name.
        """
        steps = steps or {}
        given = given or {}
        self.variables.update({node.id: Variable(argument, ()) for argument, node in given.items()})
        nodes = reachable([*(o.ref.node for o in outputs), *(ref.node for ref in first)], self.variables)
        for node in nodes:
            for arg in node.args:
                self.uses[arg.node.id] = self.uses.get(arg.node.id, 0) + 1
        for o in outputs:
            self.uses[o.ref.node.id] = self.uses.get(o.ref.node.id, 0) + 2
        for ref in first:
            if self.build.as_number(ref) is None:  # a number is written where it is used
                self.variable(ref.node)
        results = []
        for output in outputs:
            text = self.expanded(output.ref, output.order, output.prefix)
            results.append((output.name, text))
        serves = purposes(nodes, steps)
        serving = {target: serves[node] for target, node in self.made.items() if node in serves}
        texts = [text for _, text in results]
        lines, returned = tidied(self.lines, texts, self.shapes, arguments, serving, namespace)
        known = [steps.get(behind(o.ref.node).id) for o in outputs]
        opening = [f'"""{document}"""', *preamble] if document else preamble
        source = listing(name, arguments, opening, lines, returned, known, shown or {})
        scope = dict(namespace)
        exec(compile(source, f"<implicitdiff {name}>", "exec"), scope)
        return Emitted(source, scope[name], tuple(n for n, _ in results))

    def store(self, node: Node, text: str, layout: Sequence[Label], name: str | None = None) -> Variable:
        """A new statement for a node."""
        if name is None:
            self.count += 1
            name = f"t{self.count}"
        self.lines.append((name, text))
        self.made.update(dict.fromkeys([*self.pending, name], node.id))
        self.pending.clear()
        variable = Variable(name, tuple(layout))
        self.variables[node.id] = variable
        if set(layout) == set(node.axes):
            self._shape(name, node, layout)
        return variable

    def _shape(self, name: str, node: Node, layout: Sequence[Label]) -> None:
        sizes = dict(zip(node.axes, node.sizes, strict=True))
        self.shapes[name] = Shape(node.prefix, tuple(sizes[k] for k in layout), self._is_certain(node))

    def _is_certain(self, node: Node) -> bool:
        """Whether a node really has the batch of its prefix: what a solver returns may be shared by all samples."""
        if node.id not in self.certain:
            self.certain[node.id] = (
                node.prefix == UNBATCHED
                or node.op == "leaf"
                or (
                    (node.op != "call" or KEEPS_BATCH.match(node.data[0]) is not None)
                    and any(
                        arg.node.prefix == node.prefix and self._is_certain(arg.node) for arg in node.args
                    )
                )
            )
        return self.certain[node.id]

    def temporary(self, text: str) -> str:
        """A statement for an intermediate result that is no node."""
        self.count += 1
        self.lines.append((f"t{self.count}", text))
        self.pending.append(f"t{self.count}")
        return f"t{self.count}"

    # ---------------------------------------------------------------- operands

    def variable(self, node: Node) -> Variable:
        """The name of a node, written on first use."""
        known = self.variables.get(node.id)
        if known is None:
            known = getattr(self, f"_emit_{node.op}")(node)
            self.variables[node.id] = known
        return known

    def operand(self, ref: Ref) -> Operand:
        """A use of a node: text and labels in the order of its axes."""
        number = self.build.as_number(ref)
        if number is not None:
            return Operand(literal(number), (), 0)
        variable = self.variable(ref.node)
        names = dict(zip(ref.node.axes, ref.labels, strict=True))
        layout = tuple(names[k] for k in variable.layout)
        return Operand(variable.name, layout, ref.node.prefix, self._is_certain(ref.node))

    def text(self, ref: Ref, order: Sequence[Label]) -> str:
        """A use of a node, broadcastable against a tensor whose trailing axes are `order`."""
        return self.operand(ref).aligned(order)

    def expanded(self, ref: Ref, order: Sequence[Label], prefix: int) -> str:
        """A use of a node as a tensor that really has all axes of `order` and at least `prefix` leading ones."""
        operand = self.operand(ref)
        text = operand.aligned(order)
        sizes = [self.build.labels.sizes[k] for k in order]
        if self.build.as_number(ref) is not None:
            leading = f"*{self.like}.shape[:{prefix}], " if prefix else ""
            return f"{self.like}.new_full(({leading}{tuple_body(sizes)}), {text})"
        missing = set(order) - set(operand.labels)
        if missing and (operand.prefix == 0 or any(self.build.labels.sizes[k] != 1 for k in missing)):
            lead = ["-1"] * operand.prefix
            text = f"{bracket(text)}.expand({', '.join([*lead, *map(str, sizes)])})"
        if operand.prefix < prefix:
            text = bracket(text) + "[None]" * (prefix - operand.prefix)
        return text

    # ---------------------------------------------------------------- nodes

    def _emit_leaf(self, node: Node) -> Variable:
        self._shape(node.data[0], node, node.axes)
        return Variable(node.data[0], node.axes)

    def _emit_view(self, node: Node) -> Variable:
        (leaf,) = node.args
        inner = self.operand(leaf)
        text, reversed_rows = [], []
        specs = dict(zip(leaf.labels, node.data, strict=True))
        row_of = {own: row for _, own, row in self.build.view_axes(Ref(node, node.axes), node.args[0])}
        layout = []
        for label in inner.labels:
            spec = specs[label]
            if spec[0] == "all":
                text.append(":")
            elif spec[0] == "index":
                text.append(str(spec[1]))
            else:
                start, step, count = forward(spec)
                text.append(f"{start}:{start + step * (count - 1) + 1}" + (f":{step}" if step != 1 else ""))
            row = row_of[label]
            if row is not None and spec[0] == "slice" and spec[2] < 0:
                reversed_rows.append(row)
            if row is not None:
                layout.append(row)
        flips = [layout.index(row) - len(layout) for row in reversed_rows]
        return self.store(node, f"{inner.text}[..., {', '.join(text)}]{flipped(flips)}", layout)

    def _emit_prod(self, node: Node) -> Variable:
        coefficient, powers = node.data
        text = self.product(coefficient, list(zip(node.args, powers, strict=True)), node.axes)
        return self.store(node, text, node.axes)

    def product(
        self, coefficient: float, factors: Sequence[tuple[Ref, float]], order: Sequence[Label]
    ) -> str:
        """coefficient * factors. Factors over the same labels meet first, small groups before large ones."""
        groups: dict[tuple[Label, ...], list[tuple[Operand, float]]] = {}
        for ref, power in factors:
            operand = self.operand(ref)
            own = tuple(k for k in order if k in operand.labels)
            groups.setdefault(own, []).append((Operand(operand.aligned(own), own, operand.prefix), power))
        text = "" if coefficient == 1.0 else literal(coefficient)
        small = sorted(groups, key=lambda labels: (self._entries(labels), labels))
        for own in small:
            members = groups[own]
            whole = len(own) == len(order)
            if len(small) == 1 or whole:
                text = product_text(text, members, order)
                continue
            inner = product_text("", members, own)
            part = Operand(inner, own, max(o.prefix for o, _ in members)).aligned(order)
            text = f"{text} * {bracket(part)}" if text else part
        return text

    def _entries(self, labels: Sequence[Label]) -> int:
        return math.prod(self.build.labels.sizes[label] for label in labels)

    def _emit_add(self, node: Node) -> Variable:
        constant, coefficients = node.data
        terms = sorted(zip(coefficients, node.args, strict=True), key=lambda t: t[0] != 1.0)
        if coefficients == (0.5, 0.5) and not constant and terms[0][1].node is terms[1][1].node:
            both = ", ".join(self.text(ref, node.axes) for _, ref in terms)
            return self.store(node, f"saddle.symmetric_part({both})", node.axes)
        text = ""
        for coefficient, ref in terms:
            part = self.text(ref, node.axes)
            if not text:
                text = part if coefficient == 1.0 else f"{literal(coefficient)} * {part}"
            elif abs(coefficient) == 1.0:
                text = f"{text} {'+' if coefficient > 0 else '-'} {part}"
            else:
                text = f"torch.add({text}, {part}, alpha={literal(coefficient)})"
        text += f" {'+' if constant > 0 else '-'} {literal(abs(constant))}" if constant else ""
        return self.store(node, text, node.axes)

    def _emit_fn(self, node: Node) -> Variable:
        name, _ = node.data
        if name == "detach":
            return self._emit_hold(node)
        numbers = [self.build.as_number(a) for a in node.args]
        if name == "where" and numbers[1] is not None and numbers[2] is not None:
            condition = bracket(self.text(node.args[0], node.axes))
            high, low = numbers[1], numbers[2]
            text = f"{condition}.to({self.like}.dtype)"
            text = text if high - low == 1.0 else f"{text} * {literal(high - low)}"
            return self.store(node, text if low == 0.0 else f"{text} + {literal(low)}", node.axes)
        parts = [bracket(self.text(a, node.axes)) for a in node.args]
        return self.store(node, PRINT[name].format(*parts, like=self.like), node.axes)

    def _emit_con(self, node: Node) -> Variable:
        (body,) = node.args
        if has_hot(self.build, body):
            return emit_sum(self, node)
        if (squares := squares_of(self, node)) is not None:
            return squares
        if (
            body.node.op == "prod"
            and self.uses.get(body.node.id, 0) < 2
            and body.node.id not in self.variables
        ):
            _, factors = self.build.split(body)
            operands = [self.factor_operand(ref, power) for ref, power in factors]
        else:
            operands = [self.operand(body)]
        text, layout = contract(
            operands, node.axes, node.bound, bool(node.data), self.build.labels.sizes, self.temporary
        )
        return self.store(node, text, layout)

    def factor_operand(self, ref: Ref, power: float) -> Operand:
        """A use of a node to a power."""
        operand = self.operand(ref)
        if power == 1.0:
            return operand
        inverse = inverse_power(operand.text, -power) if power < 0.0 else ""
        text = inverse or (
            raised(operand.text, power) if power > 0.0 else f"{raised(operand.text, -power)}.reciprocal()"
        )
        return Operand(text, operand.labels, operand.prefix, operand.certain)

    def _emit_hot(self, node: Node) -> Variable:
        return emit_hot(self, node)

    def _emit_amax(self, node: Node) -> Variable:
        operand = self.operand(node.args[0])
        dims = sorted(operand.labels.index(k) - len(operand.labels) for k in node.bound)
        return self.store(
            node,
            f"{bracket(operand.text)}.amax({axis_list(dims)})",
            [k for k in operand.labels if k not in node.bound],
        )

    def _emit_eye(self, node: Node) -> Variable:
        return self.store(
            node, f"torch.eye({node.sizes[0]}, dtype={self.like}.dtype, device={self.like}.device)", node.axes
        )

    def _emit_select(self, node: Node) -> Variable:
        (_, start, step, count), size = node.data
        rows = f"torch.arange({start}, {start + step * count}, {step}, device={self.like}.device)"
        columns = f"torch.arange({size}, device={self.like}.device)"
        return self.store(node, f"({rows}[:, None] == {columns}).to({self.like}.dtype)", node.axes)

    def _emit_shift(self, node: Node) -> Variable:
        ones = f"{self.like}.new_ones({node.sizes[0] - abs(node.data)})"
        return self.store(node, f"{ones}.diag_embed({node.data})", node.axes)

    def _emit_pad(self, node: Node) -> Variable:
        (inner,) = node.args
        hidden = iter(node.bound)
        order = [
            own if spec[0] == "all" else next(hidden) for spec, own in zip(node.data, node.axes, strict=True)
        ]
        text = self.expanded(inner, order, inner.node.prefix)
        back = [k for k, spec in enumerate(node.data) if spec[0] == "slice" and spec[2] < 0]
        text = f"{bracket(text)}{flipped([k - len(order) for k in back])}" if back else text
        ends: list[int] = []
        for axis, (spec, size) in enumerate(zip(node.data, node.sizes, strict=True)):
            start, step, count = (0, 1, size) if spec[0] == "all" else forward((*spec, 1, 1))
            last = start + step * (count - 1)
            if step == 1:
                ends = [start, size - 1 - last, *ends]
                continue
            # torch pads at the ends only: entries that are apart are written into zeros
            values, dim = self.temporary(text), inner.node.prefix + axis
            zeros = f"{values}.new_zeros((*{values}.shape[:{dim}], {size}, *{values}.shape[{dim + 1}:]))"
            text = f"torch.slice_scatter({zeros}, {values}, {dim}, {start}, {last + 1}, {step})"
            ends = [0, 0, *ends]
        while ends and ends[-2:] == [0, 0]:
            ends = ends[:-2]
        if ends:
            text = f"torch.nn.functional.pad({text}, ({', '.join(map(str, ends))}))"
        return self.store(node, text, node.axes)

    def _emit_hold(self, node: Node) -> Variable:
        operand = self.operand(node.args[0])
        names = dict(zip(node.args[0].labels, node.axes, strict=True))
        return Variable(operand.text, tuple(names[k] for k in operand.labels))

    def _emit_call(self, node: Node) -> Variable:
        template, orders, name = node.data
        own = [*node.axes, *node.bound]
        parts = [
            self.expanded(a, [own[k] for k in order], prefix) if prefix >= 0 else self.operand(a).text
            for a, (order, prefix) in zip(node.args, orders, strict=True)
        ]
        taken = name is None or any(name == target for target, _ in self.lines)
        return self.store(node, template.format(*parts), node.axes, None if taken else name)
