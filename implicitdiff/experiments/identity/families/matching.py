"""Keypoint matching by assignment: descriptors of points learnt from which of them belong together.

In: a method and a seed. Out: the share of points matched rightly on test images. Next file to read:
``graph_matching.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from implicitdiff.combinatorial import IMLE, LPGD, Blackbox, Gumbel, Perturbed, StraightThrough
from implicitdiff.experiments.identity.applied import Applied, Method, identity, other
from implicitdiff.experiments.identity.family import Family, Ordering
from implicitdiff.experiments.identity.results import Point, Run
from implicitdiff.experiments.identity.training import Watch, batches, mean_norm
from implicitdiff.problems import KeypointMatching

CLASSES, POINTS, FEATURES, NUISANCE, WIDTH = 24, 10, 16, 24, 32
TRAINING, TEST, EPOCHS, BATCH, RATE = 1500, 500, 16, 50, 2e-3
BLUR, SCALE, OFFSET = 0.9, 5.0, 0.5


@dataclass(frozen=True)
class Pairs:
    """Two views (count, points, seen) of the same keypoints, their positions (.., 2), and who belongs to whom."""

    first: Tensor
    second: Tensor
    here: Tensor
    there: Tensor
    matching: Tensor


def pairs(seed: int, count: int, points: int, jitter: float = 0.1) -> Pairs:
    """Keypoints of different kinds; each view adds noise to their features and to turned positions, and nuisance.

    All is mixed by a fixed random matrix, so that features have to be learnt.
    """
    generator = torch.Generator().manual_seed(seed)
    home = generator.device

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=home)

    prototypes, width = normal(CLASSES, FEATURES), FEATURES + 2 + NUISANCE
    mixing = normal(width, width) / width**0.5
    kinds = torch.rand(count, CLASSES, generator=generator, device=home).argsort(1)[:, :points]
    order = torch.rand(count, points, generator=generator, device=home).argsort(1)
    place = normal(count, points, 2)
    views, places = [], []
    for kind, where in (
        (kinds, place),
        (kinds.gather(1, order), place.gather(1, order[..., None].expand_as(place))),
    ):
        angle = 0.3 * normal(count)
        turn = torch.stack((angle.cos(), -angle.sin(), angle.sin(), angle.cos()), 1).reshape(-1, 2, 2)
        moved = where @ turn.mT + jitter * normal(count, points, 2)
        features = prototypes[kind] + BLUR * normal(count, points, FEATURES)
        views.append(torch.cat((features, moved, normal(count, points, NUISANCE)), 2) @ mixing)
        places.append(moved)
    # [i, j] = 1: the second view's j is the first's i.
    matching = nn.functional.one_hot(order, points).to(place).mT.contiguous()
    return Pairs(views[0], views[1], places[0], places[1], matching)


def describer() -> nn.Module:
    """What is seen of a point to its descriptor."""
    return nn.Sequential(nn.Linear(FEATURES + 2 + NUISANCE, 96), nn.ReLU(), nn.Linear(96, WIDTH))


def likeness(net: nn.Module, first: Tensor, second: Tensor) -> Tensor:
    """Costs (batch, n, n): low where descriptors are alike, bounded above."""
    products = net(first) @ net(second).mT
    return OFFSET - nn.functional.softplus(products / SCALE)


def train(method: Method, seed: int, quick: bool) -> Run:
    """L1 loss of matchings, Adam."""
    count, test, epochs = (200, 100, 2) if quick else (TRAINING, TEST, EPOCHS)
    data = pairs(seed, count + test, POINTS)
    net, applied = describer(), Applied(method, KeypointMatching(POINTS), seed)
    optimiser = torch.optim.Adam(net.parameters(), lr=RATE)
    generator = torch.Generator().manual_seed(seed)
    watch = Watch(applied)
    for epoch in range(epochs):
        applied.train()
        watch.resume()
        for batch in batches(count, BATCH, generator):
            optimiser.zero_grad()
            target = data.matching[batch]
            found = applied(likeness(net, data.first[batch], data.second[batch]), target)
            (found - target).abs().sum((1, 2)).mean().backward()
            optimiser.step()
        watch.pause()
        with torch.no_grad():
            cost = likeness(net, data.first[count:], data.second[count:])
            right = (applied.solver(cost) * data.matching[count:]).sum((1, 2)).mean() / POINTS
        watch.curve.append(Point(epoch + 1, mean_norm(applied, cost), 100 * float(right)))
    last = watch.curve[-1]
    return watch.run("matching", seed, {"accuracy": last.score, "norm": last.norm})


PUBLISHED = {
    "Identity": "77.2 ± 0.7",
    "Identity, noise 0.1": "78.6",
    "Identity, noise 1": "79.6 ± 0.8",
    "Identity, informed 1": "79.0",
    "Identity, P_norm": "72.6 ± 1.0",
    "Identity, P_norm, noise 0.1": "78.1",
    "Blackbox 80": "74.9 ± 0.9",
    "Blackbox 80, noise 0.1": "78.0",
    "Blackbox 80, noise 1": "80.1 ± 0.4",
    "Blackbox 80, informed 1": "80.1",
    "Blackbox 80, P_norm": "63.5 ± 0.8",
    "Blackbox 80, P_norm, noise 0.1": "80.1",
}


def orderings(noise: str, informed: str) -> tuple[Ordering, ...]:
    """Those of Tab. 4, which linear and quadratic matching share; `noise` and `informed` are the sizes of margins."""
    return (
        Ordering(
            "a margin by noise improves on none, for Identity and for Blackbox",
            lambda s: all(
                s.mean(f"{name}, noise {noise}", "accuracy") > s.mean(name, "accuracy")
                for name in ("Identity", "Blackbox 80")
            ),
        ),
        Ordering(
            "noise does as well as the informed margin, which needs labels (within 1.5 points)",
            lambda s: (
                s.mean(f"Identity, noise {noise}", "accuracy")
                > s.mean(f"Identity, informed {informed}", "accuracy") - 1.5
            ),
        ),
        Ordering(
            "P_norm without a margin does not help",
            lambda s: s.mean("Identity, P_norm", "accuracy") < s.mean("Identity", "accuracy") + 1,
        ),
        Ordering(
            "Identity and Blackbox are equal (within 2 points, each at its best)",
            lambda s: (
                abs(
                    s.best([m for m in s.methods() if m.startswith("Identity")], "accuracy")
                    - s.best([m for m in s.methods() if m.startswith("Blackbox")], "accuracy")
                )
                < 2
            ),
        ),
    )


METHODS = (
    identity("none"),
    identity("none", 0.1),
    identity("none", 1.0),
    identity("none", informed=1.0),
    identity("norm"),
    identity("norm", 0.1),
    identity("auto"),
    identity("auto", 0.1),
    other("Blackbox 80", Blackbox(80.0)),
    other("Blackbox 80", Blackbox(80.0), margin=0.1),
    other("Blackbox 80", Blackbox(80.0), margin=1.0),
    other("Blackbox 80", Blackbox(80.0), informed=1.0),
    other("Blackbox 80", Blackbox(80.0), "norm"),
    other("Blackbox 80", Blackbox(80.0), "norm", margin=0.1),
    other("LPGD both 80", LPGD(80.0), margin=0.1),
    other("I-MLE 80", IMLE(80.0, Gumbel(0.1))),
    other("Perturbed 0.3, 10 samples", Perturbed(0.3, 10)),
    other("straight-through, softmax", StraightThrough(1.0)),
)

FAMILY = Family(
    name="matching",
    title="Keypoint matching, linear",
    setup=(
        "Ten keypoints of 24 kinds in each image, drawn here: noisy features, turned positions and "
        "nuisance, mixed; descriptors by a small network, costs of likeness, SciPy's assignment, L1 loss; "
        "1,500 pairs, 16 epochs. Published: Pascal VOC, VGG16 and spline convolutions on Delaunay graphs, "
        "unary and quadratic costs."
    ),
    values=(("accuracy", "points right, %"), ("norm", "mean abs(w)")),
    larger=True,
    methods=METHODS,
    train=train,
    published=PUBLISHED,
    source="Sahoo et al., Tab. 4, Pascal VOC, which is quadratic",
    orderings=(
        *orderings("0.1", "1"),
        Ordering(
            "P_norm with noise is at least as good as noise alone",
            lambda s: (
                s.mean("Identity, P_norm, noise 0.1", "accuracy")
                > s.mean("Identity, noise 0.1", "accuracy") - 0.5
            ),
        ),
    ),
    note=(
        "Margins are relative to costs of unit norm where the projection divides by the norm. P_aff is double "
        "centring."
    ),
    collapse=(
        ("Identity", "Identity"),
        ("Identity, noise 0.1", "Identity, noise"),
        ("Identity, P_norm", "Identity, P_norm"),
        ("Identity, P_norm, noise 0.1", "Identity, both"),
    ),
)

__all__ = ["FAMILY", "METHODS", "PUBLISHED", "describer", "likeness", "orderings", "pairs", "train"]
