"""Gauss-Newton and Levenberg-Marquardt: steps for sums of squares from first derivatives of the residuals.

A `System` (iterate.py) whose objective is a sum of squares and a start come in, an `Outcome` goes out. Next:
squares.py, which reads the residuals off the objective.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from implicitdiff.errors import OptionError
from implicitdiff.inputs import unflatten_inputs
from implicitdiff.optimizers.iterate import Outcome, Point, System, dot, largest, unpack
from implicitdiff.optimizers.lbfgs import past_saddles
from implicitdiff.optimizers.limits import (
    Callback,
    Watch,
    check_limits,
    check_positive,
    check_whole,
    refuse_constraints,
    tolerances,
)
from implicitdiff.optimizers.squares import Squares, squares_of
from implicitdiff.pytrees import unflatten
from implicitdiff.torch_private import pytree

Residual = Callable[..., Any]


@dataclass(frozen=True)
class Normal:
    """The Gauss-Newton matrix N = 2 c J' W J of one call: `at(u)` gives it.

    Attributes:
        system: The plan with its inputs.
        residuals: (r, w) of one sample, flat, from its flat u and its theta: f = c sum(w r^2) and terms without u.
        batched: For each theta, whether it carries the batch axis.
        rows: The number of residuals of one sample.
        factor: c (B,).
    """

    system: System
    residuals: Callable[..., tuple[Tensor, Tensor]]
    batched: tuple[bool, ...]
    rows: int
    factor: Tensor

    def at(self, u: Tensor) -> Tensor:
        """N (B, m, m) at u (B, m). Cost: min(m, rows) derivative passes, and O(rows m^2)."""
        jacobian, weights, _ = self._linearise(u)
        weights = 2 * self.factor[:, None] * weights
        return jacobian.mT @ (weights[:, :, None] * jacobian)

    def slope(self, u: Tensor) -> Tensor:
        """2 c J' W r (B, m): what D_u f has to be."""
        jacobian, weights, values = self._linearise(u)
        return 2 * self.factor[:, None] * (jacobian.mT @ (weights * values)[:, :, None])[:, :, 0]

    def _linearise(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """J (B, rows, m), w (B, rows) and r (B, rows)."""

        def both(flat: Tensor, *theta: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            values, weights = self.residuals(flat, *theta)
            return values, (weights, values)

        mode = torch.func.jacrev if self.rows < u.shape[1] else torch.func.jacfwd
        jacobian, (weights, values) = torch.func.vmap(mode(both, has_aux=True), in_dims=_dims(self.batched))(
            u, *self.system.theta
        )
        return jacobian, weights, values


def _dims(batched: tuple[bool, ...]) -> tuple[int | None, ...]:
    return (0, *(0 if flag else None for flag in batched))


def normal_of(name: str, system: System, residual: Residual | None, point: Point) -> Normal:
    """The Gauss-Newton matrix of a system: from the objective's graph, or from the residuals that were given.

    Raises:
        OptionError: The objective is not visibly a sum of squares and none were given, or those that were given
            are not those of the objective.
    """
    trace = system.plan.trace
    batched = tuple(placeholder.batched for placeholder in (*trace.inputs, *trace.tensors))
    if residual is not None:
        return _checked(
            name, _counted(system, _declared(name, system, residual, batched), batched, point), point
        )
    found = squares_of(trace.objective, len(trace.variables))
    if found is None:
        raise OptionError(
            f"{name}: the objective is not written as a sum of squares (sums and multiples of r ** 2, r * r, "
            f"r @ r); give the residuals, {name}(residual=lambda u, *inputs: ...), or use Newton()"
        )
    return _counted(system, _recognised(system, found), batched, point)


def _counted(
    system: System,
    residuals: Callable[..., tuple[Tensor, Tensor]],
    batched: tuple[bool, ...],
    point: Point,
) -> Normal:
    """The matrix with c = 1, after one evaluation, which tells the number of residuals."""
    values, _ = torch.func.vmap(residuals, in_dims=_dims(batched))(point.u, *system.theta)
    return Normal(system, residuals, batched, values.shape[1], torch.ones_like(point.value))


def _recognised(system: System, squares: Squares) -> Callable[..., tuple[Tensor, Tensor]]:
    def residuals(flat: Tensor, *theta: Tensor) -> tuple[Tensor, Tensor]:
        leaves = unpack(flat, system.variable_shapes)
        parts = iter(squares.module(*leaves, *theta))
        values, weights = [], []
        for factor, count in zip(squares.factors, squares.counts, strict=True):
            value = next(parts)
            weight = torch.full_like(value, factor)
            for _ in range(count):
                weight = weight * next(parts)
            values.append(value.reshape(-1))
            weights.append(weight.expand_as(value).reshape(-1))
        return torch.cat(values), torch.cat(weights)

    return residuals


def _declared(
    name: str, system: System, residual: Residual, batched: tuple[bool, ...]
) -> Callable[..., tuple[Tensor, Tensor]]:
    trace = system.plan.trace
    count = len(trace.inputs)
    if any(batched[count:]):
        raise OptionError(
            f"{name}(residual=...) knows nothing of tensors of the problem that differ between samples, as under "
            "torch.func.vmap over its parameters: pass them as inputs, or write the objective as a sum of squares"
        )

    def residuals(flat: Tensor, *theta: Tensor) -> tuple[Tensor, Tensor]:
        u = unflatten(unpack(flat, system.variable_shapes), trace.variable_spec)
        found = residual(u, *unflatten_inputs(theta[:count], trace.constants, trace.input_spec))
        leaves = pytree.tree_leaves(found)
        if not leaves or not all(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in leaves):
            raise OptionError(
                f"{name}(residual=...) must return floating tensors, got {type(found).__name__}"
            )
        values = torch.cat([leaf.reshape(-1) for leaf in leaves])
        return values, torch.ones_like(values)

    return residuals


def _checked(name: str, normal: Normal, point: Point) -> Normal:
    """The matrix with the factor c of f = c |r|^2 in it, which the gradients at the start give.

    Raises:
        OptionError: D_u f is no positive multiple of J'r.
    """
    slope, gradient = normal.slope(point.u), point.gradient
    eps = torch.finfo(slope.dtype).eps
    known = point.finite & torch.isfinite(slope).all(1) & (point.residual > 1e3 * eps)
    factor = torch.where(known, dot(slope, gradient) / dot(slope, slope), 1)
    off = largest(gradient - factor[:, None] * slope) > eps**0.25 * largest(gradient)
    # Close to a solution both are near rounding and prove nothing.
    if bool((known & (point.residual > eps**0.5) & (off | ~(factor > 0))).any()):
        raise OptionError(
            f"{name}(residual=...): D_u f is no positive multiple of J'r at the start, so the objective is not the "
            "sum of squares of these residuals; correct them, weights included"
        )
    return replace(normal, factor=torch.where(factor > 0, factor, 1))


@dataclass(frozen=True)
class LevenbergMarquardt:
    """Levenberg and Marquardt's method for f = sum of squares, without constraints, on a whole batch.

    A step solves (2 J' W J + mu D) w = -D_u f, D the diagonal of 2 J' W J, and is taken if f falls by a part of
    what the model promises; mu falls after a good step and grows otherwise, for each sample alone. Only first
    derivatives of the residuals are needed. D_u f is the plan's, so the end does not depend on the residuals.

    Attributes:
        residual: `residual(u, *inputs)` of one sample, a tensor or a pytree of tensors whose squares add up to
            the objective, but for a positive factor and terms without u; None: read off the objective.
        max_iter: Most steps of one sample.
        tol: Relative tolerance of the residual; None: that of the layer, sqrt(eps) of the dtype by default.
        damping: mu to begin with; 0 < mu.
        extra: Most steps beyond the tolerance, as long as each divides the residual by four.
        restarts: How often a stopped sample may leave a saddle or a maximum; 0: never.
        time_limit: Seconds for the whole batch, or None. Samples that are not done then are NOT_CONVERGED.
        callback: Called with a `Progress` before each iteration, or None.

    Cost: per iteration one J, one m x m Cholesky factorisation, and one pass for f and D_u f.

    Reference: Nocedal and Wright, Numerical Optimization, 2nd edition, section 10.3.
    """

    residual: Residual | None = None
    max_iter: int = 100
    tol: float | None = None
    damping: float = 1e-3
    extra: int = 3
    restarts: int = 3
    time_limit: float | None = None
    callback: Callback | None = None

    def __post_init__(self) -> None:
        _check(self, "LevenbergMarquardt")
        check_positive("LevenbergMarquardt", "damping", self.damping)

    def minimize(self, system: System, start: Tensor, tol: float) -> Outcome:
        """Walk from `start` (B, m) until every sample is optimal, stuck, or out of iterations or time.

        Args:
            system: The plan with its inputs; B > 0.
            start: Start points.
            tol: The tolerance of the layer, used if `self.tol` is None.

        Returns:
            Outcome, without a judgement.

        Raises:
            OptionError: The problem has constraints, or is no sum of squares.
        """
        return _minimize("LevenbergMarquardt", self, self.damping, system, start, tol)


@dataclass(frozen=True)
class GaussNewton:
    """Gauss and Newton's method for f = sum of squares, without constraints, on a whole batch.

    As `LevenbergMarquardt`, with full steps: mu is 0 until a step of a sample fails. It converges like Newton's
    method where the residuals are small or nearly linear at the solution.

    Attributes:
        residual: See `LevenbergMarquardt`.
        max_iter: Most steps of one sample.
        tol: Relative tolerance of the residual; None: that of the layer.
        extra: Most steps beyond the tolerance.
        restarts: How often a stopped sample may leave a saddle or a maximum; 0: never.
        time_limit: Seconds for the whole batch, or None.
        callback: Called with a `Progress` before each iteration, or None.

    Reference: Nocedal and Wright, Numerical Optimization, 2nd edition, section 10.3.
    """

    residual: Residual | None = None
    max_iter: int = 100
    tol: float | None = None
    extra: int = 3
    restarts: int = 3
    time_limit: float | None = None
    callback: Callback | None = None

    def __post_init__(self) -> None:
        _check(self, "GaussNewton")

    def minimize(self, system: System, start: Tensor, tol: float) -> Outcome:
        """See `LevenbergMarquardt.minimize`."""
        return _minimize("GaussNewton", self, 0.0, system, start, tol)


def _check(options: "GaussNewton | LevenbergMarquardt", name: str) -> None:
    for option, least in (("max_iter", 1), ("extra", 0), ("restarts", 0)):
        check_whole(name, option, getattr(options, option), least)
    check_limits(name, options.tol, options.time_limit, options.callback)
    if options.residual is not None and not callable(options.residual):
        raise OptionError(
            f"{name}(residual=...) must be a function of u and the inputs, got {options.residual!r}"
        )


def _minimize(
    name: str,
    options: "GaussNewton | LevenbergMarquardt",
    damping: float,
    system: System,
    start: Tensor,
    tol: float,
) -> Outcome:
    refuse_constraints(name, system)
    tol = tol if options.tol is None else options.tol
    watch = Watch(options.time_limit, options.callback)
    point = system.evaluate(start, start.new_zeros((start.shape[0], 0)))
    normal = normal_of(name, system, options.residual, point)
    goal = tolerances(point, tol)

    def descend(at: Point, iterations: Tensor, active: Tensor) -> tuple[Point, Tensor]:
        return _descend(normal, options, damping, at, iterations, active, goal, watch)

    return past_saddles(system, point, descend, options.restarts, options.max_iter, tol, watch)


def _descend(
    normal: Normal,
    options: "GaussNewton | LevenbergMarquardt",
    damping: float,
    point: Point,
    iterations: Tensor,
    active: Tensor,
    goal: Tensor,
    watch: Watch,
) -> tuple[Point, Tensor]:
    """One walk downhill of the active samples; frozen ones keep their bits."""
    system = normal.system
    eps = torch.finfo(point.u.dtype).eps
    shift = torch.full_like(point.value, damping)
    beyond, failures = torch.zeros_like(iterations), torch.zeros_like(iterations)
    while True:
        point = system.with_linear_part(point, active & (point.residual > goal))
        done = point.residual <= goal
        active = active & ~(done & ((point.residual <= 4 * eps) | (beyond >= options.extra)))
        active = active & (iterations < options.max_iter) & (failures < 25)
        if not watch.goes_on(point.residual, active):
            return point, iterations
        step, usable = _step(normal.at(point.u), point.gradient, shift, active)
        predicted = 0.5 * dot(step, point.gradient)
        trial = system.evaluate(point.u + step, point.multipliers)
        better = usable & trial.finite & (trial.u != point.u).any(1)
        slack = eps**0.5 * point.value.abs()
        falls = trial.value <= point.value + 1e-4 * predicted
        # Close to the solution f is flat to rounding and only the residual still sees progress.
        level = (trial.value <= point.value + slack) & (trial.residual <= 0.5 * point.residual)
        gains = trial.residual <= 0.25 * point.residual
        moved = active & better & torch.where(done, gains, falls | level)
        shift = _next_shift(shift, dot(step, trial.gradient) / dot(step, point.gradient), moved, active)
        # A step that is optimal and gains nothing more is the last one.
        beyond = torch.where(done, torch.where(moved, beyond + 1, options.extra), beyond)
        failures = torch.where(active & ~moved, failures + 1, 0)
        point, iterations = trial.where(moved, point), iterations + moved


def _next_shift(shift: Tensor, ahead: Tensor, moved: Tensor, active: Tensor) -> Tensor:
    """The damping of the next step.

    `ahead` is the slope of f along the step at its end over that at its beginning: 0 after a step to the minimum,
    negative beyond it (the curvature of the residuals adds to 2 J' W J), positive before it. Unlike the decrease of
    f it says so down to rounding.
    """
    lower = torch.where(shift * 0.1 > torch.finfo(shift.dtype).eps, shift * 0.1, 0)
    raised = torch.where(shift > 0, 10 * shift, 1e-3)
    short, far = moved & (ahead > -0.25), (moved & ~(ahead > -0.5)) | (active & ~moved)
    return torch.where(short, lower, torch.where(far, raised, shift))


def _step(normal: Tensor, gradient: Tensor, shift: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """(w (B, m), usable (B,)) with (N + shift D) w = -gradient, where N + shift D is positive definite."""
    finite = torch.isfinite(normal).all(2).all(1) & active
    identity = torch.eye(normal.shape[1], dtype=normal.dtype, device=normal.device)
    normal = torch.where(finite[:, None, None], normal, identity)
    diagonal = normal.diagonal(dim1=1, dim2=2).abs()
    # A variable that no residual sees to first order is damped by the others' size.
    floor = torch.finfo(normal.dtype).eps ** 0.5 * diagonal.amax(1, keepdim=True)
    diagonal = torch.maximum(diagonal, floor) + torch.finfo(normal.dtype).tiny
    factor, info = torch.linalg.cholesky_ex(normal + torch.diag_embed(shift[:, None] * diagonal))
    usable = finite & (info == 0)
    factor = torch.where(usable[:, None, None], factor, identity)
    step = -torch.cholesky_solve(gradient[:, :, None], factor)[:, :, 0]
    usable = usable & torch.isfinite(step).all(1)
    return torch.where(usable[:, None], step, 0), usable
