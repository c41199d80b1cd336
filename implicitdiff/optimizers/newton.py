"""Batched Newton's method on the KKT system of a plan, the optimizer used where a problem has no `solve`.

A `System` (iterate.py) and a start come in, an `Outcome` with one point per sample goes out. Each sample has
its own step length, damping and stopping time, and no sample reads another. Next: forward.py; restoration.py
for the rare cases.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from implicitdiff.optimizers.equations import newton_on_equations
from implicitdiff.optimizers.iterate import Outcome, Point, System, dot, largest
from implicitdiff.optimizers.limits import Callback, Watch, check_limits, check_positive, check_whole
from implicitdiff.optimizers.merit import curvature_of, differs, merit_of, slope_along
from implicitdiff.optimizers.restoration import escape, restore
from implicitdiff.status import Status


@dataclass(frozen=True)
class Direction:
    """A step: w (B, m), s (B, p), the slope of the merit along it (B,), whether there is one (B,)."""

    w: Tensor
    s: Tensor
    slope: Tensor
    usable: Tensor


@dataclass(frozen=True)
class _Walk:
    """What one iteration hands to the next; all (B,).

    Attributes:
        shift: The damping that the last step needed, a tenth of it to begin with.
        penalty: The weight nu of |h|_1 in the merit.
        extra: Steps taken beyond the tolerance.
        failures: Iterations in a row that found no step.
        violation: The violation of the constraints when it last fell by a tenth.
        idle: Iterations since then.
    """

    shift: Tensor
    penalty: Tensor
    extra: Tensor
    failures: Tensor
    violation: Tensor
    idle: Tensor

    @staticmethod
    def begin(point: Point, counts: Tensor) -> "_Walk":
        """The state before the first step."""
        zero, none = torch.zeros_like(point.value), torch.zeros_like(counts)
        return _Walk(zero, zero, none, none, torch.full_like(zero, torch.inf), none)


@dataclass(frozen=True)
class Newton:
    """Newton's method for min f(u) s.t. h(u) = 0, on a whole batch, with the KKT solve of the plan.

    A step solves [[H + sigma I, -A'], [-A, 0]] (w, s) = (-D_u L, h) and goes to (u + t w, lambda + t s).
    sigma is 0 unless w is no descent direction or the plan reports a singular or (without constraints)
    indefinite H; then it grows tenfold, for that sample alone. t is halved until the merit f + nu |h|_1 falls
    enough (f alone without constraints) and all values are finite, which keeps log u inside its domain; one
    second-order correction is tried where only the curvature of h is in the way. A sample whose residual is
    within the tolerance takes up to `extra` more steps as long as each divides the residual by four, then it
    is frozen: its bits are those of solving it alone, as far as the plan's products are.

    At a point where H has negative curvature on the tangent space (a saddle or a maximum) the walk goes on
    along that curvature; from an infeasible point where it cannot go on it first minimises |h|.

    For a system of equations (`Root`, `FixedPoint`) it is Newton's method on the residual: see equations.py.

    Attributes:
        max_iter: Most steps of one sample.
        tol: Relative tolerance of the residual; None: that of the layer, sqrt(eps) of the dtype by default.
        extra: Most steps beyond the tolerance. They are what brings gradients from 1e-8 to rounding.
        max_halvings: Most halvings of one step.
        decrease: The fraction of the predicted decrease that a step has to reach (Armijo).
        restarts: How often a stopped sample may be moved on by restoration or along negative curvature; 0:
            never.
        time_limit: Seconds for the whole batch, or None. Samples that are not done then are NOT_CONVERGED.
        callback: Called with a `Progress` before each iteration, or None.

    Cost: per iteration one factorisation of the plan, one pass for f and one for D_u L and h per step length
    tried.

    Reference: Nocedal and Wright, Numerical Optimization, 2nd edition, sections 3.4 (damping), 18.3 and 18.5
    (merit).
    """

    max_iter: int = 50
    tol: float | None = None
    extra: int = 3
    max_halvings: int = 40
    decrease: float = 1e-4
    restarts: int = 3
    time_limit: float | None = None
    callback: Callback | None = None
    solves_equations: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for option, least in (("max_iter", 1), ("extra", 0), ("max_halvings", 0), ("restarts", 0)):
            check_whole("Newton", option, getattr(self, option), least)
        check_limits("Newton", self.tol, self.time_limit, self.callback)
        check_positive("Newton", "decrease", self.decrease, "a number between 0 and 0.5", 0.5)

    def minimize(self, system: System, start: Tensor, tol: float) -> Outcome:
        """Walk from `start` (B, m) until every sample is optimal, stuck, or out of iterations.

        Args:
            system: The plan with its inputs; B > 0.
            start: Start points.
            tol: The tolerance of the layer, used if `self.tol` is None.

        Returns:
            Outcome. It makes no judgement: the caller holds the points against the optimality rule.
        """
        tol = tol if self.tol is None else self.tol
        watch = Watch(self.time_limit, self.callback)
        if system.plan.trace.square:
            return newton_on_equations(self, system, start, tol, watch)
        point = system.evaluate(start, system.estimate_multipliers(start))
        iterations = torch.zeros(start.shape[0], dtype=torch.int64, device=start.device)
        active = point.finite
        for restart in range(self.restarts + 1):
            point, iterations = self._descend(system, point, iterations, active, tol, watch)
            if restart == self.restarts or watch.over():
                break
            left = point.finite & (iterations < self.max_iter)
            point, restored = restore(
                system, point, left & (point.residual > tol) & (point.violation > tol), tol
            )
            point, escaped = escape(system, point, left & (point.residual <= tol), tol)
            active = restored | escaped
            if not bool(active.any()):
                break
        return Outcome(point, iterations)

    def _descend(
        self, system: System, point: Point, iterations: Tensor, active: Tensor, tol: float, watch: Watch
    ) -> tuple[Point, Tensor]:
        walk = _Walk.begin(point, iterations)
        floor = 4 * torch.finfo(point.u.dtype).eps
        while True:
            done = point.residual <= tol
            active = active & ~(done & ((point.residual <= floor) | (walk.extra >= self.extra)))
            # Ten steps that brought the constraints no nearer: restoration finds out whether they can be met
            # at all.
            active = active & (iterations < self.max_iter) & (walk.failures < 3) & (walk.idle < 10)
            if not watch.goes_on(point.residual, active):
                return point, iterations
            direction, walk = self._direction(system, point, walk, active & ~done, active & done)
            moved, trial = self._search(system, point, direction, walk, active & ~done, active & done)
            before, point = point, trial.where(moved, point)
            iterations = iterations + moved
            # A sample that is optimal and gains nothing more is frozen at once; one that is stuck tries a
            # shorter, more damped step, as a trust region would.
            stuck = active & ~done & ~moved
            # A shift that no longer bends the step is dropped, so that the plan solves with H itself again.
            bends = walk.shift * largest(direction.w) > torch.finfo(walk.shift.dtype).eps * largest(
                before.gradient
            )
            shift = torch.where(bends, walk.shift / 10, 0)
            if bool(stuck.any()):
                more = torch.maximum(10 * walk.shift, 1.3e-3 * curvature_of(system, point))
                shift = torch.where(stuck, more, shift)
            idle = moved & ~done & self._idles(before, point)
            nearer = (point.violation <= 0.9 * walk.violation) | (point.violation <= tol)
            walk = replace(
                walk,
                shift=shift,
                extra=torch.where(done, torch.where(moved, walk.extra + 1, self.extra), walk.extra),
                failures=torch.where(stuck | idle, walk.failures + 1, 0),
                violation=torch.where(nearer, point.violation, walk.violation),
                idle=torch.where(nearer, 0, walk.idle + 1),
            )

    def _direction(
        self, system: System, point: Point, walk: _Walk, searching: Tensor, polishing: Tensor
    ) -> tuple[Direction, _Walk]:
        """The Newton step of every sample, damped where it has to be.

        A sample that is being polished takes the plain step. One that is searching takes the first step that
        goes down and that the plan vouches for, else the first that goes down at all, else (without
        constraints) the gradient.
        """
        constrained = point.constraint.shape[1] > 0
        shift, penalty = torch.where(searching, walk.shift, 0), walk.penalty
        chosen = Direction(
            torch.zeros_like(point.u),
            torch.zeros_like(point.multipliers),
            torch.zeros_like(point.value),
            torch.zeros_like(searching),
        )
        settled = ~(searching | polishing)
        curvature: Tensor | None = None
        for attempt in range(16):
            w, s, status = system.solve(
                point,
                -point.gradient,
                point.constraint,
                shift if bool((shift > 0).any()) else None,
                ~settled,
            )
            finite = torch.isfinite(w).all(1) & torch.isfinite(s).all(1)
            slope, needed = slope_along(point, w, s, penalty)
            downhill = finite & (slope < 0)
            vouched = (status == int(Status.OK)) | (status == int(Status.DAMPED))
            # Dependent constraints: the step of least norm, which the residual judges like any other.
            vouched = vouched | (status == int(Status.NOT_REGULAR))
            # A singular K has a step of least norm, which is as good as Newton's where it is not wild. With
            # constraints an indefinite H says nothing about the tangent space, and no shift of H repairs
            # dependent constraints: after two attempts any step that goes down will do.
            vouched = vouched | (
                (status == int(Status.SINGULAR)) & (largest(w) <= 1e3 * (1 + largest(point.u)))
            )
            if constrained:
                vouched = vouched | (status == int(Status.INDEFINITE)) | (attempt >= 2)
            take = ~settled & ((polishing & finite) | (searching & downhill & vouched))
            provisional = ~settled & searching & downhill & ~chosen.usable
            update = take | provisional
            chosen = Direction(
                torch.where(update[:, None], w, chosen.w),
                torch.where(update[:, None], s, chosen.s),
                torch.where(update, slope, chosen.slope),
                chosen.usable | update,
            )
            penalty = torch.where(update, needed, penalty)
            settled = settled | take | polishing
            missing = ~settled
            if not bool(missing.any()):
                break
            curvature = curvature_of(system, point) if curvature is None else curvature
            # A singular H needs only as much as rounding demands, so that the steps stay nearly Newton's. 1.3
            # and not 1: ten-fold growth from a fraction of |H| must not land on H + sigma I = 0 where H is a
            # multiple of I.
            first = (
                torch.where(status == int(Status.SINGULAR), torch.finfo(shift.dtype).eps ** 0.5, 1.3e-3)
                * curvature
            )
            shift = torch.where(missing, torch.maximum(10 * shift, first), shift)
        if not constrained and curvature is not None:
            steepest = searching & ~chosen.usable
            chosen = Direction(
                torch.where(steepest[:, None], -point.gradient / curvature[:, None], chosen.w),
                chosen.s,
                torch.where(steepest, -dot(point.gradient, point.gradient) / curvature, chosen.slope),
                chosen.usable | steepest,
            )
        return chosen, replace(walk, shift=shift, penalty=penalty)

    def _search(
        self,
        system: System,
        point: Point,
        direction: Direction,
        walk: _Walk,
        searching: Tensor,
        polishing: Tensor,
    ) -> tuple[Tensor, Point]:
        """(which samples moved (B,), where to): halve each step until the merit and the domain accept it."""
        merit = merit_of(point, walk.penalty)
        pending = (searching | polishing) & direction.usable
        w = torch.where(pending[:, None], direction.w, 0)
        s = torch.where(pending[:, None], direction.s, 0)
        length = torch.ones_like(point.value)
        moved, result = torch.zeros_like(pending), point
        for halving in range(self.max_halvings + 1):
            trial = system.evaluate(point.u + length[:, None] * w, point.multipliers + length[:, None] * s)
            accepted = pending & self._accepts(
                point, trial, merit, walk.penalty, length * direction.slope, polishing
            )
            moved, result = moved | accepted, trial.where(accepted, result)
            pending = pending & ~accepted & ~polishing
            bent = pending & trial.finite & (largest(trial.constraint) > 0)
            if halving == 0 and bool(bent.any()):
                corrected = self._corrected(system, point, trial, bent, walk.shift)
                accepted = bent & self._accepts(
                    point, corrected, merit, walk.penalty, direction.slope, polishing
                )
                moved, result = moved | accepted, corrected.where(accepted, result)
                pending = pending & ~accepted
            if not bool(pending.any()):
                break
            length = length / 2
        return moved, result

    def _accepts(
        self, point: Point, trial: Point, merit: Tensor, penalty: Tensor, predicted: Tensor, polishing: Tensor
    ) -> Tensor:
        reached = merit_of(trial, penalty)
        falls = reached <= merit + self.decrease * predicted
        # Close to the solution the merit is flat to rounding and only the residual still sees progress.
        slack = torch.finfo(merit.dtype).eps ** 0.5 * merit.abs()
        level = (reached <= merit + slack) & (trial.residual <= 0.5 * point.residual)
        gains = trial.residual <= 0.25 * point.residual
        return trial.finite & torch.where(polishing, gains, (falls & differs(trial, point)) | level)

    def _idles(self, before: Point, after: Point) -> Tensor:
        """Whether a step is lost in rounding: u as good as unchanged and the residual too."""
        spacing = 4 * torch.finfo(after.u.dtype).eps * largest(after.u)
        return (largest(after.u - before.u) <= spacing) & (after.residual > 0.9 * before.residual)

    def _corrected(self, system: System, point: Point, trial: Point, bent: Tensor, shift: Tensor) -> Point:
        """The full step and the shortest one (in the metric of H) back to h = 0: for the Maratos effect."""
        w, _, _ = system.solve(
            point,
            torch.zeros_like(point.u),
            torch.where(bent[:, None], trial.constraint, 0),
            shift if bool((shift > 0).any()) else None,
            bent,
        )
        return system.evaluate(trial.u + torch.where(bent[:, None], w, 0), trial.multipliers)
