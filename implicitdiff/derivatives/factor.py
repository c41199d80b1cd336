"""What is left of K once it is factored at a point: right-hand sides in, solutions out, as often as asked.

In: a plan's `kkt_factor`. Out: a `KKTFactor`. Derivatives of derivatives solve with the same K again and again; they
share one of these. Next: `autograd/shared.py`, which keeps it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

Leaves = tuple[Tensor, ...]
Solution = tuple[Leaves, Leaves, Tensor]
"""(w, s, status)."""


class KKTFactor(Protocol):
    """K = [[H, -A'], [-A, 0]] at one point, factored; it may be used by several threads at once."""

    def solve(self, rhs_u: Leaves, rhs_h: Leaves) -> Solution:
        """(w, s, status): K^-1 rhs for right-hand sides (R, B, *shape)."""


@dataclass(frozen=True)
class FactoredBy:
    """A factorisation as the function that solves with it."""

    solving: Callable[[Leaves, Leaves], Solution]

    def solve(self, rhs_u: Leaves, rhs_h: Leaves) -> Solution:
        """(w, s, status): K^-1 rhs for right-hand sides (R, B, *shape)."""
        return self.solving(rhs_u, rhs_h)
