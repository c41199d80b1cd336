"""The KKT solve, the only copy of the formula: K (w, s) = (a, b) with K = [[H, -A'], [-A, 0]].

In: the steps (apply H^-1, A, A', S^-1) as callables, over symbols or over tensors. Out: (w, s).
From H w - A's = a and -A w = b follow w = H^-1 (a + A's) and S s = -(b + A H^-1 a) with S = A H^-1 A'.
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


def range_space(steps: Steps[X, Y], a: X, b: Y) -> tuple[X, Y]:
    """(w, s): one solve with S and two with H.

    Gould et al. (2022), Eqn. 3, evaluated from the left for given right-hand sides.
    """
    s = steps.schur(steps.negate(steps.add_y(b, steps.constrain(steps.inverse(a)))))
    w = steps.inverse(steps.add_x(a, steps.spread(s)))
    return w, s
