"""A user's solver on a local Dask cluster: `make test-dask`, which installs Dask. Not collected by `make test`.

Through the client's executor, and through joblib's backend for Dask; the solutions are those of the serial solver, in
the order of the samples, and errors keep the sample's index.
"""

from collections.abc import Iterator

import joblib
import numpy as np
import pytest
import torch
from distributed import Client, LocalCluster
from scipy.optimize import linear_sum_assignment
from torch import Tensor

import implicitdiff as idf
import implicitdiff.combinatorial as co

CITIES = 5


def matching(cost: np.ndarray) -> np.ndarray:
    """One assignment, as a user would write it; importable, so that it reaches another process."""
    y = np.zeros(cost.shape)
    y[linear_sum_assignment(cost)] = 1
    return y


def fails_for_large(cost: np.ndarray) -> np.ndarray:
    """A solver with a fault."""
    if cost.max() > 100:
        raise ValueError("too large")
    return matching(cost)


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    """Two worker processes on this machine."""
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster,
        Client(cluster) as made,
    ):
        yield made


@pytest.fixture
def costs() -> Tensor:
    """Seven samples, so that the workers get unequal shares."""
    return torch.randn(7, CITIES, CITIES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_by_the_clients_executor(client: Client, costs: Tensor) -> None:
    solver = co.solver(co.batched(matching, client.get_executor()), cost_shape=(CITIES, CITIES))
    assert torch.equal(solver(costs), co.Assignment()(costs))


def test_by_joblib(client: Client, costs: Tensor) -> None:
    with joblib.parallel_config(backend="dask"):
        solver = co.solver(co.batched(matching, joblib.Parallel()), cost_shape=(CITIES, CITIES))
        assert torch.equal(solver(costs), co.Assignment()(costs))


def test_a_layer_trains_on_the_cluster(client: Client, costs: Tensor) -> None:
    spread = co.solver(
        co.batched(matching, client.get_executor()),
        cost_shape=(CITIES, CITIES),
        equalities=co.Assignment().equalities((CITIES, CITIES)),
    )
    target = co.Assignment()(costs.flip(0))
    gradients = []
    for solver in (spread, co.Assignment()):
        for estimator in (co.Identity(), co.Blackbox(5.0)):
            w = costs.clone().requires_grad_()
            (co.DiscreteLayer(solver, estimator)(w) - target).square().sum().backward()
            gradients.append(w.grad)
    torch.testing.assert_close(gradients[0], gradients[2])
    torch.testing.assert_close(gradients[1], gradients[3])
    assert gradients[0].abs().max() > 0


def test_a_fault_keeps_the_samples_index(client: Client, costs: Tensor) -> None:
    solver = co.solver(co.batched(fails_for_large, client.get_executor()), cost_shape=(CITIES, CITIES))
    costs[4] += 200
    with pytest.raises(idf.SolverError, match="sample 4"):
        solver(costs)
