"""K factored at one point along the routes of a structured plan, for as many solves as come.

In: the values of a point by name. Out: `StructuredFactor`, which hands the emitted functions the factorisations that
they would otherwise make. Next file: `plan.py`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from implicitdiff.derivatives.factor import Leaves, Solution
from implicitdiff.structured.outputs import Way

Given = Mapping[str, Any]
"""Factorisations by the names under which emitted functions take them."""


@dataclass(frozen=True)
class StructuredFactor:
    """The factorisations of one point: that of the route, and K as one matrix once a solve has asked for it.

    Attributes:
        values: the point, by name.
        make: (way, values) -> the factorisations of a way.
        along: (values, right-hand sides, self) -> (w, s, status), what `StructuredPlan.kkt_solve` does after it has
            looked at the point.
        lock: one thread solves at a time, because iterative solvers leave their status in the factorisation.
    """

    values: Mapping[str, Tensor]
    make: Callable[[Way, Mapping[str, Tensor]], Given]
    along: Callable[[Mapping[str, Tensor], Leaves, Leaves, StructuredFactor], Solution]
    lock: threading.Lock = field(default_factory=threading.Lock)
    _made: dict[Way, Given] = field(default_factory=dict)

    def solve(self, rhs_u: Leaves, rhs_h: Leaves) -> Solution:
        """(w, s, status): K^-1 rhs for right-hand sides (R, B, *shape)."""
        with self.lock:
            return self.along(self.values, rhs_u, rhs_h, self)

    def given(self, way: Way) -> Given:
        """The factorisations of a way; refinements work with those of the route."""
        source: Way = "route" if way == "refined" else way
        if source not in self._made:
            self._made[source] = self.make(source, self.values)
        return self._made[source]
