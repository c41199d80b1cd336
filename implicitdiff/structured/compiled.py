"""Emitted functions through torch.compile: the stretches of tensor operations between the solvers' calls, each fused.

In: an emitted function. Out: `Compiled`, a callable that gives the same results. Solvers look at values, so that they
stay as they are; what a compiler refuses runs eagerly, and a warning says why. Next file: `writer.py`.
"""

from __future__ import annotations

import ast
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from implicitdiff.errors import FallbackWarning
from implicitdiff.graph.calls import Emitted

OBJECTS = frozenset(("solvers", "operators"))
OUTSIDE = frozenset("RangeSpace FullKKT merged divided anchor_weight squared_distance".split())
"""Functions of `saddle` that do not go into a compiled stretch: they look at values, or are faster as they are (a sum
of squared differences works in pieces that stay in the cache)."""
WORTHWHILE = 2
"""Arithmetic operations from which on a stretch is compiled: calling compiled code takes about as long as two."""


def square_sum(tensor: Tensor, dim: int) -> Tensor:
    """`saddle.square_sum` for a compiler, which makes one loop of it by itself."""
    return tensor.square().sum(dim)


class Compiled:
    """An emitted function whose stretches of tensor operations are compiled on the first call.

    The first call runs eagerly as well, and compares: results that differ by more than rounding, a compiler that is not
    there, and whatever else it raises make this function eager for good, with a `FallbackWarning`.
    """

    def __init__(self, emitted: Emitted, namespace: Mapping[str, Any]) -> None:
        self.eager, self.source, self.namespace = emitted.call, emitted.source, namespace
        self.refusal = ""
        self._program: Callable[..., Any] | None = None
        self._lock = threading.Lock()

    def __call__(self, *arguments: Any) -> Any:
        """The results for these arguments, which are never written to."""
        if self.refusal:
            return self.eager(*arguments)
        # a compiler would keep a guard for arguments that take part in autograd, and warn of those that are results
        arguments = tuple(a.detach() if isinstance(a, Tensor) and a.requires_grad else a for a in arguments)
        try:
            return self._first(arguments) if self._program is None else self._program(*arguments)
        except Exception as error:  # whatever dynamo, inductor, their backends and a C++ compiler raise
            self._refuse(f"{type(error).__name__}: {_first_line(error)}")
        return self.eager(*arguments)

    def _first(self, arguments: Sequence[Any]) -> Any:
        with self._lock:
            program = self._program or build(self.source, self.namespace)
            found = program(*arguments)
            expected = self.eager(*arguments)
            if not _alike(found, expected):
                self._refuse("compiled, its results differ from those of the same code run eagerly")
                return expected
            self._program = program
        return found

    def _refuse(self, reason: str) -> None:
        self.refusal = reason
        warnings.warn(
            f"compile=True: {ast.parse(self.source).body[0].name} runs eagerly, with equal results: {reason}",  # type: ignore[attr-defined]
            FallbackWarning,
            stacklevel=3,
        )


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")


def _alike(found: Sequence[Any], expected: Sequence[Any]) -> bool:
    """Whether results agree up to rounding, which a solver may have amplified.

    The largest number of all results is the measure: a gradient that vanishes at a solution is rounding as a whole.
    """
    largest = max(
        (float(t.nan_to_num(0.0, 0.0, 0.0).abs().max()) for t in expected if _counts(t)), default=0.0
    )
    for a, b in zip(found, expected, strict=True):
        if not isinstance(b, Tensor):
            same = type(a) is type(b)
        elif not _counts(b):
            same = torch.equal(a, b)
        else:
            atol = torch.finfo(b.dtype).eps ** 0.5 * largest
            same = a.shape == b.shape and torch.allclose(a, b, rtol=0.0, atol=atol, equal_nan=True)
        if not same:
            return False
    return True


def _counts(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.numel() > 0


# -------------------------------------------------------------------- cutting a function into stretches


@dataclass
class _Stretch:
    """Tensor statements that follow each other, or one statement of another kind."""

    statements: list[ast.stmt] = field(default_factory=list)
    opaque: bool = False

    def assigned(self) -> list[str]:
        return [name for statement in self.statements for name in _targets(statement)]

    def worthwhile(self) -> bool:
        if self.opaque:
            return False
        trees = (tree for statement in self.statements for tree in ast.walk(statement))
        return sum(isinstance(tree, ast.BinOp | ast.Call) for tree in trees) >= WORTHWHILE


def build(source: str, namespace: Mapping[str, Any]) -> Callable[..., Any]:
    """The function with its stretches compiled.

    A statement that uses solvers, or what they return, stands between two stretches. One that reads nothing of the
    stretch before it is moved in front of that, so that stretches are long.
    """
    (function,) = ast.parse(source).body
    assert isinstance(function, ast.FunctionDef)
    statements, results = _body(function)
    groups = _grouped(statements)
    scope: dict[str, Any] = {**namespace, "square_sum": square_sum}
    read_after = [set(_read(results))]
    for group in reversed(groups):
        read_after.append(read_after[-1] | set(_read(group.statements)))
    program: list[ast.stmt] = []
    known = {argument.arg for argument in function.args.args}
    for k, group in enumerate(groups):
        later = read_after[len(groups) - 1 - k]
        if not group.worthwhile():
            program += group.statements
            known |= {name for s in group.statements for name in _targets(s)}
            continue
        own = [name for name in dict.fromkeys(group.assigned()) if name in later]
        given = [name for name in dict.fromkeys(_read(group.statements)) if name in known]
        name = f"stretch_{k}"
        scope[name] = _compiled(name, given, own, group.statements, scope)
        call = f"{', '.join(own)}, = {name}({', '.join(given)})" if own else f"{name}({', '.join(given)})"
        program += ast.parse(call).body
        known |= set(own)
    tail = ast.Return(ast.Tuple(results, ast.Load()))
    whole = ast.parse(f"def program({', '.join(a.arg for a in function.args.args)}): pass").body[0]
    assert isinstance(whole, ast.FunctionDef)
    whole.body = [*program, tail]
    _execute([whole], "program", scope)
    made: Callable[..., Any] = scope["program"]
    return made


def _body(function: ast.FunctionDef) -> tuple[list[ast.stmt], list[ast.expr]]:
    """Statements and returned expressions; those that compute something on tensors become statements."""
    statements = [s for s in function.body if not isinstance(s, ast.Delete | ast.Return) and not _is_text(s)]
    last = function.body[-1]
    assert isinstance(last, ast.Return)
    assert isinstance(last.value, ast.Tuple)
    results: list[ast.expr] = []
    objects = _objects(statements)
    for k, value in enumerate(last.value.elts):
        opaque = _is_opaque(ast.Expr(value), objects)
        if isinstance(value, ast.Name) or opaque:
            results.append(value)
            continue
        statements += ast.parse(f"result_{k} = {ast.unparse(value)}").body
        results.append(ast.Name(f"result_{k}", ast.Load()))
    return statements, results


def _is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _objects(statements: Iterable[ast.stmt]) -> set[str]:
    """Names of factorisations, operators and pairs of solutions."""
    found: set[str] = {"factor", "schur", "kkt"}
    for statement in statements:
        if isinstance(statement, ast.Assign):
            text = ast.unparse(statement.value)
            pair = (
                isinstance(statement.value, ast.Call) and ".solve(" in text and len(statement.value.args) == 2
            )
            if pair or text.startswith(("solvers.", "operators.", "saddle.RangeSpace", "saddle.FullKKT")):
                found |= set(_targets(statement))
    return found


def _is_opaque(statement: ast.stmt, objects: set[str]) -> bool:
    for tree in ast.walk(statement):
        if isinstance(tree, ast.Name) and (tree.id in OBJECTS or tree.id in objects):
            return True
        saddle = (
            isinstance(tree, ast.Attribute) and isinstance(tree.value, ast.Name) and tree.value.id == "saddle"
        )
        if saddle and isinstance(tree, ast.Attribute) and tree.attr in OUTSIDE:
            return True
    return False


def _grouped(statements: Sequence[ast.stmt]) -> list[_Stretch]:
    """Stretches, and single statements between them."""
    objects = _objects(statements)
    groups: list[_Stretch] = []
    pending = _Stretch()
    for statement in statements:
        if not _is_opaque(statement, objects):
            pending.statements.append(statement)
            continue
        if pending.statements and set(pending.assigned()) & set(_read([statement])):
            groups.append(pending)
            pending = _Stretch()
        groups.append(_Stretch([statement], opaque=True))
    return [*groups, pending] if pending.statements else groups


def _compiled(
    name: str,
    given: Sequence[str],
    own: Sequence[str],
    statements: Sequence[ast.stmt],
    scope: Mapping[str, Any],
) -> Callable[..., Any]:
    """A stretch as a function of what it reads, compiled; a size that changes is a symbol from then on."""
    function = ast.parse(f"def {name}({', '.join(given)}): pass").body[0]
    assert isinstance(function, ast.FunctionDef)
    returned = ast.parse(f"({''.join(f'{n}, ' for n in own)})", mode="eval").body
    fused = [_Fused().visit(ast.parse(ast.unparse(statement)).body[0]) for statement in statements]
    function.body = [*fused, ast.Return(returned)]
    inner = dict(scope)
    _execute([function], name, inner)
    made: Callable[..., Any] = torch.compile(inner[name])
    return made


class _Fused(ast.NodeTransformer):
    """`saddle.square_sum`, which works in pieces, as what a compiler fuses with the values that it sums."""

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        self.generic_visit(node)
        known = isinstance(node.value, ast.Name) and node.value.id == "saddle" and node.attr == "square_sum"
        return ast.Name(node.attr, ast.Load()) if known else node


def _execute(body: list[ast.stmt], name: str, scope: dict[str, Any]) -> None:
    source = "\n".join(ast.unparse(ast.fix_missing_locations(statement)) for statement in body)
    exec(compile(source, f"<implicitdiff compiled {name}>", "exec"), scope)


def _targets(statement: ast.stmt) -> list[str]:
    """The names that a statement assigns or writes to."""
    if isinstance(statement, ast.Assign):
        return [target.id for target in statement.targets if isinstance(target, ast.Name)]
    tree: ast.AST = statement.value if isinstance(statement, ast.Expr) else statement
    while isinstance(tree, ast.Call | ast.Attribute):
        tree = tree.func if isinstance(tree, ast.Call) else tree.value
    return [tree.id] if isinstance(tree, ast.Name) else []


def _read(trees: Iterable[ast.AST]) -> list[str]:
    names = (node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Name))
    return [node.id for node in names if isinstance(node.ctx, ast.Load)]
