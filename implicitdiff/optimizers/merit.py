"""The merit f + nu |h|_1 by which a line search judges a step, and a size of H to damp by.

Points and steps (iterate.py) come in, one number per sample goes out. Next: newton.py, which uses them.
"""

import torch
from torch import Tensor

from implicitdiff.optimizers.iterate import Point, System, dot, largest


def merit_of(point: Point, penalty: Tensor) -> Tensor:
    """f + nu |h|_1 (B,)."""
    return point.value + penalty * point.constraint.abs().sum(1)


def differs(trial: Point, point: Point) -> Tensor:
    """Whether u changed at all: a step below the spacing of the numbers is no step."""
    return (trial.u != point.u).any(1) | (trial.multipliers != point.multipliers).any(1)


def slope_along(point: Point, w: Tensor, s: Tensor, penalty: Tensor) -> tuple[Tensor, Tensor]:
    """The directional derivative of f + nu |h|_1 along a Newton step, and the nu it is taken with.

    A w = -h, so D_u f w = D_u L w - lambda'h and |h|_1 falls at rate |h|_1. nu exceeds the new multipliers by
    half, which makes the merit exact; it may fall, but slowly, so that one wild step is forgotten and the
    merit does not cycle.
    """
    violation = point.constraint.abs().sum(1)
    needed = torch.maximum(penalty / 4, 1.5 * largest(point.multipliers + s))
    return dot(point.gradient, w) - dot(point.multipliers, point.constraint) - needed * violation, needed


def curvature_of(system: System, point: Point) -> Tensor:
    """A rough |H| (B,), positive: its gain along the gradient, or |D_u L| / (1 + |u|) where that is 0."""
    variables, lam = system.leaves(point.u, point.multipliers)
    hessian = system.plan.hessian(variables, lam, system.theta)
    along = point.gradient / largest(point.gradient).clamp_min(torch.finfo(point.u.dtype).tiny)[:, None]
    gain = largest(hessian.matvec(along))
    plain = largest(point.gradient) / (1 + largest(point.u))
    gain = torch.where(torch.isfinite(gain) & (gain > 0), gain, plain)
    return torch.where(torch.isfinite(gain) & (gain > 0), gain, torch.ones_like(gain))
