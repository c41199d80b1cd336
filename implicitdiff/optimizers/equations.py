"""Newton's method for systems of equations r(u) = 0, with a line search on |r|^2.

A `System` (iterate.py) whose constraints are the residual and a start come in, an `Outcome` goes out. Next: newton.py,
which hands systems of equations over to this file, and anderson.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from implicitdiff.derivatives.equations import lagrangian_of
from implicitdiff.errors import OptionError
from implicitdiff.optimizers.combined import Chain, MultiStart
from implicitdiff.optimizers.iterate import Optimizer, Outcome, Point, System, largest, pack, unpack
from implicitdiff.optimizers.limits import Watch
from implicitdiff.status import Status

if TYPE_CHECKING:
    from implicitdiff.optimizers.newton import Newton

FAILURES = 8
"""Damped steps in a row that find nothing smaller, before a sample is given up."""


@dataclass(frozen=True)
class _Walk:
    """What one iteration hands to the next, all (B,): the damping, steps beyond the tolerance, failures in a row."""

    shift: Tensor
    extra: Tensor
    failures: Tensor


def newton_on_equations(options: Newton, system: System, start: Tensor, tol: float, watch: Watch) -> Outcome:
    """Walk from `start` (B, m) until |r| is within tol of the terms that cancel in it, or nothing makes it smaller.

    The step is w = -J^-1 r, halved until |r|^2 falls by the fraction `decrease` of what its slope promises. Where J is
    singular, or no halving helps, the sample takes w = -(J'J + sigma^2 I)^-1 J'r with sigma growing tenfold
    (Levenberg, Marquardt), and sigma falls again with every step that works. A sample within the tolerance takes up to
    `extra` more steps as long as each divides |r| by four.

    Args:
        options: `max_iter`, `extra`, `max_halvings` and `decrease` are read.
        system: The plan with its inputs; B > 0.
        start: Start points.
        tol: The tolerance.
        watch: The clock.

    Returns:
        Outcome. Cost: one factorisation of J a step, one evaluation of r for each step length tried.
    """
    point = system.evaluate(start, system.estimate_multipliers(start))
    iterations = torch.zeros(start.shape[0], dtype=torch.int64, device=start.device)
    walk = _Walk(torch.zeros_like(point.value), iterations, iterations)
    active, floor = point.finite, 4 * torch.finfo(start.dtype).eps
    while True:
        done = point.residual <= tol
        active = active & ~(done & ((point.residual <= floor) | (walk.extra >= options.extra)))
        active = active & (iterations < options.max_iter) & (walk.failures < FAILURES)
        if not watch.goes_on(point.residual, active):
            return Outcome(point, iterations)
        w, damped = _step(system, point, torch.where(active & ~done, walk.shift, 0.0))
        moved, u = _search(options, system, point, w, active, done, damped)
        if bool(moved.any()):
            point = system.evaluate(u, point.multipliers).where(moved, point)
        iterations = iterations + moved
        stuck = active & ~done & ~moved
        size = _jacobian_size(system, point) if bool(stuck.any()) else walk.shift
        grown = torch.maximum(10 * walk.shift, torch.finfo(u.dtype).eps ** 0.25 * size)
        negligible = walk.shift <= torch.finfo(u.dtype).eps ** 0.5 * size
        walk = replace(
            walk,
            shift=torch.where(stuck, grown, torch.where(negligible, 0.0, walk.shift / 10)),
            extra=torch.where(done, torch.where(moved, walk.extra + 1, options.extra), walk.extra),
            failures=torch.where(stuck, walk.failures + 1, 0),
        )


def _step(system: System, point: Point, shift: Tensor) -> tuple[Tensor, Tensor]:
    """w (B, m), damped where `shift` says so or J is singular, and which samples are damped (B,)."""
    nothing = torch.zeros_like(point.u)
    w, _, status = system.solve(point, nothing, point.constraint, None)
    singular = (status != int(Status.OK)) | ~torch.isfinite(w).all(1)
    damped = singular | (shift > 0)
    if bool(damped.any()):
        least = torch.finfo(shift.dtype).eps ** 0.5 * _jacobian_size(system, point)
        sigma = torch.where(singular, torch.maximum(shift, least), shift)
        again, _, _ = system.solve(point, nothing, point.constraint, sigma)
        w = torch.where(damped[:, None], again, w)
    return torch.where(torch.isfinite(w).all(1, keepdim=True), w, 0.0), damped


def _jacobian_size(system: System, point: Point) -> Tensor:
    """A rough |J| (B,), positive: its gain along u, or 1."""
    variables, lam = system.leaves(point.u, point.multipliers)
    jacobian = system.plan.hessian(variables, lam, system.theta)
    sizes = torch.stack(
        [
            largest(jacobian.matvec(torch.ones_like(point.u))),
            largest(jacobian.transpose().matvec(torch.ones_like(point.u))),
        ]
    )
    gain = sizes.amax(0)
    return torch.where(torch.isfinite(gain) & (gain > 0), gain, torch.ones_like(gain))


def _search(
    options: Newton,
    system: System,
    point: Point,
    w: Tensor,
    active: Tensor,
    polishing: Tensor,
    damped: Tensor,
) -> tuple[Tensor, Tensor]:
    """(which samples moved (B,), where to (B, m)): halve each step until |r|^2 has fallen enough.

    A plain Newton step has the slope -2 |r|^2; a damped one has less, and any decrease will do.
    """
    before = _norm(point.constraint)
    pending, u = active & (w != 0).any(1), point.u
    moved, length = torch.zeros_like(active), torch.ones_like(before)
    for _ in range(options.max_halvings + 1):
        trial = point.u + length[:, None] * torch.where(pending[:, None], w, 0.0)
        after = _norm(residual_at(system, trial))
        enough = torch.where(damped, 1 - 1e-6, 1 - options.decrease * length)
        bound = torch.where(polishing, 0.25, enough)
        accepted = pending & torch.isfinite(after) & (after <= bound * before) & (trial != point.u).any(1)
        u = torch.where(accepted[:, None], trial, u)
        moved, pending = moved | accepted, pending & ~accepted & ~polishing
        if not bool(pending.any()):
            break
        length = length / 2
    return moved, u


def residual_at(system: System, u: Tensor) -> Tensor:
    """r (B, m) at u (B, m), without its scale."""
    trace = system.plan.trace
    functions = lagrangian_of(trace, tuple(given.batched for given in (*trace.inputs, *trace.tensors)))
    return pack(functions.constraints(unpack(u, system.variable_shapes), system.theta), u.shape[0], u)


def _norm(residual: Tensor) -> Tensor:
    return torch.linalg.vector_norm(residual, dim=1)


def require_equations(optimizer: Optimizer) -> None:
    """Raise OptionError for an optimizer that minimises: a system of equations has nothing to minimise."""
    if isinstance(optimizer, Chain):
        for stage in optimizer.stages:
            require_equations(stage)
    elif isinstance(optimizer, MultiStart):
        require_equations(optimizer.inner)
    elif not getattr(optimizer, "solves_equations", False):
        raise OptionError(
            f"{type(optimizer).__name__} minimises, and a Root or FixedPoint has nothing to minimise: use Newton(), "
            "Anderson(), a Chain of them, or leave optimizer= out"
        )
