"""The ready-made discrete problems: their examples, their solutions, and the diagnostics of each."""

from __future__ import annotations

import itertools

import pytest
import torch

import implicitdiff as idf
import implicitdiff.combinatorial as co
from implicitdiff import problems
from implicitdiff.problems import (
    GlobeTour,
    GraphMatching,
    KeypointMatching,
    RetrievalRanking,
    SubsetSelection,
    TerrainPath,
)

READY = [
    TerrainPath(5, 6),
    KeypointMatching(5),
    GraphMatching(4),
    GlobeTour(6),
    SubsetSelection(7, 3),
    RetrievalRanking(5),
]


@pytest.mark.parametrize("solver", READY, ids=lambda solver: solver.name)
def test_example_is_solved_explained_and_checked(solver: co.Solver) -> None:
    (cost,) = solver.example()
    assert len(cost) == 3
    assert torch.equal(cost, solver.example()[0]), "the same costs every time"
    y = solver(cost)
    assert len(y.flatten(1).unique(dim=0)) > 1, "an example whose samples differ"
    assert idf.check(solver, cost.double()).ok
    assert idf.explain(solver, cost).solver == type(solver).__name__
    assert idf.explain(solver, cost).valid


@pytest.mark.parametrize("solver", READY, ids=lambda solver: solver.name)
def test_in_a_layer_with_every_kind_of_estimator(solver: co.Solver) -> None:
    (cost,) = solver.example()
    for estimator in (co.Identity(), co.Blackbox(20.0), co.Perturbed(2.0, 20)):
        w = cost.clone().requires_grad_()
        y = co.DiscreteLayer(solver, estimator, domain="clamp")(w)
        (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(7))).sum().backward()
        assert w.grad.abs().max() > 0


def test_terrains_have_five_kinds_and_the_published_costs() -> None:
    solver = TerrainPath(12, 10)
    terrains = solver.maps(4, torch.Generator().manual_seed(3))
    assert terrains.shape == (4, 12, 10)
    assert all(sorted(kinds.unique().tolist()) == [0, 1, 2, 3, 4] for kinds in terrains)
    costs = solver.true_costs(terrains)
    assert costs.max() == 1
    assert costs.min() == pytest.approx(0.8 / 9.2)


def test_edge_lengths_of_graph_matching_find_a_rotation() -> None:
    solver = GraphMatching(5)
    generator = torch.Generator().manual_seed(1)
    positions = torch.randn(1, 5, 2, generator=generator, dtype=torch.float64)
    order = torch.tensor([3, 0, 4, 1, 2])
    turned = positions[:, order] @ torch.tensor([[0.6, 0.8], [-0.8, 0.6]], dtype=torch.float64)
    (first, _), (_, second) = solver.lengths(positions), solver.lengths(turned)
    cost = solver.join(torch.zeros(1, 5, 5, dtype=torch.float64), (first[:, :, None] - second[:, None]).abs())
    matched, _ = solver.split(solver(cost))
    assert torch.equal(matched[0].argmax(1), order.argsort())


def test_chords_are_the_distances_of_all_pairs() -> None:
    places = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    pairs = [(places[i] - places[j]).norm() for i, j in itertools.combinations(range(4), 2)]
    torch.testing.assert_close(GlobeTour(4).chords(places), torch.stack(pairs))


def test_sizes_are_part_of_the_declaration() -> None:
    with pytest.raises(idf.InputError, match="shape"):
        KeypointMatching(4)(torch.rand(2, 5, 5))
    for wrong in (lambda: KeypointMatching(0), lambda: SubsetSelection(3, 4), lambda: RetrievalRanking(0)):
        with pytest.raises(idf.OptionError):
            wrong()
    with pytest.raises(idf.ProblemDefinitionError, match="TSP"):
        co.TSP(4).example()
    with pytest.raises(AttributeError, match="Nothing"):
        _ = problems.Nothing
