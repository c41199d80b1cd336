"""Fixed-point iteration with Anderson's acceleration, for `FixedPoint` problems.

A `System` (iterate.py) whose constraints are r = u - step(u) and a start come in, an `Outcome` goes out. Next:
default.py, which puts Newton's method behind it.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from implicitdiff.errors import OptionError
from implicitdiff.optimizers.equations import residual_at
from implicitdiff.optimizers.iterate import Outcome, Point, System, largest
from implicitdiff.optimizers.limits import Callback, Watch, check_limits, check_positive, check_whole

LOOK = 10
"""Iterations between two measurements of the scale that |r| is held against."""


@dataclass(frozen=True)
class Anderson:
    """u <- step(u), accelerated: the next point is the combination of the last steps whose residual is smallest.

    With f_k = step(u_k) - u_k and the differences dF of the last f, dU of the last u, gamma minimises |f_k - dF gamma|,
    and u_(k+1) = u_k + beta f_k - (dU + beta dF) gamma. A sample whose residual has grown tenfold over its best starts
    again from the best point with an empty memory; one that has not halved its best residual in `patience` iterations
    is given up, so that Newton's method behind it can take over.

    Attributes:
        max_iter: Most steps of one sample.
        memory: Differences kept; 0 is the plain iteration.
        beta: Weight of the new step; below 1 it damps.
        patience: Iterations without halving the residual after which a sample is given up.
        tol: Relative tolerance of the residual; None: that of the layer.
        time_limit: Seconds for the whole batch, or None.
        callback: Called with a `Progress` before each iteration, or None.

    Cost: one evaluation of step and 4 m memory flops an iteration.

    Reference: Walker and Ni, Anderson acceleration for fixed-point iterations, 2011.
    """

    max_iter: int = 200
    memory: int = 5
    beta: float = 1.0
    patience: int = 20
    tol: float | None = None
    time_limit: float | None = None
    callback: Callback | None = None
    solves_equations: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for option, least in (("max_iter", 1), ("memory", 0), ("patience", 1)):
            check_whole("Anderson", option, getattr(self, option), least)
        check_positive("Anderson", "beta", self.beta)
        check_limits("Anderson", self.tol, self.time_limit, self.callback)

    def minimize(self, system: System, start: Tensor, tol: float) -> Outcome:
        """Iterate from `start` (B, m) until every sample is within tol, stuck, or out of iterations.

        Args:
            system: The plan with its inputs; B > 0.
            start: Start points.
            tol: The tolerance of the layer, used if `self.tol` is None.

        Returns:
            Outcome: the best point of every sample.

        Raises:
            OptionError: The problem is no system of equations.
        """
        if not system.plan.trace.square:
            raise OptionError(
                "Anderson is for FixedPoint problems, and this one has an objective: use Newton() or LBFGS()"
            )
        tol = tol if self.tol is None else self.tol
        watch = Watch(self.time_limit, self.callback)
        best = system.evaluate(start, system.estimate_multipliers(start))
        u, f = best.u, -best.constraint
        iterations = torch.zeros(start.shape[0], dtype=torch.int64, device=start.device)
        steps, values = u.new_zeros(*u.shape, self.memory), u.new_zeros(*u.shape, self.memory)
        active, milestone, idle = best.finite, largest(f), iterations
        for count in range(self.max_iter):
            active = active & ~(best.residual <= tol) & (idle < self.patience)
            if not watch.goes_on(best.residual, active):
                break
            after = u + self._move(f, steps, values)
            residual = torch.where(active[:, None], -residual_at(system, after), f)
            size = largest(residual)
            wild = active & ~(size <= 10 * largest(best.constraint))
            after = torch.where(wild[:, None], best.u, after)
            residual = torch.where(wild[:, None], -best.constraint, residual)
            steps = self._remembered(steps, after - u, active & ~wild, wild)
            values = self._remembered(values, residual - f, active & ~wild, wild)
            u, f = torch.where(active[:, None], after, u), torch.where(active[:, None], residual, f)
            iterations = iterations + active
            better = active & ~wild & (size < largest(best.constraint))
            best = self._improved(system, best, u, f, better, tol, count)
            halved = largest(best.constraint) <= 0.5 * milestone
            milestone = torch.where(halved, largest(best.constraint), milestone)
            idle = torch.where(halved, 0, idle + 1)
        return Outcome(system.evaluate(best.u, best.multipliers), iterations)

    def _move(self, f: Tensor, steps: Tensor, values: Tensor) -> Tensor:
        """beta f - (dU + beta dF) gamma (B, m); differences of zeros have gamma 0."""
        if not self.memory:
            return self.beta * f
        gram = values.mT @ values
        scale = gram.diagonal(dim1=1, dim2=2).amax(1)
        ridge = torch.where(scale > 0, 10 * torch.finfo(f.dtype).eps * scale, 1.0)
        gram = gram + torch.diag_embed(ridge[:, None].expand(-1, self.memory))
        factors, pivots, _ = torch.linalg.lu_factor_ex(gram)
        gamma = torch.linalg.lu_solve(factors, pivots, values.mT @ f[:, :, None])
        move = self.beta * f - ((steps + self.beta * values) @ gamma)[:, :, 0]
        return torch.where(torch.isfinite(move).all(1, keepdim=True), move, self.beta * f)

    @staticmethod
    def _remembered(kept: Tensor, new: Tensor, mask: Tensor, emptied: Tensor) -> Tensor:
        """The differences with a new one in front, in the samples of the mask; none in those that are emptied."""
        if not kept.shape[2]:
            return kept
        moved = torch.cat([new[:, :, None], kept[:, :, :-1]], dim=2)
        return torch.where(emptied[:, None, None], 0.0, torch.where(mask[:, None, None], moved, kept))

    @staticmethod
    def _improved(
        system: System, best: Point, u: Tensor, f: Tensor, better: Tensor, tol: float, count: int
    ) -> Point:
        """The best point of every sample; its residual is relative to the scale last measured, at the end anew."""
        scale = largest(best.constraint) / best.residual
        scale = torch.where(torch.isfinite(scale), scale, 1.0)
        moved = replace(
            best, u=u, constraint=-f, residual=largest(f) / scale, violation=largest(f) / scale
        ).where(better, best)
        wanted = better & (moved.residual <= tol) if (count + 1) % LOOK else moved.finite
        if not bool(wanted.any()):
            return moved
        return system.evaluate(moved.u, moved.multipliers).where(wanted, moved)
