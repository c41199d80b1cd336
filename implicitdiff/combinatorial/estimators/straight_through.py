"""Straight-through: the gradient passes the solver as if it were the identity, or a softmax.

In: costs and g. Out: -g, or g through a softmax of -w. Next file to read: ``spo_plus.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from implicitdiff.combinatorial.estimator import Estimator, Pass, Saved, per_sample
from implicitdiff.combinatorial.estimators.blackbox import positive
from implicitdiff.combinatorial.noise import Noise


@dataclass(frozen=True)
class StraightThrough(Estimator):
    """Without a temperature dl/dw = -g (Bengio et al. 2013), which is `Identity` without projection. With one, the
    derivative of k softmax(-w / T) over the entries of a sample, k = sum(y) (Jang et al. 2017, for one-hot y).

    One solver call a sample and step.

    Attributes:
        temperature: T > 0, or None.
        noise: subtracted from the costs in training, forward and backward; Gumbel noise gives straight-through
            Gumbel-softmax.
    """

    temperature: float | None = None
    noise: Noise | None = None

    smooth = True

    def __post_init__(self) -> None:
        if self.temperature is not None:
            positive("temperature", self.temperature, self.name)

    @property
    def formula(self) -> str:
        """See `Estimator`."""
        return (
            "dl/dw = -g"
            if self.temperature is None
            else f"dl/dw = that of k softmax(-w / {self.temperature:.3g})"
        )

    @property
    def calls(self) -> tuple[int, int]:
        """See `Estimator`."""
        return (1, 0)

    def forward(self, run: Pass, w: Tensor) -> tuple[Tensor, ...]:
        """(y(w - e), e, sum(y))."""
        e = torch.zeros_like(w)
        if self.noise is not None and run.training:
            e = self.noise.draw(w, run.generator)
        y = run.oracle(w - e)
        return y, e, y.flatten(1).sum(1)

    def vjp(self, run: Pass, w: Tensor, y: Tensor, saved: Saved, g: Tensor) -> Tensor:
        """-(k / T) (diag(p) - p p^T) g with p = softmax(-(w - e) / T), or -g."""
        if self.temperature is None:
            return -g
        e, k = saved
        p = torch.softmax((e - w).flatten(1) / self.temperature, dim=1)
        flat = g.flatten(1)
        moved = p * (flat - (p * flat).sum(1, keepdim=True))
        return (-per_sample(k, moved) / self.temperature * moved).reshape(g.shape)

    def jvp(self, run: Pass, w: Tensor, y: Tensor, saved: Saved, t: Tensor) -> Tensor:
        """The same, since the Jacobian is symmetric."""
        return self.vjp(run, w, y, saved, t)


__all__ = ["StraightThrough"]
