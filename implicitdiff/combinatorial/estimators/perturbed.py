"""Perturbed optimisers: the expected solution under noise, which has an exact Jacobian.

In: costs. Out: the mean of M solutions, and a score-function estimate of the derivative of the expectation. Next file
to read: ``fenchel_young.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from implicitdiff.combinatorial.checks import name_samples
from implicitdiff.combinatorial.estimator import Estimator, Pass, Saved
from implicitdiff.combinatorial.estimators.blackbox import positive
from implicitdiff.combinatorial.estimators.imle import check_samples, repeated
from implicitdiff.combinatorial.noise import gumbel, normal
from implicitdiff.combinatorial.oracle import Oracle
from implicitdiff.errors import InputError, OptionError

NOISES = ("normal", "gumbel")


@dataclass(frozen=True)
class Smoothing:
    """w_m = w - sigma Z_m, or w * exp(sigma Z_m - sigma^2 / 2), and the weights of the score function.

    With density exp(-nu(Z)) the derivative of E f(w - sigma Z) is -E f nu'(Z) / sigma: nu'(Z) = Z for normal noise,
    1 - exp(-Z) for Gumbel. Multiplicative: E f Z / (sigma w).

    Attributes:
        sigma: > 0.
        samples: M.
        noise: "normal" or "gumbel".
        multiplicative: None: where the solver's domain is not "any".
    """

    sigma: float
    samples: int
    noise: str
    multiplicative: bool | None

    def multiplies(self, oracle: Oracle) -> bool:
        """Whether the noise keeps signs, for this solver.

        Raises:
            OptionError: Gumbel noise has no multiplicative form.
        """
        multiplies = oracle.keeps_signs if self.multiplicative is None else self.multiplicative
        if multiplies and self.noise != "normal":
            raise OptionError(
                "multiplicative noise has to be normal; Gumbel noise needs multiplicative=False"
            )
        return multiplies

    def draw(self, oracle: Oracle, w: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """(w_m, score_m), each (B, M, *shape); the derivative of the mean of f(w_m) is the mean of f(w_m) score_m."""
        many = repeated(w, self.samples)
        if self.multiplies(oracle):
            zero = (w == 0).flatten(1).any(1)
            if zero.any():
                raise InputError(
                    f"multiplicative noise does not move costs of zero, in {name_samples(zero)} of {len(w)}: use "
                    "multiplicative=False, or positive costs"
                )
            z = normal(many, generator)
            return many * torch.exp(self.sigma * z - self.sigma**2 / 2), z / (self.sigma * many)
        z = normal(many, generator) if self.noise == "normal" else gumbel(many, generator)
        score = z if self.noise == "normal" else 1 - torch.exp(-z)
        return many - self.sigma * z, -score / self.sigma


@dataclass(frozen=True)
class Perturbed(Estimator):
    """Forward (1/M) sum of y(w_m), w_m = w - sigma Z_m; backward (1/M) sum of <y_m, g> times the score of w_m
    (Berthet et al., NeurIPS 2020): -Z_m / sigma for normal noise, -(1 - exp(-Z_m)) / sigma for Gumbel.

    The gradient is an unbiased estimate of that of E y(w - sigma Z), not of a discrete solution's. In evaluation the
    forward is y(w); its gradient, if asked for, is that of the expectation too. M solver calls a sample and step.

    Attributes:
        sigma: the size of the noise.
        samples: M.
        noise: "normal" or "gumbel".
        multiplicative: w_m = w exp(sigma Z_m - sigma^2 / 2), which keeps signs (Dalle et al. 2022), with the score
            Z_m / (sigma w); None: where the solver's domain is not "any".
        baseline: subtract the mean of the other samples from <y_m, g>: less variance, no bias; needs M > 1 and has no
            effect otherwise.
    """

    sigma: float = 1.0
    samples: int = 10
    noise: Literal["normal", "gumbel"] = "normal"
    multiplicative: bool | None = None
    baseline: bool = True

    def __post_init__(self) -> None:
        positive("sigma", self.sigma, self.name)
        check_samples(self.samples, self.name)
        if self.noise not in NOISES:
            raise OptionError(f"noise={self.noise!r} of Perturbed: one of {', '.join(NOISES)}")

    @property
    def smoothing(self) -> Smoothing:
        """The noise."""
        return Smoothing(self.sigma, self.samples, self.noise, self.multiplicative)

    @property
    def formula(self) -> str:
        """See `Estimator`."""
        return "dl/dw = mean of <y_m, g> times the score of w_m, unbiased for E y(w_m)"

    @property
    def calls(self) -> tuple[int, int]:
        """See `Estimator`."""
        return (self.samples, 0)

    def forward(self, run: Pass, w: Tensor) -> tuple[Tensor, ...]:
        """(mean, solutions, scores); in evaluation y(w) alone."""
        if not run.training:
            return (run.oracle(w),)
        solutions, score = self._sample(run, w)
        return solutions.mean(1), solutions, score

    def _sample(self, run: Pass, w: Tensor) -> tuple[Tensor, Tensor]:
        costs, score = self.smoothing.draw(run.oracle, w, run.generator)
        return run.oracle.many(costs), score

    def _centred(self, run: Pass, w: Tensor, saved: Saved) -> tuple[Tensor, Tensor]:
        solutions, score = saved if saved else self._sample(run, w)
        if self.baseline and self.samples > 1:
            # y_m minus the mean of the others is (y_m - mean) M / (M - 1).
            solutions = (solutions - solutions.mean(1, keepdim=True)) * (self.samples / (self.samples - 1))
        return solutions.flatten(2), score.flatten(2)

    def vjp(self, run: Pass, w: Tensor, y: Tensor, saved: Saved, g: Tensor) -> Tensor:
        """(1/M) sum of <y_m, g> score_m."""
        solutions, score = self._centred(run, w, saved)
        weights = (solutions * g.flatten(1).unsqueeze(1)).sum(2, keepdim=True)
        return (weights * score).mean(1).reshape(w.shape)

    def jvp(self, run: Pass, w: Tensor, y: Tensor, saved: Saved, t: Tensor) -> Tensor:
        """(1/M) sum of y_m <score_m, t>."""
        solutions, score = self._centred(run, w, saved)
        weights = (score * t.flatten(1).unsqueeze(1)).sum(2, keepdim=True)
        return (weights * solutions).mean(1).reshape(w.shape)


__all__ = ["NOISES", "Perturbed", "Smoothing"]
