"""Diagnostics, one comparison in words: the cells of a row, and the sentence that says who is best.

In: rows of `contest.py`. Out: text. Used by `compare.py`.
"""

import itertools
from collections.abc import Sequence

from implicitdiff.diagnostics.contest import Row
from implicitdiff.diagnostics.meter import format_bytes
from implicitdiff.diagnostics.tables import number, seconds

HEADER = ("backward", "solver", "error", "time", "ratio", "peak", "moved", "FLOPs")
WIDE = 100
"""Characters from which on both quartiles of a ratio have room; below, half their distance has to do."""


def cells(row: Row, width: int) -> tuple[str, ...]:
    """The row as it stands in the table."""
    if row.seconds is None:
        return (row.backward, row.solver or "-", "-", "not run", "-", "-", "-", "-")
    star = "*" if row.rounds < 7 else ""
    return (
        row.backward,
        row.solver or "-",
        number(row.error),
        seconds(row.seconds) + star,
        _ratio(row, width >= WIDE),
        "-" if row.peak is None else format_bytes(row.peak),
        "-" if row.bytes is None else format_bytes(row.bytes),
        "-" if row.flops is None else count(row.flops),
    )


def count(value: float) -> str:
    """A number of operations for people: 950, 12.3k, 4.56M, 7.89G."""
    for unit in ("", "k", "M"):
        if abs(value) < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}G"


def _ratio(row: Row, wide: bool) -> str:
    low, high = row.ratio_low, row.ratio_high
    if row.ratio is None or low is None or high is None or low == high:
        return number(row.ratio)
    if wide:
        return f"{number(row.ratio)} ({number(low)}-{number(high)})"
    return f"{number(row.ratio)} ±{50 * (high - low) / row.ratio:.0f}%"


def verdict_on(rows: Sequence[Row]) -> str:
    """Who is fastest, leanest and most accurate among those that agree with the reference, and who does not agree."""
    ran = [row for row in rows if row.seconds is not None]
    if not ran:
        return "none of the backward passes could run"
    first = ran[0]
    right = [row for row in ran if row.exact]
    if not right:
        return "none of the backward passes agrees with the reference"
    fastest = min(right, key=lambda row: row.seconds or 0.0)
    leanest = min(right, key=lambda row: row.peak or 0)
    said = [_fastest(first, fastest)]
    lean = "needs the least memory"
    if leanest is not first and first.peak:
        lean += f" ({number((leanest.peak or 0) / first.peak)} of the peak of {first.backward})"
    said.append((leanest.backward, lean))
    known = [row for row in right if row.error is not None]
    if known:
        best = min(known, key=lambda row: row.error or 0.0)
        said.append((best.backward, f"has the smallest error ({number(best.error)})"))
    text = "; ".join(f"{who} {_listed([what for _, what in group])}" for who, group in _by_subject(said))
    wrong = [f"{row.backward} (error {number(row.error)})" for row in ran if not row.exact]
    return text + (f"; not the gradient: {', '.join(wrong)}" if wrong else "")


def _listed(parts: Sequence[str]) -> str:
    """One; one and another; one, another and a third."""
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))


def _by_subject(said: Sequence[tuple[str, str]]) -> list[tuple[str, list[tuple[str, str]]]]:
    return [(who, list(group)) for who, group in itertools.groupby(said, key=lambda pair: pair[0])]


def _fastest(first: Row, fastest: Row) -> tuple[str, str]:
    """(subject, the rest of the sentence)."""
    if fastest is first:
        return first.backward, "is the fastest"
    low, high = fastest.ratio_low or 0.0, fastest.ratio_high or 0.0
    if low <= 1 <= high:
        return f"{fastest.backward} and {first.backward}", "take about the same time"
    spread = f", quartiles {number(low)} to {number(high)}" if low != high else ""
    share = f"{number(fastest.ratio)} of the time of {first.backward}{spread}"
    return fastest.backward, f"is the fastest ({share})"
