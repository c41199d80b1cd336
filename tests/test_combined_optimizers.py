"""Several starts, chains, SciPy's methods, and the choice of a default."""

import random
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from scipy import optimize
from torch import Tensor

import implicitdiff as idf
from implicitdiff.optimizers import (
    LBFGS,
    AugmentedLagrangian,
    Chain,
    MultiStart,
    Newton,
    Progress,
    SciPy,
    default_optimizer,
)
from implicitdiff.optimizers.default import MANY_VARIABLES, optimizer_name
from implicitdiff.optimizers.from_scipy import METHODS
from tests.optimizer_problems import DOUBLE, Circle, Logistic, Rosenbrock, Wells, normal, system_of


def wells(batch: int = 4) -> Tensor:
    s = normal(batch, 2, seed=6)
    return torch.sign(s) * (s.abs() + 0.5)


def lowest_well(s: Tensor) -> Tensor:
    """The global minimum, entry by entry, from the roots of 4 u^3 - 4 u - s / 4."""
    rows = []
    for value in s.reshape(-1).tolist():
        roots = [r.real for r in np.roots([4, 0, -4, -0.25 * value]) if abs(r.imag) < 1e-9]
        rows.append(min(roots, key=lambda u: (u**2 - 1) ** 2 - 0.25 * value * u))
    return torch.tensor(rows, dtype=DOUBLE).reshape(s.shape)


# Several starts


@pytest.mark.parametrize("inner", [Newton(), LBFGS(tol=1e-10)], ids=["newton", "lbfgs"])
def test_several_starts_find_the_lowest_of_four_minima(inner: Any) -> None:
    s = wells()
    best = lowest_well(s)
    alone = idf.solve(Wells(), s, optimizer=inner)
    assert ((alone.u - best).abs().amax(1) > 1).all(), "one start finds it already: nothing is tested"
    found = idf.solve(Wells(), s, optimizer=MultiStart(inner, starts=20))
    torch.testing.assert_close(found.u, best, rtol=1e-7, atol=1e-7)
    assert (found.value < alone.value - 1e-3).all()


def test_the_gradient_is_that_of_the_best_minimum() -> None:
    s = wells().requires_grad_()
    u = idf.DeclarativeLayer(Wells(), optimizer=MultiStart(Newton(), starts=20))(s)
    (found,) = torch.autograd.grad(u.sum(), s)
    torch.testing.assert_close(found, 0.25 / (12 * u.detach() ** 2 - 4))  # du/ds = f_us / -f_uu


def test_starts_touch_no_global_generator_and_repeat() -> None:
    s = wells()
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    first = idf.solve(Wells(), s, optimizer=MultiStart(Newton(), starts=4))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert random.getstate() == before[2]
    torch.manual_seed(4)
    again = idf.solve(Wells(), s, optimizer=MultiStart(Newton(), starts=4))
    assert torch.equal(first.u, again.u)


def test_the_seed_and_the_spread_matter() -> None:
    seen: list[Tensor] = []

    class Watched:
        def minimize(self, system: Any, start: Tensor, tol: float) -> Any:
            seen.append(start)
            return Newton().minimize(system, start, tol)

    system, start = system_of(Wells(), wells()), -0.9 * torch.sign(wells())
    for options in ({}, {"seed": 1}, {"spread": 0.1}):
        MultiStart(Watched(), starts=3, **options).minimize(system, start, 1e-8)
    assert all(torch.equal(seen[index], start) for index in (0, 3, 6))
    assert not torch.equal(seen[1], seen[4])
    torch.testing.assert_close(seen[7] - start, 0.1 * (seen[1] - start))
    noise = (seen[1] - start) / (1 + start.abs().amax(1, keepdim=True))
    torch.testing.assert_close(noise, noise[:1].expand_as(noise))  # a sample's place does not matter
    assert not torch.equal(seen[1], seen[2])


def test_a_start_that_is_not_optimal_never_wins() -> None:
    """Some starts end on a slope that goes down for ever, far below the minimum."""

    class Edge(idf.Problem):
        def objective(self, u: Tensor, s: Tensor) -> Tensor:
            return (u**3 / 3 - s * u).sum()  # a minimum at sqrt(s), and no lower bound

        def init(self, s: Tensor) -> Tensor:
            return torch.ones_like(s)

    s = normal(3, 2).abs() + 0.5
    found = idf.solve(Edge(), s, optimizer=MultiStart(Newton(max_iter=12), starts=12))
    torch.testing.assert_close(found.u, s.sqrt())
    assert not found.status.any()
    lost = idf.solve(Edge(), s, init=-3 - s, optimizer=Newton(max_iter=12), on_failure="zero")
    assert lost.status.all(), "no start ends on the slope: nothing is tested"


def test_equal_minima_keep_the_first_start() -> None:
    s = torch.zeros(2, 2, dtype=DOUBLE)
    start = torch.tensor([[0.9, -0.9], [-0.9, -0.9]], dtype=DOUBLE)
    found = idf.solve(Wells(), s, init=start, optimizer=MultiStart(Newton(), starts=10))
    torch.testing.assert_close(found.u, torch.sign(start))


def test_several_starts_with_a_bad_sample() -> None:
    s, system = wells(3), system_of(Wells(), wells(3))
    start = -0.9 * torch.sign(s)
    hurt = start.clone()
    hurt[1] = torch.nan
    good = MultiStart(Newton(), starts=9).minimize(system, start, 1e-8)
    found = MultiStart(Newton(), starts=9).minimize(system, hurt, 1e-8)
    assert torch.equal(found.point.u[[0, 2]], good.point.u[[0, 2]])
    assert found.point.finite.tolist() == [True, False, True]


def test_several_starts_with_constraints_and_limits() -> None:
    x, w = normal(3, 5, seed=3), normal(5, seed=4).abs() + 0.5
    seen: list[Progress] = []
    optimizer = MultiStart(AugmentedLagrangian(), starts=3, callback=seen.append)
    found = idf.solve(Circle(), x, w, in_dims=(0, None), optimizer=optimizer)
    alone = idf.solve(Circle(), x, w, in_dims=(0, None), optimizer=AugmentedLagrangian())
    assert (found.value <= alone.value + 1e-7).all()
    assert [progress.iteration for progress in seen] == [0, 1, 2]
    assert seen[0].residual.isinf().all()
    assert (seen[1].residual < 1.5e-8).all()
    short = idf.solve(Wells(), wells(), optimizer=MultiStart(Newton(), starts=50, time_limit=1e-9))
    assert torch.equal(short.u, idf.solve(Wells(), wells(), optimizer=Newton()).u)


# Chains


def test_a_chain_brings_the_last_digits() -> None:
    inputs = (5 * normal(3, 4).abs() + 1,)
    rough = idf.solve(Rosenbrock(), *inputs, optimizer=LBFGS())
    fine = idf.solve(Rosenbrock(), *inputs, optimizer=Chain((LBFGS(), Newton(extra=1))))
    exact = idf.solve(Rosenbrock(), *inputs, optimizer=Newton())
    assert (rough.u - exact.u).abs().max() > 1e-12
    torch.testing.assert_close(fine.u, exact.u, rtol=1e-13, atol=1e-14)
    assert torch.equal(fine.iterations, rough.iterations + 1)


def test_a_chain_finishes_what_its_first_stage_could_not() -> None:
    inputs = (5 * normal(3, 4).abs() + 1,)
    seen: list[Progress] = []
    found = idf.solve(
        Rosenbrock(), *inputs, optimizer=Chain((LBFGS(max_iter=3), Newton()), callback=seen.append)
    )
    assert not found.status.any()
    assert (found.iterations > 3).all()
    assert [progress.iteration for progress in seen] == [0, 1]
    assert (seen[0].residual > seen[1].residual).all()
    with pytest.raises(idf.ConvergenceError, match="after LBFGS, then Newton; raise time_limit="):
        idf.solve(Rosenbrock(), *inputs, optimizer=Chain((LBFGS(max_iter=3), Newton()), time_limit=1e-9))


# SciPy


@pytest.mark.parametrize("method", METHODS)
def test_every_method_of_scipy(method: str) -> None:
    inputs = normal(2, 7, 3), normal(2, 7, seed=1).sign()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = idf.solve(Logistic(), *inputs, optimizer=SciPy(method), optimality_tol=1e-6)
    expected = idf.solve(Logistic(), *inputs, optimizer=Newton())
    torch.testing.assert_close(found.u, expected.u, rtol=1e-5, atol=1e-5)
    assert (found.iterations > 0).all()


@pytest.mark.parametrize("method", ["SLSQP", "trust-constr"])
def test_the_methods_of_scipy_with_constraints(method: str) -> None:
    x, w = normal(2, 5, seed=3), normal(5, seed=4).abs() + 0.5
    found = idf.solve(Circle(), x, w, in_dims=(0, None), optimizer=SciPy(method))
    expected = idf.solve(Circle(), x, w, in_dims=(0, None), optimizer=Newton())
    torch.testing.assert_close(found.u, expected.u, rtol=1e-6, atol=1e-6)
    for name, lam in found.equality_multipliers.items():
        torch.testing.assert_close(lam, expected.equality_multipliers[name], rtol=1e-5, atol=1e-6)


def test_options_reach_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    plain = optimize.minimize

    def watched(*given: Any, **named: Any) -> Any:
        calls.append(named)
        return plain(*given, **named)

    monkeypatch.setattr(optimize, "minimize", watched)
    a, b = normal(2, 9, 4), normal(2, 9, seed=1).sign()
    optimizer = SciPy("L-BFGS-B", options={"maxcor": 3}, max_iter=77)
    idf.solve(Logistic(), a, b, optimizer=optimizer, optimality_tol=1e-5)
    assert [call["method"] for call in calls] == ["L-BFGS-B"] * 2
    assert all(call["options"]["maxcor"] == 3 and call["options"]["maxiter"] == 77 for call in calls)
    with pytest.warns(optimize.OptimizeWarning, match="Unknown solver options: nonsense"):
        idf.solve(Logistic(), a, b, optimizer=SciPy("BFGS", options={"nonsense": 1}))


def test_scipy_starts_anew_where_it_gave_up_and_a_chain_goes_on() -> None:
    """Its line searches read f alone, which is flat to rounding at sqrt(eps)."""
    inputs = normal(3, 9, 4), normal(3, 9, seed=1).sign()
    seen: list[Progress] = []
    rough = SciPy("L-BFGS-B", tol=1e-30, callback=seen.append)
    found = idf.solve(Logistic(), *inputs, optimizer=Chain((rough, Newton())))
    torch.testing.assert_close(found.u, idf.solve(Logistic(), *inputs).u, rtol=1e-13, atol=1e-13)
    assert [progress.active.tolist() for progress in seen] == [
        [True, True, True],
        [False, True, True],
        [False, False, True],
        [False, False, False],
    ]
    assert (seen[-1].residual < 1e-6).all()


# The default


def test_the_default_and_its_reason() -> None:
    class Ready(Logistic):
        def solve(self, a: Tensor, b: Tensor) -> Tensor:
            return a[:, 0]

    def chosen(problem: idf.Problem, *inputs: Tensor, in_dims: Any = 0) -> tuple[Any, str]:
        # without structure, whatever solver the cost model would take for it
        backward = "dense" if inputs and inputs[0].shape[-2] > MANY_VARIABLES else "auto"
        return default_optimizer(
            problem, system_of(problem, *inputs, in_dims=in_dims, backward=backward).plan
        )

    wide = MANY_VARIABLES + 7
    small = normal(2, 9, 4), normal(2, 9, seed=1).sign()
    large = torch.zeros(1, 2 * wide, wide).double(), torch.ones(1, 2 * wide).double()
    few = torch.zeros(1, 3, wide).double(), torch.ones(1, 3).double()
    assert chosen(Ready(), *small) == (None, "Ready declares its own")
    assert chosen(Logistic(), *small) == (Newton(), "few steps, and a factorisation for 4 variables is cheap")
    optimizer, reason = chosen(Logistic(), *large)
    assert optimizer_name(optimizer) == "LBFGS, then Newton"
    assert reason == f"without structure a factorisation for {wide} variables costs more than many gradients"
    optimizer, reason = chosen(Logistic(), *few)
    assert optimizer == Newton()
    assert "structure of H makes them cheap (woodbury)" in reason
    x = torch.zeros(1, wide).double()
    optimizer, reason = chosen(Circle(), x, x[0], in_dims=(0, None))
    assert optimizer == Newton()
    assert "KKT solve" in reason


def test_the_layer_uses_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the line drawn at 3 variables, 4 are many."""
    a, b = normal(2, 9, 4), normal(2, 9, seed=1).sign()
    newton = idf.solve(Logistic(), a, b)
    assert "Newton: few steps" in str(idf.explain(Logistic(), a, b))
    monkeypatch.setattr("implicitdiff.optimizers.default.MANY_VARIABLES", 3)
    chain = idf.solve(Logistic(), a, b)
    assert (chain.iterations > newton.iterations).all()
    torch.testing.assert_close(chain.u, newton.u, rtol=1e-12, atol=1e-13)
    explained = idf.explain(Logistic(), a, b)
    assert explained.forward.startswith("LBFGS, then Newton: without structure")
    assert "forward" in str(explained)
    assert "LBFGS, then Newton" in explained.to_html()
