"""`explain(...).code`: Python as a person would have written it, on its syntax tree, for every case of the table.

Every clause of what the code promises has a test: short, nothing repeated, multiplied by one or renamed for nothing,
the user's names, a step on each line, clean for ruff, and the same gradients bit by bit when it is executed.
"""

import ast
import functools
import inspect
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import implicitdiff as idf
from implicitdiff.diagnostics import explain
from implicitdiff.diagnostics.held import plan_of
from implicitdiff.problems import OptimalTransport, RobustPooling
from implicitdiff.status import Status
from tests.cases import CASES, STRANGERS, Case

PENALTIES = ("quadratic", "pseudo-huber", "huber", "welsch", "truncated-quadratic")
EMITTED = [case for case in CASES if case.name not in ("running-sums", "constants")]
"""The other two have no emitted plan: they say so in `.fallbacks`."""


def pooling(penalty: str, points: int) -> tuple[idf.Problem, tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(1)
    return RobustPooling(penalty, 2.0), (torch.randn(2, 12, points, generator=generator),)


def transport(*marginals: int) -> tuple[idf.Problem, tuple[Tensor, ...]]:
    costs, rows, columns = OptimalTransport().example()
    return OptimalTransport(5.0), (costs, rows, columns) if marginals else (costs,)


def body_of(code: str) -> tuple[ast.FunctionDef, list[ast.stmt]]:
    """The function, and its statements without the docstring."""
    functions = [node for node in ast.parse(code).body if isinstance(node, ast.FunctionDef)]
    assert [function.name for function in functions] == ["backward"]
    return functions[0], functions[0].body[1:]


@functools.cache
def code_of(case: Case) -> str:
    return explain(case.problem(), *case.make_inputs(), in_dims=case.in_dims).code


BUILT_INS = [
    *(
        (f"{penalty}-{points}", *pooling(penalty, points), 24 if penalty == "huber" else 16)
        for penalty in PENALTIES
        for points in (5, 900)
    ),
    ("transport", *transport(1, 1), 24),
    ("transport-uniform", *transport(), 24),
]


@pytest.mark.parametrize(("name", "problem", "inputs", "most"), BUILT_INS, ids=[row[0] for row in BUILT_INS])
def test_the_built_ins_have_few_statements(
    name: str, problem: idf.Problem, inputs: tuple[Tensor, ...], most: int
) -> None:
    _, statements = body_of(explain(problem, *inputs).code)
    assert 1 <= len(statements) <= most


@pytest.mark.parametrize("case", STRANGERS, ids=str)
def test_so_have_the_strangers_versions(case: Case) -> None:
    _, statements = body_of(code_of(case))
    assert 1 <= len(statements) <= (16 if "pooling" in case.name else 24)


@pytest.mark.parametrize("case", EMITTED, ids=str)
def test_nothing_is_repeated_renamed_or_done_for_nothing(case: Case) -> None:
    function, statements = body_of(code_of(case))
    seen: Counter[str] = Counter()
    for tree in ast.walk(function):
        if isinstance(tree, ast.BinOp):
            sides = [side.value for side in (tree.left, tree.right) if isinstance(side, ast.Constant)]
            assert not (isinstance(tree.op, ast.Mult | ast.Div) and 1.0 in sides), ast.unparse(tree)
            assert not (isinstance(tree.op, ast.Add | ast.Sub) and 0.0 in sides), ast.unparse(tree)
        number = isinstance(tree, ast.UnaryOp) and isinstance(tree.operand, ast.Constant)
        if isinstance(tree, ast.BinOp | ast.UnaryOp | ast.Compare | ast.Call) and not number:
            seen[ast.unparse(tree)] += 1
        assert not (isinstance(tree, ast.Attribute) and tree.attr == "repeat")
    assert [text for text, count in seen.items() if count > 1] == []
    assert [s for s in statements if isinstance(s, ast.Assign) and isinstance(s.value, ast.Name)] == []


@pytest.mark.parametrize("case", EMITTED, ids=str)
def test_only_what_is_constant_along_an_axis_is_expanded(case: Case) -> None:
    """An expanded view is the leanest gradient of a sum: no number is written. Blocks of a band may be equal, too."""
    _, statements = body_of(code_of(case))
    for statement in statements:
        text = ast.unparse(statement)
        allowed = isinstance(statement, ast.Return) or "saddle." in text or "functional.pad(" in text
        assert "expand(" not in text or allowed, text


@pytest.mark.parametrize("case", EMITTED, ids=str)
def test_every_statement_says_its_step(case: Case) -> None:
    code = code_of(case)
    lines = code.splitlines()
    _, statements = body_of(code)
    for statement in statements:
        own, above = lines[statement.lineno - 1], lines[statement.lineno - 2].strip()
        assert "  # " in own or above.startswith("# "), own
    assert max(map(len, lines)) <= 110


def test_ruff_finds_nothing(tmp_path: Path) -> None:
    for case in EMITTED:
        (tmp_path / f"{case.name.replace('-', '_')}.py").write_text(code_of(case))
    for name, problem, inputs, _ in BUILT_INS:
        (tmp_path / f"built_in_{name.replace('-', '_')}.py").write_text(explain(problem, *inputs).code)
    command = ["ruff", "check", "--isolated", "--no-cache", "--line-length=110", "--select=E,F,I,B,UP", "."]
    found = subprocess.run([sys.executable, "-m", *command], cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    (tmp_path / "wrong.py").write_text("import os\n")  # the check itself can fail
    assert subprocess.run([sys.executable, "-m", *command], cwd=tmp_path, capture_output=True).returncode == 1


class Weighted(idf.Problem):
    """minimise over u  sum w (u - x)^2 / 2 + (sum u)^2 s, with names that the emitted code has for values of its own"""

    def objective(self, u: Tensor, x: Tensor, w: Tensor, s: Tensor, U: Tensor, t1: Tensor) -> Tensor:
        return 0.5 * (w * (u - x) ** 2).sum() + s * u.sum() ** 2 + (U * u**4).sum() + (t1 * u).sum()

    def init(self, x: Tensor, w: Tensor, s: Tensor, U: Tensor, t1: Tensor) -> Tensor:
        return x


def given_by_name(case: tuple[idf.Problem, tuple[Any, ...], Any]) -> tuple[str, dict[str, Tensor], Any]:
    """The code, tensors of a point by the user's names, and what the plan says there."""
    problem, inputs, in_dims = case
    planned = plan_of(problem, inputs, in_dims)
    plan, theta = planned.plan, tuple(t.detach() for t in planned.theta)
    generator = torch.Generator().manual_seed(5)
    batch = planned.bound.batch

    def positive(*shape: int) -> Tensor:
        return torch.rand(batch, *shape, generator=generator, dtype=planned.bound.dtype) + 0.5

    u = tuple(positive(*p.shape) for p in plan.trace.variables)
    v = tuple(positive(*p.shape) - 1.0 for p in plan.trace.variables)
    lam = tuple(positive(*shape) for shape in plan.declared.output_shapes)
    grads, _ = plan.vjp(u, lam, theta, v, None, planned.needs)
    values = {**plan.arguments.point(u, lam, theta), **plan.arguments.sides("v", "v_lam", v, ())}
    return plan.analysis.code, values, grads


def executed(code: str, values: dict[str, Tensor]) -> tuple[Any, ...]:
    scope: dict[str, Any] = {}
    exec(compile(code, "emitted", "exec"), scope)
    arguments = inspect.signature(scope["backward"]).parameters
    found: tuple[Any, ...] = scope["backward"](*(values.get(f"{n}_in", values.get(n)) for n in arguments))
    return found


@pytest.mark.parametrize("case", EMITTED, ids=str)
def test_executing_the_code_alone_gives_the_same_gradients_bit_by_bit(case: Case) -> None:
    code, values, grads = given_by_name((case.problem(), case.make_inputs(), case.in_dims))
    *results, status = executed(code, values)
    if case.name == "dependent-data":  # the plan goes on to take K as one matrix
        assert bool((status == Status.SINGULAR).all())
        return
    for grad in grads:
        if grad is not None and grad.count_nonzero():
            of_this_size = [
                r.reshape(grad.shape) for r in results if isinstance(r, Tensor) and r.numel() == grad.numel()
            ]
            assert any(torch.allclose(r, grad, rtol=0.0, atol=0.0, equal_nan=True) for r in of_this_size)


def test_the_users_names_are_kept_and_ours_give_way() -> None:
    inputs = tuple(torch.rand(2, 3, dtype=torch.float64) for _ in range(2))
    inputs = (*inputs, torch.rand(2, dtype=torch.float64), *inputs)
    code, values, grads = given_by_name((Weighted(), inputs, 0))
    function, _ = body_of(code)
    assert [argument.arg for argument in function.args.args] == ["v", "u", "x", "w", "s", "U"]
    results = executed(code, values)
    assert all(any(torch.equal(r, g) for r in results if r.shape == g.shape) for g in grads)
