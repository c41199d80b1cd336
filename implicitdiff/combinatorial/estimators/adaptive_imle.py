"""Adaptive I-MLE: I-MLE whose lam follows the sizes of costs and gradients and the sparsity of its own output.

In: costs, noise and g. Out: the mean difference of solutions; its state is in the layer's state_dict. Next file to
read: ``perturbed.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from implicitdiff.combinatorial.estimator import Estimator, Pass, Saved, per_sample
from implicitdiff.combinatorial.estimators.blackbox import positive
from implicitdiff.combinatorial.estimators.imle import (
    check_samples,
    moved_samples,
    perturb_and_map,
    repeated,
)
from implicitdiff.combinatorial.noise import Noise
from implicitdiff.errors import OptionError
from implicitdiff.torch_private import HOST


class AdaptiveIMLE(Estimator, nn.Module):
    """dl/dw = mean over s of (y(w - e_s + lam g) - y(w - e_s)) / lam with lam = alpha |w| / |g| for each sample
    (Minervini, Franceschi and Niepert, AAAI 2023).

    After each backward pass in training alpha grows by eta while the running mean of the number of non-zero entries in
    a sample's gradient is below target, and falls by eta otherwise. Where g = 0, or alpha = 0, the gradient is zero.
    2 S solver calls a sample and step; with central=True 3 S, and the difference is (y(. + lam g) - y(. - lam g)) / 2
    lam.

    Args:
        noise: as for `IMLE`.
        samples: S.
        alpha: the start value, >= 0.
        target: c, non-zero entries per sample.
        eta: the step of alpha; published 1e-4, or 1e-3.
        momentum: of the running mean, 0.9.
        central: one-sided or central differences.
    """

    alpha: Tensor
    sparsity: Tensor

    def __init__(
        self,
        noise: Noise | None = None,
        samples: int = 1,
        *,
        alpha: float = 1.0,
        target: float = 1.0,
        eta: float = 1e-4,
        momentum: float = 0.9,
        central: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        positive("alpha", alpha, self.name, zero=True)
        positive("target", target, self.name)
        positive("eta", eta, self.name, zero=True)
        check_samples(samples, self.name)
        if not 0 <= momentum < 1:
            raise OptionError(f"momentum={momentum} of AdaptiveIMLE: expected 0 <= momentum < 1")
        self.noise = noise
        self.samples = samples
        self.target = target
        self.eta = eta
        self.momentum = momentum
        self.central = central
        self.register_buffer("alpha", torch.tensor(alpha, dtype=torch.float64, device=HOST))
        self.register_buffer("sparsity", torch.tensor(target, dtype=torch.float64, device=HOST))

    @property
    def draws(self) -> int:
        """Samples drawn in training: without noise they are all the same, and there is one."""
        return 1 if self.noise is None else self.samples

    @property
    def formula(self) -> str:
        """See `Estimator`."""
        return "dl/dw = mean of (y(w - e_s + lam g) - y(w - e_s)) / lam, lam = alpha |w| / |g|"

    @property
    def calls(self) -> tuple[int, int]:
        """See `Estimator`."""
        return (self.draws, (2 if self.central else 1) * self.draws)

    def forward(self, run: Pass, w: Tensor) -> tuple[Tensor, ...]:
        """(mean, e, samples); an estimator is called by the layer, not like a module."""
        return perturb_and_map(run, w, self.noise, self.samples)

    def vjp(self, run: Pass, w: Tensor, y: Tensor, saved: Saved, g: Tensor) -> Tensor:
        """The mean difference, after which alpha is adapted."""
        e, solutions = saved
        sizes = torch.linalg.vector_norm(g.flatten(1), dim=1)
        costs = torch.linalg.vector_norm(w.flatten(1), dim=1)
        lam = torch.where(
            sizes > 0, self.alpha.to(w) * costs / sizes.where(sizes > 0, torch.ones_like(sizes)), 0.0
        )
        shift = repeated(per_sample(lam, g) * g, e.shape[1])
        ahead = moved_samples(run, w, e, solutions, shift)
        if self.central:
            difference = (ahead - moved_samples(run, w, e, solutions, -shift)) / 2
        else:
            difference = ahead - solutions
        moves = per_sample(lam > 0, g)
        gradient = torch.where(moves, difference.mean(1) / per_sample(lam, g), 0.0)
        if run.training:
            self._adapt(gradient)
        return gradient

    @torch.no_grad()
    def _adapt(self, gradient: Tensor) -> None:
        # Counted per sample: a share of all entries is at most 1 and would never exceed the target.
        count = gradient.flatten(1).ne(0).sum(1).double().mean().to(self.sparsity.device)
        self.sparsity.mul_(self.momentum).add_((1 - self.momentum) * count)
        step = torch.where(self.sparsity < self.target, self.eta, -self.eta)
        self.alpha.add_(step).clamp_(min=0)


__all__ = ["AdaptiveIMLE"]
