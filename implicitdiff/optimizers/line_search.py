"""A batched line search: every sample looks for its own step length with the strong Wolfe conditions.

Points and directions (iterate.py) come in, the accepted points go out. Next: lbfgs.py, which uses it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from implicitdiff.optimizers.iterate import Point, System, dot
from implicitdiff.optimizers.limits import check_positive, check_whole


@dataclass(frozen=True)
class Wolfe:
    """Strong Wolfe conditions: f(t) <= f(0) + c1 t f'(0) and |f'(t)| <= c2 |f'(0)|.

    Attributes:
        decrease: c1.
        curvature: c2.
        trials: Most evaluations of one search.
    """

    decrease: float = 1e-4
    curvature: float = 0.9
    trials: int = 25

    def __post_init__(self) -> None:
        check_positive("Wolfe", "curvature", self.curvature, "a number between 0 and 1", 1.0)
        bound = min(0.5, self.curvature)
        check_positive("Wolfe", "decrease", self.decrease, "between 0 and 0.5 and below curvature", bound)
        check_whole("Wolfe", "trials", self.trials, 1)

    def search(
        self, system: System, point: Point, direction: Tensor, length: Tensor, pending: Tensor
    ) -> tuple[Tensor, Point, Tensor]:
        """Find a step for every pending sample.

        [low, high] brackets a step with both conditions: at low, f is low enough and falls steeply; at high, f is
        too high, not finite, or rises steeply. A cubic through both ends gives the next trial. Where f is flat to
        rounding, its slope decides instead (f'(t) <= (1 - 2 c1) |f'(0)|, the approximate Wolfe conditions).

        Args:
            system: Evaluates points.
            point: Where the samples stand.
            direction: Downhill directions (B, m); only those of pending samples count.
            length: The first step length to try (B,).
            pending: Who searches (B,).

        Returns:
            (moved (B,), point, endless (B,)): where no step has both conditions within the trials, the last one with
            the first condition alone; a sample that has none stays. Endless: f went on falling as far as was tried,
            so that it has no minimum that way. Cost: one reverse pass per trial. Residuals are
            against the scale at the beginning.

        Reference: Hager and Zhang, SIAM Journal on Optimization 16 (2005), section 4.
        """
        direction = torch.where(pending[:, None], direction, 0)
        slope = dot(point.gradient, direction)
        slack = torch.finfo(slope.dtype).eps ** 0.5 * point.value.abs()
        low = torch.zeros_like(length)
        low_value, low_slope = point.value, slope
        high = torch.full_like(length, torch.inf)
        high_value, high_slope = torch.full_like(length, torch.nan), torch.full_like(length, torch.nan)
        moved, result = torch.zeros_like(pending), point
        for trial_number in range(self.trials):
            step = torch.where(pending, length, 0)
            trial = system.trial(point.u + step[:, None] * direction, point)
            rate = dot(trial.gradient, direction)
            falls = trial.value <= point.value + self.decrease * length * slope
            flat = (length * slope.abs() <= slack) & (trial.value <= point.value + slack)
            low_enough = falls | (flat & (rate <= (1 - 2 * self.decrease) * slope.abs()))
            low_enough = pending & trial.finite & low_enough & (trial.u != point.u).any(1)
            found = low_enough & (rate.abs() <= self.curvature * slope.abs())
            short = low_enough & ~found & (rate < 0)
            far = pending & ~found & ~short
            result = trial.where(found | short, result)
            moved, pending = moved | found | short, pending & ~found
            if not bool(pending.any()):
                break
            low, low_value = torch.where(short, length, low), torch.where(short, trial.value, low_value)
            low_slope = torch.where(short, rate, low_slope)
            high, high_value = torch.where(far, length, high), torch.where(far, trial.value, high_value)
            high_slope = torch.where(far, rate, high_slope)
            inside = _cubic(low, low_value, low_slope, high, high_value, high_slope)
            if trial_number % 3 == 2:  # a bracket that shrinks from one side only is cut in half
                inside = 0.5 * (low + high)
            # The edge of the domain of f may be very near: log u with a small u.
            inside = torch.where(trial.finite, inside, low + 0.1 * (high - low))
            # Without an upper end: where the slope would vanish, if it went on as from 0 to here.
            ahead = low * slope / (slope - low_slope)
            ahead = torch.where(ahead > 0, torch.minimum(torch.maximum(ahead, 2 * low), 10 * low), 10 * low)
            length = torch.where(pending, torch.where(torch.isinf(high), ahead, inside), length)
        unbounded = moved & (result.value < -(torch.finfo(slope.dtype).max ** 0.5))
        return moved, result, unbounded | (moved & pending & torch.isinf(high))


def _cubic(
    low: Tensor, low_value: Tensor, low_slope: Tensor, high: Tensor, high_value: Tensor, high_slope: Tensor
) -> Tensor:
    """The minimiser of the cubic through two values and slopes, kept off the ends by a tenth; else the middle."""
    width = high - low
    mean = low_slope + high_slope - 3 * (high_value - low_value) / width
    root = (mean.square() - low_slope * high_slope).clamp_min(0).sqrt()
    place = high - width * (high_slope + root - mean) / (high_slope - low_slope + 2 * root)
    place = torch.minimum(torch.maximum(place, low + 0.1 * width), high - 0.1 * width)
    return torch.where(torch.isfinite(place), place, 0.5 * (low + high))
