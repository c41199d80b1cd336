"""Small questions about syntax trees of emitted expressions, and their simplification.

In: expressions as text or trees. Out: trees. Next file: `tidy.py`.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import TypeVar

Value = TypeVar("Value")


def kept(tree: ast.AST, name: str, compute: Callable[[], Value]) -> Value:
    """What `compute` returns for a tree, computed once: trees are never changed after they are built."""
    known: Value | None = tree.__dict__.get(name)
    if known is None:
        known = compute()
        setattr(tree, name, known)
    return known


def text_of(tree: ast.expr) -> str:
    """The source of an expression."""
    return kept(tree, "_text", lambda: ast.unparse(tree))


def read(tree: ast.AST) -> list[str]:
    """The names that an expression reads, one entry an occurrence."""
    return kept(tree, "_read", lambda: [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)])


def copied(tree: ast.expr) -> ast.expr:
    """The same expression as a tree of its own."""
    return ast.parse(text_of(tree), mode="eval").body


def substituted(tree: ast.expr, part: ast.expr, name: str) -> ast.expr:
    """A copy of the tree with every part that equals `part` replaced by a name."""
    kind, key = type(part), ast.dump(part)

    class Replace(ast.NodeTransformer):
        def visit(self, node: ast.AST) -> ast.AST:
            if type(node) is kind and ast.dump(node) == key:
                return ast.Name(name, ast.Load())
            self.generic_visit(node)
            return node

    changed = Replace().visit(copied(tree))
    assert isinstance(changed, ast.expr)
    return changed


def as_product(tree: ast.expr) -> list[ast.expr] | None:
    """The factors of a product, numbers included; None for anything else."""
    if not (isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.Mult)):
        return None
    left = as_product(tree.left) or [tree.left]
    return [*left, tree.right]


def summands(tree: ast.expr) -> list[tuple[float, ast.expr]] | None:
    """(sign, term) of a sum or difference, `torch.add(a, b, alpha=c)` included; None for anything else."""
    if isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.Add | ast.Sub):
        left = summands(tree.left) or [(1.0, tree.left)]
        return [*left, (1.0 if isinstance(tree.op, ast.Add) else -1.0, tree.right)]
    if isinstance(tree, ast.Call) and ast.unparse(tree.func) == "torch.add" and len(tree.keywords) == 1:
        alpha = ast.literal_eval(tree.keywords[0].value)
        left = summands(tree.args[0]) or [(1.0, tree.args[0])]
        return [*left, (float(alpha), tree.args[1])]
    return None


def negated(tree: ast.expr, in_place: bool) -> ast.expr | None:
    """A product, or a call of `mul_`, with the other sign; None for anything else."""
    if in_place:
        if not isinstance(tree, ast.Call) or not isinstance(tree.func, ast.Attribute):
            return None
        if tree.func.attr != "mul_" or isinstance(tree.args[0], ast.Name):
            return None
        return ast.Call(tree.func, [_minus(tree.args[0])], [])
    factors = as_product(tree)
    if factors is None or not isinstance(tree, ast.BinOp):
        return None
    first = _minus(factors[0])
    for factor in factors[1:]:
        first = ast.BinOp(first, ast.Mult(), factor)
    return first


def _minus(tree: ast.expr) -> ast.expr:
    """-tree; the sign goes into a subscripted factor, so that the small value takes it."""
    if isinstance(tree, ast.Constant) and isinstance(tree.value, int | float):
        return _constant(-float(tree.value))
    if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.USub):
        return tree.operand
    if isinstance(tree, ast.Subscript) and adds_axes_only(tree.slice):
        return ast.Subscript(_minus(tree.value), tree.slice, ast.Load())
    factors = as_product(tree)
    if factors is not None:
        first = _minus(factors[0])
        for factor in factors[1:]:
            first = ast.BinOp(first, ast.Mult(), factor)
        return first
    return ast.UnaryOp(ast.USub(), tree)


def _constant(value: float) -> ast.expr:
    # -1.0 is written as a sign and a number, as the parser does
    return ast.UnaryOp(ast.USub(), ast.Constant(-value)) if value < 0 else ast.Constant(value)


def simplified(text: str) -> ast.expr:
    """The expression parsed, without factors of one, terms of zero and transposed outer products."""
    tree: ast.expr = _Simplify().visit(ast.parse(text, mode="eval").body)
    return ast.parse(text_of(tree), mode="eval").body


def number_of(tree: ast.expr) -> float | None:
    """The value of a literal, signs included; None for anything else."""
    if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.USub):
        inner = number_of(tree.operand)
        return None if inner is None else -inner
    if isinstance(tree, ast.Constant) and isinstance(tree.value, int | float):
        return float(tree.value)
    return None


class _Simplify(ast.NodeTransformer):
    """Bottom up: -1.0 * x is -x, 1.0 / x is x.reciprocal(), (a * b).mT is a.mT * b.mT, x[..., None, :].mT is
    x[..., :, None]."""

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        self.generic_visit(node)
        if isinstance(node.op, ast.Mult):
            for number, other in ((node.left, node.right), (node.right, node.left)):
                if number_of(number) == 1.0:
                    return other
                if number_of(number) == -1.0:
                    return _minus(other)
        if isinstance(node.op, ast.Div) and number_of(node.left) == 1.0:
            return ast.Call(ast.Attribute(node.right, "reciprocal", ast.Load()), [], [])
        if isinstance(node.op, ast.Add | ast.Sub) and number_of(node.right) == 0.0:
            return node.left
        if (
            isinstance(node.op, ast.Add)
            and isinstance(node.right, ast.UnaryOp)
            and isinstance(node.right.op, ast.USub)
        ):
            return ast.BinOp(node.left, ast.Sub(), node.right.operand)
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        self.generic_visit(node)
        if node.attr != "mT":
            return node
        inner = node.value
        factors = as_product(inner) or [inner]
        turned = [_turned(factor) for factor in factors]
        found = [factor for factor in turned if factor is not None]
        if len(found) < len(factors):
            return node
        product = found[0]
        for factor in found[1:]:
            product = ast.BinOp(product, ast.Mult(), factor)
        return product


def _turned(tree: ast.expr) -> ast.expr | None:
    """The transpose of x[..., None, :] or x[..., :, None], or of a number; None for anything else."""
    if number_of(tree) is not None:
        return tree
    if isinstance(tree, ast.Subscript) and isinstance(tree.slice, ast.Tuple) and adds_axes_only(tree.slice):
        parts = tree.slice.elts
        new = [isinstance(part, ast.Constant) and part.value is None for part in parts]
        if new in ([False, True, False], [False, False, True]):
            swapped = ast.Tuple([parts[0], parts[2], parts[1]], ast.Load())
            return ast.Subscript(tree.value, swapped, ast.Load())
    return None


def adds_axes_only(index: ast.expr) -> bool:
    """Whether an index is made of `...`, `:` and `None`."""
    parts = index.elts if isinstance(index, ast.Tuple) else [index]
    return all(
        (isinstance(part, ast.Constant) and part.value in (None, Ellipsis))
        or (isinstance(part, ast.Slice) and part.lower is part.upper is part.step is None)
        for part in parts
    )
