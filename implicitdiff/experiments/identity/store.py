"""The identity experiments: runs as comma-separated values, one file of numbers and one of curves for each family.

In: a `Summary` and a folder. Out: files, and the same `Summary` from them, so that tables and figures can be made anew
without training. Next file to read: ``report.py``.
"""

from __future__ import annotations

import csv
from pathlib import Path

from implicitdiff.experiments.identity.results import Point, Run, Summary

FIXED = ("method", "seed", "calls", "solver_seconds", "seconds")
CURVE = ("method", "seed", "epoch", "norm", "score")


def write_runs(folder: Path, family: str, summary: Summary) -> list[Path]:
    """`family`.csv and, if the runs have curves, `family`-curves.csv; numbers to six digits."""
    runs = summary.runs
    names = list(runs[0].values) if runs else []
    table = folder / f"{family}.csv"
    with table.open("w", newline="", encoding="utf-8") as sink:
        writer = csv.writer(sink, lineterminator="\n")
        writer.writerow([*FIXED, *names])
        for run in runs:
            times = (f"{run.solver_seconds:.3f}", f"{run.seconds:.3f}")
            writer.writerow(
                [run.method, run.seed, run.calls, *times, *(f"{run.values[n]:.6g}" for n in names)]
            )
    if not any(run.curve for run in runs):
        return [table]
    curves = folder / f"{family}-curves.csv"
    with curves.open("w", newline="", encoding="utf-8") as sink:
        writer = csv.writer(sink, lineterminator="\n")
        writer.writerow(CURVE)
        for run in runs:
            for point in run.curve:
                writer.writerow(
                    [run.method, run.seed, point.epoch, f"{point.norm:.6g}", f"{point.score:.6g}"]
                )
    return [table, curves]


def read_runs(folder: Path, family: str) -> Summary | None:
    """What `write_runs` wrote; None where there is nothing."""
    table, curves = folder / f"{family}.csv", folder / f"{family}-curves.csv"
    if not table.exists():
        return None
    points: dict[tuple[str, int], list[Point]] = {}
    if curves.exists():
        with curves.open(newline="", encoding="utf-8") as source:
            for row in csv.DictReader(source):
                point = Point(int(row["epoch"]), float(row["norm"]), float(row["score"]))
                points.setdefault((row["method"], int(row["seed"])), []).append(point)
    runs = []
    with table.open(newline="", encoding="utf-8") as source:
        for row in csv.DictReader(source):
            values = {name: float(text) for name, text in row.items() if name not in FIXED}
            method, seed = row["method"], int(row["seed"])
            curve = tuple(points.get((method, seed), ()))
            calls, inside, whole = int(row["calls"]), float(row["solver_seconds"]), float(row["seconds"])
            runs.append(Run(family, method, seed, values, calls, inside, whole, curve))
    return Summary(tuple(runs))


__all__ = ["read_runs", "write_runs"]
