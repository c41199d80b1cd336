"""Report 1: the derived pass beside the hand-written one, the slower rungs, and the peers, on every work.

Nothing comes in but whether it shall be quick; `Row`s go out, one per work and method. Next: targets.py.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks import peers, works
from benchmarks.methods import RUNGS, Absent, Racer, racer
from benchmarks.output import duration, size, spread
from benchmarks.race import Times, alternate
from benchmarks.work import Work
from implicitdiff.diagnostics.tables import number


@dataclass(frozen=True)
class Row:
    """One method on one work; None where it did not run, and `note` says why."""

    work: str
    setting: str
    method: str
    solver: str
    error: float | None
    seconds: float | None
    seconds_low: float | None
    seconds_high: float | None
    ratio: float | None
    ratio_low: float | None
    ratio_high: float | None
    bytes: int | None
    peak: int | None
    flops: int | None
    operations: int | None
    rounds: int
    note: str


HEADER = (
    "work", "setting", "method", "solver", "error", "time", "ratio (quartiles)", "bytes", "peak", "FLOPs",
    "operations", "note",
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A work that is compared, and the rungs that are left out of it with the reason."""

    make: Callable[[], Work]
    without: tuple[tuple[str, str], ...] = ()


# K of transport is so ill-conditioned that its minres takes seconds at 12 x 15.
_ENDLESS = (("matrix-free", "minres on K takes thousands of iterations: seen at the small size"),)


def entries(quick: bool) -> tuple[Entry, ...]:
    """What is compared, small first."""
    small = (
        Entry(works.median),
        Entry(lambda: works.transport(1, 6, 8)),
        Entry(lambda: works.softmax(1, 1000)),
        Entry(lambda: works.smoothing(4, 500)),
        Entry(lambda: works.logistic(4, 20, 200)),
        Entry(lambda: works.pooling(1, 128, 256)),
        Entry(lambda: works.quadratic(8, 40, 20)),
    )
    if quick:
        return small
    return (
        *small,
        Entry(lambda: works.quadratic(32, 100, 50)),
        Entry(lambda: works.quadratic(32, 100, 50, whole=False)),
        Entry(lambda: works.pooling(8, 128, 1024)),
        Entry(lambda: works.pooling(8, 128, 1024, "truncated-quadratic")),
        Entry(lambda: works.transport(1, 50, 50), _ENDLESS),
        Entry(lambda: works.transport(1, 200, 200), _ENDLESS),
        Entry(lambda: works.softmax(32, 1000)),
        Entry(
            lambda: works.smoothing(1, 100_000), (("unrolled", "Newton's steps on a problem of this size"),)
        ),
        Entry(lambda: works.logistic(8, 128, 1024)),
    )


def compare(work: Work, methods: Sequence[str], rounds: int) -> list[Row]:
    """All methods on one work; ratios are to the first that runs."""
    truth = work.truth()
    found = [racer(work, method, truth) for method in methods]
    runs = {r.method: r.run for r in found if isinstance(r, Racer)}
    times = alternate(runs, rounds)
    return [absent(work, r) if isinstance(r, Absent) else ran(work, r, times[r.method]) for r in found]


def ran(work: Work, found: Racer, times: Times) -> Row:
    """The row of a method that ran."""
    note = "WRONG: not this gradient" if found.wrong else work.note if found.method == "hand" else ""
    return Row(
        work=work.name,
        setting=work.setting,
        method=found.method,
        solver=found.solver,
        error=found.error,
        seconds=times.seconds,
        seconds_low=times.low,
        seconds_high=times.high,
        ratio=times.ratio,
        ratio_low=times.ratio_low,
        ratio_high=times.ratio_high,
        bytes=found.counts.bytes,
        peak=found.counts.peak,
        flops=found.counts.flops,
        operations=found.counts.operations,
        rounds=times.rounds,
        note=note,
    )


def absent(work: Work, found: Absent) -> Row:
    """The row of a method that did not."""
    nothing = (None,) * 11
    return Row(work.name, work.setting, found.method, "", *nothing, rounds=0, note=f"not run: {found.reason}")


def report(quick: bool, rounds: int) -> Iterator[list[Row]]:
    """The rows of one work after the other."""
    for entry in entries(quick):
        work = entry.make()
        left_out = dict(entry.without)
        methods = [m for m in (*RUNGS, *peers.installed_for(work)) if m not in left_out]
        rows = compare(work, methods, rounds)
        rows += [absent(work, Absent(method, reason)) for method, reason in entry.without]
        yield rows


def cells(row: Row) -> tuple[str, ...]:
    """A row for people."""
    few = "*" if 0 < row.rounds < 7 else ""
    return (
        row.work,
        row.setting,
        row.method,
        row.solver,
        number(row.error),
        duration(row.seconds) + few,
        spread(row.ratio, row.ratio_low, row.ratio_high),
        size(row.bytes),
        size(row.peak),
        "-" if row.flops is None else f"{row.flops:.3g}",
        "-" if row.operations is None else str(row.operations),
        row.note,
    )
