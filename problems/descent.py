"""Minimises sum_j rho(|u - x_j|^2) over u for a batch: reweighted means, then safeguarded Newton steps.

Points x (batch, m, n) and start points come in, a `Descent` goes out: u, its value, and per sample how near
to stationary it is. Called by `robust_pooling.py`. All are torch operations without writes in place: it can
be unrolled.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .penalties import Penalty, Rho, slope, slopes

REWEIGHTED_STEPS = 8
NEWTON_STEPS = 100
LEAST_DAMPING = 1e-3  # of the weight
DAMPING_FACTOR = 8.0


@dataclass(frozen=True)
class Descent:
    """A point per sample, with what is known there; the leading axes `...` are those of the samples.

    Attributes:
        u: The point (..., m).
        gradient: The gradient of the objective (..., m).
        value: The objective (...).
        weight: sum_j kappa_1 (...): the gradient divided by it is the reweighted step.
        residual: |gradient|_inf, less what the spacing of the numbers around u makes of it, divided by the
            largest term that cancels in it (...); 0 where nothing is left.
    """

    u: Tensor
    gradient: Tensor
    value: Tensor
    weight: Tensor
    residual: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> "Descent":
        """The same change of the leading axes, applied to every field."""
        return Descent(
            change(self.u),
            change(self.gradient),
            change(self.value),
            change(self.weight),
            change(self.residual),
        )

    def where(self, mask: Tensor, other: "Descent") -> "Descent":
        """This point where the mask (...) is true, the other one elsewhere."""
        return Descent(
            torch.where(mask[..., None], self.u, other.u),
            torch.where(mask[..., None], self.gradient, other.gradient),
            torch.where(mask, self.value, other.value),
            torch.where(mask, self.weight, other.weight),
            torch.where(mask, self.residual, other.residual),
        )

    def at(self, places: tuple[Tensor, ...]) -> "Descent":
        """The samples at these places, in one axis."""
        return self.map(lambda field: field[places])

    def scattered(self, places: tuple[Tensor, ...], into: "Descent") -> "Descent":
        """`into` with its samples at these places replaced by the samples here."""
        return Descent(
            into.u.index_put(places, self.u),
            into.gradient.index_put(places, self.gradient),
            into.value.index_put(places, self.value),
            into.weight.index_put(places, self.weight),
            into.residual.index_put(places, self.residual),
        )

    def reweighted(self, fraction: float = 1.0) -> Tensor:
        """The mean of the points weighted by kappa_1, or a fraction of the way to it; (..., m)."""
        pulled = self.weight > 0  # false where every weight underflowed: no point pulls
        step = self.gradient / torch.where(pulled, self.weight, 1)[..., None]
        return self.u - fraction * torch.where(pulled[..., None], step, 0)

    def lower(self, other: "Descent") -> Tensor:
        """Where the value is lower than the other's or, if equal up to rounding, the residual."""
        noise = 32 * torch.finfo(other.value.dtype).eps * other.value.abs()
        equal = self.value <= other.value + noise
        return (self.value < other.value - noise) | (equal & (self.residual < other.residual))

    def reweighted_lower(self, other: "Descent", concave: bool) -> Tensor:
        """As `lower`, for a reweighted step from the other point.

        If rho is concave in s such a step cannot raise the objective, whatever its rounded value says:
        alpha^2 (sqrt(1 + s / alpha^2) - 1) loses all digits at large alpha. Then the residual decides.
        """
        return self.lower(other) | (concave & (self.residual < other.residual))


def tightness(x: Tensor) -> float:
    """The residual that rounding allows: the gradient is a sum of n rounded terms."""
    eps = float(torch.finfo(x.dtype).eps)
    return min(eps * (16 + 16 * x.shape[-1] ** 0.5), 0.25 * eps**0.5)


def evaluate(rho: Rho, x: Tensor, alpha: Tensor, u: Tensor) -> Descent:
    """Value, gradient and weight at u (..., m), for x (..., m, n) and alpha broadcasting to (..., n)."""
    difference = u[..., None] - x
    s = difference.square().sum(-2)
    value, first = slope(rho, s, alpha)
    kappa = 2 * first
    gradient = (kappa[..., None, :] @ difference.mT)[..., 0, :]
    weight = kappa.sum(-1)
    return Descent(
        u, gradient, value.sum(-1), weight, _residual(*(t.detach() for t in (u, gradient, weight, kappa, s)))
    )


def _residual(u: Tensor, gradient: Tensor, weight: Tensor, kappa: Tensor, s: Tensor) -> Tensor:
    # The largest entry of kappa_1 (u - x_j) is at least its length over sqrt(m): a bound without a pass over
    # x.
    scale = (kappa.abs() * s.sqrt()).amax(-1) / u.shape[-1] ** 0.5
    # H is at most weight I: no u of this dtype has a smaller gradient than about this.
    unreachable = 2 * torch.finfo(u.dtype).eps * weight.abs() * u.abs().amax(-1)
    size = (gradient.abs().amax(-1) - unreachable).clamp_min(0)
    return torch.where(size == 0, size, size / scale)


def descend(penalty: Penalty, x: Tensor, alpha: Tensor, starts: Tensor) -> Descent:
    """A local minimiser, no higher than any of the start points, to the rounding error of its gradient.

    Reweighted means never raise the objective where rho is concave in s (all of Table 1), and converge fast
    when m is large. From the lowest point they reach, unfinished samples go on with Newton steps.

    Args:
        penalty: With what is known about it.
        x: Points (batch, m, n).
        alpha: Broadcasts to (batch, n).
        starts: (starts, batch, m).

    Returns:
        Descent over the batch. Cost: O(m n) per reweighted step and start; O(m^2 n + m^3) per Newton step of
        an unfinished sample.
    """
    found = _reweight(penalty, x, alpha, starts)
    lowest = torch.where(torch.isfinite(found.value), found.value, torch.inf).argmin(0)
    here = found.at((lowest, torch.arange(x.shape[0], device=x.device)))
    (rest,) = (~(here.residual <= tightness(x))).nonzero(as_tuple=True)
    if rest.numel() == 0:
        return here
    alpha = alpha.expand(x.shape[0], 1)[rest]
    damping = torch.zeros_like(here.residual[rest])
    return _newton(penalty, x[rest], alpha, here.at((rest,)), damping, NEWTON_STEPS).scattered((rest,), here)


def _reweight(penalty: Penalty, x: Tensor, alpha: Tensor, starts: Tensor) -> Descent:
    here = evaluate(penalty.rho, x, alpha, starts)
    active = ~(here.residual <= tightness(x))
    for _ in range(REWEIGHTED_STEPS):
        if not bool(active.any()):
            break
        ahead = evaluate(penalty.rho, x, alpha, here.reweighted())
        # A step that raises the objective (a penalty that is not concave in s) is left to Newton.
        active = active & ahead.reweighted_lower(here, penalty.concave)
        here = ahead.where(active, here)
        active = active & ~(here.residual <= tightness(x))
    return here


def _newton(
    penalty: Penalty, x: Tensor, alpha: Tensor, here: Descent, damping: Tensor, steps: int
) -> Descent:
    """Damped Newton steps for x (k, m, n) and alpha (k, 1), with a reweighted step where one fails.

    The damping (k,) is raised where H + damping I is indefinite or its step does no good, and lowered after
    a success: a non-convex penalty makes H indefinite over long, nearly flat stretches, on which reweighted
    steps alone are slow. When half of the samples are done the others go on by themselves.
    """
    rho, identity = penalty.rho, torch.eye(x.shape[-2], dtype=x.dtype, device=x.device)
    active = ~(here.residual <= tightness(x))
    for done in range(steps):
        unit = here.weight.detach().abs()
        hessian = _hessian(rho, x, alpha, here.u) + damping[:, None, None] * identity
        factor, failed = torch.linalg.cholesky_ex(hessian)
        step = torch.cholesky_solve(here.gradient[..., None], factor)[..., 0]
        usable = active & (failed == 0) & torch.isfinite(step).all(-1)
        ahead = evaluate(rho, x, alpha, here.u - torch.where(usable[:, None], step, 0))
        success = usable & ahead.lower(here)
        progress = active & ~success
        if bool(progress.any()):
            reweighted = evaluate(rho, x, alpha, here.reweighted())
            progress = progress & reweighted.reweighted_lower(here, penalty.concave)
            here = reweighted.where(progress, here)
        here = ahead.where(success, here)
        lowered = torch.where(damping > LEAST_DAMPING * unit, damping / DAMPING_FACTOR, 0)
        raised = torch.maximum(DAMPING_FACTOR * damping, LEAST_DAMPING * unit)
        damping = torch.where(success, lowered, raised)
        # Damping beyond the weight gives shorter steps than reweighting: nothing is left to try.
        active = active & (success | progress | (damping <= unit)) & ~(here.residual <= tightness(x))
        (rest,) = active.nonzero(as_tuple=True)
        if 2 * rest.numel() <= active.numel():
            if rest.numel() == 0:
                return here
            unfinished = here.at((rest,))
            others = _newton(penalty, x[rest], alpha[rest], unfinished, damping[rest], steps - done - 1)
            return others.scattered((rest,), here)
    return here


def _hessian(rho: Rho, x: Tensor, alpha: Tensor, u: Tensor) -> Tensor:
    """(sum_j kappa_1) I + sum_j kappa_2 (u - x_j)(u - x_j)', (k, m, m)."""
    difference = u[..., None] - x
    first, second = slopes(rho, difference.square().sum(-2), alpha)
    identity = torch.eye(x.shape[-2], dtype=x.dtype, device=x.device)
    outer = (difference * (4 * second)[..., None, :]) @ difference.mT
    return (2 * first).sum(-1)[..., None, None] * identity + outer
