"""Diagnostics: everything that shows or proves what the library does, and changes nothing.

`meter` counts, `explain` reports the derivation, `check` tests one problem against independent oracles,
`compare` puts backward passes side by side, `walkthrough` teaches the derivation.
"""

from implicitdiff.diagnostics.check import check
from implicitdiff.diagnostics.check_report import CheckReport, CheckRow
from implicitdiff.diagnostics.compare import Comparison, compare
from implicitdiff.diagnostics.contest import Row
from implicitdiff.diagnostics.explain import Explanation, explain
from implicitdiff.diagnostics.meter import Measurement, Meter, OperationTotal, measure
from implicitdiff.diagnostics.walkthrough import walkthrough

__all__ = [
    "CheckReport",
    "CheckRow",
    "Comparison",
    "Explanation",
    "Measurement",
    "Meter",
    "OperationTotal",
    "Row",
    "check",
    "compare",
    "explain",
    "measure",
    "walkthrough",
]
