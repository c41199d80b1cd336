"""Emitted statements as a person would have written them: nothing twice, no name used once, buffers written in place.

In: assignments in order and the shapes of what they compute. Out: statements. All rewriting is on syntax trees: shared
subexpressions first, then single uses move inline, then values whose last use has come are overwritten. Next file:
`emit.py`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from implicitdiff.graph.inplace import chain, join, overwritable, work_in_place
from implicitdiff.graph.naming import deletion, rename
from implicitdiff.graph.purpose import NO_PURPOSE, Purpose, joined
from implicitdiff.graph.statements import (
    KEPT,
    OBJECTS,
    WIDTH,
    Body,
    Shape,
    Statement,
    broadcast,
    largest,
    named,
    read_results,
)
from implicitdiff.graph.trees import adds_axes_only, kept, read, simplified, substituted, text_of


class Line(NamedTuple):
    """A statement and the comment beside it."""

    text: str
    comment: str


def tidied(
    lines: Sequence[tuple[str, str]],
    results: Sequence[str],
    shapes: Mapping[str, Shape],
    arguments: Sequence[str],
    serving: Mapping[str, Purpose] | None = None,
    taken: Collection[str] = (),
) -> tuple[list[Line], list[str]]:
    """(statements, returned expressions) that compute the same.

    Args:
        lines: (target, expression) in order; every target is assigned once.
        results: the expressions to return.
        shapes: of the arguments and of targets, as far as they are tensors of a known shape.
        arguments: names that belong to the caller and are never written to.
        serving: what targets are for, as far as it is known.
        taken: further names that no statement may assign.
    """
    serving = serving or {}
    statements = [
        Statement(target, simplified(text), False, serving.get(target, NO_PURPOSE)) for target, text in lines
    ]
    body = Body(statements, [simplified(text) for text in results], dict(shapes), arguments)
    body.counter = 1 + max((int(t[1:]) for t, _ in lines if re.fullmatch(r"t\d+", t)), default=0)
    for _ in range(2):
        _share(body)
        _unalias(body)
        _move_inline(body)
    work_in_place(body)
    chain(body)
    join(body)
    _share(body, {statement.target for statement in body.statements if statement.in_place})
    _delete(body)
    rename(body, taken)
    written = [Line(statement.text, statement.comment) for statement in body.statements]
    return written, [text_of(value) for value in body.results]


# -------------------------------------------------------------------- nothing twice


def _share(body: Body, changing: Collection[str] = ()) -> None:
    """Every expression that occurs twice gets a name before its first use, the largest first.

    Those that read a `changing` name are left alone: what is written in place has another value each time. So are those
    that such a name begins with: under another name they would be written to as well.
    """
    while True:
        begun = {ast.dump(s.value) for s in body.statements if s.target in changing and not s.in_place}
        known = set(body.arguments) | {statement.target for statement in body.statements}
        found: dict[str, list[int]] = {}
        trees: dict[str, ast.expr] = {}
        for k, value in body.values():
            for key, tree in _parts(value):
                if known.intersection(read(tree)) and not set(changing).intersection(read(tree)):
                    found.setdefault(key, []).append(k)
                    trees[key] = tree
        repeated = [key for key, where in found.items() if len(where) > 1 and key not in begun]
        if not repeated:
            return
        key = max(repeated, key=len)
        first = found[key][0]
        tree = trees[key]
        whole = body.statements[first] if first < len(body.statements) else None
        if whole is not None and whole.target not in changing and ast.dump(whole.value) == key:
            name = whole.target
            body.rewrite(lambda value: _shared(value, key, tree, name), first + 1)  # noqa: B023
        else:
            name = f"t{body.counter}"
            body.counter += 1
            body.rewrite(lambda value: _shared(value, key, tree, name), first)  # noqa: B023
            readers = [body.statements[k].purpose for k in found[key] if k < len(body.statements)]
            body.statements.insert(first, Statement(name, tree, False, joined(readers)))
            axes = broadcast(tree, body.shapes)
            if axes is not None and 1 not in axes:
                leading = axes.count("B")
                sizes = tuple(axis for axis in axes[leading:] if isinstance(axis, int))
                body.shapes[name] = Shape(leading, sizes, True)


def _shared(value: ast.expr, key: str, part: ast.expr, name: str) -> ast.expr:
    return substituted(value, part, name) if any(k == key for k, _ in _parts(value)) else value


def _parts(value: ast.expr) -> list[tuple[str, ast.expr]]:
    """The parts of an expression that may be shared, the whole among them, with a key each."""

    def find() -> list[tuple[str, ast.expr]]:
        trees = (tree for tree in ast.walk(value) if isinstance(tree, ast.expr) and _worth_sharing(tree))
        return [(ast.dump(tree), tree) for tree in trees]

    return kept(value, "_parts", find)


def _worth_sharing(tree: ast.expr) -> bool:
    if isinstance(tree, ast.Call):
        if text_of(tree).startswith("solvers."):
            return False
    elif isinstance(tree, ast.Subscript):
        if isinstance(tree.value, ast.Attribute) and tree.value.attr == "shape":
            return False
        if isinstance(tree.value, ast.Name) and adds_axes_only(tree.slice):
            return False  # a view that only adds axes is cheaper written than named
    elif not isinstance(tree, ast.BinOp | ast.UnaryOp | ast.Compare):
        return False
    return True


# -------------------------------------------------------------------- no two names for one value


def _unalias(body: Body) -> None:
    """`a = b` goes, and b is read wherever a was; to be called while every name is assigned once."""
    k = 0
    while k < len(body.statements):
        statement = body.statements[k]
        if isinstance(statement.value, ast.Name):
            replacement = {statement.target: statement.value}
            body.replace(k, None)
            body.rewrite(lambda value: named(value, replacement), k)  # noqa: B023
        else:
            k += 1


# -------------------------------------------------------------------- no name used once


def _move_inline(body: Body) -> None:
    """Moves expressions that are used once to where they are used, if no large value lives longer for it."""
    k = len(body.statements) - 1
    while k >= 0:
        statement = body.statements[k]
        where = body.uses().get(statement.target, [])
        if not where:
            if not text_of(statement.value).startswith("solvers."):
                body.replace(k, None)
        elif len(where) == 1 and _may_move(body, k, where[0]):
            replacement = {statement.target: statement.value}
            body.replace(k, None)
            body.rewrite(lambda value: named(value, replacement), k)  # noqa: B023
        k -= 1


def _may_move(body: Body, k: int, to: int) -> bool:
    statement = body.statements[k]
    text = text_of(statement.value)
    if KEPT.match(statement.target) or re.search(r"\.(status|cancelled)$", text):
        return False
    if overwritable(body, k) is not None:
        return False
    if to < len(body.statements):
        length = len(body.statements[to].text)
        overwritten = overwritable(body, to)
        if overwritten is not None and overwritten in read(statement.value):
            return False
        if overwritten == statement.target and 4 * body.shapes[overwritten].entries >= largest(body):
            return False
    else:
        length = sum(len(text_of(value)) + 2 for value in body.results)
    if length + len(text) > WIDTH and not text.startswith("operators."):
        return False
    uses = body.uses()
    for name in read(statement.value):
        shape = body.shapes.get(name)
        large = shape is None or 4 * shape.entries > largest(body)
        if name not in body.arguments and large and to > k + 1 and max(uses[name]) < to:
            return False
    return True


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
        if (holds or (shape is not None and 4 * shape.entries >= largest(body) > 64)) and end < last:
            ends.setdefault(end, []).append(name)
    for end in sorted(ends, reverse=True):
        body.statements.insert(end + 1, deletion(ends[end]))
