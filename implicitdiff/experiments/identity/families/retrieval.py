"""Retrieval of digits of classes never seen: embeddings learnt from ranks.

In: a method and a seed. Out: how often the nearest neighbour has the right class. Next file to read: ``globe.py``.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from implicitdiff.combinatorial import IMLE, LPGD, Blackbox, Normal, Perturbed
from implicitdiff.experiments.identity.applied import Applied, Method, identity, other
from implicitdiff.experiments.identity.family import Family, Ordering
from implicitdiff.experiments.identity.results import Point, Run
from implicitdiff.experiments.identity.training import Watch, batches, digits, mean_norm
from implicitdiff.problems import RetrievalRanking

SEEN, NUISANCE, WIDTH, EPOCHS, BATCH, RATE, DECAY = 5, 64, 32, 24, 128, 3e-4, 4e-4


def _embedding() -> nn.Module:
    return nn.Sequential(nn.Linear(64 + NUISANCE, 128), nn.ReLU(), nn.Linear(128, WIDTH))


def _cosines(net: nn.Module, images: Tensor) -> Tensor:
    embedded = nn.functional.normalize(net(images), dim=1)
    return embedded @ embedded.mT


def ranking_loss(ranks: Tensor, relevant: Tensor) -> Tensor:
    """Mean over relevant i of log(1 + log(1 + rk_i - rk+_i)), with rk+ the rank among the relevant ones only.

    rk - rk+ counts the irrelevant candidates that stand before i.
    """
    among = ((ranks[:, :, None] >= ranks[:, None, :]) * relevant[:, None, :]).sum(2).detach()
    before = (ranks - among).clamp(min=0)
    terms = torch.log1p(torch.log1p(before)) * relevant
    return (terms.sum(1) / relevant.sum(1).clamp(min=1)).mean()


def train(method: Method, seed: int, quick: bool) -> Run:
    """Every image of a batch is a query, the others are its candidates."""
    images, labels = digits()
    generator = torch.Generator().manual_seed(seed)
    nuisance = torch.randn(len(images), NUISANCE, generator=generator, device=images.device)
    images = torch.cat((images, nuisance), 1)
    training, test = images[labels < SEEN], images[labels >= SEEN]
    seen, unseen = labels[labels < SEEN], labels[labels >= SEEN]
    epochs = 2 if quick else EPOCHS
    net, applied = _embedding(), Applied(method, RetrievalRanking(BATCH - 1), seed)
    optimiser = torch.optim.Adam(net.parameters(), lr=RATE, weight_decay=DECAY)
    others = ~torch.eye(BATCH, dtype=torch.bool, device=images.device)
    watch = Watch(applied)
    for epoch in range(epochs):
        applied.train()
        watch.resume()
        for batch in batches(len(training), BATCH, generator):
            if len(batch) < BATCH:
                continue
            optimiser.zero_grad()
            scores = _cosines(net, training[batch])[others].reshape(BATCH, -1)
            same = (seen[batch][:, None] == seen[batch][None, :])[others].reshape(BATCH, -1).to(scores)
            ranking_loss(applied(scores), same).backward()
            optimiser.step()
        watch.pause()
        with torch.no_grad():
            scores = _cosines(net, test)
            norm = mean_norm(applied, scores[:, :-1])
            nearest = scores.fill_diagonal_(-2).argmax(1)
            right = (unseen[nearest] == unseen).float().mean()
        watch.curve.append(Point(epoch + 1, norm, 100 * float(right)))
    last = watch.curve[-1]
    return watch.run("retrieval", seed, {"recall": last.score, "norm": last.norm})


def _blackbox(projection: str, lams: Iterable[float] = (0.2, 2.0, 20.0)) -> tuple[Method, ...]:
    return tuple(other(f"Blackbox {lam:g}", Blackbox(lam), projection) for lam in lams)


def _best_blackbox(suffix: str) -> tuple[str, ...]:
    return tuple(f"Blackbox {lam:g}{suffix}" for lam in (0.2, 2.0, 20.0))


FAMILY = Family(
    name="retrieval",
    title="Retrieval on unseen classes",
    setup=(
        "scikit-learn's digits with 64 entries of noise beside the 64 pixels; classes 0 to 4 for "
        "training, 5 to 9 for the test; embeddings by a small network, cosines, ranks within a batch of "
        "128, the loss of eq. 26, 24 epochs. Published: CUB-200 (birds), ResNet50, unseen species."
    ),
    values=(("recall", "recall at 1, %"), ("norm", "mean abs(w)")),
    larger=True,
    methods=(
        identity("none"),
        identity("mean"),
        identity("norm"),
        identity("std"),
        identity("std", 0.01),
        identity("std", 0.1),
        *_blackbox("none"),
        *_blackbox("mean"),
        *_blackbox("norm"),
        *_blackbox("std"),
        other("LPGD both 2", LPGD(2.0), "std"),
        other("I-MLE 2", IMLE(2.0, Normal(0.05))),
        other("Perturbed 0.1, 10 samples", Perturbed(0.1, 10)),
    ),
    train=train,
    published={
        "Identity": "13.9 ± 0.9",
        "Identity, P_mean": "44.6 ± 0.8",
        "Identity, P_norm": "59.0 ± 0.4",
        "Identity, P_std": "60.2 ± 0.6",
        "Identity, P_std, noise 0.01": "60.4",
        "Identity, P_std, noise 0.1": "60.5",
        "Blackbox 0.2": "62.6 ± 0.4",
        "Blackbox 0.2, P_mean": "62.9 ± 0.5",
        "Blackbox 0.2, P_norm": "60.8 ± 0.3",
        "Blackbox 0.2, P_std": "62.4 ± 0.6",
    },
    source="Sahoo et al., Tab. 5, CUB-200",
    orderings=(
        Ordering(
            "Identity: none is much worse than P_mean",
            lambda s: s.mean("Identity", "recall") < s.mean("Identity, P_mean", "recall") - 5,
        ),
        Ordering(
            "Identity: P_mean is worse than P_norm",
            lambda s: s.mean("Identity, P_mean", "recall") < s.mean("Identity, P_norm", "recall"),
        ),
        Ordering(
            "Identity: P_norm and P_std are about equal (within 3 points)",
            lambda s: abs(s.mean("Identity, P_norm", "recall") - s.mean("Identity, P_std", "recall")) < 3,
        ),
        Ordering(
            "Blackbox beats Identity, each at its best",
            lambda s: (
                s.best([m for m in s.methods() if m.startswith("Blackbox")], "recall")
                > s.best([m for m in s.methods() if m.startswith("Identity")], "recall")
            ),
        ),
        Ordering(
            "Blackbox does not need a projection, Identity does",
            lambda s: (
                s.best(_best_blackbox(""), "recall") > s.best(_best_blackbox(", P_std"), "recall") - 5
                and s.mean("Identity", "recall") < s.mean("Identity, P_std", "recall") - 5
            ),
        ),
    ),
    collapse=(
        ("Identity", "no projection"),
        ("Identity, P_mean", "P_mean"),
        ("Identity, P_norm", "P_norm"),
        ("Identity, P_std", "P_std"),
    ),
)

__all__ = ["FAMILY", "ranking_loss", "train"]
