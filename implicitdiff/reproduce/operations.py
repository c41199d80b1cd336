"""Operations outside the algebra: does `explain` name the operation, and the line that calls it?

In: settings. Out: findings about the twelve objectives of `outside.py`: what was named, and whether the gradient by the
fallback is right.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import implicitdiff as idf
from implicitdiff.diagnostics.tables import number
from implicitdiff.reproduce.base import Advance, Claim, Experiment, Findings, Settings, Table, nobody
from implicitdiff.reproduce.outside import PROBLEMS

MARK = "# outside: "
STEP = 1e-6
RIGHT = 1e-6


@dataclass(frozen=True)
class Row:
    """One objective.

    Attributes:
        operation: What is outside of the algebra, as its comment says.
        expected: The line with that comment, file.py:12.
        named: The aten operation that was named.
        line: The line that was named.
        outcome: The kind that H falls back to, or the error.
        error: The gradient by the fallback against central differences; None if there is none.
    """

    operation: str
    expected: str
    named: str
    line: str
    outcome: str
    error: float | None

    @property
    def right(self) -> bool:
        """Whether operation and line are named, and the gradient, if there is one, is right."""
        return bool(self.named) and self.line == self.expected and (self.error is None or self.error <= RIGHT)


def run(settings: Settings, advance: Advance = nobody) -> Findings:
    """Explain all objectives, and differentiate through those that can be."""
    rows = []
    for done, kind in enumerate(PROBLEMS):
        advance(done, len(PROBLEMS), kind.__name__)
        rows.append(examine(kind(), check=not settings.quick))
    table = Table("operations", "Twelve objectives, each with one operation outside of the algebra", tuple(rows),
                  ("operation", "named", "line", "H", "error"), _cells, ("error",))  # fmt: skip
    right = sum(row.right for row in rows)
    claims = (
        Claim(
            "explain names the operation and the line",
            right == len(rows),
            f"{right} of {len(rows)}, and the gradients by the fallback agree with central differences to {RIGHT:.0e}",
        ),
    )
    about = (
        "What has no rule falls back to dense derivatives, slower and exact, and is named; a branch on a value cannot "
        "be a graph, and is refused. Error: of the gradient against central differences in float64."
    )
    return Findings("Operations outside the algebra", about, (table,), claims)


def examine(problem: idf.Problem, check: bool = True) -> Row:
    """What is said about one objective.

    Args:
        problem: Its source has one line with the comment `# outside: name`.
        check: Compare the gradient with differences too.
    """
    operation, expected = marked_line(type(problem))
    inputs = tuple(x.double() for x in problem.example())
    try:
        found = idf.explain(problem, *inputs)
    except idf.TraceError as error:
        # file.py:12: the message quotes the line after its place.
        text = str(error)
        named = text.partition("(")[2].partition(")")[0]
        place = expected if f" at {expected}:" in text else ""
        return Row(operation, expected, named, place, type(error).__name__, None)
    steps = [step for step in found.fallbacks if step.operation]
    if not steps:
        return Row(operation, expected, "", "", found.hessian.kind, None)
    place = ":".join(steps[0].line.split(":")[:2])
    off = _against_differences(problem, inputs) if check else None
    return Row(operation, expected, steps[0].operation, place, found.hessian.kind, off)


def marked_line(kind: type[idf.Problem]) -> tuple[str, str]:
    """(name in the comment, file.py:12) of the marked line of a class."""
    lines, start = inspect.getsourcelines(kind)
    path = inspect.getsourcefile(kind) or ""
    for offset, line in enumerate(lines):
        if MARK in line:
            return line.partition(MARK)[2].strip(), f"{path.rpartition('/')[2]}:{start + offset}"
    raise idf.ProblemDefinitionError(f"{kind.__name__} has no line with {MARK!r}")


def _against_differences(problem: idf.Problem, inputs: Sequence[Tensor]) -> float:
    """Relative error of the gradient of <v, u(x)> along one direction."""
    layer = idf.DeclarativeLayer(problem.double(), on_failure="warn")
    (x,) = (leaf.detach().requires_grad_() for leaf in inputs)
    u = layer(x)
    v = torch.arange(u.numel(), dtype=u.dtype, device=u.device).cos().reshape(u.shape)
    towards = torch.arange(x.numel(), dtype=x.dtype, device=x.device).sin().reshape(x.shape)
    (gradient,) = torch.autograd.grad(u, x, v)
    with torch.no_grad():
        ahead, behind = (layer(x + sign * STEP * towards) for sign in (1, -1))
    slope = ((ahead - behind) * v).sum() / (2 * STEP)
    return float((slope - (gradient * towards).sum()).abs() / slope.abs())


def _cells(row: Row) -> tuple[str, ...]:
    line = row.line or f"not named ({row.expected})"
    named = row.named.removeprefix("aten.").removesuffix(".default") or "-"
    return (row.operation, named, line, row.outcome, number(row.error, 1))


EXPERIMENT = Experiment("operations", "operations without a rule, named with their line", run)
