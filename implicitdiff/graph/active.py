"""Inequalities and bounds as masks: a problem with them becomes one with equalities alone, for a given active set.

Comes in: a Trace with inequality or bounds. Goes out: a Trace of the same variables and inputs, with masks as further
placeholders, whose derivative is 0. No other part of the library needs to know: structures, solvers, second
derivatives and transforms are those of equalities. Next file: ``layer/inequalities.py``, which finds the masks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from implicitdiff.graph.clean import outputs
from implicitdiff.graph.trace import Placeholder, Trace, TracedFunction

aten = torch.ops.aten


def active_trace(trace: Trace) -> Trace:
    """The problem on a given active set: min f(u) s.t. h(u) = 0, a g(u) = 0 with the fixed variables on their bounds.

    With masks free, low, high for each leaf of u that has bounds (free = 1 - low - high) and c = low ? lower : high ?
    upper : 0, the functions are taken at

        v = free z + c,    f(v) + |(1 - free)(z - c)|^2 / 2,    h(v),    a g(v).

    So H becomes F H F + (I - F), A becomes A F, and a fixed variable follows its bound: dz = dc. The multipliers of
    rows that are off, a = 0, are held at 0 by the corner D = 1 - a of K = [[H, -A'], [-A, -D]]: S + D has rows of the
    identity there. Masks are last in the order of `masks_of`.
    """
    dtype = trace.variables[0].dtype
    extra: list[Placeholder] = []
    for k, (leaf, sides) in enumerate(zip(trace.variables, _bounded(trace), strict=True)):
        if any(sides):
            names = (("free", dtype), ("low", torch.bool), ("high", torch.bool))
            extra += [Placeholder(f"{name}[{k}]", "mask", leaf.shape, kind, True) for name, kind in names]
    shapes = () if trace.inequality is None else trace.inequality.output_shapes
    for name in ("rows", "corner"):
        extra += [Placeholder(f"{name}[{k}]", "mask", s, dtype, True) for k, s in enumerate(shapes)]
    placeholders = (*trace.placeholders, *extra)
    count = len(trace.equality.output_shapes) if trace.equality is not None else 0

    def compose(function: TracedFunction) -> _Composer:
        composer = _Composer(placeholders)
        given = composer.nodes[: len(trace.placeholders)]
        rest = iter(composer.nodes[len(trace.placeholders) :])
        composer.results = _moved(composer, trace, given, rest, function)
        return composer

    objective = compose(trace.objective)
    value, *anchors = objective.results
    for anchor in anchors:
        value = objective.call(aten.add.Tensor, value, anchor)
    functions = [f for f in (trace.equality, trace.inequality) if f is not None]
    equality = None
    if functions:
        equality = _joined(placeholders, trace, functions, rows=True)
    return dataclasses.replace(
        trace,
        placeholders=placeholders,
        declared=trace,
        objective=objective.finish("objective", value),
        equality=equality,
        corner=_corner(placeholders, count, len(shapes)),
    )


def interior_trace(trace: Trace) -> Trace:
    """The problem as an interior-point method meets it: g among the equalities, with a corner, and weights on u.

    The objective is f(u) + sum weight u^2 / 2 for each leaf with bounds, the constraints are (h, g), the corner belongs
    to g: K = [[H + diag(weight), -A'], [-A, -D]], A = D_u (h, g). Masks: the weights, then the corners.
    """
    dtype = trace.variables[0].dtype
    extra = [
        Placeholder(f"weight[{k}]", "mask", leaf.shape, dtype, True)
        for k, (leaf, sides) in enumerate(zip(trace.variables, _bounded(trace), strict=True))
        if any(sides)
    ]
    shapes = () if trace.inequality is None else trace.inequality.output_shapes
    extra += [Placeholder(f"corner[{k}]", "mask", s, dtype, True) for k, s in enumerate(shapes)]
    placeholders = (*trace.placeholders, *extra)
    composer = _Composer(placeholders)
    given = composer.nodes[: len(trace.placeholders)]
    (value,) = composer.inline(trace.objective, given)
    weights = iter(composer.nodes[len(trace.placeholders) :])
    for node, sides in zip(given, _bounded(trace), strict=False):
        if any(sides):
            value = composer.call(aten.add.Tensor, value, composer.half_square(node, next(weights)))
    functions = [f for f in (trace.equality, trace.inequality) if f is not None]
    count = len(trace.equality.output_shapes) if trace.equality is not None else 0
    return dataclasses.replace(
        trace,
        placeholders=placeholders,
        declared=trace,
        objective=composer.finish("objective", value),
        equality=_joined(placeholders, trace, functions, rows=False) if functions else None,
        corner=_corner(placeholders, count, len(shapes)),
    )


def default_masks(trace: Trace, batch: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Masks of a trace on an active set for a report: every variable free, every row of g active."""
    found = []
    for placeholder in trace.masks:
        full = placeholder.name.startswith(("free", "rows"))
        shape = (batch, *placeholder.shape)
        found.append(torch.full(shape, full, dtype=placeholder.dtype, device=device))
    return tuple(found)


def _bounded(trace: Trace) -> tuple[tuple[bool, bool], ...]:
    return trace.bounded or ((False, False),) * len(trace.variables)


def _corner(
    placeholders: Sequence[Placeholder], equalities: int, inequalities: int
) -> tuple[int | None, ...]:
    """For each constraint leaf the placeholder of its corner: they are the last."""
    first = len(placeholders) - inequalities
    return (*(None,) * equalities, *range(first, len(placeholders)))


def _moved(
    composer: _Composer, trace: Trace, given: Sequence[fx.Node], rest: Any, function: TracedFunction
) -> list[fx.Node]:
    """The outputs of a function at v = free z + c, then (for each leaf with bounds) |(1 - free)(z - c)|^2 / 2."""
    bounds = iter(composer.inline(trace.bounds, given) if trace.bounds is not None else ())
    values, anchors = list(given), []
    for k, sides in enumerate(_bounded(trace)):
        if not any(sides):
            continue
        free, low, high = next(rest), next(rest), next(rest)
        limits = [
            composer.call(aten.where.ScalarOther, mask, next(bounds), 0.0)
            for mask, there in zip((low, high), sides, strict=True)
            if there
        ]
        limit = limits[0] if len(limits) == 1 else composer.call(aten.add.Tensor, *limits)
        held = composer.call(aten.rsub.Scalar, free, 1)
        anchors.append(composer.half_square(composer.call(aten.sub.Tensor, given[k], limit), held))
        values[k] = composer.call(aten.add.Tensor, composer.call(aten.mul.Tensor, free, given[k]), limit)
    composer.left = list(rest)
    found = composer.inline(function, values)
    return [*found, *(anchors if function.name == "objective" else ())]


def _joined(
    placeholders: Sequence[Placeholder], trace: Trace, functions: Sequence[TracedFunction], *, rows: bool
) -> TracedFunction:
    """h and g as one function; with `rows` at v, and the rows of g times their masks."""
    composer = _Composer(placeholders)
    given = composer.nodes[: len(trace.placeholders)]
    results: list[fx.Node] = []
    for function in functions:
        rest = iter(composer.nodes[len(trace.placeholders) :])
        if rows:
            found = _moved(composer, trace, given, rest, function)
        else:
            found = composer.inline(function, given)
        if rows and function.name == "inequality":
            found = [composer.masked(m, node) for m, node in zip(composer.left, found, strict=False)]
        results += found
    return composer.finish("equality", tuple(results))


class _Composer:
    """A graph made of other graphs."""

    def __init__(self, placeholders: Sequence[Placeholder]) -> None:
        self.graph, self.root = fx.Graph(), torch.nn.Module()
        self.nodes: list[fx.Node] = []
        self.results: list[fx.Node] = []
        self.left: list[fx.Node] = []
        for index, placeholder in enumerate(placeholders):
            node = self.graph.placeholder(f"arg_{index}")
            node.meta["val"] = torch.empty(placeholder.shape, dtype=placeholder.dtype, device="meta")
            self.nodes.append(node)

    def inline(self, function: TracedFunction, values: Sequence[fx.Node]) -> list[fx.Node]:
        """The outputs of a function of these values."""
        table: dict[fx.Node, fx.Node] = {}
        given = iter(values)
        for node in function.module.graph.nodes:
            if node.op == "placeholder":
                table[node] = next(given)
            elif node.op != "output":
                table[node] = self.graph.node_copy(node, lambda n: table[n])
                if node.op == "get_attr":
                    setattr(self.root, node.target, getattr(function.module, node.target))
        return [table[node] for node in outputs(function.module)]

    def call(self, operation: Any, *args: Any) -> fx.Node:
        """One operation on nodes and numbers."""
        node = self.graph.call_function(operation, args)
        node.meta["val"] = operation(*(a.meta["val"] if isinstance(a, fx.Node) else a for a in args))
        return node

    def half_square(self, value: fx.Node, weight: fx.Node) -> fx.Node:
        """sum weight value^2 / 2."""
        product = self.call(aten.mul.Tensor, self.call(aten.mul.Tensor, weight, value), value)
        return self.call(aten.mul.Tensor, self.call(aten.sum.default, product), 0.5)

    def masked(self, mask: fx.Node, value: fx.Node) -> fx.Node:
        """mask * value; a concatenation is masked piece by piece, so that its pieces keep their structure."""
        if value.target is not aten.cat.default:
            return self.call(aten.mul.Tensor, mask, value)
        pieces, dim = value.args[0], (value.args[1] if len(value.args) > 1 else 0)
        assert isinstance(pieces, list | tuple)
        masked, start = [], 0
        for piece in pieces:
            assert isinstance(piece, fx.Node)
            end = start + piece.meta["val"].shape[dim]
            part = self.call(aten.slice.Tensor, mask, dim, start, end)
            masked.append(self.call(aten.mul.Tensor, part, piece))
            start = end
        node = self.graph.call_function(aten.cat.default, (masked, dim))
        node.meta["val"] = value.meta["val"]
        return node

    def finish(self, name: str, result: fx.Node | tuple[fx.Node, ...]) -> TracedFunction:
        """The function that returns these nodes."""
        self.graph.output(result)
        self.graph.eliminate_dead_code()
        self.graph.lint()
        module = fx.GraphModule(self.root, self.graph)
        return TracedFunction(name, module, tuple(tuple(node.meta["val"].shape) for node in outputs(module)))
