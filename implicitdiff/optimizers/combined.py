"""Optimizers made of optimizers: one after the other (`Chain`), and the best of several starts (`MultiStart`).

A `System` (iterate.py) and a start come in, an `Outcome` goes out; the walks are those of the inner optimizers.
Next: default.py, which uses `Chain`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from implicitdiff.errors import OptionError
from implicitdiff.optimizers.iterate import Optimizer, Outcome, Point, System, largest
from implicitdiff.optimizers.limits import Callback, Watch, check_limits, check_positive, check_whole
from implicitdiff.torch_private import HOST


@dataclass(frozen=True)
class Chain:
    """Several optimizers, each from where the one before it stopped.

    `Chain((LBFGS(), Newton()))` walks without matrices and lets Newton's method bring the last digits, or finish
    what L-BFGS could not. Samples that an optimizer finds optimal it leaves as they are, but for the `extra` steps
    of Newton's method.

    Attributes:
        stages: The optimizers, first to last.
        time_limit: Seconds after which no further stage is begun, or None. The first always runs.
        callback: Called with a `Progress` before each stage, or None.
    """

    stages: tuple[Optimizer, ...]
    time_limit: float | None = None
    callback: Callback | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.stages, tuple) or not self.stages:
            raise OptionError(f"Chain(stages=...) must be a tuple of optimizers, got {self.stages!r}")
        for stage in self.stages:
            check_optimizer("Chain", "stages", stage)
        check_limits("Chain", None, self.time_limit, self.callback)

    def minimize(self, system: System, start: Tensor, tol: float) -> Outcome:
        """Run the stages; iterations add up.

        Args:
            system: The plan with its inputs; B > 0.
            start: Start points (B, m).
            tol: The tolerance of the layer, for stages that have none of their own.

        Returns:
            Outcome of the last stage; where it left no finite point, that of the one before.
        """
        watch = Watch(self.time_limit, self.callback)
        outcome: Outcome | None = None
        for stage in self.stages:
            if outcome is None:
                begin = system.evaluate(start, system.estimate_multipliers(start)) if self.callback else None
                if begin is not None:
                    watch.goes_on(begin.residual, begin.finite)
                outcome = stage.minimize(system, start, tol)
                continue
            if not watch.goes_on(outcome.point.residual, outcome.point.finite):
                break
            found = stage.minimize(system, outcome.point.u, tol)
            outcome = Outcome(
                found.point.where(found.point.finite, outcome.point), outcome.iterations + found.iterations
            )
        assert outcome is not None
        return outcome


@dataclass(frozen=True)
class MultiStart:
    """The best of several starts, per sample, for problems with several minima.

    The first start is the given one; the others are it plus spread (1 + |u|_inf) z with z standard normal, the same
    z for every sample, so that a sample's answer does not depend on its place in the batch. z comes from a
    generator of its own on the host: torch's global generators are neither read nor moved.

    Of the starts that end optimal the one with the lowest f wins, the earliest of those that differ by rounding
    only; where none ends optimal, the one with the smallest residual.

    Attributes:
        inner: The optimizer of every start.
        starts: How many, the given one included.
        seed: Of the generator.
        spread: How far from the given start.
        time_limit: Seconds after which no further start is begun, or None. The first always runs.
        callback: Called with a `Progress` before each start (iteration: its number; residual: the best so far; the
            first time infinite), or None.

    Iterations are those of the winning start. Cost: `starts` times that of `inner`.
    """

    inner: Optimizer
    starts: int = 8
    seed: int = 0
    spread: float = 1.0
    time_limit: float | None = None
    callback: Callback | None = None

    def __post_init__(self) -> None:
        check_optimizer("MultiStart", "inner", self.inner)
        check_whole("MultiStart", "starts", self.starts, 1)
        check_whole("MultiStart", "seed", self.seed, 0)
        check_positive("MultiStart", "spread", self.spread)
        check_limits("MultiStart", None, self.time_limit, self.callback)

    def minimize(self, system: System, start: Tensor, tol: float) -> Outcome:
        """Run all starts, one after the other, and keep the best of each sample.

        Args:
            system: The plan with its inputs; B > 0.
            start: Start points (B, m).
            tol: The tolerance of the layer, by which a start counts as optimal.

        Returns:
            Outcome.
        """
        watch = Watch(self.time_limit, self.callback)
        everyone = torch.ones(start.shape[0], dtype=torch.bool, device=start.device)
        watch.goes_on(torch.full_like(start[:, :1].sum(1), torch.inf), everyone)
        best = _settled(system, self.inner.minimize(system, start, tol), tol)
        generator = torch.Generator(HOST).manual_seed(self.seed)
        for _ in range(self.starts - 1):
            noise = torch.randn(start.shape[1], generator=generator, dtype=torch.float64, device=HOST).to(
                start
            )
            if not watch.goes_on(best.point.residual, everyone):
                break
            size = self.spread * (1 + largest(start))
            found = _settled(system, self.inner.minimize(system, start + size[:, None] * noise, tol), tol)
            better = _better(found.point, best.point, tol)
            best = Outcome(
                found.point.where(better, best.point),
                torch.where(better, found.iterations, best.iterations),
            )
        return best


def check_optimizer(name: str, option: str, value: object) -> None:
    """Raise OptionError unless the value is an optimizer."""
    if not callable(getattr(value, "minimize", None)):
        raise OptionError(
            f"{name}({option}=...) needs optimizers, as Newton(), but {value!r} has no minimize"
        )


def _settled(system: System, outcome: Outcome, tol: float) -> Outcome:
    """The outcome with residuals as the optimality rule has them."""
    point = system.with_linear_part(outcome.point, outcome.point.finite & (outcome.point.residual > tol))
    return Outcome(point, outcome.iterations)


def _better(found: Point, best: Point, tol: float) -> Tensor:
    """Where `found` beats `best` (B,)."""
    optimal, was = found.finite & (found.residual <= tol), best.finite & (best.residual <= tol)
    margin = 1e3 * torch.finfo(found.value.dtype).eps * best.value.abs()
    lower = found.value < best.value - margin
    nearer = found.finite & ~(best.finite & (best.residual <= found.residual))
    return torch.where(optimal & was, lower, torch.where(was, False, optimal | nearer))
