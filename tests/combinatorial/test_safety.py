"""What is refused of projections and costs, with the sample's index."""

import networkx as nx
import pytest
import torch
from torch import Tensor

import implicitdiff as idf
import implicitdiff.combinatorial as co
from implicitdiff import (
    InputError,
    ProjectionError,
)
from tests.combinatorial.instances import INSTANCES

GRID = co.GridShortestPath(3, 3)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_door_is_lazy_and_honest() -> None:
    assert idf.combinatorial is co
    with pytest.raises(AttributeError, match="no attribute 'combinatorics'"):
        _ = idf.combinatorics  # type: ignore[attr-defined]


# --- projections ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("projection", ["mean", "std", co.Plane(torch.eye(3)), lambda w: w.exp()])
def test_a_wrong_projection_is_refused(projection: object) -> None:
    with pytest.raises(ProjectionError, match="GridShortestPath"):
        co.check_invariance(GRID, projection)  # type: ignore[arg-type]
    layer = co.DiscreteLayer(GRID, co.Identity(projection))  # type: ignore[arg-type]
    with pytest.raises(ProjectionError, match="GridShortestPath"):
        layer(torch.rand(2, 3, 3))
    with torch.no_grad():
        co.DiscreteLayer(GRID, co.Identity(projection), check=False)(torch.rand(2, 3, 3))  # type: ignore[arg-type]


def test_a_wrong_projection_is_refused_under_transforms() -> None:
    layer = co.DiscreteLayer(GRID, co.Identity("mean"))
    with pytest.raises(ProjectionError):
        torch.func.vmap(torch.func.grad(lambda w: layer(w).sum()))(torch.rand(2, 3, 3))


@pytest.mark.parametrize("name", sorted(INSTANCES))
def test_valid_projections_are_proved(name: str) -> None:
    solver = INSTANCES[name].make()
    shape = INSTANCES[name].solutions().shape[1:]
    for projection in ("none", "norm", "affine", "auto"):
        assert co.check_invariance(solver, projection, shape=shape).proved


@pytest.mark.parametrize("name", sorted(INSTANCES))
def test_mean_is_proved_exactly_where_all_sums_are_equal(name: str) -> None:
    listed = INSTANCES[name].solutions()
    shape = listed.shape[1:]
    flat = listed.reshape(len(listed), -1)
    if INSTANCES[name].kind == "nonnegative":
        # What contains another solution is never better than it: detours on a narrow grid, for instance.
        contains = (flat[:, None] >= flat[None]).all(2) & (flat[:, None] > flat[None]).any(2)
        flat = flat[~contains.any(1)]
    sums = flat.sum(1)
    if (sums == sums[0]).all():
        found = co.check_invariance(INSTANCES[name].make(), "mean", shape=shape)
        assert found.proved or INSTANCES[name].kind == "nonnegative"
    else:
        with pytest.raises(ProjectionError):
            co.check_invariance(INSTANCES[name].make(), "mean", shape=shape)


def test_what_is_not_declared_is_tested() -> None:
    """A user's function without declarations, for which mean happens to be right, or wrong."""
    right = co.solver(co.TopK(2), cost_shape=(5,))
    found = co.check_invariance(right, "mean")
    assert not found.proved
    assert "tested" in found.reason
    layer = co.DiscreteLayer(right, co.Identity("mean"))
    layer(draw(0, 3, 5))
    wrong = co.solver(lambda w: (w < 0).to(w), cost_shape=(5,))
    with pytest.raises(ProjectionError):
        co.check_invariance(wrong, "mean")
    costs = torch.tensor([[1.0, 2, 3, 4, 5], [-9, -9, -9, -9, -8]])
    with pytest.raises(ProjectionError, match="cost 1 "):
        co.check_invariance(co.EnumeratedSolver(torch.eye(5).cumsum(0)), lambda w: w.abs(), costs, samples=1)


def test_a_projection_is_tested_in_the_sense_of_its_costs() -> None:
    solver = co.TopK(2, sense="max")
    seen: list[Tensor] = []

    def mine(theta: Tensor) -> Tensor:
        seen.append(theta)
        return theta - theta.mean(1, keepdim=True)

    theta = draw(1, 3, 5).requires_grad_()
    layer = co.DiscreteLayer(solver, co.Identity(mine))
    layer(theta).backward(torch.ones(3, 5, dtype=torch.float64) + torch.eye(3, 5, dtype=torch.float64))
    assert torch.equal(seen[-1], theta.detach())
    g = torch.eye(3, 5, dtype=torch.float64) - 0.2
    torch.testing.assert_close(theta.grad, g)


def test_the_shape_must_be_known() -> None:
    with pytest.raises(InputError, match="pass costs, or shape"):
        co.check_invariance(co.TopK(2), "mean")
    with pytest.raises(ProjectionError, match=r"\(33, 2\)"):
        co.check_invariance(co.solver(co.TopK(1), cost_shape=(4,)), lambda w: w[:, :2], draw(0, 1, 4))


# --- costs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", sorted(INSTANCES))
def test_costs_that_are_not_finite(name: str, bad: float) -> None:
    instance = INSTANCES[name]
    costs = instance.costs(1, 4)
    costs[2].view(-1)[1] = bad
    solver = instance.make()
    for run in (solver, co.DiscreteLayer(solver, co.Identity("none"))):
        with pytest.raises(InputError, match="not finite in sample 2 of 4"):
            run(costs)


def test_large_finite_costs_are_not_refused() -> None:
    costs = torch.tensor([[3e38, 3e38, -3e38, 1.0]])
    assert co.TopK(1)(costs).tolist() == [[0, 0, 1, 0]]


@pytest.mark.parametrize("name", ["grid-8", "grid-steps", "path-undirected", "cut-directed"])
def test_negative_costs(name: str) -> None:
    instance = INSTANCES[name]
    costs = instance.costs(1, 4)
    costs[1].view(-1)[0] = -0.5
    costs[3].view(-1)[2] = -0.1
    solver = instance.make()
    with pytest.raises(InputError, match="negative in samples 1, 3 of 4"):
        solver(costs)
    layer = co.DiscreteLayer(solver, co.Identity("none"))
    with pytest.raises(InputError, match="domain='clamp'"):
        layer(costs)
    clamped = co.DiscreteLayer(solver, co.Identity("none"), domain="clamp", eps=0.01)
    x = costs.clone().requires_grad_()
    y = clamped(x)
    assert torch.equal(y, solver(costs.clamp(min=0.01)))
    y.sum().backward()
    torch.testing.assert_close(x.grad, -torch.ones_like(costs))
    assert clamped.diagnostics().boundary == pytest.approx(float((costs < 0.01).double().mean()))


def test_perturbed_costs_are_held_to_the_domain_too() -> None:
    costs = torch.rand(3, 3, 3) + 0.1
    for estimator in (co.Blackbox(100.0), co.LPGD(100.0), co.AdaptiveIMLE(alpha=50.0)):
        x = costs.clone().requires_grad_()
        layer = co.DiscreteLayer(GRID, estimator)
        with pytest.raises(InputError, match="perturbed costs of GridShortestPath are negative"):
            layer(x).backward(torch.full_like(x, -1.0))
        layer = co.DiscreteLayer(GRID, estimator, domain="clamp")
        layer(x).backward(torch.full_like(x, -1.0))
    noisy = co.DiscreteLayer(GRID, co.Perturbed(5.0, 20))
    noisy(costs)  # multiplicative by itself
    with pytest.raises(InputError, match="negative"):
        co.DiscreteLayer(GRID, co.Perturbed(5.0, 20, multiplicative=False))(costs)
    with pytest.raises(InputError, match="costs of zero, in sample 1 of 3"):
        noisy(costs * torch.tensor([1.0, 0.0, 1.0]).reshape(3, 1, 1))
    loss = co.SPOPlusLoss(GRID)
    with pytest.raises(InputError, match="costs 2w - c of GridShortestPath are negative"):
        loss(costs, 3 * costs)
    assert co.SPOPlusLoss(GRID, domain="clamp")(costs, 3 * costs).isfinite()


def test_negative_cycles_and_unbounded_flows() -> None:
    graph = nx.DiGraph([(0, 1), (1, 2), (2, 1), (2, 3)])
    path = co.ShortestPath(graph, 0, 3)
    good, bad = [1.0, -2.0, 2.0, 1.0], [1.0, -2.0, 1.9, 1.0]
    assert path(torch.tensor(good)).tolist() == [1, 1, 0, 1]
    with pytest.raises(InputError, match="cycle of negative sum in sample 1"):
        path(torch.tensor([good, bad]))
    graph.nodes[0]["demand"], graph.nodes[3]["demand"] = -1, 1
    flow = co.MinCostFlow(graph)
    assert flow(torch.tensor(good)).tolist() == [1, 1, 0, 1]
    with pytest.raises(InputError, match="sample 1: give every edge a capacity"):
        flow(torch.tensor([good, bad]))


def test_cycles_of_sum_zero_do_not_lead_in_a_circle() -> None:
    """Their sums round to less than zero at some scales."""
    instance = INSTANCES["path-directed"]
    solver = instance.make()
    listed = torch.from_numpy(instance.solutions())
    for scale in (1e-9, 1e-3, 0.1, 1e9):
        costs = instance.costs(17, 100, ties=True) * scale
        values = (solver(costs) * costs).sum(1)
        torch.testing.assert_close(values, (costs @ listed.T).amin(1), rtol=0, atol=1e-9 * scale)


def test_zero_costs_under_a_norm() -> None:
    costs = draw(1, 4, 5)
    costs[2] = 0.3
    layer = co.DiscreteLayer(co.TopK(2), co.Identity("std"))
    with pytest.raises(InputError, match="zero in sample 2 of 4"):
        layer(costs)
    soft = co.DiscreteLayer(co.TopK(2), co.Identity(co.Norm(co.Mean(), eps=1e-3)))
    x = costs.clone().requires_grad_()
    soft(x).square().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_shapes_and_dtypes() -> None:
    with pytest.raises(InputError, match=r"expected \(\*batch, 3, 3\)"):
        GRID(torch.rand(2, 3, 4))
    with pytest.raises(InputError, match=r"expected \(\*batch, \*, \*\)"):
        co.Assignment()(torch.rand(4))
    with pytest.raises(InputError, match=r"torch\.int64"):
        GRID(torch.ones(3, 3, dtype=torch.int64))
    with pytest.raises(InputError, match="at least 3 costs"):
        co.TopK(3)(torch.rand(2))
