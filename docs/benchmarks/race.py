"""How a pass is measured, for every report: the library's own race, under the name that the reports use.

In: callables. Out: frozen `Counts` and `Times`. See `implicitdiff/diagnostics/race.py`.
"""

from implicitdiff.diagnostics.race import (
    CLOCKS,
    READING,
    SLOW,
    Counts,
    Times,
    alternate,
    clock,
    counted,
    quartiles,
    saved_by,
    timed,
)

__all__ = [
    "CLOCKS",
    "READING",
    "SLOW",
    "Counts",
    "Times",
    "alternate",
    "clock",
    "counted",
    "quartiles",
    "saved_by",
    "timed",
]
