"""Report 2: the goals set for the derived backward passes, each with what was measured and yes or no.

The ratios are derived / hand-written, one process, one thread, in alternation; sizes and limits are those of
the goal. Nothing comes in; `Check`s go out. Next: growth.py.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from benchmarks import works
from benchmarks.methods import Absent, Racer, racer
from benchmarks.output import spread
from benchmarks.race import Times, alternate
from benchmarks.work import Work
from implicitdiff.diagnostics.tables import number


@dataclass(frozen=True)
class Check:
    """One goal.

    Attributes:
        subject: What it is about.
        quantity: What is measured.
        target: The limit; None if there is none.
        measured: What was found; None if nothing could be.
        low, high: Quartiles, where it is a time.
        at_least: Whether the measured number has to reach the target, not to stay below it.
        note: What to know.
    """

    subject: str
    quantity: str
    target: float | None
    measured: float | None
    low: float | None = None
    high: float | None = None
    at_least: bool = False
    note: str = ""

    @property
    def verdict(self) -> str:
        """yes, no, or - where nothing was measured."""
        if self.target is None or self.measured is None:
            return "-"
        good = self.measured >= self.target if self.at_least else self.measured <= self.target
        return "yes" if good else "no"


HEADER = ("subject", "quantity", "target", "measured", "reached", "note")


def cells(check: Check) -> tuple[str, ...]:
    """A check for people."""
    sign = ">=" if check.at_least else "<="
    target = "-" if check.target is None else f"{sign} {number(check.target, 3)}"
    measured = spread(check.measured, check.low, check.high)
    return check.subject, check.quantity, target, measured, check.verdict, check.note


@dataclass(frozen=True)
class Goal:
    """Limits for the ratios of one work; None where there is no limit. `error` is a ratio of errors."""

    make: Callable[[], Work]
    bytes: float | None = None
    peak: float | None = None
    time: float | None = None
    compiled: float | None = None
    error: float = 1.0


def goals(quick: bool) -> Iterator[Goal]:
    """The table of the issue, row by row."""
    pool, move = functools.partial(works.pooling, m=128), works.transport
    for b, time in ((1, 0.5), (8, 0.25)):
        yield Goal(functools.partial(pool, b, n=256), 0.8, 0.45, time)
    for n in (1024,) if quick else (1024, 4096):
        for b, peak, time in ((1, 0.5, 0.4), (8, 0.3, 0.3)):
            yield Goal(functools.partial(pool, b, n=n), 1.0, peak, time, time)
        for b in (1, 8):
            flat = functools.partial(pool, b, n=n, penalty="truncated-quadratic")
            yield Goal(flat, 1.0, 0.5, 0.4, 0.25)
    for b, time in ((1, 0.4), (8, 0.2)):
        yield Goal(functools.partial(pool, b, n=16), 0.2, 0.1, time)
    for b in (1,) if quick else (1, 4):
        yield Goal(functools.partial(works.pooling, b, 1024, 16), 0.03, 0.02, 0.03)
    for n, time in ((100, 0.55),) if quick else ((100, 0.55), (200, 0.35), (300, 0.25)):
        for b in (1, 8):
            yield Goal(functools.partial(move, b, n, n), 0.6, 0.45, time)
    for n, time in () if quick else ((500, 0.16), (1000, 0.12)):
        for gamma in (1.0, 10.0):
            yield Goal(functools.partial(move, 1, n, n, gamma), None, 0.3, time)
        for gamma in (30.0, 100.0, 300.0):
            error = 0.1 if gamma == 300.0 else 1.0
            yield Goal(functools.partial(move, 1, n, n, gamma), None, 0.45, 0.35, error=error)
    if quick:
        yield Goal(functools.partial(move, 1, 100, 100, 300.0), error=0.1)
    yield Goal(functools.partial(works.quadratic, 32, 100, 50), time=1.2)
    for b in (1, 32):
        yield Goal(functools.partial(works.softmax, b, 1000), 1.5, 1.5, 2.0)


def measure(goal: Goal, rounds: int) -> Iterator[Check]:
    """The checks of one goal."""
    work = goal.make()
    subject = f"{work.name} {work.setting}"
    truth = work.truth()
    methods = ("hand", "auto", *(("compiled",) if goal.compiled is not None else ()))
    found = {method: racer(work, method, truth) for method in methods}
    hand, auto = found["hand"], found["auto"]
    if isinstance(hand, Absent) or isinstance(auto, Absent):
        reason = next(r.reason for r in (hand, auto) if isinstance(r, Absent))
        yield Check(subject, "time", goal.time, None, note=reason)
        return
    times = alternate({name: r.run for name, r in found.items() if isinstance(r, Racer)}, rounds)
    yield from _memory(goal, subject, hand, auto)
    if goal.time is not None:
        yield _time(subject, "time", goal.time, times["auto"], auto.solver)
    if goal.compiled is not None:
        yield _compiled(goal.compiled, subject, found["compiled"], times.get("compiled"))
    # Below rounding there is nothing to compare.
    rounding = torch.finfo(torch.float32).eps if work.u.dtype == torch.float32 else 1e-13
    limit = max(goal.error * hand.error, rounding)
    note = f"hand {number(hand.error)}"
    yield Check(subject, "error", limit, auto.error, note=f"{note}, rounding" if limit == rounding else note)


def _memory(goal: Goal, subject: str, hand: Racer, auto: Racer) -> Iterator[Check]:
    for name, target in (("bytes", goal.bytes), ("peak", goal.peak)):
        if target is not None:
            ratio = getattr(auto.counts, name) / max(1, getattr(hand.counts, name))
            yield Check(subject, name, target, ratio)


def _time(subject: str, quantity: str, target: float, times: Times, note: str) -> Check:
    return Check(subject, quantity, target, times.ratio, times.ratio_low, times.ratio_high, note=note)


def _compiled(target: float, subject: str, found: Racer | Absent, times: Times | None) -> Check:
    if isinstance(found, Absent) or times is None:
        reason = found.reason if isinstance(found, Absent) else ""
        return Check(subject, "time, compiled", target, None, note=reason)
    return _time(subject, "time, compiled", target, times, found.solver)


def report(quick: bool, rounds: int) -> Iterator[list[Check]]:
    """The checks of one goal after the other; at the end, whether both long shapes of transport cost the same."""
    for goal in goals(quick):
        yield list(measure(goal, rounds))
    yield long_shapes(rounds)


def long_shapes(rounds: int) -> list[Check]:
    """Transport of 1000 x 50 and of 50 x 1000: each against hand, and against each other."""
    checks: list[Check] = []
    shapes = {"1000 x 50": works.transport(1, 1000, 50), "50 x 1000": works.transport(1, 50, 1000)}
    autos: dict[str, Racer] = {}
    for (name, work), time in zip(shapes.items(), (0.05, 0.16), strict=True):
        checks += measure(Goal(lambda work=work: work, 0.15, 0.05, time), rounds)
        found = racer(work, "auto")
        if isinstance(found, Racer):
            autos[name] = found
    if len(autos) == 2:
        times = alternate({name: found.run for name, found in autos.items()}, rounds)
        last = times["50 x 1000"]
        ratio, low, high = last.ratio, last.ratio_low, last.ratio_high
        if ratio < 1:
            ratio, low, high = 1 / ratio, 1 / high, 1 / low
        checks.append(Check("transport 1000x50 and 50x1000", "time, larger / smaller", 1.3, ratio, low, high))
    return checks
