"""Defects that were seen in other packages for discrete layers, each as a test that passes here."""

import networkx as nx
import numpy as np
import pytest
import torch
from torch import Tensor

import implicitdiff.combinatorial as co
from implicitdiff import InputError
from tests.combinatorial.instances import permutation_matrices


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient(layer: co.DiscreteLayer, w: Tensor, g: Tensor) -> Tensor:
    w = w.clone().requires_grad_()
    (found,) = torch.autograd.grad((layer(w) * g).sum(), w)
    return found


def test_identity_has_projections_everywhere() -> None:
    """InferOpt and PyEPO have Identity without projection; the paper's code has it for k-hot only."""
    for solver, w in (
        (co.TopK(2), draw(0, 2, 5)),
        (co.Assignment(), draw(0, 2, 3, 3)),
        (co.TSP(5), draw(0, 2, 10)),
    ):
        plain = gradient(co.DiscreteLayer(solver, co.Identity("none")), w, draw(1, *w.shape))
        projected = gradient(co.DiscreteLayer(solver, co.Identity()), w, draw(1, *w.shape))
        assert plain.flatten(1).sum(1).abs().min() > 0.1
        assert projected.flatten(1).sum(1).abs().max() < 1e-12


def test_identity_of_an_argmax_has_the_other_sign() -> None:
    """The paper's k-hot layer maximises, so that its backward is plus the identity."""
    w, g = draw(0, 2, 5), draw(1, 2, 5)
    assert torch.equal(gradient(co.DiscreteLayer(co.TopK(2), co.Identity("none")), w, g), -g)
    assert torch.equal(gradient(co.DiscreteLayer(co.TopK(2, sense="max"), co.Identity("none")), w, g), g)


def test_gamma_numbers_have_the_scale_of_the_paper() -> None:
    """The notebooks of Identity and tf-imle pass k/i as the inverse scale: at k = 10, tau = 10, s = 10 a standard
    deviation of 0.6 instead of 3.9.
    """
    xi = co.SumOfGamma(10, 10.0, 10).draw(torch.zeros(50_000), torch.Generator().manual_seed(0))
    places = torch.arange(1.0, 11.0)
    expected = 10 / 10 * (10 * (1 / places**2).sum()).sqrt()
    assert float(xi.std()) == pytest.approx(float(expected), rel=0.03)
    assert float(xi.std()) == pytest.approx(3.95, rel=0.05)


@pytest.mark.parametrize("sense", ["min", "max"])
def test_blackbox_moves_to_better_solutions(sense: str) -> None:
    """InferOpt's Interpolation takes the upper envelope: it moves away from a worse solution. One step of 3-of-7."""
    solver = co.TopK(3, sense=sense)  # type: ignore[arg-type]
    w, target = draw(0, 300, 7), solver(draw(1, 300, 7))
    layer = co.DiscreteLayer(solver, co.Blackbox(5.0))
    x = w.clone().requires_grad_()
    (layer(x) - target).square().sum().backward()
    assert x.grad is not None
    before = (solver(w) - target).abs().sum(1)
    after = (solver(w - 5.0 * x.grad) - target).abs().sum(1)
    assert (after - before).mean() < -0.5
    assert (after <= before).all()


def test_the_sparsity_of_adaptive_imle_is_counted_per_sample() -> None:
    """PyEPO compares a mean over entries, at most 1, with the target 1: its alpha can practically only grow."""
    estimator = co.AdaptiveIMLE(alpha=5.0, eta=0.1, momentum=0.0)
    layer = co.DiscreteLayer(co.TopK(3), estimator)
    found = gradient(layer, draw(0, 20, 8), draw(1, 20, 8))
    assert found.ne(0).sum(1).double().mean() > 1
    assert float(estimator.alpha) == pytest.approx(4.9)


@pytest.mark.parametrize("sense", ["min", "max"])
def test_noise_of_imle_is_added_to_what_is_maximised(sense: str) -> None:
    """PyEPO adds it to costs of a minimisation too; with Gumbel noise the samples are then not those of a softmax."""
    sign = -1 if sense == "min" else 1
    solver = co.TopK(1, sense=sense)  # type: ignore[arg-type]
    w = torch.tensor([[0.0, 1.0, 3.0]])
    layer = co.DiscreteLayer(
        solver, co.IMLE(1.0, co.Gumbel(), 40_000), generator=torch.Generator().manual_seed(0)
    )
    torch.testing.assert_close(layer(w), torch.softmax(sign * w, dim=1), rtol=0, atol=0.01)


def test_imle_is_divided_by_lam_and_keeps_its_shape() -> None:
    """torch-imle does not divide (unless asked, neither do we), and returns a batch of B times the samples."""
    w, g = draw(0, 4, 8), draw(1, 4, 8)
    layer = co.DiscreteLayer(co.TopK(2), co.IMLE(3.0, co.SumOfGamma(2), samples=5))
    assert layer(w).shape == (4, 8)
    scaled = gradient(co.DiscreteLayer(co.TopK(2), co.IMLE(3.0)), w, g)
    unscaled = gradient(co.DiscreteLayer(co.TopK(2), co.IMLE(3.0, scale=False)), w, g)
    torch.testing.assert_close(unscaled, 3.0 * scaled)


def test_the_value_of_the_fenchel_young_loss_is_the_loss() -> None:
    """Elsewhere |mean y - y*|^2 is returned, with the right gradient: differences of the value must agree with it."""
    solver, target = co.TopK(2), co.TopK(2)(draw(1, 1, 5))
    w, step = draw(0, 1, 5), 1e-6 * draw(2, 1, 5)

    def loss(w: Tensor) -> Tensor:
        made = co.FenchelYoungLoss(solver, 0.5, 20, generator=torch.Generator().manual_seed(3))
        return made(w, target)

    x = w.clone().requires_grad_()
    loss(x).backward()
    assert x.grad is not None
    assert float(loss(w + step) - loss(w)) == pytest.approx(float((x.grad * step).sum()), rel=1e-4)


def test_backward_of_every_solver_runs() -> None:
    """blackbox-backprop's TSP reads an attribute that its forward never sets; its matching returns two gradients for
    four inputs.
    """
    for solver, w in (
        (co.TSP(5), draw(0, 9, 10)),
        (co.PerfectMatching(nx.grid_2d_graph(2, 2)), draw(0, 9, 4)),
        (co.PerfectMatching(nx.complete_graph(4)), draw(0, 9, 6)),
    ):
        found = gradient(co.DiscreteLayer(solver, co.Blackbox(20.0)), w, draw(1, *w.shape))
        assert found.abs().max() > 0


def test_negative_and_nan_costs_of_paths_are_errors() -> None:
    """Elsewhere 66 of 500 grids with costs from -0.3 to 1 get a path that is not shortest, and NaN gets some path."""
    grid, costs = co.GridShortestPath(3, 3), torch.rand(2, 3, 3) + 0.1
    for bad in (-0.2, float("nan")):
        costs[1, 1, 1] = bad
        with pytest.raises(InputError, match="sample 1"):
            grid(costs)


def test_dijkstra_is_not_used_on_negative_arcs() -> None:
    """networkx' Dijkstra returns [0, 1, 3] here without a word."""
    arcs = {(0, 1): 1.0, (0, 2): 2.0, (2, 1): -1.5, (1, 3): 1.0}
    path = co.ShortestPath(nx.DiGraph(list(arcs)), 0, 3)
    y = path(torch.tensor([arcs[edge] for edge in path.edges]))  # networkx lists edges by their tails
    assert dict(zip(path.edges, y.tolist(), strict=True)) == {(0, 1): 0, (0, 2): 1, (2, 1): 1, (1, 3): 1}


def test_ties_of_top_k_have_k_ones() -> None:
    """A threshold gives more than k where scores tie."""
    for w in (torch.zeros(3, 6), torch.tensor([[1.0, 1, 1, 0, 0, 0]])):
        assert (co.TopK(2)(w).sum(1) == 2).all()


def test_edges_of_cost_zero_stay_edges() -> None:
    """SciPy's trees and sparse matchings lose explicit zeros."""
    triangle = nx.complete_graph(3)
    for costs in ([0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]):
        assert co.SpanningTree(triangle)(torch.tensor(costs)).sum() == 2
    square = nx.cycle_graph(4)
    matched = co.PerfectMatching(square)(torch.tensor([0.0, 1.0, 1.0, 0.0]))
    assert matched.sum() == 2
    grid = co.GridShortestPath(3, 3, neighbours=4)
    corner = torch.tensor([[0.0, 0.0, 0.0], [1, 1, 0], [1, 1, 0]])
    assert torch.equal(grid(corner), 1 - corner)


def test_a_graph_without_a_perfect_matching_is_an_error() -> None:
    """networkx returns a matching that is not perfect."""
    with pytest.raises(co_error(), match="no matching of more than 1"):
        co.PerfectMatching(nx.complete_graph(3))


def co_error() -> type[Exception]:
    from implicitdiff import InfeasibleError

    return InfeasibleError


def test_network_simplex_ends_on_float_costs() -> None:
    """networkx' hangs on a graph like this one, unless costs are whole numbers."""
    graph = nx.DiGraph([(0, 1), (0, 2), (1, 2), (1, 3), (2, 3)])
    graph.nodes[0]["demand"], graph.nodes[3]["demand"] = -2, 2
    for edge in graph.edges:
        graph.edges[edge]["capacity"] = 2
    costs = torch.tensor([[0.1, 0.7, -0.3, 0.9, 0.2], [0.30000001, 0.1, 0.2, 0.1, 1e-9]], dtype=torch.float64)
    assert co.MinCostFlow(graph)(costs).tolist() == [[2, 0, 2, 0, 2], [0, 2, 0, 0, 2]]


def test_cuts_take_float_capacities() -> None:
    """SciPy's maximum flow takes integers only; rounding would lose the difference here."""
    graph = nx.DiGraph([("s", "a"), ("a", "t")])
    capacities = torch.tensor([[1.0 + 1e-12, 1.0], [1.0, 1.0 + 1e-12]], dtype=torch.float64)
    assert co.MinCut(graph, "s", "t")(capacities).tolist() == [[0, 1], [1, 0]]


def test_forbidden_pairs_of_an_assignment_are_named() -> None:
    with pytest.raises(InputError, match="not finite in sample 1"):
        co.Assignment()(torch.tensor([[[1.0, 2], [3, 4]], [[float("inf"), 1], [1, 2]]]))


def test_larger_tours_agree_between_methods() -> None:
    """Back-pointers of 8 bits overflow from 8 cities on."""
    costs = draw(0, 3, 36)
    both = [co.TSP(9, method=method)(costs) for method in ("dynamic", "cuts")]
    assert torch.equal(*both)
    assert np.array_equal(both[0].sum(1), np.full(3, 9.0))


def test_larger_matchings_agree_between_methods() -> None:
    graph = nx.grid_2d_graph(4, 4)
    costs = draw(0, 5, graph.number_of_edges())
    fast = co.PerfectMatching(graph)
    assert fast.bipartite
    edges = [tuple(map(fast.graph.nodes.index, edge)) for edge in fast.edges]
    incidence = np.zeros((16, len(edges)))
    for column, (u, v) in enumerate(edges):
        incidence[[u, v], column] = 1
    slow = co.MILP(len(edges), A_eq=incidence, b_eq=np.ones(16))
    assert torch.equal(fast(costs), slow(costs))


def test_the_penalty_of_a_hamming_loss_with_identity_is_reported() -> None:
    """y (1 - t) + (1 - y) t has the gradient 1 - 2 t at every y: Identity then never looks at the solver."""
    target = torch.from_numpy(permutation_matrices(3, 3)[:2])
    with pytest.warns(UserWarning, match="does not vanish"):
        assert not co.check_loss(lambda y: (y * (1 - target) + (1 - y) * target).sum((1, 2)), target)
