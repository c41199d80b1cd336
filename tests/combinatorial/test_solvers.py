"""Every solver against all solutions of small instances: optimal, and a member of Y, also where costs tie."""

import pickle

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import implicitdiff.combinatorial as co
from implicitdiff import InputError
from implicitdiff.combinatorial.base import orthonormal_rows
from implicitdiff.combinatorial.solvers.graphs import EdgeList
from tests.combinatorial.instances import BOTH_SENSES, INSTANCES

EVERY = sorted(INSTANCES)


def assert_optimal(y: Tensor, costs: Tensor, listed: np.ndarray, sense: str, tolerance: float = 1e-9) -> None:
    """y is a row of Y for each cost, and none is better."""
    rows, flat = torch.from_numpy(listed).flatten(1), costs.double().flatten(1)
    found = y.double().flatten(1)
    assert ((found[:, None] - rows[None]).abs().amax(2).amin(1) == 0).all(), "not a solution"
    values = flat @ rows.T
    best = values.amin(1) if sense == "min" else values.amax(1)
    torch.testing.assert_close((found * flat).sum(1), best, rtol=0, atol=tolerance)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("name", EVERY)
def test_solutions_are_optimal(name: str, ties: bool) -> None:
    instance = INSTANCES[name]
    solver = instance.make()
    costs = instance.costs(seed=3, batch=12, ties=ties)
    y = solver(costs)
    assert y.dtype == torch.float64
    assert_optimal(y, costs, instance.solutions(), solver.sense)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31), ties=st.booleans(), batch=st.integers(1, 4))
@pytest.mark.parametrize("name", EVERY)
def test_solutions_are_optimal_anywhere(name: str, seed: int, ties: bool, batch: int) -> None:
    instance = INSTANCES[name]
    solver = instance.make()
    costs = instance.costs(seed, batch, ties)
    assert_optimal(solver(costs), costs, instance.solutions(), solver.sense)


@pytest.mark.parametrize("sense", ["min", "max"])
@pytest.mark.parametrize("name", BOTH_SENSES)
def test_both_senses(name: str, sense: str) -> None:
    instance = INSTANCES[name]
    solver = instance.make(sense=sense)
    costs = instance.costs(seed=5, batch=6)
    assert_optimal(solver(costs), costs, instance.solutions(), sense)


@pytest.mark.parametrize("name", EVERY)
def test_batches_of_any_shape_and_single_precision(name: str) -> None:
    instance = INSTANCES[name]
    solver = instance.make()
    costs = instance.costs(seed=7, batch=6)
    whole = solver(costs)
    assert torch.equal(solver(costs[0]), whole[0])
    assert torch.equal(solver(costs.unflatten(0, (2, 3))), whole.unflatten(0, (2, 3)))
    assert solver(costs[:0]).shape == costs[:0].shape
    single = solver(costs.float())
    assert single.dtype == torch.float32
    assert torch.equal(single.double(), whole)


@pytest.mark.parametrize("name", EVERY)
def test_one_sample_does_not_change_another(name: str) -> None:
    instance = INSTANCES[name]
    solver = instance.make()
    costs = instance.costs(seed=11, batch=5)
    assert torch.equal(solver(costs.flip(0)).flip(0), solver(costs))


@pytest.mark.parametrize("name", EVERY)
def test_declared_equalities_hold_for_all_solutions(name: str) -> None:
    instance = INSTANCES[name]
    listed = instance.solutions()
    rows = instance.make().row_space(listed.shape[1:])
    values = listed.reshape(len(listed), -1) @ rows.T
    np.testing.assert_allclose(values, np.broadcast_to(values[0], values.shape), atol=1e-9)
    if instance.dimension is not None:
        flat = listed.reshape(len(listed), -1)
        assert np.linalg.matrix_rank(flat - flat[0]) == instance.dimension
        assert flat.shape[1] - len(rows) == instance.dimension, "an equality that holds is not declared"


@pytest.mark.parametrize("name", EVERY)
def test_affine_projection_is_the_projector_on_differences_of_solutions(name: str) -> None:
    instance = INSTANCES[name]
    listed = instance.solutions()
    costs = instance.costs(seed=2, batch=3)
    projected = instance.make().without_normals(costs)
    rows = instance.make().row_space(listed.shape[1:])
    flat = costs.flatten(1).numpy()
    np.testing.assert_allclose(projected.flatten(1).numpy(), flat - flat @ rows.T @ rows, atol=1e-12)
    if instance.dimension is not None:
        other = co.EnumeratedSolver(listed).without_normals(costs)
        torch.testing.assert_close(projected, other, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["grid-8", "spanning-tree", "tsp-5", "matching-general", "flow", "milp"])
def test_solvers_can_be_pickled(name: str) -> None:
    instance = INSTANCES[name]
    solver = instance.make()
    costs = instance.costs(seed=1, batch=2)
    assert torch.equal(pickle.loads(pickle.dumps(solver))(costs), solver(costs))


def test_tours_from_matrices_of_distances() -> None:
    solver, points = co.TSP(6), torch.rand(2, 6, 3, generator=torch.Generator().manual_seed(0))
    points.requires_grad_()
    costs = solver.edge_costs(torch.cdist(points, points))
    y = solver(costs)
    tour = torch.zeros(2, 6, 6)
    tour[:, solver.tail, solver.head] = y
    length = ((tour + tour.mT) * torch.cdist(points, points)).sum((1, 2)) / 2
    torch.testing.assert_close(co.optimal_value(solver, costs), length)
    (found,) = torch.autograd.grad(co.optimal_value(solver, costs).sum(), points)
    assert found.abs().max() > 0
    with pytest.raises(InputError, match=r"expected \(\*batch, 6, 6\)"):
        solver.edge_costs(torch.zeros(2, 5, 6))


def test_quadratic_costs_are_joined_and_solutions_split() -> None:
    first, second = [(0, 1), (1, 2)], [(0, 2), (2, 1), (1, 0)]
    solver = co.QuadraticAssignment(3, first, second)
    unary, pairs = torch.randn(2, 3, 3), torch.randn(2, 2, 3)
    Y, Z = solver.split(solver(solver.join(unary, pairs)))
    assert torch.equal(Y.sum(1), torch.ones(2, 3))
    assert torch.equal(Y.sum(2), torch.ones(2, 3))
    for e, (i, j) in enumerate(first):
        for f, (k, m) in enumerate(second):
            assert torch.equal(Z[:, e, f], Y[:, i, k] * Y[:, j, m])
    # Costs of edge pairs decide where those of node pairs are zero.
    pairs = torch.zeros(1, 2, 3)
    pairs[0, 0, 2] = pairs[0, 1, 0] = -1
    Y, Z = solver.split(solver(solver.join(torch.zeros(1, 3, 3), pairs)))
    assert Z[0].tolist() == [[0, 0, 1], [1, 0, 0]]
    assert Y[0].argmax(1).tolist() == [1, 0, 2]
    with pytest.raises(InputError, match="quadratic"):
        solver.join(unary, pairs[:, :1])


@pytest.mark.parametrize("chain", [False, True])
def test_row_spaces_of_many_rows(chain: bool) -> None:
    """A grid goes by eigenvectors; a long chain has no gap in its spectrum and goes by QR."""
    graph = nx.path_graph(1500, create_using=nx.DiGraph) if chain else nx.grid_2d_graph(9, 9).to_directed()
    rows = EdgeList.of(graph, "test").incidence()[:: 4 if chain else 1]
    basis = orthonormal_rows(rows)
    assert len(basis) == (len(rows) if chain else len(rows) - 1)
    np.testing.assert_allclose(basis @ basis.T, np.eye(len(basis)), atol=1e-10)
    np.testing.assert_allclose(rows @ basis.T @ basis, rows, atol=1e-10)


def test_nearly_dependent_equalities_are_not_lost() -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((70, 90))
    rows[1] = rows[0] + 1e-5 * rng.standard_normal(90)
    rows[2] = rows[3] - rows[4]
    basis = orthonormal_rows(rows)
    assert len(basis) == 69
    np.testing.assert_allclose(basis @ basis.T, np.eye(69), atol=1e-10)
    np.testing.assert_allclose(rows @ basis.T @ basis, rows, atol=1e-9)
