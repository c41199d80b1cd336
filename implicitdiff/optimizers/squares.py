"""The residuals of a sum of squares, read off the traced objective.

A `TracedFunction` comes in; a `Squares` goes out, a graph that returns the residuals and their weights instead of
the sum, or None where the objective is not visibly a sum of squares. Next: least_squares.py, which uses it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx import Graph, GraphModule, Node

from implicitdiff.graph.trace import TracedFunction

_ATEN = torch.ops.aten
_SUMS = (_ATEN.sum.default, _ATEN.sum.dim_IntList)
_MEANS = (_ATEN.mean.default, _ATEN.mean.dim)
_VIEWS = (
    _ATEN.view.default,
    _ATEN.reshape.default,
    _ATEN.unsqueeze.default,
    _ATEN.squeeze.default,
    _ATEN.squeeze.dim,
    _ATEN.alias.default,
    _ATEN.clone.default,
)


@dataclass(frozen=True)
class Block:
    """weight * sum of r^2: the residual r, a number, and tensors without u that multiply the squares."""

    residual: Node
    factor: float
    weights: tuple[Node, ...]


@dataclass(frozen=True, eq=False)
class Squares:
    """f(u) = sum over blocks of factor * sum(weights * r(u)^2), plus terms without u.

    Attributes:
        module: Called like the objective; returns, for each block, r followed by its weights, in one tuple.
        factors: The factor of each block.
        counts: How many weights each block has.
    """

    module: GraphModule
    factors: tuple[float, ...]
    counts: tuple[int, ...]


def squares_of(objective: TracedFunction, variables: int) -> Squares | None:
    """Recognise f = sum of weighted squares from the outermost operations of its graph.

    Sums, means, products with a number or with a tensor without u, differences whose second term has no u, and
    terms without u are looked through; r^2, r * r, dot(r, r), |r|_2^2 and mse_loss end the search. Weights may be
    negative: nothing is assumed about them.

    Args:
        objective: The traced objective of one sample.
        variables: How many of its first arguments are variables.

    Returns:
        Squares, or None where some term of f is anything else.
    """
    graph = _merged(objective.module.graph)
    depends = _dependent(graph, variables)
    (output,) = (node for node in graph.nodes if node.op == "output")
    blocks = _blocks(output.args[0], 1.0, (), depends)
    if not blocks:
        return None
    copy = Graph()
    copied: dict[Node, Node] = {}
    copy.graph_copy(graph, copied)
    found: list[Node] = []
    for block in blocks:
        residual = copied[block.residual]
        if block.residual.op == "call_function" and block.residual.target is _ATEN.mse_loss.default:
            with copy.inserting_after(residual):
                residual = copy.call_function(_ATEN.sub.Tensor, residual.args[:2])
        found += [residual, *(copied[weight] for weight in block.weights)]
    copy.output(tuple(found))
    copy.eliminate_dead_code()
    return Squares(
        GraphModule(objective.module, copy),
        tuple(block.factor for block in blocks),
        tuple(len(block.weights) for block in blocks),
    )


def _merged(graph: Graph) -> Graph:
    """A copy in which equal expressions are one node: in (a - b) * (a - b) the difference is written twice."""
    copy = Graph()
    known: dict[tuple[object, ...], Node] = {}
    values: dict[Node, Node] = {}
    for node in graph.nodes:
        if node.op == "output":
            copy.output(values[node.args[0]])
            continue
        arguments = torch.fx.map_arg((node.args, node.kwargs), values.__getitem__)
        key = (node.op, node.target, repr(arguments))  # nodes are shown by their names, which are unique
        if node.op == "placeholder" or key not in known:
            known[key] = copy.node_copy(node, values.__getitem__)
        values[node] = known[key]
    return copy


def _dependent(graph: Graph, variables: int) -> set[Node]:
    """The nodes that depend on u."""
    found: set[Node] = set()
    for position, node in enumerate(graph.nodes):
        if (node.op == "placeholder" and position < variables) or any(
            source in found for source in node.all_input_nodes
        ):
            found.add(node)
    return found


def _size(node: Node) -> int:
    return math.prod(node.meta["val"].shape)


def _blocks(node: object, factor: float, weights: tuple[Node, ...], depends: set[Node]) -> list[Block] | None:
    """The blocks of factor * sum(weights * node); [] where node has no u, None where it is no sum of squares."""
    if not isinstance(node, Node) or node not in depends:
        return []
    arguments, target = node.args, node.target
    if target in _SUMS or target in _MEANS:
        # Weights of the sums may have axes of their own only if all is summed up: else they do not fit r.
        if _size(node) != 1 and any(_size(weight) != 1 for weight in weights):
            return None
        over = factor * _size(node) / _size(arguments[0]) if target in _MEANS else factor  # type: ignore[arg-type]
        return _blocks(arguments[0], over, weights, depends)
    if target in _VIEWS:
        if any(_size(weight) != 1 for weight in weights):
            return None
        return _blocks(arguments[0], factor, weights, depends)
    if target in (_ATEN.add.Tensor, _ATEN.sub.Tensor):
        alpha = node.kwargs.get("alpha", 1)
        if not isinstance(alpha, int | float):
            return None
        scale = -alpha * factor if target is _ATEN.sub.Tensor else alpha * factor
        return _joined(arguments[:2], (factor, scale), node, weights, depends)
    if target is _ATEN.neg.default:
        return _blocks(arguments[0], -factor, weights, depends)
    if target is _ATEN.mul.Tensor and arguments[0] is not arguments[1]:
        first, second = arguments[:2]
        if isinstance(first, Node) and first in depends:
            first, second = second, first
        return _weighted(second, first, node, factor, weights, depends)
    if target is _ATEN.div.Tensor and isinstance(arguments[1], int | float):
        return _blocks(arguments[0], factor / arguments[1], weights, depends)
    return _square(node, factor, weights)


def _joined(
    terms: Sequence[object],
    factors: Sequence[float],
    whole: Node,
    weights: tuple[Node, ...],
    depends: set[Node],
) -> list[Block] | None:
    """The blocks of a sum of two terms; a term that is broadcast against the other would count several times."""
    found: list[Block] = []
    for term, factor in zip(terms, factors, strict=True):
        if isinstance(term, Node) and term in depends and _size(term) != _size(whole):
            return None
        blocks = _blocks(term, factor, weights, depends)
        if blocks is None:
            return None
        found += blocks
    return found


def _weighted(
    squares: object,
    weight: object,
    whole: Node,
    factor: float,
    weights: tuple[Node, ...],
    depends: set[Node],
) -> list[Block] | None:
    """The blocks of weight * squares, the weight a number or a tensor without u."""
    if isinstance(weight, int | float):
        return _blocks(squares, factor * weight, weights, depends)
    if not isinstance(weight, Node) or weight in depends or not isinstance(squares, Node):
        return None
    if _size(squares) != _size(whole):
        return None
    return _blocks(squares, factor, (*weights, weight), depends)


def _square(node: Node, factor: float, weights: tuple[Node, ...]) -> list[Block] | None:
    """The block of a node that is a square itself; None if it is not."""
    arguments, target = node.args, node.target
    fits = all(_size(weight) == 1 for weight in weights)
    if target is _ATEN.pow.Tensor_Scalar and arguments[1] == 2:
        inner = arguments[0]
        assert isinstance(inner, Node)
        if inner.target is _ATEN.linalg_vector_norm.default and _is_whole_norm(inner):
            source = inner.args[0]
            return [Block(source, factor, weights)] if fits and isinstance(source, Node) else None
        return [Block(inner, factor, weights)]
    if target in (_ATEN.mul.Tensor, _ATEN.dot.default) and arguments[0] is arguments[1]:
        source = arguments[0]
        whole = target is _ATEN.mul.Tensor or fits
        return [Block(source, factor, weights)] if whole and isinstance(source, Node) else None
    if target is _ATEN.mse_loss.default:
        reduction = arguments[2] if len(arguments) > 2 else 1  # 0: none, 1: mean, 2: sum
        source = arguments[0]
        other = arguments[1]
        if not fits or reduction == 0 or not isinstance(source, Node) or not isinstance(other, Node):
            return None
        if source.meta["val"].shape != other.meta["val"].shape:
            return None
        return [Block(node, factor / _size(source) if reduction == 1 else factor, weights)]
    return None


def _is_whole_norm(node: Node) -> bool:
    """Whether a norm is the Euclidean one of all entries."""
    order = node.args[1] if len(node.args) > 1 else node.kwargs.get("ord", 2)
    dims = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim")
    return bool(order == 2 and (dims is None or _size(node) == 1))
