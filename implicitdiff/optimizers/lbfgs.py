"""L-BFGS, batched: descent with the last few changes of the gradient in the place of H, without constraints.

A `System` (iterate.py) and a start come in, an `Outcome` goes out. Each sample has its own step length and its own
end, and no sample reads another. Next: line_search.py; augmented.py, which walks with it.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from implicitdiff.errors import OptionError
from implicitdiff.optimizers.iterate import Outcome, Point, System, dot, largest
from implicitdiff.optimizers.limits import (
    Callback,
    Watch,
    check_limits,
    check_whole,
    refuse_constraints,
    tolerances,
)
from implicitdiff.optimizers.line_search import Wolfe
from implicitdiff.optimizers.restoration import escape_small

Descend = Callable[[Point, Tensor, Tensor], tuple[Point, Tensor]]

# Iterations without a smaller residual or a smaller f after which a walk has reached rounding.
_PATIENCE = 50
# Steps after which the scales of the residual are computed anew.
_REFRESH = 10


class Memory:
    """The last pairs (s, y) of one walk; a sample that did not move has a pair that counts for nothing."""

    def __init__(self, size: int, like: Tensor) -> None:
        """No pairs yet, `size` at most, for vectors like (B, m)."""
        self._pairs: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=size)
        self.scale = like.new_zeros(like.shape[0])
        """s'y / y'y of the last pair (B,): the size of H^-1; 0 where there is none."""

    def push(self, s: Tensor, y: Tensor, moved: Tensor) -> None:
        """Keep the pair of each sample that moved and along which the gradient grew: s'y > 0.

        A sample without such a pair uses up a place too: what it remembers must not depend on the others.
        """
        product, size = dot(s, y), dot(y, y)
        floor = torch.finfo(s.dtype).eps * (dot(s, s) * size).sqrt()
        kept = moved & (product > floor) & torch.isfinite(size)
        s, y = torch.where(kept[:, None], s, 0), torch.where(kept[:, None], y, 0)
        self._pairs.append((s, y, torch.where(kept, 1 / product, 0)))
        self.scale = torch.where(kept, product / size, self.scale)

    def forget(self, samples: Tensor) -> None:
        """Drop all pairs of these samples (B,)."""
        if bool(samples.any()):
            for index, (s, y, weight) in enumerate(self._pairs):
                self._pairs[index] = s, y, torch.where(samples, 0, weight)
            self.scale = torch.where(samples, 0, self.scale)

    def direction(self, gradient: Tensor) -> Tensor:
        """-(approximate H^-1) gradient (B, m), by the two-loop recursion: O(B m) per pair.

        Reference: Nocedal and Wright, Numerical Optimization, 2nd edition, algorithm 7.4.
        """
        q, weights = gradient, []
        for s, y, weight in reversed(self._pairs):
            along = weight * dot(s, q)
            q = q - along[:, None] * y
            weights.append(along)
        q = torch.where(self.scale > 0, self.scale, 1)[:, None] * q
        for (s, y, weight), along in zip(self._pairs, reversed(weights), strict=True):
            q = q + (along - weight * dot(y, q))[:, None] * s
        return -q


@dataclass(frozen=True)
class LBFGS:
    """L-BFGS for min f(u) without constraints, on a whole batch.

    u goes to u - t B D_u f, B the approximate inverse of H from the last `history` steps, t with the strong Wolfe
    conditions. No matrix is formed, so a step costs a few products with vectors beside one or two gradients: this
    is the method for many variables without structure. It converges linearly, so u has the digits that `tol` asks
    for, where Newton's method brings rounding; `Chain((LBFGS(), Newton()))` adds them.

    A `Progress` far from the end has residuals against scales of up to ten steps before.

    Attributes:
        max_iter: Most steps of one sample.
        tol: Relative tolerance of the residual; None: that of the layer, sqrt(eps) of the dtype by default.
        history: Pairs kept, (2 history, B, m) numbers.
        restarts: How often a stopped sample may leave a saddle or a maximum along negative curvature (looked for
            up to 512 variables); 0: never.
        time_limit: Seconds for the whole batch, or None. Samples that are not done then are NOT_CONVERGED.
        callback: Called with a `Progress` before each iteration, or None.
        line_search: The conditions on a step.

    Reference: Nocedal and Wright, Numerical Optimization, 2nd edition, section 7.2.
    """

    max_iter: int = 1000
    tol: float | None = None
    history: int = 10
    restarts: int = 3
    time_limit: float | None = None
    callback: Callback | None = None
    line_search: Wolfe = field(default_factory=Wolfe)

    def __post_init__(self) -> None:
        for option, least in (("max_iter", 1), ("history", 1), ("restarts", 0)):
            check_whole("LBFGS", option, getattr(self, option), least)
        check_limits("LBFGS", self.tol, self.time_limit, self.callback)
        if not isinstance(self.line_search, Wolfe):
            raise OptionError(f"LBFGS(line_search=...) must be a Wolfe(...), got {self.line_search!r}")

    def minimize(self, system: System, start: Tensor, tol: float) -> Outcome:
        """Walk from `start` (B, m) until every sample is optimal, stuck, or out of iterations or time.

        Args:
            system: The plan with its inputs; B > 0.
            start: Start points.
            tol: The tolerance of the layer, used if `self.tol` is None.

        Returns:
            Outcome. It makes no judgement: the caller holds the points against the optimality rule.

        Raises:
            OptionError: The problem has constraints.
        """
        refuse_constraints("LBFGS", system)
        tol = tol if self.tol is None else self.tol
        watch = Watch(self.time_limit, self.callback)
        point = system.evaluate(start, start.new_zeros((start.shape[0], 0)))
        goal = tolerances(point, tol)
        return past_saddles(
            system,
            point,
            lambda at, steps, active: self.descend(system, at, steps, active, goal, watch),
            self.restarts,
            self.max_iter,
            tol,
            watch,
        )

    def descend(
        self, system: System, point: Point, iterations: Tensor, active: Tensor, goal: Tensor, watch: Watch
    ) -> tuple[Point, Tensor]:
        """One walk downhill of the active samples, to the residual `goal` (B,), without looking back.

        Returns:
            (point, iterations): frozen samples have the bits they came with.
        """
        memory = Memory(self.history, point.u)
        steepest, failures = largest(point.gradient), torch.zeros_like(iterations)
        best, lowest, waited = point.residual, point.value, torch.zeros_like(iterations)
        eps = torch.finfo(point.u.dtype).eps
        count = 0
        while True:
            # The scales of the residual cost more than the gradient, and are needed near the end only. They may have
            # grown on the way, so they are looked at now and then.
            due = active & ((point.residual <= 4 * goal) | (count % _REFRESH == 0))
            point = point if count == 0 else system.measured(point, due)
            # A gradient that fell this far is held against the linear part of D_u f too.
            candidates = active & (point.residual > goal)
            if count > 0:
                candidates = candidates & (largest(point.gradient) <= goal * steepest)
            point = system.with_linear_part(point, candidates)
            active = active & (point.residual > goal) & (iterations < self.max_iter)
            active = active & (failures < 2) & (waited < _PATIENCE)
            if not watch.goes_on(point.residual, active):
                return point, iterations
            direction = memory.direction(point.gradient)
            slope = dot(direction, point.gradient)
            wild = active & ~((slope < 0) & torch.isfinite(direction).all(1))
            memory.forget(wild)
            fresh = memory.scale == 0
            direction = torch.where(fresh[:, None], -point.gradient, direction)
            size = largest(direction)
            # Nothing is known about H yet: a step that changes u by its own size at most.
            cautious = torch.minimum(torch.ones_like(size), 0.5 * (1 + largest(point.u)) / size)
            length = torch.where(fresh, cautious, torch.ones_like(size))
            moved, trial, endless = self.line_search.search(system, point, direction, length, active)
            memory.push(trial.u - point.u, trial.gradient - point.gradient, moved)
            stuck = active & ~moved
            memory.forget(stuck)
            # The second failure in a row is that of the plain gradient.
            failures = torch.where(stuck, failures + 1 + fresh, torch.where(moved, 0, failures))
            failures = torch.where(endless, 2, failures)
            point, iterations, count = trial.where(moved, point), iterations + moved, count + 1
            steepest = torch.maximum(steepest, largest(point.gradient))
            gains = (point.residual < 0.9 * best) | (point.value < lowest - 10 * eps * lowest.abs())
            best, lowest = torch.minimum(best, point.residual), torch.minimum(lowest, point.value)
            waited = torch.where(gains, 0, waited + moved)


def past_saddles(
    system: System,
    point: Point,
    descend: Descend,
    restarts: int,
    max_iter: int,
    tol: float,
    watch: Watch,
) -> Outcome:
    """Walk down, and on from where the walk ended at a saddle or a maximum, `restarts` times at most.

    Args:
        system: The plan with its inputs.
        point: The evaluated start.
        descend: (point, iterations, active) to (point, iterations).
        restarts: Most times that a sample is moved on.
        max_iter: Most steps of one sample.
        tol: The relative tolerance.
        watch: The clock: when the time is up, nobody is moved on.

    Returns:
        Outcome.
    """
    iterations = torch.zeros(point.u.shape[0], dtype=torch.int64, device=point.u.device)
    active = point.finite
    for restart in range(restarts + 1):
        point, iterations = descend(point, iterations, active)
        if restart == restarts or watch.over():
            break
        settled = point.finite & (iterations < max_iter) & (point.residual <= tol)
        point, active = escape_small(system, point, settled & (active | (restart == 0)), tol)
        if not bool(active.any()):
            break
    return Outcome(point, iterations)
