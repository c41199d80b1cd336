"""Users' own functions as solvers, one instance at a time, in threads, processes and joblib's workers."""

from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

import joblib
import numpy as np
import pytest
import torch

import implicitdiff.combinatorial as co
from implicitdiff import InfeasibleError, InputError, OptionError, SolverError


def largest(cost: np.ndarray) -> np.ndarray:
    return np.eye(len(cost))[cost.argmax()]


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_function_of_one_instance_is_a_solver() -> None:
    solver = co.solver(co.batched(largest), cost_shape=(5,), sense="max", equalities=np.ones(5))
    w, g = draw(0, 4, 5), draw(1, 4, 5)
    assert solver.name == "largest"
    assert torch.equal(solver(w), co.TopK(1, sense="max")(w))
    x, z = w.clone().requires_grad_(), w.clone().requires_grad_()
    co.DiscreteLayer(solver, co.Identity())(x).backward(g)
    co.DiscreteLayer(co.TopK(1, sense="max"), co.Identity())(z).backward(g)
    torch.testing.assert_close(x.grad, z.grad)


def test_executors_keep_the_order() -> None:
    w = draw(0, 30, 5)
    expected = co.TopK(1, sense="max")(w)
    with ThreadPoolExecutor(3) as pool:
        assert torch.equal(co.batched(largest, pool)(w), expected)
    assert torch.equal(co.batched(largest, joblib.Parallel(2, backend="threading"))(w), expected)
    lazily = joblib.Parallel(2, backend="threading", return_as="generator")
    assert torch.equal(co.batched(largest, lazily)(w), expected)


def test_processes() -> None:
    w = draw(0, 6, 5)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        assert torch.equal(co.batched(np.sign, pool)(w), w.sign())


def test_programs_in_threads() -> None:
    w = draw(0, 6, 4)
    with ThreadPoolExecutor(2) as pool:
        threaded = co.MILP(4, A_eq=np.ones((1, 4)), b_eq=[2], executor=pool)
        assert torch.equal(threaded(w), co.TopK(2)(w))
        infeasible = co.MILP(4, A_eq=np.ones((1, 4)), b_eq=[9], executor=pool)
        with pytest.raises(InfeasibleError, match="sample 0"):
            infeasible(w)


@pytest.mark.parametrize("parallel", [False, True])
def test_failures_name_the_sample(parallel: bool) -> None:
    w = torch.ones(4, 3)
    w[2] = -1

    def fails(cost: np.ndarray) -> np.ndarray:
        if cost[0] < 0:
            raise ZeroDivisionError("no way")
        return cost

    def has_none(cost: np.ndarray) -> np.ndarray | None:
        return None if cost[0] < 0 else cost

    def is_short(cost: np.ndarray) -> np.ndarray:
        return cost[:1] if cost[0] < 0 else cost

    def is_infeasible(cost: np.ndarray) -> np.ndarray:
        if cost[0] < 0:
            raise InfeasibleError("too little")
        return cost

    with ThreadPoolExecutor(2) as pool:
        executor = pool if parallel else None
        for function, error, message in [
            (fails, SolverError, "fails failed for sample 2 of 4: no way"),
            (has_none, SolverError, "has_none returned None for sample 2 of 4"),
            (is_short, SolverError, r"shape \(1,\) for sample 2"),
            (is_infeasible, InfeasibleError, "sample 2: too little"),
        ]:
            solver = co.solver(co.batched(function, executor), cost_shape=(3,))
            with pytest.raises(error, match=message):
                solver(w)


def test_wrong_executors_and_equalities() -> None:
    with pytest.raises(OptionError, match="executor is str"):
        co.batched(largest, "threads")
    wrong = co.solver(co.batched(largest), cost_shape=(5,), equalities=np.ones(4))
    with pytest.raises(InputError, match="rows of 5 are expected"):
        co.DiscreteLayer(wrong, co.Identity())(draw(0, 2, 5))


def test_solutions_may_be_arrays_of_another_dtype() -> None:
    def chosen(costs: torch.Tensor) -> np.ndarray:
        return (costs.numpy() < 0).astype(np.int8)

    y = co.solver(chosen, cost_shape=(3,))(torch.tensor([[1.0, -1.0, 0.0]]))
    assert y.dtype == torch.float32
    assert y.tolist() == [[0, 1, 0]]


@pytest.mark.parametrize("sense", ["min", "max"])
def test_functions_may_work_in_place_and_return_what_they_keep(sense: str) -> None:
    kept = torch.eye(3, dtype=torch.float64)

    def careless(costs: torch.Tensor) -> torch.Tensor:
        costs.zero_()
        return kept

    layer = co.DiscreteLayer(co.solver(careless, cost_shape=(3,), sense=sense), co.Identity("none"))  # type: ignore[arg-type]
    w = draw(0, 3, 3).requires_grad_()
    before = w.detach().clone()
    y = layer(w)
    y.detach().mul_(7)
    assert torch.equal(w.detach(), before)
    assert torch.equal(kept, torch.eye(3, dtype=torch.float64))
    assert not kept.requires_grad
