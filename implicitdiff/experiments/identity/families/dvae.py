"""Discrete variational auto-encoder of digits: codes of k ones out of n, sampled by perturb-and-MAP.

In: a method and a seed. Out: the negative evidence bound on test digits. Next file to read: ``explaining.py``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from implicitdiff.combinatorial import (
    IMLE,
    LPGD,
    AdaptiveIMLE,
    Blackbox,
    Perturbed,
    StraightThrough,
    SumOfGamma,
)
from implicitdiff.experiments.identity.applied import Applied, Method, identity, other
from implicitdiff.experiments.identity.family import Family, Ordering
from implicitdiff.experiments.identity.results import Point, Run
from implicitdiff.experiments.identity.training import Watch, batches, digits, mean_norm
from implicitdiff.problems import SubsetSelection

CODES, SIZE, ONES, TAU, TERMS = 8, 12, 4, 1.0, 10
TRAINING, EPOCHS, BATCH, RATE, SAMPLES = 1200, 30, 60, 1.5e-3, 5
FOLLOWED = 150  # test digits that the curve is made of; their noise takes longer than training would
NOISE = SumOfGamma(ONES, TAU, TERMS)


class AutoEncoder(nn.Module):
    """64 pixels to scores of 8 codes with 12 entries, and from codes back to pixels."""

    def __init__(self) -> None:
        super().__init__()
        codes = CODES * SIZE
        self.encoder = nn.Sequential(
            nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, codes)
        )
        self.decoder = nn.Sequential(
            nn.Linear(codes, 64), nn.ReLU(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)
        )

    def scores(self, images: Tensor) -> Tensor:
        """(batch * codes, size)."""
        return self.encoder(images).reshape(-1, SIZE)

    def bound(self, images: Tensor, scores: Tensor, codes: Tensor) -> Tensor:
        """Cross entropy of the pixels plus KL(softmax of the scores | uniform), summed; one number a digit."""
        pixels = self.decoder(codes.reshape(len(images), -1))
        crossed = nn.functional.binary_cross_entropy_with_logits(pixels, images, reduction="none").sum(1)
        logs = torch.log_softmax(scores / TAU, dim=1)
        divergence = (logs.exp() * (logs + math.log(SIZE))).sum(1).reshape(len(images), -1).sum(1)
        return crossed + divergence


def train(method: Method, seed: int, quick: bool) -> Run:
    """Adam on the bound, one sample of the codes for each digit."""
    images, _ = digits()
    generator = torch.Generator().manual_seed(seed)
    images = images[torch.randperm(len(images), generator=generator, device=images.device)]
    epochs, count = (2, 200) if quick else (EPOCHS, TRAINING)
    training, test = images[:count], images[TRAINING:]
    net, applied = AutoEncoder(), Applied(method, SubsetSelection(SIZE, ONES), seed)
    optimiser = torch.optim.Adam(net.parameters(), lr=RATE)
    watch = Watch(applied)
    # I-MLE and the perturbed optimiser draw their noise themselves; to the others the noise is a part of the scores.
    draws = isinstance(method.estimator, IMLE | AdaptiveIMLE | Perturbed)
    for epoch in range(epochs):
        applied.train()
        watch.resume()
        for batch in batches(count, BATCH, generator):
            optimiser.zero_grad()
            scores = net.scores(training[batch])
            noise = 0 if draws else NOISE.draw(scores.detach(), generator)
            net.bound(training[batch], scores, applied(scores + noise)).mean().backward()
            optimiser.step()
        watch.pause()
        applied.eval()
        few = test[:FOLLOWED]
        watch.curve.append(Point(epoch + 1, *_evaluate(net, applied, few, generator, 1)))
    norm, bound = _evaluate(net, applied, test, generator, SAMPLES)
    return watch.run("dvae", seed, {"bound": bound, "norm": norm})


def _evaluate(
    net: AutoEncoder, applied: Applied, test: Tensor, generator: torch.Generator, samples: int
) -> tuple[float, float]:
    """(mean norm of the scores, bound)."""
    with torch.no_grad():
        scores = net.scores(test)
        found = [
            net.bound(test, scores, applied(scores + NOISE.draw(scores, generator))).mean()
            for _ in range(samples)
        ]
        return mean_norm(applied, scores), float(torch.stack(found).mean())


IMLES = tuple(f"I-MLE {lam:g}" for lam in (1, 10, 100, 1000))

FAMILY = Family(
    name="dvae",
    title="Discrete variational auto-encoder of digits",
    setup=(
        "scikit-learn's digits (8 x 8, 1,200 for training), 8 codes with 4 ones out of 12, encoder "
        "64-128-64-96 and back, sum-of-gamma noise with s = 10 and tau = 1, Adam, 30 epochs. "
        "Published: MNIST, 20 codes with 10 ones out of 20, tau = 10, 100 epochs."
    ),
    values=(("bound", "test N-ELBO"), ("norm", "mean abs(w)")),
    larger=False,
    methods=(
        identity("none"),
        identity("mean"),
        identity("norm"),
        identity("std"),
        *(other(f"I-MLE {lam:g}", IMLE(lam, NOISE)) for lam in (1.0, 10.0, 100.0, 1000.0)),
        other("AIMLE", AdaptiveIMLE(NOISE, eta=1e-3)),
        other("Blackbox 10", Blackbox(10.0), "std"),
        other("LPGD both 10", LPGD(10.0), "std"),
        other("Perturbed 1, 10 samples", Perturbed(1.0, 10)),
        other("straight-through, softmax", StraightThrough(1.0)),
    ),
    train=train,
    published={
        "Identity, P_std": "best curve, below I-MLE",
        "Identity, P_norm": "between",
        "Identity, P_mean": "far above P_norm",
        "Identity": "bad, with SGD too",
        "I-MLE 10": "above Identity P_std",
    },
    source="Sahoo et al., Fig. 3 and 5, which are curves without numbers",
    orderings=(
        Ordering(
            "Identity with P_std is better than Identity without a projection",
            lambda s: s.mean("Identity, P_std", "bound") < s.mean("Identity", "bound") - 5,
        ),
        Ordering(
            "P_norm alone is much better than P_mean alone",
            lambda s: s.mean("Identity, P_norm", "bound") < s.mean("Identity, P_mean", "bound") - 5,
        ),
        Ordering(
            "both together are at least as good as either",
            lambda s: (
                s.mean("Identity, P_std", "bound")
                < min(s.mean("Identity, P_norm", "bound"), s.mean("Identity, P_mean", "bound")) + 0.1
            ),
        ),
        Ordering(
            "Identity with P_std is better than I-MLE at its best lam",
            lambda s: s.mean("Identity, P_std", "bound") < s.best(IMLES, "bound", larger=False),
        ),
    ),
    note="The perturbed optimiser trains the decoder on means of codes and is tested on codes.",
    collapse=(
        ("Identity", "no projection"),
        ("Identity, P_mean", "P_mean"),
        ("Identity, P_norm", "P_norm"),
        ("Identity, P_std", "P_std"),
    ),
)

__all__ = ["FAMILY", "train"]
