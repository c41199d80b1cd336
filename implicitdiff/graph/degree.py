"""Whether a traced function is a polynomial of low degree in the variables: linear, quadratic, or neither.

Comes in: a TracedFunction. Goes out: an upper bound of its degree in u, from the operations alone. Used by the
optimizers, which solve quadratic programs with constant matrices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from implicitdiff.graph.clean import outputs
from implicitdiff.graph.trace import Trace, TracedFunction

aten = torch.ops.aten

_LINEAR = {
    aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Scalar, aten.rsub.Tensor,
    aten.neg.default, aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim,
    aten.reshape.default, aten.view.default, aten.permute.default, aten.transpose.int, aten.t.default,
    aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.expand.default,
    aten.slice.Tensor, aten.select.int, aten.cat.default, aten.stack.default, aten.flip.default, aten.diagonal.default,
    aten._to_copy.default, aten.clone.default, aten.index_select.default, aten.roll.default, aten.cumsum.default,
    aten.movedim.int, aten.unfold.default, aten.constant_pad_nd.default, aten.split.Tensor, aten.unbind.int,
}  # fmt: skip
_PRODUCTS = {
    aten.mul.Tensor, aten.mul.Scalar, aten.mm.default, aten.bmm.default, aten.mv.default, aten.dot.default,
    aten.matmul.default,
}  # fmt: skip
_QUOTIENTS = {aten.div.Tensor, aten.div.Scalar}
_SUMS_OF_PRODUCTS = {aten.addmm.default, aten.addmv.default, aten.baddbmm.default}


def is_quadratic_program(trace: Trace) -> bool:
    """Whether f is at most quadratic in u, h and g affine, by their operations."""
    constraints = [f for f in (trace.equality, trace.inequality) if f is not None]
    variables = len(trace.variables)
    return degree(trace.objective, variables) <= 2 and all(degree(f, variables) <= 1 for f in constraints)


def degree(function: TracedFunction, variables: int) -> float:
    """An upper bound of the degree in the first `variables` arguments; infinite where it is not known."""
    found: dict[fx.Node, float] = {}
    for index, node in enumerate(n for n in function.module.graph.nodes if n.op == "placeholder"):
        found[node] = 1.0 if index < variables else 0.0
    for node in function.module.graph.nodes:
        if node.op not in ("placeholder", "output"):
            found[node] = _of(node, found)
    return max(found[node] for node in outputs(function.module))


def _of(node: fx.Node, found: dict[fx.Node, float]) -> float:
    degrees = [found[n] for n in node.all_input_nodes]
    largest = max(degrees, default=0.0)
    if largest == 0:
        return 0.0
    if node.target in _LINEAR or getattr(node.target, "__name__", "") == "getitem":
        return largest
    if node.target in _QUOTIENTS:
        return largest if _at(node.args[1], found) == 0 else math.inf
    combine: dict[bool, Callable[[], float]] = {
        node.target in _PRODUCTS: lambda: _at(node.args[0], found) + _at(node.args[1], found),
        node.target in _SUMS_OF_PRODUCTS: lambda: max(
            _at(node.args[0], found), _at(node.args[1], found) + _at(node.args[2], found)
        ),
        node.target is aten.square.default: lambda: 2 * largest,
        node.target is aten.pow.Tensor_Scalar: lambda: _power(node.args, largest),
        node.target is aten.where.self: lambda: _branches(node.args, found),
    }
    return combine[True]() if True in combine else math.inf


def _at(argument: Any, found: dict[fx.Node, float]) -> float:
    return found[argument] if isinstance(argument, fx.Node) else 0.0


def _power(args: Sequence[Any], base: float) -> float:
    return base * args[1] if args[1] in (1, 2) else math.inf


def _branches(args: Sequence[Any], found: dict[fx.Node, float]) -> float:
    return math.inf if _at(args[0], found) else max(_at(args[1], found), _at(args[2], found))
