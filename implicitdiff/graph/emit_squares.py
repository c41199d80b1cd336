"""How sums of squares are written: in pieces, without a tensor of all squares or of all differences.

In: a `con` node. Out: a statement that calls `saddle.square_sum` or `saddle.squared_distance`; None for another sum.
Next file: `contraction.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from implicitdiff.graph.ir import Node

if TYPE_CHECKING:
    from implicitdiff.graph.emit import Emitter, Variable


def squares_of(emitter: Emitter, node: Node) -> Variable | None:
    """A sum of squares along one axis, or of squared differences: nothing of the size of the squares is made."""
    (body,) = node.args
    coefficient, factors = emitter.build.split(body)
    if node.data or len(node.bound) != 1 or body.node.op != "prod" or coefficient != 1.0:
        return None
    if len(factors) != 1 or factors[0][1] != 2.0 or body.node.id in emitter.variables:
        return None
    ref = factors[0][0]
    args, _ = emitter.build.open(ref)
    only = emitter.uses.get(ref.node.id, 0) == 1 and ref.node.id not in emitter.variables
    if only and ref.node.op == "add" and ref.node.data == (0.0, (1.0, -1.0)):
        order = list(ref.labels)
        texts = ", ".join(emitter.text(a, order) for a in args)
        if any(set(a.labels) == set(order) for a in args) and ref.node.prefix == 1:
            dim = order.index(node.bound[0]) - len(order)
            layout = [k for k in order if k not in node.bound]
            return emitter.store(node, f"saddle.squared_distance({texts}, {dim})", layout)
    operand = emitter.operand(ref)
    dim = operand.labels.index(node.bound[0]) - len(operand.labels)
    layout = [k for k in operand.labels if k not in node.bound]
    if not layout:
        return None
    return emitter.store(node, f"saddle.square_sum({operand.text}, {dim})", layout)
