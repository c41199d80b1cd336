"""Buffers written in place: values whose last use has come take the result, chains work on what they have just made.

In: a `Body` in its final order. Out: the same `Body` with fewer new buffers. Next file: `tidy.py`.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping

from implicitdiff.graph.statements import (
    IN_PLACE,
    WIDTH,
    Body,
    Shape,
    Statement,
    broadcast,
    is_fresh,
    largest,
    named,
    read_results,
)
from implicitdiff.graph.trees import as_product, negated, number_of, read, summands

# -------------------------------------------------------------------- in place


def work_in_place(body: Body) -> None:
    """Values that are read for the last time take the result, where it has their shape."""
    for k in range(len(body.statements)):
        statement = body.statements[k]
        name = overwritable(body, k)
        if name is None:
            continue
        if isinstance(statement.value, ast.BinOp) and isinstance(statement.value.op, ast.Sub):
            _turn_sign(body, k, name)
        value = _written_to(statement.value, name, body.shapes)
        if value is None:
            continue
        old = statement.target
        body.replace(k, Statement(name, value, True, statement.purpose))
        body.rewrite(lambda v: named(v, {old: ast.Name(name)}), k + 1)  # noqa: B023
        for later in body.statements[k + 1 :]:
            if later.target == old:
                later.target = name


def overwritable(body: Body, k: int) -> str | None:
    """A value that statement `k` reads for the last time, in an entrywise expression of the same shape."""
    statement = body.statements[k]
    shape = body.shapes.get(statement.target)
    if shape is None or not shape.sure or statement.in_place:
        return None
    uses = body.uses()
    fresh = {s.target for s in body.statements[:k] if is_fresh(s.value)}
    found = []
    for name in _operands(statement.value):
        if name in fresh and body.shapes.get(name) == shape and uses[name].count(k) == 1:
            held = _holders(body, name)
            held.discard(name)
            last = max(uses[name]) == k and all(max(uses.get(other, [0])) < k for other in held)
            if last and not (held | {name}) & set(read_results(body)):
                found.append(name)
    # a product of small factors need not be made at all where another value can take the sum: addcmul_ forms it
    rather = [name for name in found if not _is_outer(body, k, name) and _takes_sign(body, k, name)]
    return next(iter([*rather, *found]), None)


def _definition(body: Body, k: int, name: str) -> Statement:
    return next(s for s in reversed(body.statements[:k]) if s.target == name)


def _is_outer(body: Body, k: int, name: str) -> bool:
    """Whether a value is a product of factors that are all smaller than itself."""
    made, shape = _definition(body, k, name), body.shapes[name]
    factors = None if made.in_place else as_product(made.value)
    whole = ("B",) * shape.prefix + shape.sizes
    return factors is not None and all(broadcast(f, body.shapes) not in (None, whole) for f in factors)


def _takes_sign(body: Body, k: int, name: str) -> bool:
    """Whether a value is added in statement `k`, or what defined it can take the minus sign."""
    value = body.statements[k].value
    subtracted = isinstance(value, ast.BinOp) and isinstance(value.op, ast.Sub)
    if not (
        subtracted
        and isinstance(value, ast.BinOp)
        and ast.dump(value.right) == ast.dump(ast.Name(name, ast.Load()))
    ):
        return True
    made = _definition(body, k, name)
    return negated(made.value, made.in_place) is not None


def _operands(value: ast.expr) -> list[str]:
    """Names that stand in an entrywise expression by themselves: a factor of a product, a term of a sum."""
    if isinstance(value, ast.UnaryOp):
        return _operands(value.operand)
    product = as_product(value)
    if product is not None:
        return [factor.id for factor in product if isinstance(factor, ast.Name)]
    if isinstance(value, ast.BinOp) and isinstance(value.op, ast.Div):
        return [value.left.id] if isinstance(value.left, ast.Name) else []
    terms = summands(value)
    if terms is not None:
        return [tree.id for _, tree in terms if isinstance(tree, ast.Name)]
    return []


def _holders(body: Body, name: str) -> set[str]:
    """The name and all that may share its memory: views of it, objects that keep it."""
    held = {name}
    for statement in body.statements:
        if not statement.in_place and not is_fresh(statement.value) and held & set(read(statement.value)):
            held.add(statement.target)
    return held


def _turn_sign(body: Body, k: int, name: str) -> None:
    """`other - name` becomes `name + other` with the sign moved into the product that defined `name`."""
    value = body.statements[k].value
    if not (isinstance(value, ast.BinOp) and isinstance(value.right, ast.Name) and value.right.id == name):
        return
    for earlier in reversed(body.statements[:k]):
        if earlier.target == name:
            turned = negated(earlier.value, earlier.in_place)
            if turned is not None and body.uses()[name].count(k) == 1:
                between = [
                    s
                    for s in body.statements[body.statements.index(earlier) + 1 : k]
                    if name in read(s.value)
                ]
                if not between:
                    earlier.value, body.known = turned, None
                    body.statements[k].value = ast.BinOp(value.right, ast.Add(), value.left)
            return


def _written_to(value: ast.expr, name: str, shapes: Mapping[str, Shape]) -> ast.expr | None:
    """`value` as methods that change `name`; None where there is no such form."""
    target: ast.expr = ast.Name(name)
    factor: ast.expr

    if isinstance(value, ast.UnaryOp) and isinstance(value.op, ast.USub):
        inner = value.operand
        return _call(target, "neg_") if isinstance(inner, ast.Name) and inner.id == name else None
    factors = as_product(value)
    if factors is not None:
        whole = shapes[name]
        others = [f for f in factors if not (isinstance(f, ast.Name) and f.id == name)]
        large = [f for f in others if isinstance(f, ast.Name) and shapes.get(f.id) == whole]
        small = [f for f in others if f not in large]
        for factor in large:
            target = _call(target, "mul_", factor)
        if small:
            joined = small[0]
            for factor in small[1:]:
                joined = ast.BinOp(joined, ast.Mult(), factor)
            target = _call(target, "mul_", joined)
        return target
    if isinstance(value, ast.BinOp) and isinstance(value.op, ast.Div):
        return _call(target, "div_", value.right)
    terms = summands(value)
    if terms is None:
        return None
    own = [sign for sign, tree in terms if isinstance(tree, ast.Name) and tree.id == name]
    if own != [1.0]:
        return None
    for sign, tree in terms:
        if not (isinstance(tree, ast.Name) and tree.id == name):
            target = _plus(target, sign, tree)
    return target


def _call(on: ast.expr, method: str, *arguments: ast.expr, **options: ast.expr) -> ast.expr:
    keywords = [ast.keyword(key, given) for key, given in options.items()]
    return ast.Call(ast.Attribute(on, method), list(arguments), keywords)


def _plus(target: ast.expr, sign: float, tree: ast.expr) -> ast.expr:
    """`target` with sign * tree added in place; a product is formed on the way."""
    if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.USub):
        sign, tree = -sign, tree.operand
    factors = as_product(tree)
    numbers = [x for f in factors or [] if (x := number_of(f)) is not None]
    tensors = [f for f in factors or [] if number_of(f) is None]
    if len(tensors) > 1 and len(numbers) < 2:
        amount = sign * (numbers[0] if numbers else 1.0)
        first = tensors[0]
        for factor in tensors[1:-1]:
            first = ast.BinOp(first, ast.Mult(), factor)
        options = {} if amount == 1.0 else {"value": ast.Constant(amount)}
        return _call(target, "addcmul_", first, tensors[-1], **options)
    if sign in (1.0, -1.0):
        return _call(target, "add_" if sign > 0 else "sub_", tree)
    return _call(target, "add_", tree, alpha=ast.Constant(sign))


def chain(body: Body) -> None:
    """What follows the first operation of a large expression works in place on its result."""
    for statement in body.statements:
        shape = body.shapes.get(statement.target)
        if shape is None or not shape.sure or 4 * shape.entries < largest(body):
            continue
        if statement.in_place or not isinstance(statement.value, ast.BinOp):
            continue
        statement.value = _chained(statement.value, ("B",) * shape.prefix + shape.sizes, body.shapes)


def join(body: Body) -> None:
    """Statements that change the same value one after the other become one."""
    k = 1
    while k < len(body.statements):
        before, statement = body.statements[k - 1 : k + 1]
        same = statement.in_place and before.target == statement.target
        if (
            same
            and (before.in_place or is_fresh(before.value))
            and len(before.text) + len(statement.text) < WIDTH
            and read(statement.value).count(before.target) == 1
        ):
            statement.value = named(statement.value, {before.target: before.value})
            statement.in_place = before.in_place
            body.replace(k - 1, None)
        else:
            k += 1


def _chained(tree: ast.expr, whole: tuple[object, ...], shapes: Mapping[str, Shape]) -> ast.expr:
    """The tree as method calls on its innermost operation of the whole size."""
    if not isinstance(tree, ast.BinOp) or type(tree.op) not in IN_PLACE:
        return tree
    left, right = tree.left, tree.right
    if isinstance(tree.op, ast.Mult) and _makes(right, whole, shapes) and not _makes(left, whole, shapes):
        left, right = right, left
    if not _makes(left, whole, shapes):
        return tree
    inner = _chained(left, whole, shapes)
    if isinstance(tree.op, ast.Add | ast.Sub):
        return _plus(inner, 1.0 if isinstance(tree.op, ast.Add) else -1.0, right)
    return ast.Call(ast.Attribute(inner, IN_PLACE[type(tree.op)]), [right], [])


def _makes(tree: ast.expr, whole: tuple[object, ...], shapes: Mapping[str, Shape]) -> bool:
    """Whether an expression makes a new value of the whole size, which is the most that its parts can have."""
    if not isinstance(tree, ast.BinOp) or type(tree.op) not in IN_PLACE:
        return False
    return whole in (broadcast(tree, shapes), broadcast(tree.left, shapes), broadcast(tree.right, shapes))
