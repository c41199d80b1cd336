"""Diagnostics, `compare`: backward passes side by side, at the same solution and for the same cotangent.

In: a problem, inputs, names of backwards. Out: a frozen `Comparison`: error, time, memory, bytes and FLOPs of
each. Times are taken in alternation with one thread; `contest.py` runs one row. See also `meter.py`.
"""

from __future__ import annotations

import csv
import io
import itertools
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from implicitdiff.diagnostics.contest import Row, contest
from implicitdiff.diagnostics.discrete import as_discrete
from implicitdiff.diagnostics.examples import example_inputs
from implicitdiff.diagnostics.tables import WIDTH, pairs, require_matplotlib, table
from implicitdiff.diagnostics.verdict import HEADER, WIDE, cells, verdict_on
from implicitdiff.errors import OptionError
from implicitdiff.plan import BACKWARDS
from implicitdiff.problem import Problem, require_problem

if TYPE_CHECKING:
    from implicitdiff.combinatorial import DiscreteLayer, Estimator, Solver
    from implicitdiff.diagnostics.discrete.compare import DiscreteComparison

DEFAULT = ("hand", "auto", "dense", "unrolled")
Advance = Callable[[int, int, str], object]
"""Called before each step of long work: (steps done, steps in all, what comes next)."""


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes:
        problem: The class of the problem.
        rows: One `Row` for each backward (and each setting of a sweep), in the order asked for.
        reference: What the errors are measured against.
    """

    problem: str
    rows: tuple[Row, ...]
    reference: str

    @property
    def groups(self) -> list[tuple[str, list[Row]]]:
        """(setting in words, its rows), one for each setting of a sweep; ("", all rows) without one."""
        found = itertools.groupby(self.rows, key=lambda row: row.setting)
        return [(", ".join(f"{name} = {value}" for name, value in s), list(rows)) for s, rows in found]

    @property
    def verdict(self) -> str:
        """Who is fastest, leanest and most accurate, in one line per setting."""
        return "\n".join((f"{place}: " if place else "") + verdict_on(rows) for place, rows in self.groups)

    def __str__(self) -> str:
        return self.text()

    def text(self, width: int = WIDTH) -> str:
        """The rows as tables, one for each setting, the notes and the verdict, in lines of at most `width`."""
        parts = [f"backward passes of {self.problem}"]
        for place, rows in self.groups:
            body = table(HEADER, [cells(row, width) for row in rows], HEADER[2:], width)
            parts.append(f"{place}\n\n{body}" if place else body)
        notes = list(dict.fromkeys((row.backward, row.note) for row in self.rows if row.note))
        parts += [pairs(notes, width)] if notes else []
        last = "time: one backward, one thread, median in alternation"
        last += "; * of fewer than 7 rounds" if any(0 < row.rounds < 7 for row in self.rows) else ""
        spread = "ratio: to the first, with the quartiles" + (", as a half range" if width < WIDE else "")
        parts.append("\n".join([f"error: against {self.reference}", last, spread]))
        parts.append("\n".join(textwrap.fill(line, width) for line in self.verdict.splitlines()))
        return "\n\n".join(parts)

    def to_csv(self, path: str | Path | None = None) -> str:
        """The rows as comma-separated values with a header; also written to `path` if given."""
        settings = list(dict.fromkeys(name for row in self.rows for name, _ in row.setting))
        plain = [field.name for field in fields(Row) if field.name != "setting"]
        sink = io.StringIO()
        writer = csv.writer(sink, lineterminator="\n")
        writer.writerow([*settings, *plain])
        for row in self.rows:
            values = dict(row.setting)
            found = [getattr(row, name) for name in plain]
            writer.writerow(
                [values.get(s, "") for s in settings] + ["" if cell is None else cell for cell in found]
            )
        if path is not None:
            Path(path).write_text(sink.getvalue(), encoding="utf-8")
        return sink.getvalue()

    def plot(self, path: str | Path | None = None) -> Any:
        """A matplotlib Figure: time, peak memory and error of each backward; over the values of a sweep if
        there is one.

        Args:
            path: Also write it there, in the format that the name ends in.

        Raises:
            ImplicitDiffError: matplotlib is not installed, or does not know the format.
        """
        require_matplotlib("Comparison.plot")
        from implicitdiff.diagnostics.plots import plot_comparison, write

        figure = plot_comparison(self.problem, self.rows)
        if path is not None:
            write(figure, Path(path))
        return figure


@overload
def compare(
    problem: Problem,
    *inputs: Any,
    in_dims: Any = 0,
    backwards: Sequence[str] = DEFAULT,
    cotangent: Any = None,
    sweep: Mapping[str, Sequence[Any]] | None = None,
    rounds: int = 9,
    memory_limit: int = 4 * 2**30,
    flop_limit: float = 2e12,
    advance: Advance | None = None,
) -> Comparison: ...
@overload
def compare(
    problem: DiscreteLayer | Solver,
    *inputs: Any,
    in_dims: Any = 0,
    backwards: Sequence[Estimator] = (),
    cotangent: Any = None,
    rounds: int = 9,
) -> DiscreteComparison: ...
def compare(
    problem: Problem | DiscreteLayer | Solver,
    *inputs: Any,
    in_dims: Any = 0,
    backwards: Sequence[Any] = DEFAULT,
    cotangent: Any = None,
    sweep: Mapping[str, Sequence[Any]] | None = None,
    rounds: int = 9,
    memory_limit: int = 4 * 2**30,
    flop_limit: float = 2e12,
    advance: Advance | None = None,
) -> Comparison | DiscreteComparison:
    """Run several backward passes of one problem at the same solution and compare them.

    Without inputs it runs on the problem's own `example`; with `sweep={"n": [16, 64, 256]}` on `example(n=16)`,
    `example(n=64)`, `example(n=256)`.

    The problem is solved once; every backward starts from that u, with the same cotangent, through the layer.
    Only "unrolled" has to run its own forward, so its u is its own. All floating inputs get a gradient,
    unless some of them
    require one and others do not: then those that do. With one thread, `rounds` rounds; in each of them every
    backward runs once. At gamma >= 100 or so optimal transport has denormal numbers, which slow every pass
    down by up to 60
    times: call torch.set_flush_denormal(True) before.

    Args:
        problem: The declared problem. Of a `DiscreteLayer` or a discrete solver estimators are compared: see
            `diagnostics/discrete/compare.py`; `sweep` and the limits do not apply.
        inputs: As for the layer; none: the problem's `example`. With `sweep` none, or one function that makes
            them, `make(**setting) -> tuple of inputs`.
        in_dims: As for the layer.
        backwards: Names as for the layer's `backward=` (of a discrete layer: estimators); the ratio is taken
            to the first that runs.
        cotangent: A pytree like u; None: standard normal numbers, seeded.
        sweep: {name: values}: compare at every combination, as `compare(p, sweep={"n": [16, 64, 256]})`, or
            `compare(p, lambda n: (torch.randn(8, 3, n),), sweep={"n": [16, 64, 256]})`.
        rounds: Rounds of timing; a backward that takes seconds gets fewer.
        memory_limit, flop_limit: A dense backward that would need more bytes or more FLOPs (1e12 take about
        half a
            minute) is not run.
        advance: Called before each setting of a sweep, for a progress bar.

    Returns:
        Comparison. A backward that cannot run has a row that says why.

    Raises:
        OptionError: An unknown backward, a sweep with inputs, or a size that the example does not take.
        ProblemDefinitionError: No inputs, and no `example` to take their place.
        ImplicitDiffError: The problem cannot be solved for these inputs.
    """
    layer = as_discrete(problem)
    if layer is not None:
        from implicitdiff.diagnostics.discrete.compare import compare_discrete

        if sweep is not None:
            raise OptionError("sweep= is not there for discrete layers: call compare for each setting")
        chosen = () if backwards is DEFAULT else tuple(backwards)
        return compare_discrete(layer, inputs, in_dims, chosen, cotangent, rounds)
    problem = require_problem(problem)
    for name in backwards:
        if name not in BACKWARDS:
            raise OptionError(f"backwards={name!r} does not exist; choose from {', '.join(BACKWARDS)}")
    if not backwards:
        raise OptionError(f"backwards is empty; choose from {', '.join(BACKWARDS)}")
    if sweep is None:
        rows, reference = contest(
            problem,
            inputs or example_inputs(problem),
            in_dims,
            backwards,
            cotangent,
            rounds,
            memory_limit,
            flop_limit,
        )
        return Comparison(type(problem).__name__, tuple(rows), reference)
    make = _maker(problem, inputs, cotangent)
    rows, reference = [], ""
    settings = list(itertools.product(*sweep.values()))
    for done, values in enumerate(settings):
        setting = tuple(zip(sweep, values, strict=True))
        if advance is not None:
            advance(done, len(settings), ", ".join(f"{name} = {value}" for name, value in setting))
        made = make(**dict(setting))
        made = made if isinstance(made, tuple) else (made,)
        part, reference = contest(problem, made, in_dims, backwards, None, rounds, memory_limit, flop_limit)
        rows += [replace(row, setting=setting) for row in part]
    return Comparison(type(problem).__name__, tuple(rows), reference)


def _maker(problem: Problem, inputs: Sequence[Any], cotangent: Any) -> Callable[..., Any]:
    if cotangent is not None:
        raise OptionError("a cotangent fits one size only: leave it out with sweep=")
    if not inputs:
        return lambda **setting: example_inputs(problem, setting)
    if len(inputs) != 1 or not callable(inputs[0]):
        raise OptionError(
            "with sweep=, pass no inputs (the problem's example makes them) or one function that makes them: "
            "compare(problem, lambda n: (torch.randn(8, 3, n),), sweep={'n': [16, 64]})"
        )
    make: Callable[..., Any] = inputs[0]
    return make
