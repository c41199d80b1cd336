"""I-MLE: perturb-and-MAP samples, and Blackbox' difference at each of them.

In: costs and a noise distribution. Out: the mean of S solutions, and the mean of S differences of solutions. Next file
to read: ``adaptive_imle.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from implicitdiff.combinatorial.estimator import Estimator, Pass, Saved
from implicitdiff.combinatorial.estimators.blackbox import positive
from implicitdiff.combinatorial.noise import Noise
from implicitdiff.errors import OptionError


def repeated(w: Tensor, samples: int) -> Tensor:
    """(B, *shape) as (B, S, *shape)."""
    return w.unsqueeze(1).expand(-1, samples, *w.shape[1:])


def perturb_and_map(run: Pass, w: Tensor, noise: Noise | None, samples: int) -> tuple[Tensor, Tensor, Tensor]:
    """(mean of y_s, e_s, y_s) with y_s = y(w - e_s); in evaluation or without noise e = 0 and there is one sample.

    The noise is subtracted, which adds it to theta = -w: with Gumbel noise a one-hot y is a sample of softmax(-w).
    """
    if noise is None or not run.training:
        y = run.oracle(w)
        return y, torch.zeros_like(w).unsqueeze(1), y.clone().unsqueeze(1)
    many = repeated(w, samples)
    e = noise.draw(many, run.generator)
    solutions = run.oracle.many(many - e)
    return solutions.mean(1), e, solutions


def check_samples(samples: int, owner: str) -> None:
    """Raise OptionError unless samples is a positive integer."""
    if samples < 1:
        raise OptionError(f"samples={samples} of {owner}: expected a positive integer")


@dataclass(frozen=True)
class IMLE(Estimator):
    """dl/dw = mean over s of (y(w - e_s + lam g) - y(w - e_s)) / lam (Niepert et al., NeurIPS 2021, algorithm 1).

    Forward: the mean of y(w - e_s), s = 1..S, in evaluation y(w). The shape of the output does not depend on S; g is
    the gradient at the mean. 2 S solver calls a sample and step, S where g = 0.

    Attributes:
        lam: > 0; published 10, 100, 1000.
        noise: `SumOfGamma(k, tau)` for solutions with k ones, `Gumbel(tau)` for one-hot ones, any other, or None.
        samples: S.
        scale: divide by lam. The paper leaves the factor to the learning rate: scale=False.
    """

    lam: float
    noise: Noise | None = None
    samples: int = 1
    scale: bool = True

    def __post_init__(self) -> None:
        positive("lam", self.lam, self.name)
        check_samples(self.samples, self.name)

    @property
    def draws(self) -> int:
        """Samples drawn in training: without noise they are all the same, and there is one."""
        return 1 if self.noise is None else self.samples

    @property
    def formula(self) -> str:
        """See `Estimator`."""
        return (
            "dl/dw = mean of y(w - e_s + lam g) - y(w - e_s)"
            + (", divided by lam" if self.scale else "")
            + f"; lam = {self.lam:.3g}"
        )

    @property
    def calls(self) -> tuple[int, int]:
        """See `Estimator`."""
        return (self.draws, self.draws)

    def forward(self, run: Pass, w: Tensor) -> tuple[Tensor, ...]:
        """(mean, e, samples)."""
        return perturb_and_map(run, w, self.noise, self.samples)

    def vjp(self, run: Pass, w: Tensor, y: Tensor, saved: Saved, g: Tensor) -> Tensor:
        """The mean difference."""
        e, solutions = saved
        shifts = repeated(self.lam * g, e.shape[1])
        difference = moved_samples(run, w, e, solutions, shifts) - solutions
        return difference.mean(1) / (self.lam if self.scale else 1.0)


def moved_samples(run: Pass, w: Tensor, e: Tensor, solutions: Tensor, shifts: Tensor) -> Tensor:
    """y(w - e_s + shift_s) for all (B, S, *shape)."""
    base = (repeated(w, e.shape[1]) - e).flatten(0, 1)
    found = run.oracle.moved(base, solutions.flatten(0, 1), shifts.flatten(0, 1))
    return found.reshape(solutions.shape)


__all__ = ["IMLE", "check_samples", "moved_samples", "perturb_and_map", "repeated"]
