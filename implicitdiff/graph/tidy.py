"""Emitted statements as a person would have written them: nothing twice, no name used once, buffers written in place.

In: assignments in order and the shapes of what they compute. Out: statements. All rewriting is on syntax trees: shared
subexpressions first, then single uses move inline, then values whose last use has come are overwritten. Next file:
`emit.py`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from implicitdiff.graph.trees import (
    adds_axes_only,
    as_product,
    negated,
    number_of,
    read,
    simplified,
    substituted,
    summands,
    text_of,
)

WIDTH = 100
"""Lines do not grow beyond this by moving expressions inline."""
KEPT = re.compile(r"^(w|s|kkt|factor|schur)\d*$")
"""Names that say what a value is: they stay, also where they are used once."""
IN_PLACE: dict[type[ast.operator], str] = {
    ast.Add: "add_",
    ast.Sub: "sub_",
    ast.Mult: "mul_",
    ast.Div: "div_",
}
ENTRYWISE = frozenset("rsqrt sqrt square reciprocal pow exp log log1p abs tanh sigmoid sin cos".split())
OBJECTS = ("operators.", "solvers.", "saddle.FullKKT", "saddle.RangeSpace")
VIEWS = frozenset("expand squeeze unflatten flatten reshape permute to matrix einsum".split())
"""Methods and functions whose result may share memory with what they are given."""


@dataclass(frozen=True)
class Shape:
    """The leading axes and the sizes of the trailing ones; `sure` where no leading axis can be of size 1 by sharing."""

    prefix: int
    sizes: tuple[int, ...]
    sure: bool

    @property
    def entries(self) -> int:
        """Numbers per sample."""
        out = 1
        for size in self.sizes:
            out *= size
        return out


@dataclass
class Statement:
    """`target = value`, or `value` alone where it works in place (then `target` is what it writes to)."""

    target: str
    value: ast.expr
    in_place: bool = False

    @property
    def text(self) -> str:
        """The source line."""
        written = text_of(self.value)
        return written if self.in_place else f"{self.target} = {written}"


@dataclass
class Body:
    """Statements and the returned expressions while they are rewritten."""

    statements: list[Statement]
    results: list[ast.expr]
    shapes: dict[str, Shape]
    arguments: Sequence[str]
    counter: int = 0

    def values(self) -> Iterator[tuple[int, ast.expr]]:
        """All expressions with their positions; the returned ones come last."""
        for k, statement in enumerate(self.statements):
            yield k, statement.value
        for value in self.results:
            yield len(self.statements), value

    def rewrite(self, change: Callable[[ast.expr], ast.expr], first: int = 0) -> None:
        """Applies a change to every expression from position `first` on."""
        for statement in self.statements[first:]:
            statement.value = change(statement.value)
        self.results = [change(value) for value in self.results]

    def uses(self) -> dict[str, list[int]]:
        """The positions at which each name is read, one entry an occurrence."""
        found: dict[str, list[int]] = {}
        for k, value in self.values():
            for name in read(value):
                found.setdefault(name, []).append(k)
        return found


def tidied(
    lines: Sequence[tuple[str, str]],
    results: Sequence[str],
    shapes: Mapping[str, Shape],
    arguments: Sequence[str],
) -> tuple[list[str], list[str]]:
    """(statements, returned expressions) that compute the same.

    Args:
        lines: (target, expression) in order; every target is assigned once.
        results: the expressions to return.
        shapes: of the arguments and of targets, as far as they are tensors of a known shape.
        arguments: names that belong to the caller and are never written to.
    """
    statements = [Statement(target, simplified(text)) for target, text in lines]
    body = Body(statements, [simplified(text) for text in results], dict(shapes), arguments)
    body.counter = 1 + max((int(t[1:]) for t, _ in lines if re.fullmatch(r"t\d+", t)), default=0)
    _share(body)
    _move_inline(body)
    _share(body)
    _work_in_place(body)
    _chain(body)
    _join(body)
    _delete(body)
    _renumber(body)
    return [statement.text for statement in body.statements], [text_of(value) for value in body.results]


# -------------------------------------------------------------------- nothing twice


def _share(body: Body) -> None:
    """Every expression that occurs twice gets a name before its first use, the largest first."""
    while True:
        known = set(body.arguments) | {statement.target for statement in body.statements}
        found: dict[str, list[int]] = {}
        trees: dict[str, ast.expr] = {}
        for k, value in body.values():
            for tree in ast.walk(value):
                if isinstance(tree, ast.expr) and _worth_sharing(tree, known):
                    key = ast.dump(tree)
                    found.setdefault(key, []).append(k)
                    trees[key] = tree
        repeated = [key for key, where in found.items() if len(where) > 1]
        if not repeated:
            return
        key = max(repeated, key=len)
        first = found[key][0]
        tree = trees[key]
        if first < len(body.statements) and ast.dump(body.statements[first].value) == key:
            name = body.statements[first].target
            body.rewrite(lambda value: substituted(value, key, name), first + 1)  # noqa: B023
        else:
            name = f"t{body.counter}"
            body.counter += 1
            body.rewrite(lambda value: substituted(value, key, name), first)  # noqa: B023
            body.statements.insert(first, Statement(name, tree))
            axes = _broadcast(tree, body.shapes)
            if axes is not None and 1 not in axes:
                leading = axes.count("B")
                sizes = tuple(axis for axis in axes[leading:] if isinstance(axis, int))
                body.shapes[name] = Shape(leading, sizes, True)


def _worth_sharing(tree: ast.expr, known: set[str]) -> bool:
    if isinstance(tree, ast.Call):
        name = tree.func.attr if isinstance(tree.func, ast.Attribute) else ""
        if name in ("new_zeros", "new_full", "eye") or text_of(tree).startswith("solvers."):
            return False
    elif isinstance(tree, ast.Subscript):
        if isinstance(tree.value, ast.Attribute) and tree.value.attr == "shape":
            return False
        if isinstance(tree.value, ast.Name) and adds_axes_only(tree.slice):
            return False  # a view that only adds axes is cheaper written than named
    elif not isinstance(tree, ast.BinOp | ast.UnaryOp | ast.Compare):
        return False
    return bool(known.intersection(read(tree)))


# -------------------------------------------------------------------- no name used once


def _move_inline(body: Body) -> None:
    """Moves expressions that are used once to where they are used, if no large value lives longer for it."""
    k = len(body.statements) - 1
    while k >= 0:
        statement = body.statements[k]
        where = body.uses().get(statement.target, [])
        if not where:
            if not text_of(statement.value).startswith("solvers."):
                del body.statements[k]
        elif len(where) == 1 and _may_move(body, k, where[0]):
            replacement = {statement.target: statement.value}
            del body.statements[k]
            body.rewrite(lambda value: _named(value, replacement), k)  # noqa: B023
        k -= 1


def _may_move(body: Body, k: int, to: int) -> bool:
    statement = body.statements[k]
    text = text_of(statement.value)
    if KEPT.match(statement.target) or re.search(r"\.(status|cancelled)$", text):
        return False
    if _overwritable(body, k) is not None:
        return False
    if to < len(body.statements):
        length = len(body.statements[to].text)
        overwritten = _overwritable(body, to)
        if overwritten is not None and overwritten in read(statement.value):
            return False
        if overwritten == statement.target and 4 * body.shapes[overwritten].entries >= _largest(body):
            return False
    else:
        length = sum(len(text_of(value)) + 2 for value in body.results)
    if length + len(text) > WIDTH and not text.startswith("operators."):
        return False
    uses = body.uses()
    for name in read(statement.value):
        shape = body.shapes.get(name)
        large = shape is None or 4 * shape.entries > _largest(body)
        if name not in body.arguments and large and to > k + 1 and max(uses[name]) < to:
            return False
    return True


def _named(value: ast.expr, replacement: Mapping[str, ast.expr]) -> ast.expr:
    class Insert(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.expr:
            return replacement.get(node.id, node)

    changed: ast.expr = Insert().visit(value)
    return simplified(text_of(changed))


def _largest(body: Body) -> int:
    return max((shape.entries for shape in body.shapes.values()), default=1)


# -------------------------------------------------------------------- in place


def _work_in_place(body: Body) -> None:
    """Values that are read for the last time take the result, where it has their shape."""
    for k in range(len(body.statements)):
        statement = body.statements[k]
        name = _overwritable(body, k)
        if name is None:
            continue
        if isinstance(statement.value, ast.BinOp) and isinstance(statement.value.op, ast.Sub):
            _turn_sign(body, k, name)
        value = _written_to(statement.value, name, body.shapes)
        if value is None:
            continue
        old = statement.target
        body.statements[k] = Statement(name, value, in_place=True)
        body.rewrite(lambda v: _named(v, {old: ast.Name(name)}), k + 1)  # noqa: B023
        for later in body.statements[k + 1 :]:
            if later.target == old:
                later.target = name


def _overwritable(body: Body, k: int) -> str | None:
    """A value that statement `k` reads for the last time, in an entrywise expression of the same shape."""
    statement = body.statements[k]
    shape = body.shapes.get(statement.target)
    if shape is None or not shape.sure or statement.in_place:
        return None
    uses = body.uses()
    fresh = {s.target for s in body.statements[:k] if _is_fresh(s.value)}
    for name in _operands(statement.value):
        if name in fresh and body.shapes.get(name) == shape and uses[name].count(k) == 1:
            held = _holders(body, name)
            if all(max(uses.get(other, [0])) <= k for other in held) and not held & set(read_results(body)):
                if all(other == name or max(uses.get(other, [0])) < k for other in held):
                    return name
    return None


def read_results(body: Body) -> list[str]:
    """The names that the returned expressions read."""
    return [name for value in body.results for name in read(value)]


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
        if not statement.in_place and not _is_fresh(statement.value) and held & set(read(statement.value)):
            held.add(statement.target)
    return held


def _is_fresh(value: ast.expr) -> bool:
    """Whether the result is a tensor of its own."""
    if isinstance(value, ast.BinOp | ast.Compare | ast.UnaryOp):
        return True
    if isinstance(value, ast.Attribute) and value.attr in ("status", "cancelled"):
        return True
    if isinstance(value, ast.Subscript) or (isinstance(value, ast.Attribute) and value.attr == "mT"):
        return _is_fresh(value.value)
    if isinstance(value, ast.Call):
        name = value.func.attr if isinstance(value.func, ast.Attribute) else ""
        if name in VIEWS:
            return isinstance(value.func, ast.Attribute) and _is_fresh(value.func.value)
        return not text_of(value).startswith(OBJECTS)
    return False


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
                    earlier.value = turned
                    body.statements[k].value = ast.BinOp(value.right, ast.Add(), value.left)
            return


def _written_to(value: ast.expr, name: str, shapes: Mapping[str, Shape]) -> ast.expr | None:
    """`value` as methods that change `name`; None where there is no such form."""
    target: ast.expr = ast.Name(name)

    def call(on: ast.expr, method: str, *arguments: ast.expr, **options: ast.expr) -> ast.expr:
        keywords = [ast.keyword(key, given) for key, given in options.items()]
        return ast.Call(ast.Attribute(on, method), list(arguments), keywords)

    if isinstance(value, ast.UnaryOp) and isinstance(value.op, ast.USub):
        inner = value.operand
        return call(target, "neg_") if isinstance(inner, ast.Name) and inner.id == name else None
    factors = as_product(value)
    if factors is not None:
        whole = shapes[name]
        others = [f for f in factors if not (isinstance(f, ast.Name) and f.id == name)]
        large = [f for f in others if isinstance(f, ast.Name) and shapes.get(f.id) == whole]
        small = [f for f in others if f not in large]
        for factor in large:
            target = call(target, "mul_", factor)
        if small:
            joined = small[0]
            for factor in small[1:]:
                joined = ast.BinOp(joined, ast.Mult(), factor)
            target = call(target, "mul_", joined)
        return target
    if isinstance(value, ast.BinOp) and isinstance(value.op, ast.Div):
        return call(target, "div_", value.right)
    terms = summands(value)
    if terms is None:
        return None
    own = [sign for sign, tree in terms if isinstance(tree, ast.Name) and tree.id == name]
    if own != [1.0]:
        return None
    for sign, tree in terms:
        if isinstance(tree, ast.Name) and tree.id == name:
            continue
        factors = as_product(tree)
        numbers = [x for f in factors or [] if (x := number_of(f)) is not None]
        tensors = [f for f in factors or [] if number_of(f) is None]
        if factors is not None and len(tensors) > 1 and len(numbers) < 2:
            amount = sign * (numbers[0] if numbers else 1.0)
            last = tensors[-1]
            first = tensors[0]
            for factor in tensors[1:-1]:
                first = ast.BinOp(first, ast.Mult(), factor)
            options = {} if amount == 1.0 else {"value": ast.Constant(amount)}
            target = call(target, "addcmul_", first, last, **options)
        elif sign in (1.0, -1.0):
            target = call(target, "add_" if sign > 0 else "sub_", tree)
        else:
            target = call(target, "add_", tree, alpha=ast.Constant(sign))
    return target


def _chain(body: Body) -> None:
    """What follows the first operation of a large expression works in place on its result."""
    for statement in body.statements:
        shape = body.shapes.get(statement.target)
        if shape is None or not shape.sure or 4 * shape.entries < _largest(body):
            continue
        if statement.in_place or not isinstance(statement.value, ast.BinOp):
            continue
        statement.value = _chained(statement.value, ("B",) * shape.prefix + shape.sizes, body.shapes)


def _join(body: Body) -> None:
    """Statements that change the same value one after the other become one."""
    k = 1
    while k < len(body.statements):
        before, statement = body.statements[k - 1 : k + 1]
        same = before.in_place and statement.in_place and before.target == statement.target
        if (
            same
            and len(before.text) + len(statement.text) < WIDTH
            and read(statement.value).count(before.target) == 1
        ):
            statement.value = _named(statement.value, {before.target: before.value})
            del body.statements[k - 1]
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
    return ast.Call(ast.Attribute(inner, IN_PLACE[type(tree.op)]), [right], [])


def _makes(tree: ast.expr, whole: tuple[object, ...], shapes: Mapping[str, Shape]) -> bool:
    """Whether an expression makes a new value of the whole size, which is the most that its parts can have."""
    if not isinstance(tree, ast.BinOp) or type(tree.op) not in IN_PLACE:
        return False
    return whole in (_broadcast(tree, shapes), _broadcast(tree.left, shapes), _broadcast(tree.right, shapes))


def _broadcast(tree: ast.expr, shapes: Mapping[str, Shape]) -> tuple[object, ...] | None:
    """The axes of an entrywise expression, "B" for a leading one and 1 for one added; None where it is not known."""
    if isinstance(tree, ast.Name):
        shape = shapes.get(tree.id)
        return None if shape is None or not shape.sure else ("B",) * shape.prefix + shape.sizes
    if number_of(tree) is not None:
        return ()
    if isinstance(tree, ast.UnaryOp):
        return _broadcast(tree.operand, shapes)
    if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Attribute) and tree.func.attr in ENTRYWISE:
        return _broadcast(tree.func.value, shapes)
    if isinstance(tree, ast.Subscript) and isinstance(tree.slice, ast.Tuple):
        inner, parts = _broadcast(tree.value, shapes), tree.slice.elts[1:]
        new = [_is_none(part) for part in parts]
        plain = all(isinstance(p, ast.Slice) and p.lower is p.upper is None for p in parts if not _is_none(p))
        kept = len(parts) - sum(new)
        if inner is None or not plain or kept > len(inner):
            return None
        own = iter(inner[len(inner) - kept :])
        return (*inner[: len(inner) - kept], *(1 if n else next(own) for n in new))
    if isinstance(tree, ast.BinOp) and type(tree.op) in IN_PLACE:
        left, right = _broadcast(tree.left, shapes), _broadcast(tree.right, shapes)
        if left is None or right is None:
            return None
        size = max(len(left), len(right))
        pairs = zip((1,) * (size - len(left)) + left, (1,) * (size - len(right)) + right, strict=True)
        return tuple(b if a == 1 else a for a, b in pairs)
    return None


# -------------------------------------------------------------------- the end of large values


def _delete(body: Body) -> None:
    """`del` for large values, and objects that may hold some, whose last use is not the last statement."""
    uses = body.uses()
    last = len(body.statements) - 1
    lasting = set(read_results(body))
    ends: dict[int, list[str]] = {}
    seen: set[str] = set()
    for statement in body.statements:
        name = statement.target
        if name in seen or name in lasting:
            continue
        seen.add(name)
        shape = body.shapes.get(name)
        holds = shape is None and text_of(statement.value).startswith(OBJECTS)
        end = max([*uses.get(name, []), *(k for k, s in enumerate(body.statements) if s.target == name)])
        if (holds or (shape is not None and 4 * shape.entries >= _largest(body) > 64)) and end < last:
            ends.setdefault(end, []).append(name)
    for end in sorted(ends, reverse=True):
        gone = ast.parse(f"del {', '.join(sorted(ends[end]))}").body[0]
        body.statements.insert(
            end + 1, Deletion("", ast.Constant(None), in_place=True, source=ast.unparse(gone))
        )


@dataclass
class Deletion(Statement):
    """A `del` statement."""

    source: str = ""

    @property
    def text(self) -> str:
        """The source line."""
        return self.source


def _renumber(body: Body) -> None:
    """t1, t2, ... in the order of assignment."""
    names: dict[str, str] = {}
    for statement in body.statements:
        if re.fullmatch(r"t\d+", statement.target) and statement.target not in names:
            names[statement.target] = f"t{len(names) + 1}"

    def renamed(text: str) -> str:
        return re.sub(r"\bt\d+\b", lambda found: names.get(found.group(), found.group()), text)

    for statement in body.statements:
        statement.target = renamed(statement.target)
        if isinstance(statement, Deletion):
            statement.source = renamed(statement.source)
    body.rewrite(lambda value: ast.parse(renamed(text_of(value)), mode="eval").body)


def _is_none(tree: ast.expr) -> bool:
    return isinstance(tree, ast.Constant) and tree.value is None
