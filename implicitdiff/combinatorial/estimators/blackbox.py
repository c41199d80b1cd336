"""Blackbox: the derivative of a piecewise linear interpolation of the loss.

In: costs, y(w) and g. Out: the difference of two solutions. Next file to read: ``lpgd.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from implicitdiff.combinatorial.estimator import Estimator, Pass, Saved
from implicitdiff.errors import OptionError


@dataclass(frozen=True)
class Blackbox(Estimator):
    """dl/dw = (y(w + lam g) - y(w)) / lam (Vlastelica et al., ICLR 2020, algorithm 1, in the sense of descent).

    Two solver calls a sample and step, one where g = 0. For any lam > 0 and exact solutions <dl/dw, g> <= 0.

    Attributes:
        lam: the interpolation; a rule of thumb is mean |w| / mean |g|. Published: 20 for paths and TSP, 80 for
            matching, 0.2 for ranking.
    """

    lam: float

    def __post_init__(self) -> None:
        positive("lam", self.lam, self.name)

    @property
    def formula(self) -> str:
        """See `Estimator`."""
        return f"dl/dw = (y(w + {self.lam:.3g} g) - y(w)) / {self.lam:.3g}"

    @property
    def calls(self) -> tuple[int, int]:
        """See `Estimator`."""
        return (1, 1)

    def vjp(self, run: Pass, w: Tensor, y: Tensor, saved: Saved, g: Tensor) -> Tensor:
        """(y(w + lam g) - y) / lam."""
        return (run.oracle.moved(w, y, self.lam * g) - y) / self.lam


def positive(name: str, value: float, owner: str, zero: bool = False) -> None:
    """Raise OptionError unless an option of `owner` is > 0 (or >= 0)."""
    if not (math.isfinite(value) and (value > 0 or (zero and value == 0))):
        raise OptionError(f"{name}={value} of {owner}: expected a finite number {'>= 0' if zero else '> 0'}")


__all__ = ["Blackbox", "positive"]
