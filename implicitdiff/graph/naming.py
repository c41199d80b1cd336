"""Names of emitted values: those of the derivation where a value is a step of it, t1, t2, ... otherwise.

In: a `Body` in its final order, with preliminary names. Out: the same `Body` under its final names. Next file:
`tidy.py`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from implicitdiff.graph.statements import Body, Statement, read_results
from implicitdiff.graph.trees import read, text_of

TEMPORARY = re.compile(r"\bt\d+\b")


@dataclass
class Deletion(Statement):
    """A `del` statement."""

    names: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The source line."""
        return f"del {', '.join(sorted(self.names))}"

    @property
    def comment(self) -> str:
        """What stands beside it."""
        return (
            "its memory is free from here on" if len(self.names) == 1 else "their memory is free from here on"
        )


def deletion(names: Collection[str]) -> Deletion:
    """`del` of these names."""
    return Deletion("", ast.Constant(None), in_place=True, names=tuple(names))


def rename(body: Body, taken: Collection[str]) -> None:
    """Gives every temporary its final name.

    What is written in place of something else has a name of its own where that is returned (`grad_x = U.mul_(...)`), or
    where the same text would mean two values.

    Args:
        taken: names that nothing may be called, beside the arguments.
    """
    fixed = {s.target for s in body.statements if not TEMPORARY.fullmatch(s.target)}
    used = {*body.arguments, *taken, *fixed}
    lasting = set(read_results(body))
    final = {statement.target: k for k, statement in enumerate(body.statements)}
    now: dict[str, list[str]] = {}
    count = 0

    def renamed(value: ast.expr) -> ast.expr:
        text = text_of(value)
        if not TEMPORARY.search(text):
            return value
        return ast.parse(TEMPORARY.sub(lambda found: now[found.group()][-1], text), mode="eval").body

    again = [
        s.in_place and not isinstance(s, Deletion) and s.target not in fixed and _ambiguous(body, k)
        for k, s in enumerate(body.statements)
    ]
    for k, statement in enumerate(body.statements):
        if isinstance(statement, Deletion):
            statement.names = tuple(new for name in statement.names for new in now.get(name, [name]))
            continue
        old = statement.target
        statement.value = renamed(statement.value)
        step = statement.purpose.step
        wanted = "" if step is None or step.name in used else step.name
        returned = wanted and old in lasting and final[old] == k
        if old in fixed or (statement.in_place and not returned and not again[k]):
            statement.target = now.get(old, [old])[-1]
            continue
        if not wanted:
            count += 1
            while f"t{count}" in used:
                count += 1
            wanted = f"t{count}"
        used.add(wanted)
        now.setdefault(old, []).append(wanted)
        statement.target, statement.in_place = wanted, False
    body.results = [renamed(value) for value in body.results]
    body.known = None


def _ambiguous(body: Body, k: int) -> bool:
    """Whether some expression that reads what statement `k` changes stands both before and after it."""
    name = body.statements[k].target

    def parts(values: Iterable[ast.expr]) -> set[str]:
        kinds = ast.BinOp | ast.UnaryOp | ast.Compare | ast.Call
        trees = (tree for value in values if name in read(value) for tree in ast.walk(value))
        return {ast.dump(tree) for tree in trees if isinstance(tree, kinds) and name in read(tree)}

    before = parts(s.value for s in body.statements[:k])
    return bool(before & parts([*(s.value for s in body.statements[k + 1 :]), *body.results]))
