"""The KKT solve, the only copy of the formula: K (w, s) = (a, b) with K = [[H, -A'], [-A, -D]].

In: the steps (apply H^-1, A, A', S^-1) as callables, over symbols or over tensors. Out: (w, s).
From H w - A's = a and -A w - D s = b follow w = H^-1 (a + A's) and S s = -(b + A H^-1 a) with S = A H^-1 A' + D, where
D = 0 but for constraints that may be off (`graph/active.py`).
Next files: `saddle.py` (numbers), `symbolic.py` (symbols).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

X = TypeVar("X")
Y = TypeVar("Y")


@dataclass(frozen=True)
class Steps(Generic[X, Y]):
    """What the formula needs: X lives with the variables, Y with the constraints."""

    inverse: Callable[[X], X]
    constrain: Callable[[X], Y]
    spread: Callable[[Y], X]
    schur: Callable[[Y], Y]
    add_x: Callable[[X, X], X]
    add_y: Callable[[Y, Y], Y]
    negate: Callable[[Y], Y]
    hold: Callable[[X], X]
    corner: Callable[[Y], Y] | None = None
    """D s; None where D = 0."""


def range_space(steps: Steps[X, Y], a: X, b: Y, refinements: int = 0) -> tuple[X, Y]:
    """(w, s): one solve with S and two with H, and the same again for each refinement.

    Gould et al. (2022), Eqn. 3, evaluated from the left for given right-hand sides.

    A refinement solves for what is left of -A w = b. Where S is nearly singular its solution s is large, and w, a
    difference of its entries, carries their rounding; that error lies in the range of H^-1 A', which is exactly
    what the correction removes.
    """
    s = steps.schur(steps.negate(steps.add_y(b, steps.constrain(steps.inverse(a)))))
    w = steps.inverse(steps.add_x(a, steps.spread(s)))
    for _ in range(refinements):
        w = steps.hold(w)
        left = steps.add_y(b, steps.constrain(w))
        if steps.corner is not None:
            left = steps.add_y(left, steps.corner(s))
        correction = steps.schur(steps.negate(left))
        s = steps.add_y(s, correction)
        w = steps.add_x(w, steps.inverse(steps.spread(correction)))
    return w, s
