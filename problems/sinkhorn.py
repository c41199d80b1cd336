"""Entropic transport in the log domain: Sinkhorn sweeps, then Newton steps on the dual for what they leave.

Scaled costs (batch, m, n) and marginals come in, a `Transport` goes out: the plan, the two log potentials,
and per sample how far the marginals are off. Called by `optimal_transport.py`. Nothing is written in place:
it can be unrolled.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# A stage has costs of four times the width of the one before, and the last one the costs themselves.
FIRST_WIDTH = 30.0
GROWTH = 4.0
LOOSE = 0.01  # the violation of the marginals at which a stage hands over
SWEEPS = 20
NEWTON_STEPS = 40


@dataclass(frozen=True)
class Transport:
    """The plan exp(row_i + column_j - cost_ij) of a batch.

    Attributes:
        plan: (batch, m, n); entries below the smallest normal number are exactly 0.
        row: The potentials of the rows (batch, m).
        column: The potentials of the columns (batch, n).
        residual: The largest violation of a marginal, relative to the largest marginal (batch,).
    """

    plan: Tensor
    row: Tensor
    column: Tensor
    residual: Tensor


@dataclass(frozen=True)
class _Dual:
    """One point of the dual with the potentials of the rows eliminated.

    Attributes:
        column: The free potentials (batch, n).
        row: Those that make the row sums exact (batch, m).
        following: `column` after one more Sinkhorn sweep (batch, n).
        value: The dual objective (batch,), concave in `column`.
        violation: |marginal - wanted|_inf over the largest marginal (batch,).
    """

    column: Tensor
    row: Tensor
    following: Tensor
    value: Tensor
    violation: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> "_Dual":
        """The same change of the batch axis, applied to every field."""
        return _Dual(
            change(self.column),
            change(self.row),
            change(self.following),
            change(self.value),
            change(self.violation),
        )

    def where(self, mask: Tensor, other: "_Dual") -> "_Dual":
        """This point where the mask (batch,) is true, the other one elsewhere."""
        return _Dual(
            torch.where(mask[:, None], self.column, other.column),
            torch.where(mask[:, None], self.row, other.row),
            torch.where(mask[:, None], self.following, other.following),
            torch.where(mask, self.value, other.value),
            torch.where(mask, self.violation, other.violation),
        )

    def better(self, other: "_Dual") -> Tensor:
        """Where the value is higher than the other's or, if equal up to rounding, the violation smaller."""
        noise = 32 * torch.finfo(other.value.dtype).eps * (1 + other.value.abs())
        higher = self.value > other.value + noise
        return higher | ((self.value >= other.value - noise) & (self.violation < other.violation))


def transport(cost: Tensor, r: Tensor, c: Tensor) -> Transport:
    """The plan of least  sum P cost + sum P log P  with row sums r and column sums c.

    The side with more marginals is eliminated, so that a Newton system has the smaller size.

    Args:
        cost: gamma M (batch, m, n).
        r: Positive row sums (batch, m).
        c: Positive column sums (batch, n), of the same total.

    Returns:
        Transport. Cost: O(m n) per sweep, O(m n k + k^3) per Newton step with k = min(m, n).
    """
    if cost.shape[1] >= cost.shape[2]:
        return _eliminating_rows(cost, r, c)
    found = _eliminating_rows(cost.mT, c, r)
    return Transport(found.plan.mT, found.column, found.row, found.residual)


def _eliminating_rows(cost: Tensor, r: Tensor, c: Tensor) -> Transport:
    """`transport` with the rows exact at every step and the potentials of the columns free.

    Large costs are reached in stages, each from the potentials of the one before: near a vertex of the
    transport polytope neither sweeps nor Newton steps get anywhere from a distance.
    """
    log_r, log_c = r.log(), c.log()
    width = cost.detach().amax((1, 2)) - cost.detach().amin((1, 2))
    fraction = FIRST_WIDTH / width.clamp_min(FIRST_WIDTH)
    column = torch.zeros_like(log_c)
    while bool((fraction < 1).any()):
        loose = torch.full_like(fraction, LOOSE)
        larger = (GROWTH * fraction).clamp_max(1)
        stage = _solve(fraction[:, None, None] * cost, log_r, log_c, column, loose)
        column, fraction = stage.column * (larger / fraction)[:, None], larger
    return _solve(cost, log_r, log_c, column, _tightness(width, r, c))


def _solve(cost: Tensor, log_r: Tensor, log_c: Tensor, column: Tensor, tight: Tensor) -> Transport:
    """Sweeps from these potentials (batch, n), then Newton steps where the tolerance (batch,) is not met."""
    here = _evaluate(cost, log_r, log_c, column)
    active = ~(here.violation <= tight)
    for _ in range(SWEEPS):
        if not bool(active.any()):
            break
        here = _evaluate(cost, log_r, log_c, here.following).where(active, here)
        active = active & ~(here.violation <= tight)
    found = Transport(_plan(cost, here), here.row, here.column, here.violation)
    (rest,) = active.nonzero(as_tuple=True)
    if rest.numel() == 0:
        return found
    polished = _newton(cost[rest], log_r[rest], log_c[rest], here.map(lambda field: field[rest]), tight[rest])
    return Transport(
        found.plan.index_put((rest,), polished.plan),
        found.row.index_put((rest,), polished.row),
        found.column.index_put((rest,), polished.column),
        found.residual.index_put((rest,), polished.residual),
    )


def _tightness(width: Tensor, r: Tensor, c: Tensor) -> Tensor:
    """The violation that rounding allows (batch,): log P is a difference of numbers as large as the width."""
    eps = torch.finfo(width.dtype).eps
    total = c.detach().sum(1)
    mismatch = (r.detach().sum(1) - total).abs() / c.detach().amax(1)
    return (eps * (4 + width / 2)).clamp_max(0.1 * eps**0.5) + 2 * mismatch


def _evaluate(cost: Tensor, log_r: Tensor, log_c: Tensor, column: Tensor) -> _Dual:
    """The dual at these potentials of the columns, and the sweep from it; two passes over the costs."""
    row = log_r - _log_sum_exp(column[:, None, :] - cost, 2)
    following = log_c - _log_sum_exp(row[:, :, None] - cost, 1)
    value = (log_r.exp() * row).sum(1) + (log_c.exp() * column).sum(1)
    # The column sums are c exp(column - following).
    wanted = log_c.detach().exp()
    off = (wanted * torch.expm1((column - following).detach())).abs().amax(1)
    return _Dual(column, row, following, value, off / wanted.amax(1))


def _log_sum_exp(x: Tensor, dim: int) -> Tensor:
    """As torch.logsumexp without subnormal numbers: they change no digit, and make exp 20 times slower."""
    largest = x.detach().amax(dim, keepdim=True)
    lowest = 0.9 * math.log(torch.finfo(x.dtype).tiny)
    return (x - largest).clamp_min(lowest).exp().sum(dim).log() + largest.squeeze(dim)


def _plan(cost: Tensor, here: _Dual) -> Tensor:
    """P, with 0 for subnormal numbers: they have too few digits for a logarithm, and slow products down."""
    exponent = here.row[:, :, None] + here.column[:, None, :] - cost
    smallest = math.log(torch.finfo(cost.dtype).tiny)
    return torch.where(exponent < smallest, 0, exponent.clamp_min(smallest).exp())


def _newton(cost: Tensor, log_r: Tensor, log_c: Tensor, here: _Dual, tight: Tensor) -> Transport:
    """Newton steps on the dual, each held against a Sinkhorn sweep.

    Before each step the potentials are moved into the costs: what is left are small numbers wherever P is not
    negligible, so that the marginals become exact to rounding even where gamma M has no digits left for it.
    """
    row, column = torch.zeros_like(log_r), torch.zeros_like(log_c)
    active = torch.ones_like(tight, dtype=torch.bool)
    for _ in range(NEWTON_STEPS):
        cost = cost - here.row[:, :, None] - here.column[:, None, :]
        row, column = row + here.row, column + here.column
        here = _evaluate(cost, log_r, log_c, torch.zeros_like(log_c))
        active = active & ~(here.violation <= tight)
        if not bool(active.any()):
            break
        step, usable = _newton_step(_plan(cost, here), log_c.exp())
        best = _evaluate(cost, log_r, log_c, here.following)
        reach = (step.amax(1) - step.amin(1))[:, None].clamp_min(1e-6)
        for ahead_step in (step, torch.log1p(reach) / reach * step):
            ahead = _evaluate(cost, log_r, log_c, ahead_step)
            best = ahead.where(usable & ahead.better(best), best)
        improved = active & best.better(here)
        here, active = best.where(improved, here), improved
    return Transport(_plan(cost, here), row + here.row, column + here.column, here.violation)


def _newton_step(plan: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The step of the column potentials (batch, n) and where it may be used (batch,).

    The Hessian of the dual, diag(P'1) - P' diag(1 / P1) P, has the ones in its kernel (a constant moved from
    the rows to the columns changes nothing), so a multiple of 11' is added.
    """
    sums = plan.sum(1)
    outer = (sums.mean(1) / sums.shape[1])[:, None, None]
    hessian = torch.diag_embed(sums) - plan.mT @ (plan / plan.sum(2, keepdim=True)) + outer
    factor, failed = torch.linalg.cholesky_ex(hessian)
    step = torch.cholesky_solve((wanted - sums)[:, :, None], factor)[:, :, 0]
    usable = (failed == 0) & torch.isfinite(step).all(1)
    return torch.where(usable[:, None], step, 0), usable
