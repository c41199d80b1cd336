"""Keypoint matching by quadratic assignment: unary costs of points and costs of pairs of edges.

In: a method and a seed. Out: the share of points matched rightly. The data are those of ``matching.py`` with fewer
points; solutions are exact, by enumeration. Next file to read: ``retrieval.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from implicitdiff.combinatorial import IMLE, LPGD, Blackbox, Gumbel, Perturbed, StraightThrough
from implicitdiff.experiments.identity.applied import Applied, Method, identity, other
from implicitdiff.experiments.identity.families.matching import (
    PUBLISHED,
    Pairs,
    describer,
    likeness,
    orderings,
    pairs,
)
from implicitdiff.experiments.identity.family import Family
from implicitdiff.experiments.identity.results import Point, Run
from implicitdiff.experiments.identity.training import Watch, batches, mean_norm
from implicitdiff.problems import GraphMatching

POINTS, TRAINING, TEST, EPOCHS, BATCH, RATE, JITTER = 6, 1000, 400, 12, 50, 2e-3, 0.5


class Costs(nn.Module):
    """Unary costs from descriptors, edge costs from differences in length, with learnt weights."""

    def __init__(self, solver: GraphMatching) -> None:
        super().__init__()
        self.solver = solver
        self.describe = describer()
        self.compare = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, data: Pairs, chosen: Tensor) -> Tensor:
        """(batch, n^2 + E1 E2)."""
        unary = likeness(self.describe, data.first[chosen], data.second[chosen])
        here, _ = self.solver.lengths(data.here[chosen])
        _, there = self.solver.lengths(data.there[chosen])
        long, short = (
            here[:, :, None].expand(-1, -1, there.shape[1]),
            there[:, None, :].expand(-1, here.shape[1], -1),
        )
        quadratic = self.compare(torch.stack((long, short, (long - short).abs()), 3))[..., 0]
        return self.solver.join(unary, quadratic / 5)


def train(method: Method, seed: int, quick: bool) -> Run:
    """L1 loss of the matching of points; the edges' part of a solution follows from it."""
    count, test, epochs = (150, 60, 2) if quick else (TRAINING, TEST, EPOCHS)
    data = pairs(seed, count + test, POINTS, JITTER)
    solver = GraphMatching(POINTS)
    net, applied = Costs(solver), Applied(method, solver, seed)
    optimiser = torch.optim.Adam(net.parameters(), lr=RATE)
    generator = torch.Generator().manual_seed(seed)
    unseen = torch.arange(count, count + test, device=data.matching.device)
    watch = Watch(applied)
    for epoch in range(epochs):
        applied.train()
        watch.resume()
        for batch in batches(count, BATCH, generator):
            optimiser.zero_grad()
            target = data.matching[batch]
            found, _ = solver.split(applied(net(data, batch), _whole(solver, target)))
            (found - target).abs().sum((1, 2)).mean().backward()
            optimiser.step()
        watch.pause()
        with torch.no_grad():
            cost = net(data, unseen)
            found, _ = solver.split(applied.solver(cost))
            right = (found * data.matching[unseen]).sum((1, 2)).mean() / POINTS
        watch.curve.append(Point(epoch + 1, mean_norm(applied, cost), 100 * float(right)))
    last = watch.curve[-1]
    return watch.run("graph_matching", seed, {"accuracy": last.score, "norm": last.norm})


def _whole(solver: GraphMatching, matching: Tensor) -> Tensor:
    """(Y, Z) for permutation matrices Y: Z[e, f] = Y[i, k] Y[j, l]; what an informed margin needs."""
    (i, j), (k, l) = (
        torch.as_tensor(edges.T, device=matching.device) for edges in (solver.first, solver.second)
    )
    both = matching[:, i[:, None], k[None, :]] * matching[:, j[:, None], l[None, :]]
    return solver.join(matching, both)


FAMILY = Family(
    name="graph_matching",
    title="Keypoint matching, quadratic",
    setup=(
        "Six keypoints of the same kind of images, unary costs of descriptors and costs of all pairs of "
        "edges by a small network of their lengths, exact solutions among 720; 1,000 pairs, 12 epochs. "
        "Published: Pascal VOC, Delaunay graphs, an approximate solver."
    ),
    values=(("accuracy", "points right, %"), ("norm", "mean abs(w)")),
    larger=True,
    methods=(
        identity("none"),
        identity("none", 0.1),
        identity("none", 1.0),
        identity("none", informed=0.1),
        identity("none", informed=1.0),
        identity("norm"),
        identity("norm", 0.1),
        other("Blackbox 80", Blackbox(80.0)),
        other("Blackbox 80", Blackbox(80.0), margin=0.1),
        other("Blackbox 80", Blackbox(80.0), margin=1.0),
        other("Blackbox 80", Blackbox(80.0), informed=0.1),
        other("Blackbox 80", Blackbox(80.0), informed=1.0),
        other("Blackbox 80", Blackbox(80.0), "norm"),
        other("Blackbox 80", Blackbox(80.0), "norm", margin=0.1),
        other("LPGD both 80", LPGD(80.0), margin=0.1),
        other("I-MLE 80", IMLE(80.0, Gumbel(0.1))),
        other("Perturbed 0.3, 10 samples", Perturbed(0.3, 10)),
        other("straight-through, softmax", StraightThrough(1.0)),
    ),
    train=train,
    published=PUBLISHED,
    source="Sahoo et al., Tab. 4, Pascal VOC",
    orderings=orderings("0.1", "0.1"),
    collapse=(
        ("Identity", "Identity"),
        ("Identity, noise 0.1", "Identity, noise"),
        ("Identity, P_norm", "Identity, P_norm"),
    ),
)

__all__ = ["FAMILY", "train"]
