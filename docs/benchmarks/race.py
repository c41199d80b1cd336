"""How a pass is measured, for every report: the library's own race, under the name that the reports use.

In: callables. Out: frozen `Counts` and `Times`. See `implicitdiff/diagnostics/race.py`.
"""

import time

from implicitdiff.diagnostics.race import (
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

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""What a second may be; on a busy machine the processor's time of this process moves less than the wall clock."""
