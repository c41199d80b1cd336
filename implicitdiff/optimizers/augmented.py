"""The augmented Lagrangian method: nonlinear equality constraints by walks downhill without constraints.

A `System` (iterate.py) and a start come in, an `Outcome` goes out. Next: lbfgs.py, which makes the walks.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from implicitdiff.errors import OptionError
from implicitdiff.optimality import residuals_at
from implicitdiff.optimizers.iterate import Leaves, Outcome, Point, System, dot, largest, pack
from implicitdiff.optimizers.lbfgs import LBFGS, past_saddles
from implicitdiff.optimizers.limits import Callback, Watch, check_limits, check_positive, check_whole

# Outer iterations without a smaller residual after which a sample has reached what it can.
_PATIENCE = 10


@dataclass(frozen=True)
class Penalised(System):
    """The system of f - lam'h + rho |h|^2 / 2 for fixed lam and rho: without constraints.

    Attributes:
        lam: (B, p).
        penalty: rho (B,).
    """

    lam: Tensor
    penalty: Tensor

    @property
    def constraints(self) -> int:
        """0: the constraints are part of the objective."""
        return 0

    def multipliers_at(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """(lam - rho h, h), both (B, p): the multipliers with which D_u L is the gradient of the objective."""
        variables, lam = self.leaves(u, self.lam)
        h = pack(self.plan.stationarity(variables, lam, self.theta).constraint, u.shape[0], u)
        return self.lam - self.penalty[:, None] * h, h

    def evaluate(self, u: Tensor, multipliers: Tensor) -> Point:
        """The point, with h in the value and the gradient; `multipliers` (B, 0) are passed on.

        Cost: one value and two passes of D_u L and h, since the multipliers of the second depend on h.
        """
        lam, h = self.multipliers_at(u)
        variables, leaves = self.leaves(u, lam)
        stationarity = self.plan.stationarity(variables, leaves, self.theta)
        value = self.plan.value(variables, self.theta) - dot(self.lam, h) + 0.5 * self.penalty * dot(h, h)
        gradient = pack(stationarity.gradient, u.shape[0], u)
        everything = torch.cat([u, value[:, None], gradient, h], dim=1)
        return Point(
            u,
            multipliers,
            value,
            gradient,
            u.new_zeros((u.shape[0], 0)),
            residuals_at(stationarity, variables).stationarity,
            torch.zeros_like(value),
            torch.isfinite(everything).all(1),
        )

    def value_and_gradient(self, u: Tensor) -> tuple[Tensor, Leaves]:
        """The penalised objective (B,) and the leaves of its gradient: one reverse pass."""
        variables, lam = self.leaves(u, self.lam)
        return self.plan.value_and_gradient(variables, self.theta, lam, self.penalty)

    def with_linear_part(self, point: Point, wanted: Tensor) -> Point:
        """See `System.with_linear_part`; H is that of the Lagrangian, without rho A'A."""
        if not bool(wanted.any()):
            return point
        plain = System(self.plan, self.theta, self.variable_shapes, self.constraint_shapes)
        lam, _ = self.multipliers_at(point.u)
        measured = plain.with_linear_part(replace(point, multipliers=lam), wanted)
        return replace(measured, multipliers=point.multipliers)


@dataclass(frozen=True)
class AugmentedLagrangian:
    """The augmented Lagrangian method for min f(u) s.t. h(u) = 0, on a whole batch.

    Each outer iteration minimises f - lam'h + rho |h|^2 / 2 by L-BFGS, without constraints, then sets lam to
    lam - rho h; rho grows tenfold, for that sample alone, where |h| has not fallen to a quarter. No matrix is
    formed or factored, so this is the method for many variables and constraints without structure; where a KKT
    solve is affordable, Newton's method is faster by far. Without constraints it is `inner` alone.

    Attributes:
        max_iter: Most outer iterations.
        tol: Relative tolerance of the residual; None: that of the layer, sqrt(eps) of the dtype by default.
        inner: The L-BFGS of each outer iteration; its limits hold for one of them, its callback and tol are not
            used.
        penalty: rho to begin with; None: ten times the size of H over that of A squared, per sample.
        restarts: How often a stopped sample may leave a saddle or a maximum (looked for up to 512 variables).
        time_limit: Seconds for the whole batch, or None. Samples that are not done then are NOT_CONVERGED.
        callback: Called with a `Progress` before each outer iteration, or None.

    The iterations that it reports are the steps of `inner`, all together.

    Reference: Nocedal and Wright, Numerical Optimization, 2nd edition, section 17.3.
    """

    max_iter: int = 50
    tol: float | None = None
    inner: LBFGS = field(default_factory=lambda: LBFGS(max_iter=500))
    penalty: float | None = None
    restarts: int = 3
    time_limit: float | None = None
    callback: Callback | None = None

    def __post_init__(self) -> None:
        name = "AugmentedLagrangian"
        check_whole(name, "max_iter", self.max_iter, 1)
        check_whole(name, "restarts", self.restarts, 0)
        check_limits(name, self.tol, self.time_limit, self.callback)
        if not isinstance(self.inner, LBFGS):
            raise OptionError(f"{name}(inner=...) must be an LBFGS(...), got {self.inner!r}")
        if self.penalty is not None:
            check_positive(name, "penalty", self.penalty, "a positive number or None")

    def minimize(self, system: System, start: Tensor, tol: float) -> Outcome:
        """Walk from `start` (B, m) until every sample is optimal, stuck, or out of iterations or time.

        Args:
            system: The plan with its inputs; B > 0.
            start: Start points.
            tol: The tolerance of the layer, used if `self.tol` is None.

        Returns:
            Outcome, without a judgement.
        """
        tol = tol if self.tol is None else self.tol
        watch = Watch(self.time_limit, self.callback)
        point = system.evaluate(start, system.estimate_multipliers(start))
        return past_saddles(
            system,
            point,
            lambda at, steps, active: self._walk(system, at, steps, active, tol, watch),
            self.restarts,
            self.max_iter * self.inner.max_iter,
            tol,
            watch,
        )

    def _walk(
        self, system: System, point: Point, iterations: Tensor, active: Tensor, tol: float, watch: Watch
    ) -> tuple[Point, Tensor]:
        """Outer iterations of the active samples; frozen ones keep their bits."""
        if not system.constraints:
            goal = torch.full_like(point.value, tol)
            return self.inner.descend(system, point, iterations, active, goal, watch)
        lam, violation = point.multipliers, largest(point.constraint)
        first = _first_penalty(system, point)
        penalty = first if self.penalty is None else torch.full_like(first, self.penalty)
        largest_penalty = 1e12 * penalty
        accuracy = 0.1
        best, waited = point, torch.zeros_like(iterations)
        for _ in range(self.max_iter):
            point = system.with_linear_part(point, active & (point.residual > tol))
            nearer = ~(point.residual >= 0.9 * best.residual)
            waited = torch.where(nearer, 0, waited + 1)
            best = point.where(active & ~(point.residual >= best.residual), best)
            active = active & (point.residual > tol) & (penalty < largest_penalty) & (waited < _PATIENCE)
            if not watch.goes_on(best.residual, active):
                return best, iterations
            accuracy = max(0.1 * accuracy, 0.3 * tol)
            penalised = Penalised(
                system.plan, system.theta, system.variable_shapes, system.constraint_shapes, lam, penalty
            )
            before = penalised.evaluate(point.u, lam[:, :0])
            goal, none = torch.full_like(point.value, accuracy), torch.zeros_like(iterations)
            found, steps = self.inner.descend(
                penalised, before, none, active & before.finite, goal, watch.silent()
            )
            lam_found, h = penalised.multipliers_at(found.u)
            # With rho too small the penalised objective may have no minimum; its walk is then forgotten.
            far = (found.residual > goal) & (largest(found.u) > 1e3 * (1 + largest(point.u)))
            taken = active & found.finite & torch.isfinite(lam_found).all(1) & ~far
            # A walk that got stuck far from its goal goes on from there, with the same lam and rho.
            near = found.residual <= torch.maximum(goal, 0.1 * before.residual)
            lam = torch.where((taken & near)[:, None], lam_found, lam)
            fresh = system.evaluate(torch.where(taken[:, None], found.u, point.u), lam)
            point, iterations = fresh.where(taken, point), iterations + steps
            slow = near & (largest(h) > 0.25 * violation) & (point.violation > 0.1 * tol)
            slow = active & (~taken | slow)
            violation = torch.where(taken & near, largest(h), violation)
            penalty = torch.where(slow, 10 * penalty, penalty)
        return point.where(active & ~(point.residual >= best.residual), best), iterations


def _first_penalty(system: System, point: Point) -> Tensor:
    """rho (B,) = 10 |H| / |A|^2, sizes by one product each; with |D_u f| / (1 + |u|) where H is smaller.

    H along the gradient comes from a difference of gradients, A' along a fixed positive vector from two
    multipliers: D_u L is linear in them.
    """
    eps = torch.finfo(point.u.dtype).eps
    size = largest(point.gradient).clamp_min(torch.finfo(point.u.dtype).tiny)
    step = eps ** (1 / 3) * (1 + largest(point.u))
    ahead = system.evaluate(point.u + (step / size)[:, None] * point.gradient, point.multipliers)
    curvature = largest(ahead.gradient - point.gradient) / step
    count = torch.arange(point.constraint.shape[1], dtype=point.u.dtype, device=point.u.device)
    weights = (1 + 0.5 * torch.cos(2.4 * count)).expand_as(point.constraint)
    pulled = system.evaluate(point.u, point.multipliers + weights).gradient - point.gradient
    gain = dot(pulled, pulled) / dot(weights, weights)
    slope = system.evaluate(point.u, torch.zeros_like(point.multipliers)).gradient
    plain = largest(slope) / (1 + largest(point.u))
    wanted = torch.maximum(10 * torch.where(torch.isfinite(curvature), curvature, 0), plain) / gain
    usable = torch.isfinite(wanted) & (wanted > 0)
    return torch.where(usable, wanted, torch.full_like(wanted, 10.0))
