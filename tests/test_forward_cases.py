"""The forward pass on the library's own plans: the table of cases, and the built-in problems at scale."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from implicitdiff import Problem
from implicitdiff.graph.trace import variable_example
from implicitdiff.inputs import Bound, bind
from implicitdiff.optimality import check, tolerance
from implicitdiff.optimizers import Newton
from implicitdiff.optimizers.forward import solve_forward
from implicitdiff.optimizers.hooks import initial_leaves
from implicitdiff.plan import Plan, plan_for
from implicitdiff.problems import OptimalTransport, RobustPooling
from implicitdiff.records import record
from implicitdiff.status import Status
from tests.cases import CASES, Case
from tests.plan_double import double_of

Call = tuple[Plan, Bound, tuple[Tensor, ...]]


def call_of(problem: Problem, *inputs: Any, in_dims: Any = 0, backward: str = "auto") -> Call:
    bound = bind(problem, inputs, in_dims)
    example = variable_example(problem, bound)
    plan = plan_for(problem, bound, example.leaves, example.spec, backward=backward)
    return plan, bound, tuple(t.detach() for t in (*bound.leaves, *bound.tensors, *plan.trace.captured))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_newton_solves_the_table(case: Case) -> None:
    problem, inputs = case.problem(), case.make_inputs()
    plan, bound, theta = call_of(problem, *inputs, in_dims=case.in_dims)
    found = solve_forward(problem, plan, bound, theta, optimizer=Newton())
    assert not found.status.any()
    # The verdict of a plan that shares no code with the one that was solved with.
    double, _, given = double_of(problem, *inputs, in_dims=case.in_dims)
    judged = check(double, found.u, found.multipliers, given, 1e-12)  # type: ignore[arg-type]
    assert judged.status.tolist() == [Status.OK] * len(found.status)


@pytest.mark.parametrize("case", CASES[::4], ids=str)
def test_newton_solves_the_table_in_float32_with_the_dense_plan(case: Case) -> None:
    problem, inputs = case.problem(torch.float32), case.make_inputs(dtype=torch.float32)
    plan, bound, theta = call_of(problem, *inputs, in_dims=case.in_dims, backward="dense")
    found = solve_forward(problem, plan, bound, theta, optimizer=Newton())
    assert not found.status.any()
    assert all(leaf.dtype == torch.float32 for leaf in (*found.u, *found.multipliers))


@pytest.mark.parametrize("case", [case for case in CASES if case.in_dims is not None][::5], ids=str)
@pytest.mark.parametrize("backward", ["auto", "dense"])
def test_a_sample_without_a_value_leaves_the_others_alone(case: Case, backward: str) -> None:
    problem, inputs = case.problem(), case.make_inputs()
    plan, bound, theta = call_of(problem, *inputs, in_dims=case.in_dims, backward=backward)
    start = initial_leaves(problem, plan, bound, theta, bound.batch)
    hurt = tuple(leaf.index_fill(0, torch.tensor([1]), torch.nan) for leaf in start)
    good = solve_forward(problem, plan, bound, theta, init=start, optimizer=Newton())
    found = solve_forward(problem, plan, bound, theta, init=hurt, optimizer=Newton(), on_failure="zero")
    assert found.failed.tolist() == [index == 1 for index in range(bound.batch)]
    keep = torch.tensor([index for index in range(bound.batch) if index != 1])
    for mine, theirs in zip((*found.u, *found.multipliers), (*good.u, *good.multipliers), strict=True):
        torch.testing.assert_close(mine[keep], theirs[keep], rtol=1e-12, atol=1e-14)
        if backward == "dense":
            assert torch.equal(mine[keep], theirs[keep])


def points(batch: int, m: int, n: int, seed: int, dtype: torch.dtype) -> Tensor:
    x = torch.randn(batch, m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x[:, :, : n // 4] *= 4  # outliers
    return x.to(dtype)


PENALTIES = ("quadratic", "pseudo-huber", "huber", "welsch", "truncated-quadratic")


def built_ins(dtype: torch.dtype, batch: int) -> list[tuple[str, Problem, tuple[Tensor, ...]]]:
    generator = torch.Generator().manual_seed(1)
    found: list[tuple[str, Problem, tuple[Tensor, ...]]] = [
        (name, RobustPooling(name, 1.0).to(dtype), (points(batch, 4, 16, 0, dtype),)) for name in PENALTIES
    ]
    for gamma in (1.0, 10.0):
        M = torch.rand(batch, 5, 7, generator=generator, dtype=torch.float64)
        r = torch.randn(batch, 5, generator=generator, dtype=torch.float64).softmax(1)
        c = torch.randn(batch, 7, generator=generator, dtype=torch.float64).softmax(1)
        found.append(
            (f"transport-{gamma}", OptimalTransport(gamma).to(dtype), (M.to(dtype), r.to(dtype), c.to(dtype)))
        )
    return found


@pytest.mark.parametrize("name", [name for name, _, _ in built_ins(torch.float32, 1)])
def test_a_thousand_float32_calls_of_the_built_ins_give_no_warning(name: str) -> None:
    problem, inputs = next((p, i) for known, p, i in built_ins(torch.float32, 1000) if known == name)
    plan, bound, theta = call_of(problem, *inputs)
    with warnings.catch_warnings(), record() as log:
        warnings.simplefilter("error")
        found = solve_forward(problem, plan, bound, theta, on_failure="warn")
    assert not found.failed.any()
    assert log.events == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", [name for name, _, _ in built_ins(torch.float32, 1)])
def test_one_percent_off_is_refused_for_the_built_ins(name: str, dtype: torch.dtype) -> None:
    problem, inputs = next((p, i) for known, p, i in built_ins(dtype, 100) if known == name)
    plan, bound, theta = call_of(problem, *inputs)
    found = solve_forward(problem, plan, bound, theta)
    (u,) = found.u
    step = torch.randn(u.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
    size = (0.01 * u.flatten(1).norm(dim=1) / step.flatten(1).norm(dim=1)).reshape(-1, *[1] * (u.dim() - 1))
    for off in (u + size * step, 1.01 * u):
        judged = check(plan, (off,), found.multipliers, theta, tolerance(dtype))
        assert (judged.status != Status.OK).all()
