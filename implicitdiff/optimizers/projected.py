"""Projected gradients for bounds: steps that need no matrix, for many variables between simple limits.

A `Limited` without other constraints and start points come in, points go out, polished on the active set. Next:
polish.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from implicitdiff.errors import OptionError
from implicitdiff.optimizers.interior import LimitedOutcome
from implicitdiff.optimizers.iterate import Outcome, System
from implicitdiff.optimizers.lbfgs import LBFGS
from implicitdiff.optimizers.limited import Limited
from implicitdiff.optimizers.limits import check_limits, check_whole
from implicitdiff.optimizers.polish import polished_at

MEMORY = 10
DECREASE = 1e-4


@dataclass(frozen=True)
class ProjectedGradient:
    """The spectral projected gradient method for min f(u) s.t. lower <= u <= upper, on a whole batch.

    A step goes to P(u - t D_u f), P the projection to the box, with the step t of Barzilai and Borwein, and is
    shortened until f falls below the largest of its last values (per sample). Near the end Newton's method on the
    active set brings the last digits. No matrix is formed before that.

    Attributes:
        max_iter: most steps of one sample.
        tol: the size of P(u - D_u f) - u, relative to u, at which the active set is tried; None: eps^(1/3).

    Cost: one value and one gradient a step.

    Reference: Birgin, Martinez and Raydan (2000), Nonmonotone spectral projected gradient methods on convex sets.
    """

    max_iter: int = 2000
    tol: float | None = None

    def __post_init__(self) -> None:
        check_whole("ProjectedGradient", "max_iter", self.max_iter, 1)
        check_limits("ProjectedGradient", self.tol, None, None)

    def minimize(self, system: System, start: Tensor, tol: float) -> Outcome:
        """Without bounds it is L-BFGS."""
        return LBFGS(max_iter=self.max_iter).minimize(system, start, tol)

    def minimize_limited(self, limited: Limited, start: Tensor, tol: float) -> LimitedOutcome:
        """Walk from `start` (B, m).

        Raises:
            OptionError: the problem has equalities or inequalities.
        """
        if limited.multiplier_shapes:
            raise OptionError(
                "ProjectedGradient takes bounds alone, and this problem has equalities or inequalities: use "
                "InteriorPoint()"
            )
        lower, upper = limited.bounds
        goal = self.tol or torch.finfo(start.dtype).eps ** (1 / 3)
        u = start.clamp(lower, upper)
        value, slope = _evaluate(limited, u)
        size = slope.abs().amax(1)
        length = torch.where(size > 0, (1 + u.abs().amax(1)) / size, 1.0)
        history = value[:, None].repeat(1, MEMORY)
        steps = torch.zeros(u.shape[0], dtype=torch.int64, device=u.device)
        active = torch.isfinite(value)
        for iteration in range(self.max_iter):
            moved = (u - slope).clamp(lower, upper) - u
            active = active & (moved.abs().amax(1) > goal * (1 + u.abs().amax(1)).clamp(max=1e3))
            if not bool(active.any()):
                break
            direction = (u - length[:, None] * slope).clamp(lower, upper) - u
            fall = (direction * slope).sum(1)
            ceiling = torch.nan_to_num(history.amax(1))
            share = torch.ones_like(value)
            waiting = active.clone()
            new_u, new_value, new_slope = u, value, slope
            for _ in range(40):
                trial = u + share[:, None] * direction
                trial_value, trial_slope = _evaluate(limited, trial)
                accepted = waiting & (trial_value <= ceiling + DECREASE * share * fall)
                new_u = torch.where(accepted[:, None], trial, new_u)
                new_value = torch.where(accepted, trial_value, new_value)
                new_slope = torch.where(accepted[:, None], trial_slope, new_slope)
                waiting = waiting & ~accepted
                if not bool(waiting.any()):
                    break
                share = torch.where(waiting, share / 2, share)
            change, turned = new_u - u, new_slope - slope
            curved = (change * turned).sum(1)
            length = torch.where(curved > 0, (change * change).sum(1) / curved, 10 * length).clamp(
                1e-12, 1e12
            )
            active = active & ~waiting
            history[:, iteration % MEMORY] = torch.where(active, new_value, history[:, iteration % MEMORY])
            u, value, slope = new_u, new_value, new_slope
            steps = steps + active
        best = polished_at(limited, u)
        return LimitedOutcome(best.u, None, steps)


def _evaluate(limited: Limited, u: Tensor) -> tuple[Tensor, Tensor]:
    """f (B,) and D_u f (B, m); infinite and 0 where f is not finite."""
    leaves = limited.leaves(u)
    value = limited.lagrangian.objective(leaves, limited.theta)
    slope = limited.gradient(u, u.new_zeros((u.shape[0], 0)))
    sound = torch.isfinite(value) & torch.isfinite(slope).all(1)
    return torch.where(sound, value, torch.inf), torch.where(sound[:, None], slope, 0.0)
