"""Learning to explain: which k words of a review a rating is predicted from.

In: a method and a seed. Out: the error of the prediction, and how many of the chosen words matter. Next file to read:
``matching.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

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
from implicitdiff.experiments.identity.training import Watch, batches, mean_norm
from implicitdiff.problems import SubsetSelection
from implicitdiff.torch_private import HOST

WORDS, ASPECT, LENGTH, RELEVANT, CHOSEN, WIDTH = 400, 60, 40, 5, 5, 24
TRAINING, TEST, EPOCHS, BATCH, RATE, TAU = 2400, 600, 12, 60, 1.5e-3, 5.0
NOISE = SumOfGamma(CHOSEN, TAU)


@dataclass(frozen=True)
class Reviews:
    """Words (count, LENGTH), which of them have a sentiment, and the rating in (0, 1) that these give."""

    words: Tensor
    matters: Tensor
    rating: Tensor


def _reviews(seed: int, count: int) -> Reviews:
    """Five words with a sentiment, good or bad, among 35 without."""
    generator = torch.Generator().manual_seed(seed)
    home = generator.device
    sentiment = _sentiment(home)
    words = torch.randint(ASPECT, WORDS, (count, LENGTH), generator=generator, device=home)
    places = torch.rand(count, LENGTH, generator=generator, device=home).argsort(1)[:, :RELEVANT]
    aspect = torch.randint(ASPECT, (count, RELEVANT), generator=generator, device=home)
    words = words.scatter(1, places, aspect)
    matters = torch.zeros(count, LENGTH, device=home).scatter(1, places, 1.0)
    return Reviews(words, matters, torch.sigmoid(sentiment[aspect].sum(1)))


def _sentiment(home: torch.device) -> Tensor:
    """+1 for half of the words with a sentiment, -1 for the others."""
    return 1.0 - 2.0 * (torch.arange(ASPECT, device=home) % 2)


class Explainer(nn.Module):
    """Scores of words by convolutions over frozen embeddings; a rating from the mean of the chosen words."""

    def __init__(self) -> None:
        super().__init__()
        embedding = torch.randn(WORDS, WIDTH, device=HOST)
        # As in embeddings that were trained on text, words of a kind lie together: one direction for having a
        # sentiment, one for which.
        embedding[:ASPECT, 0] += 1.5
        embedding[:ASPECT, 1] += 1.5 * _sentiment(embedding.device)
        self.register_buffer("embedding", embedding)
        self.selector = nn.Sequential(
            nn.Conv1d(WIDTH, 48, 3, padding=1),
            nn.ReLU(),
            nn.Conv1d(48, 48, 3, padding=1),
            nn.ReLU(),
            nn.Conv1d(48, 1, 1),
        )
        self.predictor = nn.Sequential(
            nn.Linear(WIDTH, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 1)
        )

    def scores(self, words: Tensor) -> Tensor:
        """(batch, LENGTH)."""
        return self.selector(self._seen(words).mT)[:, 0]

    def rating(self, words: Tensor, mask: Tensor) -> Tensor:
        """(batch,) from the words where the mask is 1."""
        mean = (self._seen(words) * mask[:, :, None]).sum(1) / CHOSEN
        return torch.sigmoid(self.predictor(mean))[:, 0]

    def _seen(self, words: Tensor) -> Tensor:
        return cast(Tensor, self.embedding)[words]


def train(method: Method, seed: int, quick: bool) -> Run:
    """Squared error of the rating, Adam."""
    count, test, epochs = (400, 100, 2) if quick else (TRAINING, TEST, EPOCHS)
    data = _reviews(seed, count + test)
    net, applied = Explainer(), Applied(method, SubsetSelection(LENGTH, CHOSEN), seed)
    optimiser = torch.optim.Adam(net.parameters(), lr=RATE)
    generator = torch.Generator().manual_seed(seed)
    draws = isinstance(method.estimator, IMLE | AdaptiveIMLE | Perturbed)
    watch = Watch(applied)
    values: dict[str, float] = {}
    for epoch in range(epochs):
        applied.train()
        watch.resume()
        for batch in batches(count, BATCH, generator):
            optimiser.zero_grad()
            words = data.words[batch]
            scores = net.scores(words)
            noise = 0 if draws else NOISE.draw(scores.detach(), generator)
            predicted = net.rating(words, applied(scores + noise))
            (predicted - data.rating[batch]).square().mean().backward()
            optimiser.step()
        watch.pause()
        values = _evaluate(net, applied, data, count)
        watch.curve.append(Point(epoch + 1, values["norm"], values["error"]))
    return watch.run("explaining", seed, values)


def _evaluate(net: Explainer, applied: Applied, data: Reviews, count: int) -> dict[str, float]:
    """Without noise: the words of the highest scores."""
    with torch.no_grad():
        words, matters, rating = data.words[count:], data.matters[count:], data.rating[count:]
        scores = net.scores(words)
        mask = applied.solver(scores)
        error = (net.rating(words, mask) - rating).square().mean()
        precision = (mask * matters).sum(1).mean() / CHOSEN
    return {
        "error": 100 * float(error),
        "precision": 100 * float(precision),
        "norm": mean_norm(applied, scores),
    }


LAMS = (10.0, 100.0, 1000.0, 10000.0)
IMLES = tuple(f"I-MLE {lam:g}" for lam in LAMS)
PROJECTED = ("Identity, P_mean", "Identity, P_norm", "Identity, P_std")

FAMILY = Family(
    name="explaining",
    title="Learning to explain",
    setup=(
        "Reviews of 40 words out of 400 that are drawn here, 5 of them with a sentiment that the rating "
        "depends on; k = 5 words by a small convolutional selector, the rating from the mean of their "
        "frozen embeddings; sum-of-gamma noise with tau = 5; 2,400 reviews, 12 epochs. Published: "
        "BeerAdvocate (aroma), 350 words, 20 epochs, k = 5, 10, 15. Here it is known which words matter."
    ),
    values=(("error", "MSE x 100"), ("precision", "words that matter, %"), ("norm", "mean abs(w)")),
    larger=False,
    methods=(
        identity("none"),
        identity("mean"),
        identity("norm"),
        identity("std"),
        *(other(f"I-MLE {lam:g}", IMLE(lam, NOISE)) for lam in LAMS),
        other("AIMLE", AdaptiveIMLE(NOISE, eta=1e-3)),
        other("Blackbox 1000", Blackbox(1000.0), "std"),
        other("LPGD both 1000", LPGD(1000.0), "std"),
        other("Perturbed 5, 10 samples", Perturbed(5.0, 10)),
        other("straight-through, softmax", StraightThrough(0.5)),
    ),
    train=train,
    published={
        "Identity, P_std": "MSE 2.62 ± 0.14",
        "Identity": "MSE 4.75 ± 0.06",
        "I-MLE 1000": "MSE 2.62 ± 0.05 (best of lam)",
    },
    source="Sahoo et al., Tab. 1, k = 5; there L2X has 5.75 ± 0.30 and SoftSub 2.57 ± 0.12",
    orderings=(
        Ordering(
            "every projection is better than none",
            lambda s: max(s.mean(name, "error") for name in PROJECTED) < s.mean("Identity", "error"),
        ),
        Ordering(
            "Identity with P_std is at least as good as I-MLE at its best lam (equal in the paper)",
            lambda s: s.mean("Identity, P_std", "error") < s.best(IMLES, "error", larger=False) + 0.3,
        ),
        Ordering(
            "Identity without a projection is worse than I-MLE at its best lam",
            lambda s: s.mean("Identity", "error") > s.best(IMLES, "error", larger=False),
        ),
    ),
    collapse=(
        ("Identity", "no projection"),
        ("Identity, P_mean", "P_mean"),
        ("Identity, P_norm", "P_norm"),
        ("Identity, P_std", "P_std"),
    ),
)

__all__ = ["FAMILY", "train"]
