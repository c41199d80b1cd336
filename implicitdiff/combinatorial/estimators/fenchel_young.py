"""The perturbed Fenchel-Young loss: learning a cost from solutions, with an exact gradient of a convex loss.

In: costs and target solutions. Out: one number per batch or per sample. Next file to read: ``spo_plus.py``.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from implicitdiff.combinatorial.base import Solver
from implicitdiff.combinatorial.estimators.blackbox import positive
from implicitdiff.combinatorial.estimators.imle import check_samples
from implicitdiff.combinatorial.estimators.perturbed import NOISES, Smoothing
from implicitdiff.combinatorial.function import Constant
from implicitdiff.combinatorial.oracle import Oracle, Policy
from implicitdiff.combinatorial.reduction import Reduction, check_reduction, flattened, inner, reduced
from implicitdiff.errors import OptionError


class FenchelYoungLoss(nn.Module):
    """L(w, y*) = <w, y*> - (1/M) sum of min over y of <w_m, y>, w_m = w - sigma Z_m (Berthet et al. 2020).

    Its gradient is y* - (1/M) sum of y(w_m), of multiplicative noise y* - (1/M) sum of (w_m / w) * y(w_m): exact for
    the drawn Z, so that its mean is the gradient of the expected loss. The value is that of the loss, whose
    expectation is bounded below in w, not a distance of solutions. M solver calls a sample. For a solver that
    maximises, (1/M) sum of max <theta_m, y> - <theta, y*>.

    Args:
        solver: the solver.
        sigma, samples, noise, multiplicative: as for `Perturbed`.
        reduction: "mean", "sum" or "none" over samples.
        domain, eps: as for `DiscreteLayer`.
        generator: of the noise.
    """

    def __init__(
        self,
        solver: Solver,
        sigma: float = 1.0,
        samples: int = 1,
        *,
        noise: Literal["normal", "gumbel"] = "normal",
        multiplicative: bool | None = None,
        reduction: Reduction = "mean",
        domain: Policy = "error",
        eps: float = 1e-6,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if noise not in NOISES:
            raise OptionError(f"noise={noise!r} of FenchelYoungLoss: one of {', '.join(NOISES)}")
        positive("sigma", sigma, "FenchelYoungLoss")
        check_samples(samples, "FenchelYoungLoss")
        self.smoothing = Smoothing(sigma, samples, noise, multiplicative)
        self.oracle = Oracle(solver, domain, eps)
        self.reduction = check_reduction(reduction)
        self.generator = generator

    def forward(self, cost: Tensor, target: Tensor) -> Tensor:
        """The loss of costs (*batch, *cost_shape) and target solutions of the same shape."""
        w, y, batch = flattened(self.oracle, cost, target)
        move, solutions = Constant.apply(self._sample, w)
        # w_m is written as a function of w, whose derivative is then that of the loss.
        w_m = w.unsqueeze(1) * move if self.smoothing.multiplies(self.oracle) else w.unsqueeze(1) + move
        found = (w_m.flatten(2) * solutions.flatten(2)).sum(2).mean(1)
        return reduced(inner(w, y) - found, batch, self.reduction)

    def _sample(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """(how w_m comes from w, y(w_m)), each (B, M, *shape)."""
        if len(w) == 0:
            empty = w.new_zeros(0, self.smoothing.samples, *w.shape[1:])
            return empty, empty.clone()
        w_m, _ = self.smoothing.draw(self.oracle, w, self.generator)
        one = w.unsqueeze(1)
        move = w_m / one if self.smoothing.multiplies(self.oracle) else w_m - one
        return move, self.oracle.many(w_m)


__all__ = ["FenchelYoungLoss"]
