"""LPGD: difference quotients of solutions, one-sided or central, with an optional proximal term.

In: costs, y(w) and g. Out: the difference of two solutions. Next file to read: ``imle.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from implicitdiff.combinatorial.checks import name_samples
from implicitdiff.combinatorial.estimator import Estimator, Pass, Saved
from implicitdiff.combinatorial.estimators.blackbox import positive
from implicitdiff.errors import OptionError

SIDES = ("right", "left", "both")
_FORMULAS = {
    "right": "dl/dw = (y(w + tau g) - y) / tau",
    "left": "dl/dw = (y - y(w - tau g)) / tau",
    "both": "dl/dw = (y(w + tau g) - y(w - tau g)) / tau / 2",
}


@dataclass(frozen=True)
class LPGD(Estimator):
    """Lagrangian proximal gradient descent (Paulus et al. 2024) for a linear objective.

    right (y(w + tau g) - y) / tau, left (y - y(w - tau g)) / tau, both: their mean. Two solver calls a sample and step,
    three for both; one where g = 0. Right with rho = 0 is `Blackbox` with lam = tau.

    With rho > 0 each perturbed problem has rho/2 |y' - y|^2 added. For y of zeros and ones that is linear,
    rho/2 <1 - 2y, y'> up to a constant, so that it remains one solver call; other solutions are an error.

    Attributes:
        tau: the step, > 0.
        rho: the proximal weight, >= 0.
        side: "right", "left" or "both".
    """

    tau: float
    rho: float = 0.0
    side: Literal["right", "left", "both"] = "both"

    def __post_init__(self) -> None:
        positive("tau", self.tau, self.name)
        positive("rho", self.rho, self.name, zero=True)
        if self.side not in SIDES:
            raise OptionError(f"side={self.side!r} of LPGD: one of {', '.join(SIDES)}")

    @property
    def formula(self) -> str:
        """See `Estimator`."""
        return _FORMULAS[self.side].replace("tau", f"{self.tau:.3g}") + (
            f", proximal weight {self.rho:g}" if self.rho else ""
        )

    @property
    def calls(self) -> tuple[int, int]:
        """See `Estimator`."""
        return (1, 2 if self.side == "both" else 1)

    def vjp(self, run: Pass, w: Tensor, y: Tensor, saved: Saved, g: Tensor) -> Tensor:
        """The quotient of the chosen side."""
        if self.side == "right":
            return (self._moved(run, w, y, self.tau * g) - y) / self.tau
        if self.side == "left":
            return (y - self._moved(run, w, y, -self.tau * g)) / self.tau
        ahead, behind = self._moved(run, w, y, self.tau * g), self._moved(run, w, y, -self.tau * g)
        return (ahead - behind) / (2 * self.tau)

    def _moved(self, run: Pass, w: Tensor, y: Tensor, direction: Tensor) -> Tensor:
        if self.rho == 0:
            return run.oracle.moved(w, y, direction)
        fractional = ((y != 0) & (y != 1)).flatten(1).any(1)
        if fractional.any():
            raise OptionError(
                f"rho={self.rho} of LPGD needs solutions of zeros and ones; {run.oracle.solver.name} gives others in "
                f"{name_samples(fractional)}: use rho=0"
            )
        # y minimises <w, .> and |. - y|^2, hence their sum too: rows that do not move keep their solution.
        still = per_row(direction)
        return run.oracle.moved(w, y, direction + still * (self.rho / 2) * (1 - 2 * y))


def per_row(direction: Tensor) -> Tensor:
    """1 for samples where the direction is not zero, 0 elsewhere, so that it multiplies the direction."""
    moves = direction.flatten(1).ne(0).any(1).to(direction.dtype)
    return moves.reshape(-1, *(1,) * (direction.dim() - 1))


__all__ = ["LPGD"]
