"""`make bench`: runs the reports, prints them, and writes tables and pictures into out/bench/.

make bench                          everything, ten minutes on two cores
make bench BENCH_ARGS="--quick"     small sizes, under two minutes
make bench BENCH_ARGS="--only targets growth"
"""

import argparse
import gc
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from benchmarks import choice, comparison, declared, growth, output, peers, plots, race, targets

REPORTS = ("comparison", "targets", "growth", "choice")


def environment() -> str:
    """Where the numbers come from, in one line: versions, machine, load."""
    found = [f"{name} {a.version}" for name, a in peers.ADAPTERS.items() if a.version is not None]
    load = ", ".join(f"{value:.2f}" for value in os.getloadavg()) if hasattr(os, "getloadavg") else "unknown"
    return (
        f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, "
        f"{os.cpu_count()} cores, one thread, {_clock()} clock, denormals flushed; load {load}; "
        f"peers: {', '.join(found) or 'none installed'}"
    )


def _clock() -> str:
    return next(name for name, function in race.CLOCKS.items() if function is race.clock.get())


class Report:
    """Collects what the parts yield: on the terminal, as Markdown, as CSV and as pictures."""

    def __init__(self, folder: Path, console: Console) -> None:
        self.folder, self.console = folder, console
        self.sections: list[str] = ["# Benchmarks", environment()]
        folder.mkdir(parents=True, exist_ok=True)

    def gather(self, title: str, parts: Iterable[Sequence[Any]]) -> list[Any]:
        """All rows of a report, with a sign of life while they are measured."""
        rows: list[Any] = []
        bar = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*bar, console=self.console, transient=True) as progress:
            task = progress.add_task(title)
            for part in parts:
                rows += part
                progress.update(task, description=f"{title}: {len(rows)} rows")
                gc.collect()
        return rows

    def table(
        self,
        name: str,
        title: str,
        rows: Sequence[Any],
        header: Sequence[str],
        cells: Callable[[Any], Sequence[str]],
    ) -> None:
        """One table in all its forms."""
        lines = [tuple(cells(row)) for row in rows]
        self.console.print(output.grid(header, lines, title))
        self.sections += [f"## {title}", output.markdown(header, lines)]
        if rows:
            output.write_csv(self.folder / f"{name}.csv", rows, type(rows[0]))

    def say(self, text: str) -> None:
        """A line below a table."""
        self.console.print(text, markup=False, highlight=False)
        self.sections.append(text)

    def picture(self, name: str, figure: Any) -> None:
        """A figure, linked from the Markdown."""
        plots.save(figure, self.folder, name)
        self.sections.append(f"![{name}]({name}.svg)")

    def close(self) -> Path:
        """Write the Markdown."""
        path = self.folder / "report.md"
        path.write_text("\n\n".join(self.sections) + "\n", encoding="utf-8")
        return path


def _comparison(report: Report, quick: bool, rounds: int) -> None:
    rows = report.gather("comparison", comparison.report(quick, rounds))
    title = "Backward passes side by side (* fewer than 7 rounds)"
    report.table("comparison", title, rows, comparison.HEADER, comparison.cells)
    report.picture("comparison", plots.comparison(rows))


def _targets(report: Report, quick: bool, rounds: int) -> None:
    checks = report.gather("targets", targets.report(quick, rounds))
    _checks(report, "targets", "Goals: derived over hand-written", checks)


def _growth(report: Report, quick: bool, rounds: int) -> None:
    found: list[growth.Point] = []
    checks: list[targets.Check] = []
    for curve in growth.curves(quick):
        points = report.gather(curve.name, ([point] for point in growth.points(curve)))
        found += points
        checks += growth.slopes(points)
    report.table(
        "growth",
        "Growth",
        found,
        growth.HEADER,
        lambda p: (
            p.curve, p.kind, f"{p.size:.0e}", output.duration(p.seconds), output.size(p.bytes), output.size(p.peak),
        ),
    )  # fmt: skip
    report.picture("growth", plots.growth(found))
    checks += report.gather("planning", growth.planning(quick))
    checks += report.gather("small problems", growth.small_problems(rounds))
    checks += growth.dense_rung(quick)
    checks += declared.texts()
    checks += report.gather("strangers", declared.strangers(quick))
    checks += declared.fuzz(report.folder.parent / "fuzz")
    _checks(report, "fixed", "Goals: growth, fixed costs, declarations", checks)


def _choice(report: Report, quick: bool, rounds: int) -> None:
    rows = report.gather("choice", choice.report(quick, rounds))
    report.table("choice", "The cost model's choice and the best solver", rows, choice.HEADER, choice.cells)
    report.say(choice.summary(rows))
    report.picture("choice", plots.choices(rows))


def _checks(report: Report, name: str, title: str, checks: list[targets.Check]) -> None:
    report.table(name, title, checks, targets.HEADER, targets.cells)
    verdicts = [check.verdict for check in checks]
    counts = ", ".join(f"{verdicts.count(word)} {word}" for word in ("yes", "no", "-"))
    report.say(f"reached: {counts}")
    report.picture(name, plots.targets(checks))


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run what was asked for; the Markdown's path."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds, under two minutes")
    parser.add_argument("--only", nargs="+", choices=REPORTS, default=REPORTS, help="these reports")
    parser.add_argument("--rounds", type=int, default=None, help="readings of each pass (11, quick 3)")
    parser.add_argument("--clock", choices=tuple(race.CLOCKS), default="wall", help="cpu: for a busy machine")
    parser.add_argument("--out", type=Path, default=Path("out", "bench"), help="folder for the results")
    options = parser.parse_args(arguments)
    rounds = options.rounds or (3 if options.quick else 11)
    race.clock.set(race.CLOCKS[options.clock])
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    warnings.simplefilter("ignore")  # of peers, and our own about samples that a report counts anyway
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    report = Report(options.out, console)
    report.say(environment())
    start = time.perf_counter()
    run = {"comparison": _comparison, "targets": _targets, "growth": _growth, "choice": _choice}
    for name in options.only:
        before = time.perf_counter()
        run[name](report, options.quick, rounds)
        report.say(f"{name} took {time.perf_counter() - before:.0f} s")
        report.close()  # what is known is kept if the next report is interrupted
    report.say(f"all took {time.perf_counter() - start:.0f} s; {environment()}")
    path = report.close()
    console.print(f"written: {path.parent}/", markup=False)
    return path


if __name__ == "__main__":
    main()
