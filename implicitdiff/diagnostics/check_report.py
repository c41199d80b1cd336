"""Diagnostics, the report of `check`: one row per statement, with its value, its tolerance and a verdict.

In: statements and values. Out: a frozen `CheckReport`. `check.py` fills it for declared problems,
``discrete/check.py`` for discrete layers.
"""

import math
from dataclasses import dataclass, field

from implicitdiff.diagnostics.tables import WIDTH, number, table


@dataclass(frozen=True)
class CheckRow:
    """One statement that was tried.

    Attributes:
        name: What was tried.
        value: What came out; NaN where it could not be tried.
        tolerance: What it was held against (an upper bound, except for LICQ and second order: a lower one).
        verdict: "ok", "fail" or "not run", with a reason after a colon where there is something to say.
    """

    name: str
    value: float
    tolerance: float
    verdict: str


@dataclass(frozen=True)
class CheckReport:
    """All rows of one check; `ok` is False as soon as one of them failed."""

    problem: str
    rows: tuple[CheckRow, ...]

    @property
    def ok(self) -> bool:
        """Whether no statement failed (one that could not be tried is no failure, but is listed)."""
        return not any(row.verdict.startswith("fail") for row in self.rows)

    def __str__(self) -> str:
        return self.text()

    def text(self, width: int = WIDTH) -> str:
        """The rows as a table, in lines of at most `width` characters, and the verdict."""
        cells = [(row.name, _value(row.value), _value(row.tolerance), row.verdict) for row in self.rows]
        failed = [row.name for row in self.rows if row.verdict.startswith("fail")]
        last = "all is well" if self.ok else f"{len(failed)} failed: {', '.join(failed)}"
        return f"check of {self.problem}\n\n{table(_HEADER, cells, _RIGHT, width)}\n\n{last}"


_HEADER = ("what", "value", "tolerance", "verdict")
_RIGHT = ("value", "tolerance")


def _value(value: float) -> str:
    return "-" if math.isnan(value) else number(value, 2)


@dataclass
class Rows:
    """The rows so far."""

    rows: list[CheckRow] = field(default_factory=list)

    def upper(self, name: str, value: float, tolerance: float, remark: str = "") -> None:
        """A statement `value <= tolerance`; NaN fails."""
        self._add(name, value, tolerance, value <= tolerance, remark)

    def lower(self, name: str, value: float, tolerance: float, remark: str = "") -> None:
        """A statement `value > tolerance`; NaN fails."""
        self._add(name, value, tolerance, value > tolerance, remark)

    def _add(self, name: str, value: float, tolerance: float, holds: bool, remark: str) -> None:
        verdict = "ok" if holds else "fail"
        self.rows.append(CheckRow(name, value, tolerance, f"{verdict}: {remark}" if remark else verdict))

    def one_sided(self, name: str, below: float, above: float) -> None:
        """The two derivatives at a point where the solution has none; it fails, because a gradient would be wrong."""
        said = f"fail: NOT_REGULAR: {below:.3g} from below, {above:.3g} from above"
        self.rows.append(CheckRow(f"one-sided derivatives: {name}", above - below, math.nan, said))

    def failed(self, name: str, reason: object) -> None:
        """A statement that could not be tried though it should have been possible."""
        self.rows.append(CheckRow(name, math.nan, math.nan, f"fail: {_line(reason)}"))

    def not_run(self, name: str, reason: object) -> None:
        """A statement that this check does not try for this problem."""
        self.rows.append(CheckRow(name, math.nan, math.nan, f"not run: {_line(reason)}"))


def _line(reason: object) -> str:
    return (
        " ".join(f"{type(reason).__name__}: {reason}".split())
        if isinstance(reason, Exception)
        else str(reason)
    )
