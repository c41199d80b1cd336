"""What the values of an emitted function are in the derivation: names from the literature, and the equation of each.

In: the nodes of a function, and what some of them are. Out: a `Step` by node id; the calls of operators and solvers
say it for their arguments. Next file: `writer.py`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Sequence

from implicitdiff.graph.ir import Node, Ref
from implicitdiff.graph.purpose import Step, behind

Steps = dict[int, Step]
SHARES = {
    "LowRankPlusDiagonal": (("D", "{0} = D + {1}: D"), ("U", "{0} = D + {1}: U"), ("C", "{0} = D + {1}: C")),
    "Diagonal": (("D", "{0} = diag(D)"),),
    "ScaledIdentity": (("d", "{0} = d I"),),
    "Dense": (("{0}", "{0} as a matrix"),),
    "BlockDiagonal": (("blocks", "the blocks of {0}"),),
}
"""For the arguments of an operator of the matrix {0}: name and equation."""


def steps_of(nodes: Sequence[Node], said: Sequence[tuple[Ref, Step]]) -> Steps:
    """The steps among `nodes`: those that are `said`, the first first; the rest is read off calls."""
    steps: Steps = {}

    def say(node: Node, name: str, equation: str, title: str = "") -> None:
        node = behind(node)
        if node.op != "leaf" and not (node.op == "prod" and not node.args):
            steps.setdefault(node.id, Step(name, equation, title))

    for ref, step in said:
        say(ref.node, step.name, step.equation)
    matrices = _matrices(nodes)
    for node in nodes:
        if node.op != "call":
            continue
        template, _, own = node.data
        args = [ref.node for ref in node.args]
        if template.startswith("operators."):
            matrix = matrices.get(node.id, "H")
            for index, name, equation in _operator(template, len(args), matrix):
                say(args[index], name, equation, "" if name else matrix)
            say(node, "", f"{matrix} by its structure", matrix)
        elif template.startswith("solvers."):
            say(
                node,
                "",
                f"{matrices[node.id]}{_form(args[0], matrices[node.id])}, factored",
                matrices[node.id],
            )
        elif template.startswith("saddle.FullKKT"):
            say(node, "", "K = [[H, -A'], [-A, 0]]", "K")
            texts = ("H as a matrix", "A = D_u h", "the corner of K: 1 for inequalities that are not active")
            for arg, name, what in zip(args, ("H", "A", "D"), texts, strict=False):
                say(arg, name, what)
        elif template.startswith("saddle.RangeSpace"):
            say(node, "", "S = A H^-1 A', from solves with H", "S")
            say(args[1], "A", "A = D_u h")
        elif template.startswith(("saddle.anchor_weight", "saddle.largest")):
            say(node, "rho" if "anchor" in template else "", "the weight of A'A beside H")
        elif template.startswith(("{0}.status", "saddle.merged", "saddle.divided", "saddle.vanished")):
            say(node, "status", "a verdict on each sample")
        elif template.startswith("{0}.cancelled"):
            say(node, "cancelled", "whether digits cancelled in S")
        elif template.startswith("{0}.solve({1})"):
            if matrices.get(args[0].id) == "S":
                say(node, "s", "S s = A H^-1 v")
                say(args[1], "rhs", "A H^-1 v")
            else:
                say(node, own or "", "H w = v")
                say(args[1], "rhs", "the right-hand side of H w = v")
        elif template.startswith("{0}.solve({1}, {2})"):
            say(node, "solution", "K (w, s) = -(v, 0)")
        elif own in ("w", "s"):
            say(node, own, "of the solution (w, s)")
    return steps


def _matrices(nodes: Iterable[Node]) -> dict[int, str]:
    """Which matrix factorisations and operators belong to: H, or S = A H^-1 A'."""
    found: dict[int, str] = {}
    for node in nodes:
        if node.op == "call" and node.data[0].startswith("solvers."):
            found[node.id] = found[node.args[0].node.id] = "S" if node.data[2] == "schur" else "H"
    return found


def _form(operator: Node, matrix: str) -> str:
    """How an operator is made of its parts."""
    kind = _kind(operator.data[0]) if operator.op == "call" else ""
    if kind == "LowRankPlusDiagonal":
        return f" = D + {_product(operator.data[0])}"
    known = {
        "Diagonal": " = diag(D)",
        "ScaledIdentity": " = d I",
        "Block": " by blocks",
        "Banded": " by bands",
    }
    text = known.get(kind, "")
    return f" = A H^-1 A'{text if ' = ' not in text else ''}" if matrix == "S" else text


def _kind(template: str) -> str:
    found = re.match(r"operators\.(\w+)\(", template)
    return found.group(1) if found else ""


def _product(template: str) -> str:
    tree = ast.parse(re.sub(r"\{(\d+)\}", r"arg\1", template), mode="eval").body
    return "U C V'" if isinstance(tree, ast.Call) and len(tree.args) > 3 else "U C U'"


def _operator(template: str, count: int, matrix: str) -> list[tuple[int, str, str]]:
    """(argument, name, equation) for the arguments of an operator."""
    kind = _kind(template)
    tree = ast.parse(re.sub(r"\{(\d+)\}", r"arg\1", template), mode="eval").body
    if not isinstance(tree, ast.Call):
        return []
    parts: list[tuple[ast.expr, str, str]] = []
    if kind == "Block" and isinstance(tree.args[0], ast.Tuple):
        for i, row in enumerate(tree.args[0].elts, 1):
            cells = row.elts if isinstance(row, ast.Tuple) else []
            parts += [
                (cell, f"{matrix}{i}{j}", f"{matrix}: block {i}, {j}") for j, cell in enumerate(cells, 1)
            ]
    elif kind == "Kronecker" and isinstance(tree.args[0], ast.Tuple):
        factors = " (x) ".join(f"K{k}" for k, _ in enumerate(tree.args[0].elts, 1))
        parts = [(f, f"K{k}", f"{matrix} = {factors}: K{k}") for k, f in enumerate(tree.args[0].elts, 1)]
    elif (
        kind == "Banded"
        and isinstance(tree.args[0], ast.Call)
        and isinstance(tree.args[0].args[0], ast.Tuple)
    ):
        places = tree.args[0].args[0].elts
        reach = len(places) // 2
        parts = [(p, "", f"{matrix}: band {k - reach:+d}") for k, p in enumerate(places)]
    else:
        rows = SHARES.get(kind, ())
        if kind == "LowRankPlusDiagonal" and len(tree.args) > 3:
            rows = (*rows, ("V", "{0} = D + {1}: V"))
        product = _product(template) if kind == "LowRankPlusDiagonal" else ""
        parts = [
            (arg, name.format(matrix), equation.format(matrix, product))
            for arg, (name, equation) in zip(tree.args, rows, strict=False)
        ]
    found: dict[int, tuple[str, str]] = {}
    for part, name, equation in parts:
        for leaf in ast.walk(part):
            if isinstance(leaf, ast.Name) and leaf.id.startswith("arg"):
                found.setdefault(int(leaf.id[3:]), (name, equation))
    return [(index, *found[index]) for index in sorted(found) if index < count]
