"""Diagnostics, `compare`: backward passes side by side, at the same solution and for the same cotangent.

In: a problem, inputs, names of backwards. Out: a frozen `Comparison`: error, time, memory, bytes and FLOPs of
each. Times are taken in alternation with one thread; `contest.py` runs one row. See also `meter.py`.
"""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from implicitdiff.diagnostics.contest import Row, contest
from implicitdiff.diagnostics.discrete import as_discrete
from implicitdiff.diagnostics.meter import format_bytes
from implicitdiff.diagnostics.tables import number, pairs, require_matplotlib, seconds, table
from implicitdiff.errors import OptionError
from implicitdiff.plan import BACKWARDS
from implicitdiff.problem import Problem, require_problem

if TYPE_CHECKING:
    from implicitdiff.combinatorial import DiscreteLayer, Estimator, Solver
    from implicitdiff.diagnostics.discrete.compare import DiscreteComparison

DEFAULT = ("hand", "auto", "dense", "unrolled")


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
    def verdict(self) -> str:
        """Who is fastest, leanest and most accurate, in one line per setting."""
        lines = []
        for setting, group in itertools.groupby(self.rows, key=lambda row: row.setting):
            place = ", ".join(f"{name} = {value}" for name, value in setting)
            lines.append((f"{place}: " if place else "") + _verdict(list(group)))
        return "\n".join(lines)

    def __str__(self) -> str:
        cells = [_cells(row) for row in self.rows]
        header: tuple[str, ...] = _HEADER
        right = _HEADER[2:8]
        if any(row.setting for row in self.rows):
            header = ("setting", *header)
            places = [", ".join(f"{name} = {value}" for name, value in row.setting) for row in self.rows]
            cells = [(place, *cell) for place, cell in zip(places, cells, strict=True)]
        notes = list(dict.fromkeys((row.backward, row.note) for row in self.rows if row.note))
        explained = f"\n{pairs(notes)}\n" if notes else ""
        title, body = f"backward passes of {self.problem}", table(header, cells, right)
        last = f"error: against {self.reference}\ntime: one backward, one thread, median in alternation"
        last += " (* of fewer than 7)" if any(0 < row.rounds < 7 for row in self.rows) else ""
        return f"{title}\n\n{body}\n{explained}\n{last}\n{self.verdict}"

    def to_csv(self, path: str | Path | None = None) -> str:
        """The rows as comma-separated values with a header; also written to `path` if given."""
        settings = list(dict.fromkeys(name for row in self.rows for name, _ in row.setting))
        plain = [field.name for field in fields(Row) if field.name != "setting"]
        sink = io.StringIO()
        writer = csv.writer(sink, lineterminator="\n")
        writer.writerow([*settings, *plain])
        for row in self.rows:
            values = dict(row.setting)
            cells = [getattr(row, name) for name in plain]
            writer.writerow(
                [values.get(s, "") for s in settings] + ["" if cell is None else cell for cell in cells]
            )
        if path is not None:
            Path(path).write_text(sink.getvalue(), encoding="utf-8")
        return sink.getvalue()

    def plot(self) -> Any:
        """A matplotlib Figure: time, peak memory and error of each backward; over the values of a sweep if
        there is one.

        Raises:
            ImplicitDiffError: matplotlib is not installed.
        """
        require_matplotlib("Comparison.plot")
        from implicitdiff.diagnostics.plots import plot_comparison

        return plot_comparison(self.problem, self.rows)


_HEADER = ("backward", "solver", "error", "time", "ratio", "peak", "bytes", "FLOPs")


def _cells(row: Row) -> tuple[str, ...]:
    if row.seconds is None:
        return (row.backward, row.solver or "-", "-", "not run", "-", "-", "-", "-")
    star = "*" if row.rounds < 7 else ""
    return (
        row.backward,
        row.solver or "-",
        number(row.error),
        seconds(row.seconds) + star,
        number(row.ratio),
        "-" if row.peak is None else format_bytes(row.peak),
        "-" if row.bytes is None else format_bytes(row.bytes),
        "-" if row.flops is None else f"{row.flops:.3g}",
    )


def _verdict(rows: Sequence[Row]) -> str:
    ran = [row for row in rows if row.seconds is not None]
    if not ran:
        return "none of the backward passes could run"
    first = ran[0]
    right = [row for row in ran if row.exact]
    if not right:
        return "none of the backward passes agrees with the reference"
    fastest = min(right, key=lambda row: row.seconds or 0.0)
    leanest = min(right, key=lambda row: row.peak or 0)
    text = f"fastest: {fastest.backward}"
    if fastest is not first:
        text += f" ({number(fastest.ratio)} of the time of {first.backward})"
    text += f"; least memory: {leanest.backward}"
    if leanest is not first and first.peak:
        text += f" ({number((leanest.peak or 0) / first.peak)} of the peak of {first.backward})"
    known = [row for row in right if row.error is not None]
    if known:
        best = min(known, key=lambda row: row.error or 0.0)
        text += f"; least error: {best.backward} ({number(best.error)})"
    wrong = [f"{row.backward} ({number(row.error)})" for row in ran if not row.exact]
    return text + (f"; not the gradient: {', '.join(wrong)}" if wrong else "")


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
) -> Comparison | DiscreteComparison:
    """Run several backward passes of one problem at the same solution and compare them.

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
        inputs: As for the layer. With `sweep`: one function that makes them, `make(**setting) -> tuple of
            inputs`.
        in_dims: As for the layer.
        backwards: Names as for the layer's `backward=` (of a discrete layer: estimators); the ratio is taken
            to the first that runs.
        cotangent: A pytree like u; None: standard normal numbers, seeded.
        sweep: {name: values}: compare at every combination, as `compare(p, lambda n: (torch.randn(8, 3, n),),
            sweep={"n": [16, 64, 256]})`.
        rounds: Rounds of timing; a backward that takes seconds gets fewer.
        memory_limit, flop_limit: A dense backward that would need more bytes or more FLOPs (1e12 take about
        half a
            minute) is not run.

    Returns:
        Comparison. A backward that cannot run has a row that says why.

    Raises:
        OptionError: An unknown backward, or a sweep without a function.
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
            problem, inputs, in_dims, backwards, cotangent, rounds, memory_limit, flop_limit
        )
        return Comparison(type(problem).__name__, tuple(rows), reference)
    make = _maker(inputs, cotangent)
    rows, reference = [], ""
    for values in itertools.product(*sweep.values()):
        setting = tuple(zip(sweep, values, strict=True))
        made = make(**dict(setting))
        made = made if isinstance(made, tuple) else (made,)
        part, reference = contest(problem, made, in_dims, backwards, None, rounds, memory_limit, flop_limit)
        rows += [replace(row, setting=setting) for row in part]
    return Comparison(type(problem).__name__, tuple(rows), reference)


def _maker(inputs: Sequence[Any], cotangent: Any) -> Callable[..., Any]:
    if len(inputs) != 1 or not callable(inputs[0]):
        raise OptionError(
            "with sweep=, pass one function that makes the inputs in place of the inputs: "
            "compare(problem, lambda n: (torch.randn(8, 3, n),), sweep={'n': [16, 64]})"
        )
    if cotangent is not None:
        raise OptionError("a cotangent fits one size only: leave it out with sweep=")
    make: Callable[..., Any] = inputs[0]
    return make
