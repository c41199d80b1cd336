"""A primal-dual interior-point method for a whole batch, the optimizer of problems with inequalities or bounds.

A `Limited` and start points come in, a `LimitedOutcome` goes out: u with all multipliers, on an active set where one
was found. Next: kernels.py solves for the steps, polish.py ends on the active set, limited_forward.py judges.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from implicitdiff.errors import OptionError
from implicitdiff.optimizers.iterate import Outcome, System
from implicitdiff.optimizers.kernels import Kernel, Residual, kernel_of
from implicitdiff.optimizers.limited import Limited
from implicitdiff.optimizers.limits import check_limits, check_positive, check_whole
from implicitdiff.optimizers.newton import Newton
from implicitdiff.optimizers.polish import polished


@dataclass(frozen=True)
class LimitedOutcome:
    """Where an optimizer for inequalities stopped.

    Attributes:
        u: (B, m).
        multipliers: (lam, mu), (B, p + q), mu <= 0; None where the optimizer knows none.
        iterations: steps (B,) int64.
    """

    u: Tensor
    multipliers: Tensor | None
    iterations: Tensor


@dataclass(frozen=True)
class _State:
    """An interior point of every sample: slacks of rows and bounds, and multipliers in the textbook's sign (>= 0).

    `low` and `high` are u - lower and upper - u, infinite where there is no bound; `z_low` and `z_high` are 0 there.
    """

    u: Tensor
    lam: Tensor
    slack: Tensor
    z: Tensor
    z_low: Tensor
    z_high: Tensor

    def moved(self, step: _State, primal: Tensor, dual: Tensor) -> _State:
        """This point and `primal`, `dual` (B,) times a step."""
        p, d = primal[:, None], dual[:, None]
        return _State(
            self.u + p * step.u,
            self.lam + d * step.lam,
            self.slack + p * step.slack,
            self.z + d * step.z,
            self.z_low + d * step.z_low,
            self.z_high + d * step.z_high,
        )

    def where(self, mask: Tensor, other: _State) -> _State:
        """This point in the samples of `mask`, `other` elsewhere."""
        pairs = ((getattr(self, name), getattr(other, name)) for name in _FIELDS)
        return _State(*(torch.where(mask[:, None], a, b) for a, b in pairs))

    def at(self, keep: Tensor) -> _State:
        """Some samples."""
        return _State(*(getattr(self, name)[keep] for name in _FIELDS))

    def put(self, keep: Tensor, other: _State) -> _State:
        """This state with some samples replaced."""
        return _State(*(getattr(self, name).index_copy(0, keep, getattr(other, name)) for name in _FIELDS))

    @property
    def multipliers(self) -> Tensor:
        """(lam, mu) in the library's sign."""
        return torch.cat([self.lam, -self.z], 1)


_FIELDS = ("u", "lam", "slack", "z", "z_low", "z_high")


@dataclass(frozen=True)
class _Box:
    """The bounds of the samples still iterated."""

    lower: Tensor
    upper: Tensor
    has_low: Tensor
    has_high: Tensor
    pinned: Tensor

    @staticmethod
    def of(lower: Tensor, upper: Tensor) -> _Box:
        """From bounds that may be infinite; equal ones pin their entry."""
        pinned = lower >= upper
        return _Box(lower, upper, torch.isfinite(lower) & ~pinned, torch.isfinite(upper) & ~pinned, pinned)

    def at(self, keep: Tensor) -> _Box:
        """Some samples."""
        return _Box(
            *(getattr(self, name)[keep] for name in ("lower", "upper", "has_low", "has_high", "pinned"))
        )

    def slacks(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """(u - lower, upper - u), 1 where there is no bound."""
        return torch.where(self.has_low, u - self.lower, 1.0), torch.where(self.has_high, self.upper - u, 1.0)

    def inside(self, u: Tensor) -> Tensor:
        """u pushed away from its bounds: by a tenth of their distance, or of 1 + |bound|."""
        room = torch.where(self.has_low & self.has_high, 0.1 * (self.upper - self.lower), torch.inf)
        low = self.lower + torch.minimum(room, 0.1 * (1 + self.lower.abs()))
        high = self.upper - torch.minimum(room, 0.1 * (1 + self.upper.abs()))
        u = torch.where(self.has_low, torch.maximum(u, low), u)
        u = torch.where(self.has_high, torch.minimum(u, high), u)
        return torch.where(self.pinned, self.lower, u)


@dataclass(frozen=True)
class InteriorPoint:
    """Mehrotra's predictor-corrector method for min f(u) s.t. h(u) = 0, g(u) <= 0, lower <= u <= upper, on a batch.

    With slacks s of g and of the bounds and multipliers z >= 0, s_i z_i is led to 0 along a central path. A step solves

        [[H + W, -A'], [-A, -D]] (du, dlam) = ...,   W = z / s of the bounds,   D = s / z of the rows of g, 0 for h,

    twice with one factorisation: by the plan, with the structure of H, or with constant matrices where the operations
    show a quadratic program. Each sample has its own step lengths and stopping time. Near the end the active set is
    read off the pairs (s, z) and Newton's method on it (equalities alone) brings u to rounding; where that contradicts
    the set (a slack or a multiplier of the wrong sign) the path is followed further.

    For convex problems. On others it may end at a saddle, or not at all, and the status says so.

    Attributes:
        max_iter: most steps of one sample.
        tol: relative tolerance of residuals and of complementarity where no active set is found; None: 1e-9 in float64,
            1e-5 in float32.
        polish: the complementarity at which an active set is first tried.

    Cost: one factorisation and two solves a step, 8 to 20 steps.

    Reference: Nocedal and Wright, Numerical Optimization, 2nd edition, sections 14.2, 16.6 and 19.3.
    """

    max_iter: int = 80
    tol: float | None = None
    polish: float = 1e-4

    def __post_init__(self) -> None:
        check_whole("InteriorPoint", "max_iter", self.max_iter, 1)
        check_limits("InteriorPoint", self.tol, None, None)
        check_positive("InteriorPoint", "polish", self.polish, "a positive number")

    def minimize(self, system: System, start: Tensor, tol: float) -> Outcome:
        """Without inequalities and bounds it is Newton's method."""
        return Newton(max_iter=self.max_iter).minimize(system, start, tol)

    def minimize_limited(self, limited: Limited, start: Tensor, tol: float) -> LimitedOutcome:
        """Solve every sample from `start` (B, m), B > 0; the start need not be feasible.

        Args:
            limited: the limits of the call.
            start: start points; they are pushed inside the bounds.
            tol: the tolerance of the layer.

        Returns:
            LimitedOutcome, without a judgement.
        """
        if start.shape[1] == 0:
            raise OptionError("InteriorPoint needs a variable")
        goal = self.tol or (1e-9 if start.dtype == torch.float64 else 1e-5)
        kernel = kernel_of(limited)
        box = _Box.of(*limited.bounds)
        state = _begin(kernel, box, start, sum(map(math.prod, limited.multiplier_shapes)))
        result = state
        iterations = torch.zeros(start.shape[0], dtype=torch.int64, device=start.device)
        index = torch.arange(start.shape[0], device=start.device)
        done_u, done_multipliers = state.u.clone(), state.multipliers.clone()
        finished = torch.zeros_like(index, dtype=torch.bool)
        tried = torch.full_like(state.u[:, 0], self.polish)
        for _ in range(self.max_iter):
            residual = kernel.residual(state.u, state.multipliers)
            error, gap = _errors(residual, state, box)
            closed = torch.maximum(error, gap) <= goal
            ready = (torch.maximum(error.sqrt(), gap) <= tried) | closed
            # an attempt costs about a step whatever the number of samples: rather wait until most are ready
            if bool(ready.all()) or bool(closed.any()) or int(ready.sum()) >= 0.7 * len(ready):
                # only the samples that are ready pay for the attempt
                some = ready.nonzero()[:, 0]
                narrowed = limited.narrowed(index[some])
                at = state.at(some)
                slack_low, slack_high = box.at(some).slacks(at.u)
                found = polished(
                    narrowed,
                    at.u,
                    at.multipliers,
                    (slack_low, slack_high, at.slack),
                    (at.z_low, at.z_high, at.z),
                )
                take = found.verified | closed[some]
                u = torch.where(found.verified[:, None], found.u, at.u)
                multipliers = torch.where(found.verified[:, None], found.multipliers, at.multipliers)
                done_u[index[some[take]]] = u[take]
                done_multipliers[index[some[take]]] = multipliers[take]
                finished[index[some[take]]] = True
                tried = tried.index_copy(0, some, 0.01 * gap[some])
                closed = closed.index_fill(0, some[take], True)
            going = ~closed & residual.finite
            if not bool(going.any()):
                break
            if bool((~going).any()) and int(going.sum()) <= 0.75 * len(going):
                keep = going.nonzero()[:, 0]
                result = result.put(index, state)
                kernel, box, state, index = kernel.narrowed(keep), box.at(keep), state.at(keep), index[keep]
                residual, tried, going = residual.at(keep), tried[keep], going[keep]
            moved = _step(kernel, box, state, residual)
            state = moved.where(going, state)
            iterations[index] += going
        result = result.put(index, state)
        u = torch.where(finished[:, None], done_u, result.u)
        multipliers = torch.where(finished[:, None], done_multipliers, result.multipliers)
        return LimitedOutcome(u, multipliers, iterations)


def _begin(kernel: Kernel, box: _Box, start: Tensor, count: int) -> _State:
    """Slacks and multipliers of the size of what they stand against."""
    u = box.inside(start)
    probe = kernel.residual(u, start.new_zeros((u.shape[0], count)))
    size = probe.gradient.abs().amax(1, keepdim=True)
    size = torch.where(torch.isfinite(size) & (size > 1e-3), size, 1.0).clamp(max=1e3)
    slack = -probe.rows
    if slack.shape[1]:
        slack = torch.maximum(slack, 0.1 * slack.abs().amax(1, keepdim=True).clamp(min=1.0))
    low, high = box.slacks(u)
    return _State(
        u,
        torch.zeros_like(probe.equality),
        slack,
        size / slack,
        torch.where(box.has_low, size / low, 0.0),
        torch.where(box.has_high, size / high, 0.0),
    )


def _errors(residual: Residual, state: _State, box: _Box) -> tuple[Tensor, Tensor]:
    """(relative residual, relative complementarity), (B,)."""
    gradient = torch.where(box.pinned, 0.0, residual.gradient - state.z_low + state.z_high)
    scale = torch.stack([residual.scale, state.z_low.amax(1), state.z_high.amax(1)]).amax(0)
    tiny = torch.finfo(scale.dtype).tiny
    dual = gradient.abs().amax(1) / scale.clamp(min=tiny)
    size = 1 + state.u.abs().amax(1)
    primal = torch.zeros_like(dual)
    for rows in (residual.equality, residual.rows + state.slack):
        if rows.shape[1]:
            primal = torch.maximum(primal, rows.abs().amax(1) / size)
    low, high = box.slacks(state.u)
    products = torch.cat([state.slack * state.z, low * state.z_low, high * state.z_high], 1)
    value = (scale * size).clamp(min=tiny)
    return torch.maximum(dual, primal), products.amax(1) / value


def _step(kernel: Kernel, box: _Box, state: _State, residual: Residual) -> _State:
    """One predictor-corrector step."""
    low, high = box.slacks(state.u)
    weight = state.z_low / low + state.z_high / high
    size = weight.amax(1, keepdim=True).clamp(min=1.0)
    weight = torch.where(box.pinned, 1e12 * size, weight)
    corner = state.slack / state.z
    solve = kernel.factor(state.u, state.multipliers, weight, corner)
    violated = residual.rows + state.slack
    slope = torch.where(box.pinned, 0.0, residual.gradient)

    def direction(row: Tensor, down: Tensor, up: Tensor) -> _State:
        # row, down, up: what s z + s dz + z ds has to become
        top = -slope + state.z_low - state.z_high + down / low - up / high
        top = torch.where(box.pinned, 0.0, top)
        bottom = torch.cat([residual.equality, row / state.z + violated], 1)
        w, s = solve(top, bottom)
        p = residual.equality.shape[1]
        z = -s[:, p:]
        return _State(
            w,
            s[:, :p],
            (row - state.slack * z) / state.z,
            z,
            torch.where(box.has_low, (down - state.z_low * w) / low, 0.0),
            torch.where(box.has_high, (up + state.z_high * w) / high, 0.0),
        )

    products = (state.slack * state.z, low * state.z_low, high * state.z_high)
    count = state.slack.shape[1] + box.has_low.sum(1) + box.has_high.sum(1)
    count = count.clamp(min=1)
    mean = sum(product.sum(1) for product in products) / count
    first = direction(-products[0], -products[1], -products[2])
    primal, dual = _lengths(box, state, first, low, high, 1.0)
    ahead = state.moved(first, primal, dual)
    low_ahead, high_ahead = box.slacks(ahead.u)
    left = (
        (ahead.slack * ahead.z).sum(1) + (low_ahead * ahead.z_low).sum(1) + (high_ahead * ahead.z_high).sum(1)
    ) / count
    centring = (left / mean.clamp(min=torch.finfo(mean.dtype).tiny)).clamp(0, 1) ** 3
    target = (centring * mean)[:, None]
    second = direction(
        target - products[0] - first.slack * first.z,
        torch.where(box.has_low, target - products[1] - first.u * first.z_low, 0.0),
        torch.where(box.has_high, target - products[2] + first.u * first.z_high, 0.0),
    )
    fraction = (1 - mean.clamp(max=0.1)).clamp(0.9, 0.995) if not kernel.exact else 0.995
    # one length for both: with curvature a residual of D_u L is left where they differ
    length = torch.minimum(*_lengths(box, state, second, low, high, fraction))
    if kernel.exact:
        return state.moved(second, length, length)
    merit = _Merit(kernel, box, target)
    before = merit.at(state)
    moved, taken = merit.search(state, second, length, before, 3)
    if bool(taken.all()):
        return moved
    plain = direction(
        target - products[0],
        torch.where(box.has_low, target - products[1], 0.0),
        torch.where(box.has_high, target - products[2], 0.0),
    )
    length = torch.minimum(*_lengths(box, state, plain, low, high, fraction))
    other, _ = merit.search(state, plain, length, before, 30)
    return moved.where(taken, other)


@dataclass(frozen=True)
class _Merit:
    """|F|^2 of the perturbed first-order conditions F = 0, which a Newton step reduces."""

    kernel: Kernel
    box: _Box
    target: Tensor

    def at(self, state: _State) -> Tensor:
        """(B,), infinite outside of the domain."""
        residual = self.kernel.residual(state.u, state.multipliers)
        low, high = self.box.slacks(state.u)
        parts = torch.cat(
            [
                torch.where(self.box.pinned, 0.0, residual.gradient - state.z_low + state.z_high),
                residual.equality,
                residual.rows + state.slack,
                state.slack * state.z - self.target,
                torch.where(self.box.has_low, low * state.z_low - self.target, 0.0),
                torch.where(self.box.has_high, high * state.z_high - self.target, 0.0),
            ],
            1,
        )
        return torch.where(residual.finite, (parts * parts).sum(1), torch.inf)

    def search(
        self, state: _State, step: _State, length: Tensor, before: Tensor, halvings: int
    ) -> tuple[_State, Tensor]:
        """The first of length, length / 2, ... that reduces |F|^2, and where there is one (B,)."""
        taken = torch.zeros_like(before, dtype=torch.bool)
        result = state
        for _ in range(halvings):
            trial = state.moved(step, length, length)
            after = self.at(trial)
            accepted = ~taken & (after <= (1 - 1e-4 * length) * before)
            result, taken = trial.where(accepted, result), taken | accepted
            if bool(taken.all()):
                break
            length = torch.where(taken, length, length / 2)
        return result, taken


def _lengths(
    box: _Box, state: _State, step: _State, low: Tensor, high: Tensor, fraction: float | Tensor
) -> tuple[Tensor, Tensor]:
    """The longest steps, at most 1, that keep all slacks and all multipliers positive."""

    def longest(values: Tensor, moves: Tensor) -> Tensor:
        ratio = torch.where(moves < 0, -values / moves, torch.inf)
        return ratio.amin(1) if ratio.shape[1] else values.new_full(values.shape[:1], torch.inf)

    primal = torch.stack(
        [
            longest(state.slack, step.slack),
            longest(low, torch.where(box.has_low, step.u, 0.0)),
            longest(high, torch.where(box.has_high, -step.u, 0.0)),
        ]
    ).amin(0)
    dual = torch.stack(
        [
            longest(state.z, step.z),
            longest(state.z_low, step.z_low),
            longest(state.z_high, step.z_high),
        ]
    ).amin(0)
    return (fraction * primal).clamp(max=1.0), (fraction * dual).clamp(max=1.0)
