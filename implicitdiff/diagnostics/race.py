"""Diagnostics, a race: how passes are measured, counted once under the meter, timed in alternation with each other.

In: callables. Out: frozen `Counts` and `Times`. One process, one thread; a round runs every pass once, in an
order that turns, so that what disturbs the machine disturbs all of them. Used by `contest.py`, the experiments and
the benchmarks.
"""

import contextvars
import gc
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from implicitdiff.diagnostics.meter import measure
from implicitdiff.diagnostics.traffic import tensors_in
from implicitdiff.errors import ImplicitDiffWarning

clock = contextvars.ContextVar("clock", default=time.perf_counter)
"""What a second is: the wall clock, unless a report says otherwise."""

READING = 3e-3  # seconds: a shorter pass is repeated until a reading takes about that long
SLOW = 1.0  # seconds for each round asked for; a pass that takes longer gets fewer rounds


@dataclass(frozen=True)
class Counts:
    """Of one pass: bytes moved, peak live bytes with what its forward pass saved, FLOPs, operations."""

    bytes: int
    peak: int
    flops: int
    operations: int


@dataclass(frozen=True)
class Times:
    """Seconds of one pass and its ratio to the first: medians with the quartiles below and above."""

    seconds: float
    low: float
    high: float
    ratio: float
    ratio_low: float
    ratio_high: float
    rounds: int


def counted(run: Callable[[], Any], saved: int = 0) -> tuple[Any, Counts]:
    """The result of one pass and what it did; never timed at once."""
    result, found = measure(run)
    return result, Counts(found.bytes, found.peak + saved, found.flops, found.operations)


def saved_by(forward: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """(the result of a forward pass, bytes it keeps alive beyond that result)."""
    result, found = measure(forward)
    own = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_in(result)}
    return result, max(0, found.retained - sum(own.values()))


def timed(run: Callable[[], Any], loops: int = 1) -> float:
    """Seconds of one call by the clock that is set, over `loops` calls."""
    now = clock.get()
    start = now()
    for _ in range(loops):
        run()
    return (now() - start) / loops


def alternate(
    runs: Mapping[str, Callable[[], Any]], rounds: int, reading: float = READING
) -> dict[str, Times]:
    """Times of every pass; the ratios are to the first one, in the same round.

    Args:
        runs: The passes by name; each is run twice before anything counts.
        rounds: Readings of each; a pass of more than SLOW seconds gets fewer.
        reading: Seconds of one reading.

    Returns:
        Times by name.
    """
    loops, turns = {}, {}
    for name, run in runs.items():
        once = min(timed(run), timed(run))
        loops[name] = max(1, min(200, math.ceil(reading / max(once, 1e-7))))
        turns[name] = max(1, min(rounds, int(rounds * SLOW / max(once, 1e-7))))
    readings: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            for name in order[turn % len(order) :] + order[: turn % len(order)]:
                if turn < turns[name]:
                    readings[name].append(timed(runs[name], loops[name]))
    finally:
        gc.enable()
    base = readings[order[0]]
    return {name: _times(taken, base) for name, taken in readings.items()}


def _times(taken: Sequence[float], base: Sequence[float]) -> Times:
    ratios = [mine / theirs for mine, theirs in zip(taken, base, strict=False)]
    low, middle, high = quartiles(taken)
    ratio_low, ratio, ratio_high = quartiles(ratios)
    return Times(middle, low, high, ratio, ratio_low, ratio_high, len(taken))


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, statistics.median(values), high


@contextmanager
def quiet_thread() -> Iterator[None]:
    """One thread, gradients on, and none of the library's own warnings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore", ImplicitDiffWarning)
            yield
    finally:
        torch.set_num_threads(threads)
