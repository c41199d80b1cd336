"""The last digits of a problem with inequalities: Newton's method on a guessed active set, and whether it was right.

Points with slacks and multipliers of an interior-point or first-order method come in; a `Polished` goes out, verified
per sample. Next: interior.py, which follows its path further where the guess was wrong.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from implicitdiff.optimizers.iterate import pack, unpack
from implicitdiff.optimizers.limited import Active, Limited

STEPS = 6
REPAIRS = 3


@dataclass(frozen=True)
class Polished:
    """Points on an active set.

    Attributes:
        u: (B, m).
        multipliers: (lam, mu), (B, p + q), 0 for rows that are not active.
        verified: where the first-order conditions hold to rounding, slacks and signs of multipliers included, (B,).
    """

    u: Tensor
    multipliers: Tensor
    verified: Tensor


def polished(
    limited: Limited,
    u: Tensor,
    multipliers: Tensor,
    slacks: tuple[Tensor, Tensor, Tensor],
    duals: tuple[Tensor, Tensor, Tensor],
) -> Polished:
    """Newton's method on the active set that slacks and multipliers suggest.

    Args:
        limited: the limits of these samples.
        u: (B, m).
        multipliers: (lam, mu), (B, p + q), mu <= 0.
        slacks: of lower bounds, upper bounds and rows, > 0, 1 where there is no bound.
        duals: their multipliers, >= 0, 0 where there is no bound.

    Returns:
        Polished. A set that is contradicted is repaired a few times: what has the wrong sign leaves, what is violated
        enters. Cost: one factorisation of the plan a step, one or two steps for a quadratic program.
    """
    eps = torch.finfo(u.dtype).eps
    exact = eps**0.7
    slope, _ = limited.row_sizes(u)
    lower, upper = limited.bounds
    scale = limited.gradient_scale(u)[:, None]
    size = 1 + u.abs().amax(1, keepdim=True)
    low, high = (z / scale > s / size for z, s in zip(duals[:2], slacks[:2], strict=True))
    rows = duals[2] * slope / scale > slacks[2] / (slope * size).clamp(min=torch.finfo(u.dtype).tiny)
    low = torch.isfinite(lower) & (low | (lower == upper))
    high = torch.isfinite(upper) & high & ~low
    active = Active(low, high, rows)
    result, done = Polished(u, multipliers, torch.zeros(len(u), dtype=torch.bool, device=u.device)), None
    for _ in range(REPAIRS):
        found = _newton(limited, active, u, multipliers, exact)
        against, violated = _contradictions(limited, active, found, exact)
        fits = found.verified & ~against.any() & ~violated.any()
        update = fits if done is None else fits & ~done
        result = Polished(
            torch.where(update[:, None], found.u, result.u),
            torch.where(update[:, None], found.multipliers, result.multipliers),
            result.verified | fits,
        )
        done = result.verified
        if bool((done | ~found.verified).all()):
            break
        active = Active(
            (active.low & ~against.low) | violated.low,
            (active.high & ~against.high) | violated.high,
            (active.rows & ~against.rows) | violated.rows,
        )
    return result


def _newton(limited: Limited, active: Active, u: Tensor, multipliers: Tensor, exact: float) -> Polished:
    """Newton steps on F = (D_u L, h, g of the set) = 0; verified where they arrived."""
    if limited.matrices is not None:
        lower, upper = limited.bounds
        limit = torch.where(active.low, lower, torch.where(active.high, upper, 0.0))
        matrices = limited.matrices
        u, multipliers = matrices.on_active_set(u, multipliers, limit, active.fixed, active.rows)
        return Polished(u, multipliers, _fits(limited, active, u, multipliers, exact))
    plan, theta = limited.plan, limited.masked(active)
    batch = u.shape[0]
    keep = torch.nn.functional.pad(active.rows, (limited.equalities, 0), value=True)
    multipliers = torch.where(keep, multipliers, 0.0)
    before = torch.full_like(u[:, 0], torch.inf)
    best = Polished(u, multipliers, torch.zeros_like(before, dtype=torch.bool))
    for step in range(STEPS + 1):
        variables, lam = limited.leaves(u), unpack(multipliers, limited.multiplier_shapes)
        found = plan.stationarity(variables, lam, theta)
        gradient, constraint = pack(found.gradient, batch, u), pack(found.constraint, batch, u)
        tiny = torch.finfo(u.dtype).tiny
        # the size of u: a step of rounding in the fixed entries is no step
        scale = torch.maximum(
            found.gradient_scale, gradient.abs().amax(1) if step == 0 else found.gradient_scale
        )
        scale = torch.where(torch.isfinite(scale), scale, 1.0).clamp(min=tiny)
        error = (
            gradient.abs().amax(1) / torch.maximum(scale, u.abs().amax(1)) if step else gradient.abs().amax(1)
        )
        if constraint.shape[1]:
            error = torch.maximum(
                error, constraint.abs().amax(1) / (1 + torch.nan_to_num(found.constraint_scale))
            )
        better = error < before
        best = Polished(
            torch.where(better[:, None], u, best.u),
            torch.where(better[:, None], multipliers, best.multipliers),
            torch.where(better, error <= exact, best.verified),
        )
        halved = error <= 0.25 * before
        if step == STEPS or not bool((halved & (error > 0)).any()) or bool((error <= 4e-16).all()):
            break
        before = torch.minimum(before, error)
        w, s, _ = plan.kkt_solve(
            variables,
            lam,
            theta,
            tuple(-leaf[None] for leaf in found.gradient),
            tuple(leaf[None] for leaf in found.constraint),
        )
        moved = u + pack([leaf[0] for leaf in w], batch, u)
        turned = multipliers + pack([leaf[0] for leaf in s], batch, u)
        sound = torch.isfinite(moved).all(1) & torch.isfinite(turned).all(1)
        u = torch.where(sound[:, None], moved, u)
        multipliers = torch.where(sound[:, None] & keep, turned, multipliers)
    return best


def _fits(limited: Limited, active: Active, u: Tensor, multipliers: Tensor, exact: float) -> Tensor:
    """Whether the equations of an active set hold, (B,), for a quadratic program."""
    matrices = limited.matrices
    assert matrices is not None
    terms = torch.stack(matrices.terms(u, multipliers))
    left = torch.where(active.fixed, 0.0, terms.sum(0)).abs().amax(1)
    fits = torch.isfinite(left) & (left <= exact * terms.abs().amax(2).amax(0))
    h, g = matrices.constraints(u)
    size = 1 + u.abs().amax(1)
    for value, rows in ((h, matrices.equality), (torch.where(active.rows, g, 0.0), matrices.rows)):
        if value.shape[1]:
            fits = fits & (value.abs() <= exact * rows.abs().amax(2) * size[:, None]).all(1)
    return fits


def _contradictions(limited: Limited, active: Active, found: Polished, exact: float) -> tuple[Active, Active]:
    """(members with a multiplier of the wrong sign, constraints outside of the set that are violated)."""
    u = found.u
    lower, upper = limited.bounds
    left = limited.gradient(u, found.multipliers)
    scale = limited.gradient_scale(u)[:, None] * exact
    slope, linear = limited.row_sizes(u)
    mu = found.multipliers[:, limited.equalities :]
    pinned = lower == upper
    against = Active(
        active.low & (left < -scale) & ~pinned,
        active.high & (left > scale),
        active.rows & (mu * slope > scale),
    )
    size = exact * (1 + u.abs().amax(1, keepdim=True))
    g = limited.rows(u)
    allowed = exact * torch.maximum(linear, slope * (1 + u.abs().amax(1, keepdim=True)))
    violated = Active(
        ~active.fixed & (u < lower - size), ~active.fixed & (u > upper + size), ~active.rows & (g > allowed)
    )
    return against, violated
