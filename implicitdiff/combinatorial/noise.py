"""Random perturbations of costs: for margins, for sampling, for smoothing.

In: a batch of costs and a torch.Generator (or None, torch's own state). Out: additive noise, or factors that keep the
sign of a cost. Next file to read: ``estimators/identity.py``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from implicitdiff.errors import OptionError
from implicitdiff.torch_private import standard_gamma


def _like(w: Tensor, generator: torch.Generator | None) -> torch.device:
    return w.device if generator is None else generator.device


def normal(w: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal numbers of the shape, dtype and device of w."""
    return torch.randn(w.shape, generator=generator, dtype=w.dtype, device=_like(w, generator)).to(w.device)


def uniform(w: Tensor, generator: torch.Generator | None) -> Tensor:
    """Numbers uniform on (0, 1), without the ends, of the shape, dtype and device of w."""
    u = torch.rand(w.shape, generator=generator, dtype=w.dtype, device=_like(w, generator)).to(w.device)
    tiny = torch.finfo(w.dtype).tiny
    return u.clamp(tiny, 1 - torch.finfo(w.dtype).eps / 2)


def gumbel(w: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard Gumbel numbers, -log(-log U)."""
    return -torch.log(-torch.log(uniform(w, generator)))


class Noise(ABC):
    """A distribution of independent perturbations, one per entry of a cost."""

    @abstractmethod
    def draw(self, w: Tensor, generator: torch.Generator | None) -> Tensor:
        """Additive noise xi of the shape of w."""

    def factor(self, w: Tensor, generator: torch.Generator | None) -> Tensor:
        """Positive factors of the shape of w, for costs whose sign must not change.

        Raises:
            OptionError: this noise has no multiplicative form.
        """
        raise OptionError(
            f"{type(self).__name__} has no multiplicative form: use Normal or Rademacher, or multiplicative=False"
        )


def _scale(name: str, value: float, zero: bool = True) -> None:
    if not (math.isfinite(value) and (value > 0 or (zero and value == 0))):
        raise OptionError(f"{name}={value}: expected a finite number {'>= 0' if zero else '> 0'}")


@dataclass(frozen=True)
class Rademacher(Noise):
    """xi = -a/2 or +a/2 with equal probability, the margin noise of Sahoo et al. (2023); factors are 1 + xi.

    Outside of a set of measure zero it demands a margin of a/2 in every coordinate.
    """

    a: float

    def __post_init__(self) -> None:
        _scale("a", self.a)

    def draw(self, w: Tensor, generator: torch.Generator | None) -> Tensor:
        """-a/2 or +a/2."""
        half = torch.full_like(w, self.a / 2)
        return torch.where(uniform(w, generator) < 0.5, -half, half)

    def factor(self, w: Tensor, generator: torch.Generator | None) -> Tensor:
        """1 - a/2 or 1 + a/2; needs a < 2."""
        if self.a >= 2:
            raise OptionError(f"a={self.a} of Rademacher as a factor 1 -+ a/2: expected a < 2")
        return 1 + self.draw(w, generator)


@dataclass(frozen=True)
class Normal(Noise):
    """xi = sigma Z, Z standard normal; factors are exp(sigma Z - sigma^2 / 2), whose mean is 1."""

    sigma: float

    def __post_init__(self) -> None:
        _scale("sigma", self.sigma)

    def draw(self, w: Tensor, generator: torch.Generator | None) -> Tensor:
        """sigma Z."""
        return self.sigma * normal(w, generator)

    def factor(self, w: Tensor, generator: torch.Generator | None) -> Tensor:
        """exp(sigma Z - sigma^2 / 2)."""
        return torch.exp(self.sigma * normal(w, generator) - self.sigma**2 / 2)


@dataclass(frozen=True)
class Uniform(Noise):
    """xi uniform on (-a/2, a/2); factors are 1 + xi."""

    a: float

    def __post_init__(self) -> None:
        _scale("a", self.a)

    def draw(self, w: Tensor, generator: torch.Generator | None) -> Tensor:
        """a (U - 1/2)."""
        return self.a * (uniform(w, generator) - 0.5)

    def factor(self, w: Tensor, generator: torch.Generator | None) -> Tensor:
        """1 + xi; needs a < 2."""
        if self.a >= 2:
            raise OptionError(f"a={self.a} of Uniform as a factor: expected a < 2")
        return 1 + self.draw(w, generator)


@dataclass(frozen=True)
class Gumbel(Noise):
    """xi = tau G, G standard Gumbel; subtracted from costs it samples a one-hot y from softmax(-w / tau)."""

    tau: float = 1.0

    def __post_init__(self) -> None:
        _scale("tau", self.tau)

    def draw(self, w: Tensor, generator: torch.Generator | None) -> Tensor:
        """tau G."""
        return self.tau * gumbel(w, generator)


@dataclass(frozen=True)
class SumOfGamma(Noise):
    """xi = (tau / k) (sum over i = 1..s of Gamma(shape 1/k, scale k/i) - log s), of Niepert et al. (2021), Lemma 1.

    For s to infinity the sum of k independent copies is Gumbel(0, tau), so it suits solutions with k ones. k/i is the
    scale of the Gamma numbers, not its inverse.
    """

    k: float
    tau: float = 1.0
    s: int = 10

    def __post_init__(self) -> None:
        _scale("k", self.k, zero=False)
        _scale("tau", self.tau)
        if self.s < 1:
            raise OptionError(f"s={self.s} of SumOfGamma: expected a positive integer")

    def draw(self, w: Tensor, generator: torch.Generator | None) -> Tensor:
        """Sums of s Gamma numbers."""
        shape = torch.full((self.s, *w.shape), 1 / self.k, dtype=w.dtype, device=_like(w, generator))
        scale = self.k / torch.arange(1, self.s + 1, dtype=w.dtype, device=w.device)
        terms = standard_gamma(shape, generator).to(w.device) * scale.reshape(-1, *(1,) * w.dim())
        return self.tau / self.k * (terms.sum(0) - math.log(self.s))


__all__ = ["Gumbel", "Noise", "Normal", "Rademacher", "SumOfGamma", "Uniform", "gumbel", "normal", "uniform"]
