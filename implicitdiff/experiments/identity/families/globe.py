"""Round trips on the globe: where countries lie, learnt from the best tours between them.

In: a method and a seed. Out: the share of test tours that are right. Next file to read: ``../figures.py``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from implicitdiff.combinatorial import IMLE, LPGD, Blackbox, Gumbel, Perturbed, StraightThrough
from implicitdiff.experiments.identity.applied import Applied, Method, identity, other
from implicitdiff.experiments.identity.family import Family, Ordering
from implicitdiff.experiments.identity.results import Point, Run
from implicitdiff.experiments.identity.training import Watch, batches, mean_norm
from implicitdiff.problems import GlobeTour

COUNTRIES, CITIES, FLAG = 40, 5, 3 * 8 * 12
TRAINING, TEST, EPOCHS, BATCH, RATE = 1500, 400, 30, 50, 1e-3


class Trips(NamedTuple):
    """Flags (countries, FLAG); who is visited (count, CITIES); the best tours (count, edges)."""

    flags: Tensor
    visited: Tensor
    tours: Tensor


def _trips(seed: int, count: int) -> Trips:
    generator = torch.Generator().manual_seed(seed)
    home = generator.device
    flags = torch.randn(COUNTRIES, FLAG, generator=generator, device=home)
    places = nn.functional.normalize(torch.randn(COUNTRIES, 3, generator=generator, device=home), dim=1)
    visited = torch.rand(count, COUNTRIES, generator=generator, device=home).argsort(1)[:, :CITIES]
    solver = GlobeTour(CITIES)
    return Trips(flags, visited, solver(solver.chords(places[visited])))


def _network() -> nn.Module:
    return nn.Sequential(nn.Linear(FLAG, 200), nn.ReLU(), nn.Linear(200, 3))


def _lengths(net: nn.Module, data: Trips, chosen: Tensor, solver: GlobeTour) -> Tensor:
    """A flag's place on the sphere, and the chords between those visited."""
    places = nn.functional.normalize(net(data.flags), dim=1)
    return solver.chords(places[data.visited[chosen]])


def trainer(disturbance: float):  # type: ignore[no-untyped-def]
    """`train` with Gaussian noise of this size, over the batch size, on dl/dy."""

    def train(method: Method, seed: int, quick: bool) -> Run:
        """L1 loss of tours, Adam; a margin is there in the first half of the epochs only."""
        count, test, epochs = (200, 100, 4) if quick else (TRAINING, TEST, EPOCHS)
        data, solver = _trips(seed, count + test), GlobeTour(CITIES)
        net, applied = _network(), Applied(method, solver, seed)
        optimiser = torch.optim.Adam(net.parameters(), lr=RATE)
        generator = torch.Generator().manual_seed(seed)
        unseen = torch.arange(count, count + test, device=data.visited.device)
        watch = Watch(applied)
        for epoch in range(epochs):
            if epoch == epochs // 2:
                applied.without_margin()
            applied.train()
            watch.resume()
            for batch in batches(count, BATCH, generator):
                optimiser.zero_grad()
                lengths = _lengths(net, data, batch, solver)
                found = applied(lengths)
                if disturbance:
                    drawn = torch.randn(lengths.shape, generator=generator, device=generator.device)
                    noise = disturbance / BATCH * drawn
                    found.register_hook(noise.add)
                (found - data.tours[batch]).abs().sum(1).mean().backward()
                optimiser.step()
            watch.pause()
            with torch.no_grad():
                lengths = _lengths(net, data, unseen, solver)
                right = (applied.solver(lengths) == data.tours[unseen]).all(1).float().mean()
            watch.curve.append(Point(epoch + 1, mean_norm(applied, lengths), 100 * float(right)))
        last = watch.curve[-1]
        run = watch.run("globe", seed, {"accuracy": last.score, "norm": last.norm})
        return replace(run, method=method.name)

    return train


_DISTURBED = {0.1: ", gradient noise 0.1", 0.25: ", gradient noise 0.25", 0.5: ", gradient noise 0.5"}


def _disturbed(method: Method, size: float) -> Method:
    return replace(method, name=method.name + _DISTURBED[size])


def train(method: Method, seed: int, quick: bool) -> Run:
    """By the size of gradient noise that is in the method's name."""
    size = next((size for size, suffix in _DISTURBED.items() if method.name.endswith(suffix)), 0.0)
    found: Run = trainer(size)(method, seed, quick)
    return replace(found, method=method.name)


FAMILY = Family(
    name="globe",
    title="Round trips on the globe",
    setup=(
        "40 countries at random places with random flags of 3 x 8 x 12 pixels, trips through 5 of them, "
        "exact tours by Held and Karp, L1 loss of edges; a network from flags to places; 1,500 trips, 30 "
        "epochs, the margin in the first half only. Gradient noise is Gaussian, its size divided by the "
        "batch size, on dl/dy. Published: 100 countries and their flags, 5 to 40 cities, 100 epochs."
    ),
    values=(("accuracy", "tours right, %"), ("norm", "mean abs(w)")),
    larger=True,
    methods=(
        identity("none"),
        identity("none", 0.2),
        identity("norm"),
        identity("std"),
        identity("std", 0.2),
        identity("auto", 0.2),
        other("Blackbox 20", Blackbox(20.0)),
        other("Blackbox 20", Blackbox(20.0), margin=0.2),
        other("Blackbox 20", Blackbox(20.0), "std", margin=0.2),
        other("LPGD both 20", LPGD(20.0), margin=0.2),
        other("I-MLE 20", IMLE(20.0, Gumbel(0.1))),
        other("Perturbed 0.2, 10 samples", Perturbed(0.2, 10)),
        other("straight-through, softmax", StraightThrough(0.5)),
        *(_disturbed(identity("std", 0.2), size) for size in _DISTURBED),
        *(_disturbed(other("Blackbox 20", Blackbox(20.0), margin=0.2), size) for size in _DISTURBED),
    ),
    train=train,
    published={
        "Identity, P_std": "91.09 ± 0.07",
        "Identity, P_std, noise 0.2": "99.67",
        "Blackbox 20": "99.2 ± 0.1 (Vlastelica et al., informed by a margin of their loss)",
        "Identity, P_std, noise 0.2, gradient noise 0.25": "above Blackbox (Fig. 4, a curve)",
    },
    source="Sahoo et al., Tab. 6, k = 5, and Fig. 4; Vlastelica et al., Tab. 3",
    orderings=(
        Ordering(
            "noise improves Identity with P_std by far",
            lambda s: (
                s.mean("Identity, P_std, noise 0.2", "accuracy") > s.mean("Identity, P_std", "accuracy") + 5
            ),
        ),
        Ordering(
            (
                "without noise and projection costs collapse, for Identity and for Blackbox (abs(w) below a "
                "tenth of that with noise)"
            ),
            lambda s: all(
                s.mean(name, "norm") < 0.1 * s.mean(f"{name}, noise 0.2", "norm")
                for name in ("Identity", "Blackbox 20")
            ),
        ),
        Ordering(
            "with gradient noise of 0.25 Identity with P_std beats Blackbox by far",
            lambda s: (
                s.mean("Identity, P_std, noise 0.2, gradient noise 0.25", "accuracy")
                > s.mean("Blackbox 20, noise 0.2, gradient noise 0.25", "accuracy") + 30
            ),
        ),
        Ordering(
            (
                "after the margin is gone Blackbox' costs collapse under gradient noise of 0.25, those of "
                "Identity do not"
            ),
            lambda s: (
                s.mean("Blackbox 20, noise 0.2, gradient noise 0.25", "norm")
                < 0.1 * s.mean("Identity, P_std, noise 0.2, gradient noise 0.25", "norm")
            ),
        ),
        Ordering(
            "without gradient noise both are equal (within 3 points)",
            lambda s: (
                abs(
                    s.mean("Identity, P_std, noise 0.2", "accuracy")
                    - s.mean("Blackbox 20, noise 0.2", "accuracy")
                )
                < 3
            ),
        ),
    ),
    note="The margin ends in the middle of training: what is seen after that is whether costs stay where they are.",
    collapse=(
        ("Identity", "Identity, no margin"),
        ("Blackbox 20", "Blackbox, no margin"),
        ("Identity, P_std, noise 0.2, gradient noise 0.25", "Identity, P_std, margin, noise on gradients"),
        ("Blackbox 20, noise 0.2, gradient noise 0.25", "Blackbox, margin, noise on gradients"),
    ),
)

__all__ = ["FAMILY", "train"]
