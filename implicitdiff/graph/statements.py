"""Emitted statements as data: what is assigned, what it reads, what may share its memory.

In: assignments as syntax trees and the shapes of what they compute. Out: questions answered. Next files: `inplace.py`,
`tidy.py`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from implicitdiff.graph.purpose import NO_PURPOSE, Purpose
from implicitdiff.graph.trees import copied, kept, number_of, read, simplified, text_of

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
OBJECTS = ("operators.", "solvers.", "saddle.FullKKT", "saddle.RangeSpace", "entries.")
VIEWS = frozenset("expand squeeze unflatten flatten reshape permute to matrix einsum symmetric_part".split())
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
    purpose: Purpose = NO_PURPOSE

    @property
    def text(self) -> str:
        """The source line."""
        written = text_of(self.value)
        return written if self.in_place else f"{self.target} = {written}"

    @property
    def comment(self) -> str:
        """What stands beside it."""
        return self.purpose.comment


@dataclass
class Body:
    """Statements and the returned expressions while they are rewritten."""

    statements: list[Statement]
    results: list[ast.expr]
    shapes: dict[str, Shape]
    arguments: Sequence[str]
    counter: int = 0
    known: dict[str, list[int]] | None = None
    """What `uses` found, until the statements change."""

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
        self.known = None

    def replace(self, k: int, statement: Statement | None) -> None:
        """Puts another statement in the place of the k-th, or nothing."""
        self.statements[k : k + 1] = [] if statement is None else [statement]
        self.known = None

    def uses(self) -> dict[str, list[int]]:
        """The positions at which each name is read, one entry an occurrence."""
        if self.known is None:
            self.known = {}
            for k, value in self.values():
                for name in read(value):
                    self.known.setdefault(name, []).append(k)
        return self.known


def read_results(body: Body) -> list[str]:
    """The names that the returned expressions read."""
    return [name for value in body.results for name in read(value)]


def is_fresh(value: ast.expr) -> bool:
    """Whether the result is a tensor of its own."""
    return kept(value, "_fresh", lambda: _is_fresh(value))


def _is_fresh(value: ast.expr) -> bool:
    if isinstance(value, ast.BinOp | ast.Compare | ast.UnaryOp):
        return True
    if isinstance(value, ast.Attribute) and value.attr in ("status", "cancelled"):
        return True
    if isinstance(value, ast.Subscript) or (isinstance(value, ast.Attribute) and value.attr == "mT"):
        return is_fresh(value.value)
    if isinstance(value, ast.Call):
        name = value.func.attr if isinstance(value.func, ast.Attribute) else ""
        if name in VIEWS:
            return isinstance(value.func, ast.Attribute) and is_fresh(value.func.value)
        return not text_of(value).startswith(OBJECTS)
    return False


def broadcast(tree: ast.expr, shapes: Mapping[str, Shape]) -> tuple[object, ...] | None:
    """The axes of an entrywise expression, "B" for a leading one and 1 for one added; None where it is not known."""
    if isinstance(tree, ast.Name):
        shape = shapes.get(tree.id)
        return None if shape is None or not shape.sure else ("B",) * shape.prefix + shape.sizes
    if number_of(tree) is not None:
        return ()
    if isinstance(tree, ast.UnaryOp):
        return broadcast(tree.operand, shapes)
    if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Attribute) and tree.func.attr in ENTRYWISE:
        return broadcast(tree.func.value, shapes)
    if isinstance(tree, ast.Subscript) and isinstance(tree.slice, ast.Tuple):
        inner, parts = broadcast(tree.value, shapes), tree.slice.elts[1:]
        new = [_is_none(part) for part in parts]
        plain = all(isinstance(p, ast.Slice) and p.lower is p.upper is None for p in parts if not _is_none(p))
        kept = len(parts) - sum(new)
        if inner is None or not plain or kept > len(inner):
            return None
        own = iter(inner[len(inner) - kept :])
        return (*inner[: len(inner) - kept], *(1 if n else next(own) for n in new))
    if isinstance(tree, ast.BinOp) and type(tree.op) in IN_PLACE:
        left, right = broadcast(tree.left, shapes), broadcast(tree.right, shapes)
        if left is None or right is None:
            return None
        size = max(len(left), len(right))
        pairs = zip((1,) * (size - len(left)) + left, (1,) * (size - len(right)) + right, strict=True)
        return tuple(b if a == 1 else a for a, b in pairs)
    return None


def _is_none(tree: ast.expr) -> bool:
    return isinstance(tree, ast.Constant) and tree.value is None


def named(value: ast.expr, replacement: Mapping[str, ast.expr]) -> ast.expr:
    class Insert(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.expr:
            return replacement.get(node.id, node)

    if not set(replacement).intersection(read(value)):
        return value
    changed: ast.expr = Insert().visit(copied(value))
    return simplified(text_of(changed))


def largest(body: Body) -> int:
    return max((shape.entries for shape in body.shapes.values()), default=1)
