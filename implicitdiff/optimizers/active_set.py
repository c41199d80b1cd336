"""What is active at a point: from u and, where they are known, multipliers to an active set that explains the point.

A `Limited`, points (B, m) and multipliers (B, p + q) come in; a frozen `Settled` goes out: active set, multipliers,
weakly active constraints and the margin of strict complementarity. Next: limited_forward.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from implicitdiff.optimizers.limited import Active, Limited

NEAR = 10.0
"""A slack of this many tolerances is near enough to be asked for a multiplier; the rule then judges the residual."""
ROUNDS = 25
"""Most members that leave an active set one after the other because their multiplier has the wrong sign."""


@dataclass(frozen=True)
class Settled:
    """The active sets of a batch.

    Attributes:
        u: the points (B, m).
        active: what is active, weakly active members included.
        weak: members whose multiplier is 0 up to the tolerance.
        multipliers: (lam, mu), (B, p + q).
        margin: strict complementarity, (B,): the least over all constraints of the larger of slack and multiplier,
            each relative to its own terms; infinite without inequalities and bounds.
        excess: how far bounds are violated, (B,), absolute.
        excess_scale: the size that is held against, (B,).
        wrong: the samples in which some multiplier had the wrong sign, (B,) bool.
    """

    u: Tensor
    active: Active
    weak: Active
    multipliers: Tensor
    margin: Tensor
    excess: Tensor
    excess_scale: Tensor
    wrong: Tensor


@dataclass(frozen=True)
class _Sizes:
    """Slacks (>= 0 when kept) and what they are measured against, (B, m) and (B, q); `gradient` (B,) is for D_u f."""

    low: Tensor
    high: Tensor
    bound_scale: Tensor
    own_scale: Tensor
    rows: Tensor
    row_slope: Tensor
    row_scale: Tensor
    gradient: Tensor


def settle(limited: Limited, u: Tensor, tol: float, given: Tensor | None = None) -> Settled:
    """The active set at u, decided by slacks and multipliers together.

    A constraint is a candidate where its slack is within a few tolerances of 0, measured against the terms that cancel
    in it. Candidates get multipliers, the given ones or those of least squares, A'(lam, mu) = D_u f. One whose
    multiplier has the wrong sign (mu <= 0 at a minimum here, see `Problem.inequality`) is no member: the worst leaves
    first, and the rest is fitted anew. If u is not optimal, no set fits, and the optimality rule says so afterwards.

    Args:
        limited: the limits of the call.
        u: points (B, m).
        tol: the relative tolerance of the optimality rule.
        given: (lam, mu), (B, p + q), from a solver; None: least squares.

    Returns:
        Settled. Cost: one fit of the multipliers for each round, mostly one.
    """
    sizes = _sizes(limited, u)
    lower, upper = limited.bounds
    low = (sizes.low <= NEAR * tol * sizes.bound_scale) & torch.isfinite(lower)
    high = (sizes.high <= NEAR * tol * sizes.bound_scale) & torch.isfinite(upper)
    # Between equal bounds the multiplier has no sign; where two bounds are near, the nearer one counts.
    pinned = low & high & (lower == upper)
    nearer = sizes.low <= sizes.high
    active = Active(
        low & (nearer | ~high), high & (~nearer | ~low) & ~pinned, sizes.rows <= NEAR * tol * sizes.row_scale
    )
    wrong = torch.zeros(u.shape[0], dtype=torch.bool, device=u.device)
    multipliers = limited.multipliers(u, active) if given is None else given
    strength = _strength(limited, u, multipliers, sizes)
    for _ in range(ROUNDS):
        against = _against(strength, active, pinned, tol)
        if not bool(against.any().any()):
            break
        wrong = wrong | against.any()
        active = active.without(_worst(strength, against))
        multipliers = limited.multipliers(u, active)
        strength = _strength(limited, u, multipliers, sizes)
    weak = Active(
        active.low & (strength.low <= tol) & ~pinned,
        active.high & (strength.high <= tol),
        active.rows & (strength.rows <= tol),
    )
    # A slack that is small only beside the largest entries of u, with a multiplier of 0, is not active at all.
    tiny = 100 * torch.finfo(u.dtype).eps * u.abs().amax(1, keepdim=True)
    loose = Active(
        weak.low & (sizes.low > tol * sizes.own_scale) & (sizes.low > tiny),
        weak.high & (sizes.high > tol * sizes.own_scale) & (sizes.high > tiny),
        weak.rows & (sizes.rows > tol * sizes.row_scale),
    )
    active, weak = active.without(loose), weak.without(loose)
    margin = _margin(
        sizes, strength, active, torch.isfinite(lower) & ~pinned, torch.isfinite(upper) & ~pinned
    )
    excess = torch.maximum(-sizes.low, -sizes.high).clamp(min=0)
    worst = (excess / sizes.bound_scale).argmax(1, keepdim=True)
    return Settled(
        u,
        active,
        weak,
        multipliers,
        margin,
        excess.gather(1, worst)[:, 0],
        sizes.bound_scale.gather(1, worst)[:, 0],
        wrong,
    )


@dataclass(frozen=True)
class _Strength:
    """Multipliers by the sign that a minimum asks for (>= 0 here), relative to D_u f; (B, m), (B, m), (B, q)."""

    low: Tensor
    high: Tensor
    rows: Tensor


def _sizes(limited: Limited, u: Tensor) -> _Sizes:
    lower, upper = limited.bounds
    largest = u.abs().amax(1, keepdim=True)
    near = torch.where(
        (u - lower) <= (upper - u),
        torch.where(torch.isfinite(lower), lower, 0).abs(),
        torch.where(torch.isfinite(upper), upper, 0).abs(),
    )
    own = torch.maximum(u.abs(), near)
    slope, linear = limited.row_sizes(u)
    tiny = torch.finfo(u.dtype).tiny
    g = limited.rows(u)
    # g itself counts where it is large: it is then not small against anything
    row_scale = torch.maximum(linear, slope * largest).clamp(min=tiny)
    return _Sizes(
        low=u - lower,
        high=upper - u,
        bound_scale=torch.maximum(own, largest).clamp(min=tiny),
        own_scale=own.clamp(min=tiny),
        rows=-g,
        row_slope=slope,
        row_scale=row_scale,
        gradient=limited.gradient_scale(u),
    )


def _strength(limited: Limited, u: Tensor, multipliers: Tensor, sizes: _Sizes) -> _Strength:
    left = limited.gradient(u, multipliers)
    rows = multipliers[:, limited.equalities :] * sizes.row_slope
    scale = sizes.gradient[:, None]
    if rows.shape[1]:
        scale = torch.maximum(scale, rows.abs().amax(1, keepdim=True))
    return _Strength(left / scale, -left / scale, -rows / scale)


def _against(strength: _Strength, active: Active, pinned: Tensor, tol: float) -> Active:
    """Members whose multiplier has the wrong sign."""
    return Active(
        active.low & (strength.low < -tol) & ~pinned,
        active.high & (strength.high < -tol),
        active.rows & (strength.rows < -tol),
    )


def _worst(strength: _Strength, among: Active) -> Active:
    """Of each sample the one member whose sign is most wrong."""
    parts = [
        torch.where(mask, value, torch.inf)
        for mask, value in (
            (among.low, strength.low),
            (among.high, strength.high),
            (among.rows, strength.rows),
        )
    ]
    joined = torch.cat(parts, 1)
    chosen = torch.zeros_like(joined, dtype=torch.bool)
    chosen.scatter_(1, joined.argmin(1, keepdim=True), True)
    chosen &= among.any()[:, None]
    m = among.low.shape[1]
    return Active(chosen[:, :m], chosen[:, m : 2 * m], chosen[:, 2 * m :])


def _margin(sizes: _Sizes, strength: _Strength, active: Active, has_low: Tensor, has_high: Tensor) -> Tensor:
    none = torch.inf
    parts = []
    for slack, scale, value, member, there in (
        (sizes.low, sizes.bound_scale, strength.low, active.low, has_low),
        (sizes.high, sizes.bound_scale, strength.high, active.high, has_high),
        (sizes.rows, sizes.row_scale, strength.rows, active.rows, torch.ones_like(active.rows)),
    ):
        size = torch.maximum(slack / scale, torch.where(member, value, 0.0))
        parts.append(torch.where(there, size, none))
    joined = torch.cat(parts, 1)
    return joined.amin(1) if joined.shape[1] else joined.new_full(joined.shape[:1], none)


def resolved(settled: Settled, tie: str) -> Active:
    """The active set for the derivative: weakly active members are in it only under tie="active"."""
    return settled.active if tie == "active" else settled.active.without(settled.weak)


def with_multipliers(settled: Settled, active: Active, equalities: int) -> Settled:
    """The multipliers with 0 for rows that are not in the set."""
    keep = torch.nn.functional.pad(active.rows, (equalities, 0), value=True)
    return replace(settled, multipliers=torch.where(keep, settled.multipliers, 0.0))
