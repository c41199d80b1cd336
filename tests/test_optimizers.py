"""What every forward optimizer promises: solutions, masks per sample, limits, reports, policies, derivatives."""

import dataclasses
import itertools
import pickle
import time
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import implicitdiff as idf
from implicitdiff import optimizers as opt
from implicitdiff.optimality import check
from implicitdiff.optimizers.iterate import System
from implicitdiff.status import Status
from tests.optimizer_problems import ALL, Circle, Logistic, Solved, normal, system_of
from tests.plan_double import double_of

ON_DEVICES = (opt.LBFGS, opt.GaussNewton, opt.AugmentedLagrangian, opt.SciPy)
cases = pytest.mark.parametrize("case", ALL, ids=str)
# The augmented Lagrangian takes hundreds of evaluations, which the dense plan makes slow; it is the same code.
plans = pytest.mark.parametrize(
    ("case", "backward"),
    [(case, "auto") for case in ALL] + [(case, "dense") for case in ALL if case.name != "augmented"],
    ids=str,
)
batched = pytest.mark.parametrize("case", [case for case in ALL if "scipy" not in case.name], ids=str)


def start_of(case: Solved, system: System, inputs: tuple[Tensor, ...]) -> Tensor:
    """The starts of `init`, (B, m)."""
    layer = idf.DeclarativeLayer(case.known, in_dims=case.in_dims)
    batch = max(value.shape[0] for value, dim in zip(inputs, _dims(case, inputs), strict=True) if dim == 0)
    rows = []
    for index in range(batch):
        sample = [v[index] if d == 0 else v for v, d in zip(inputs, _dims(case, inputs), strict=True)]
        rows.append(layer.problem.init(*sample))
    return torch.stack(rows)


def _dims(case: Solved, inputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
    return case.in_dims if isinstance(case.in_dims, tuple) else (0,) * len(inputs)


@plans
def test_the_solution_is_newtons(case: Solved, backward: str) -> None:
    batch = 3 if backward == "auto" else 1
    problem, inputs = case.known, case.given(batch=batch)
    options = {"in_dims": case.in_dims, "backward": backward}
    found = idf.solve(problem, *inputs, optimizer=case.make(tol=1e-10), **options)
    expected = idf.solve(problem, *inputs, optimizer=opt.Newton(), **options)
    torch.testing.assert_close(found.u, expected.u, rtol=1e-7, atol=1e-8)
    # The error of f is of second order in that of u, but for lam'h.
    torch.testing.assert_close(found.value, expected.value, rtol=1e-9, atol=1e-9)
    if problem.declares("equality"):
        for name, lam in found.equality_multipliers.items():
            torch.testing.assert_close(lam, expected.equality_multipliers[name], rtol=1e-6, atol=1e-7)
    assert found.status.tolist() == [Status.OK] * batch
    assert (found.iterations > 0).all()
    # The verdict of a plan that shares no code with the one that was solved with.
    double, _, theta = double_of(problem, *inputs, in_dims=case.in_dims)
    multipliers = () if found.equality_multipliers is None else tuple(found.equality_multipliers.values())
    lam = tuple(leaf.detach() for leaf in multipliers)
    assert not check(double, (found.u.detach(),), lam, theta, 1e-9).status.any()  # type: ignore[arg-type]


@cases
def test_float32(case: Solved) -> None:
    inputs = case.given()
    exact = idf.solve(case.known, *inputs, in_dims=case.in_dims, optimizer=opt.Newton())
    single = idf.solve(
        case.problem().float(), *case.given(torch.float32), in_dims=case.in_dims, optimizer=case.make()
    )
    assert single.u.dtype == torch.float32
    # Residuals of sqrt(eps), divided by the smallest curvature of the decay, give this much in u.
    torch.testing.assert_close(single.u.double(), exact.u, rtol=0.03, atol=0.03)
    assert not single.status.any()


@pytest.mark.parametrize("case", [case for case in ALL if case.make in ON_DEVICES], ids=str)
def test_on_each_device(case: Solved, device: torch.device) -> None:
    """The answer of the host, on the device of the inputs; several starts draw on the host."""
    inputs = case.given(batch=2)
    optimizer = opt.MultiStart(case.make(), starts=2, spread=0.1)
    expected = idf.solve(case.known, *inputs, in_dims=case.in_dims, optimizer=optimizer)
    there = tuple(value.to(device) for value in inputs)
    found = idf.solve(case.problem().to(device), *there, in_dims=case.in_dims, optimizer=optimizer)
    assert found.u.device == device
    torch.testing.assert_close(found.u.to(expected.u.device), expected.u, rtol=1e-6, atol=1e-6)


@cases
def test_the_layer_differentiates_the_solution(case: Solved) -> None:
    problem = case.known
    inputs = tuple(value.requires_grad_() for value in case.given())
    gradients = []
    for optimizer in (case.make(tol=1e-11), opt.Newton()):
        u = idf.DeclarativeLayer(problem, in_dims=case.in_dims, optimizer=optimizer)(*inputs)
        weights = normal(*u.shape, seed=9)
        gradients.append(torch.autograd.grad((weights * u).sum(), (*inputs, *problem.parameters())))
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)
    assert any(bool(gradient.abs().max() > 1e-3) for gradient in gradients[0])


# Samples on their own


@plans
def test_a_nan_in_one_sample_leaves_the_others_bit_identical(case: Solved, backward: str) -> None:
    problem, inputs = case.known, case.given()
    system = system_of(problem, *inputs, in_dims=case.in_dims, backward=backward)
    start = start_of(case, system, inputs)
    hurt = start.clone()
    hurt[1, 2] = torch.nan
    good = case.make().minimize(system, start, 1.5e-8)
    found = case.make().minimize(system, hurt, 1.5e-8)
    assert found.point.finite.tolist() == [True, False, True]
    assert found.iterations[1] == 0
    assert torch.equal(found.point.u[1].isnan(), hurt[1].isnan())
    for name in ("u", "multipliers", "value", "residual"):
        mine, theirs = getattr(found.point, name)[[0, 2]], getattr(good.point, name)[[0, 2]]
        assert torch.equal(mine, theirs), name
    assert torch.equal(found.iterations[[0, 2]], good.iterations[[0, 2]])


@batched
def test_a_sample_that_is_done_keeps_its_bits(case: Solved) -> None:
    inputs = case.given()
    system = system_of(case.known, *inputs, in_dims=case.in_dims)
    start = start_of(case, system, inputs)
    first = case.make().minimize(system, start, 1.5e-8)
    begin = torch.cat([first.point.u[:1], start[1:]])
    again = case.make(**({"extra": 0} if hasattr(case.make(), "extra") else {})).minimize(
        system, begin, 1.5e-8
    )
    assert again.iterations[0] == 0
    assert (again.iterations[1:] > 0).all()
    assert torch.equal(again.point.u[0], begin[0])


@batched
def test_active_samples_only_become_fewer(case: Solved) -> None:
    seen: list[opt.Progress] = []
    inputs = case.given()
    found = idf.solve(case.known, *inputs, in_dims=case.in_dims, optimizer=case.make(callback=seen.append))
    assert [progress.iteration for progress in seen] == list(range(len(seen)))
    assert seen[0].active.tolist() == [True] * 3
    assert not seen[-1].active.any()
    for before, after in itertools.pairwise(seen[:-1]):
        assert not (after.active & ~before.active).any()
        kept = ~before.active
        assert torch.equal(after.residual[kept], before.residual[kept])
    assert (seen[0].residual > 1e-4).all()
    assert (seen[-1].residual <= 1.5e-8).all()
    assert not found.status.any()
    with pytest.raises(dataclasses.FrozenInstanceError):
        seen[0].iteration = 3  # type: ignore[misc]


# Starts and limits


@cases
def test_a_warm_start(case: Solved) -> None:
    layer = idf.DeclarativeLayer(case.known, in_dims=case.in_dims, optimizer=case.make(), optimality_tol=1e-6)
    inputs = case.given()
    cold = layer.solve(*inputs)
    near = layer.solve(*inputs, init=cold.u.detach() + 1e-4)
    warm = layer.solve(*inputs, init=cold.u.detach())
    assert (near.iterations < cold.iterations).all()
    assert (warm.iterations <= 3).all()  # Newton's extra steps
    torch.testing.assert_close(warm.u, cold.u, rtol=0, atol=1e-4)


@cases
def test_too_few_iterations_fail_by_the_policy(case: Solved) -> None:
    optimizer = case.make(max_iter=1)
    if isinstance(optimizer, opt.AugmentedLagrangian):
        optimizer = opt.AugmentedLagrangian(max_iter=1, inner=opt.LBFGS(max_iter=2))
    problem, inputs = case.known, case.given()
    options: dict[str, Any] = {"in_dims": case.in_dims, "optimizer": optimizer}
    name = type(optimizer).__name__
    with pytest.raises(
        idf.ConvergenceError, match=rf"^samples 0, 1, 2 of 3: .* after {name}.*raise max_iter"
    ):
        idf.solve(problem, *inputs, **options)
    for policy in ("warn", "nan", "zero", "damp"):
        with warnings.catch_warnings(record=True) as caught, idf.record() as log:
            warnings.simplefilter("always")
            found = idf.solve(problem, *inputs, on_failure=policy, **options)
        expected = Status.DAMPED if policy == "damp" else Status.NOT_CONVERGED
        assert found.status.tolist() == [expected] * 3
        assert len([w for w in caught if w.category is idf.OptimalityWarning]) == (policy in ("warn", "damp"))
        assert [(event.kind, event.samples) for event in log] == [("NOT_CONVERGED", (0, 1, 2))]
        if policy in ("nan", "zero"):
            fill = torch.full_like(found.u, torch.nan if policy == "nan" else 0.0)
            torch.testing.assert_close(found.u, fill, equal_nan=True)
        assert (found.iterations <= 2).all()


@cases
def test_the_time_limit_ends_a_walk(case: Solved, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(time, "monotonic", lambda: float(next(ticks)))
    inputs = case.given()
    options: dict[str, Any] = {"in_dims": case.in_dims, "on_failure": "zero"}
    short = idf.solve(case.known, *inputs, optimizer=case.make(time_limit=2.5), **options)
    assert short.status.tolist()[-1] == Status.NOT_CONVERGED
    assert short.iterations[-1] <= 3
    enough = idf.solve(case.known, *inputs, optimizer=case.make(time_limit=1e6), **options)
    assert not enough.status.any()
    with pytest.raises(idf.ConvergenceError, match="raise time_limit="):
        idf.solve(case.known, *inputs, in_dims=case.in_dims, optimizer=case.make(time_limit=2.5))


# Options


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (
            opt.Newton,
            {"time_limit": 0},
            "Newton(time_limit=...) must be a positive number of seconds or None",
        ),
        (opt.Newton, {"callback": 3}, "Newton(callback=...) must be callable"),
        (opt.LBFGS, {"max_iter": 0}, "LBFGS(max_iter=...) must be an integer >= 1"),
        (opt.LBFGS, {"max_iter": True}, "LBFGS(max_iter=...)"),
        (opt.LBFGS, {"history": 0}, "LBFGS(history=...)"),
        (opt.LBFGS, {"tol": -1.0}, "LBFGS(tol=...)"),
        (opt.LBFGS, {"line_search": "wolfe"}, "LBFGS(line_search=...) must be a Wolfe"),
        (opt.Wolfe, {"decrease": 0.6}, "Wolfe(decrease=...) must be between 0 and 0.5 and below curvature"),
        (opt.Wolfe, {"decrease": 0.2, "curvature": 0.1}, "Wolfe(decrease=...)"),
        (opt.Wolfe, {"curvature": 1.5}, "Wolfe(curvature=...)"),
        (opt.Wolfe, {"trials": 0}, "Wolfe(trials=...)"),
        (opt.GaussNewton, {"residual": 1.0}, "GaussNewton(residual=...) must be a function"),
        (opt.GaussNewton, {"extra": -1}, "GaussNewton(extra=...)"),
        (opt.LevenbergMarquardt, {"damping": 0.0}, "LevenbergMarquardt(damping=...)"),
        (opt.AugmentedLagrangian, {"inner": opt.Newton()}, "AugmentedLagrangian(inner=...) must be an LBFGS"),
        (opt.AugmentedLagrangian, {"penalty": 0.0}, "AugmentedLagrangian(penalty=...)"),
        (opt.SciPy, {"method": "newton"}, "SciPy(method='newton') is not known; choose one of BFGS"),
        (opt.SciPy, {"options": 3}, "SciPy(options=...) must be a mapping"),
        (opt.MultiStart, {"inner": "Newton"}, "MultiStart(inner=...) needs optimizers"),
        (opt.MultiStart, {"inner": opt.Newton(), "starts": 0}, "MultiStart(starts=...)"),
        (opt.MultiStart, {"inner": opt.Newton(), "seed": -1}, "MultiStart(seed=...)"),
        (opt.MultiStart, {"inner": opt.Newton(), "spread": float("nan")}, "MultiStart(spread=...)"),
        (opt.Chain, {"stages": ()}, "Chain(stages=...) must be a tuple of optimizers"),
        (opt.Chain, {"stages": (opt.Newton(), 3)}, "Chain(stages=...) needs optimizers"),
    ],
)
def test_options_are_checked(make: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(idf.OptionError) as caught:
        make(**options)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "optimizer",
    [
        opt.LBFGS(history=3),
        opt.GaussNewton(),
        opt.LevenbergMarquardt(damping=0.1),
        opt.AugmentedLagrangian(),
        opt.SciPy("L-BFGS-B", options={"maxcor": 5}),
        opt.MultiStart(opt.Newton(), starts=3),
        opt.Chain((opt.LBFGS(), opt.Newton())),
    ],
    ids=lambda optimizer: type(optimizer).__name__,
)
def test_optimizers_are_frozen_values(optimizer: Any) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        optimizer.time_limit = 1.0
    assert pickle.loads(pickle.dumps(optimizer)) == optimizer
    layer = idf.DeclarativeLayer(Logistic(), optimizer=optimizer)
    assert type(optimizer).__name__ in repr(layer)


@pytest.mark.parametrize(
    "optimizer",
    [opt.LBFGS(), opt.GaussNewton(), opt.LevenbergMarquardt(), opt.SciPy("BFGS"), opt.SciPy("Nelder-Mead")],
    ids=lambda optimizer: f"{type(optimizer).__name__}-{getattr(optimizer, 'method', '')}",
)
def test_constraints_are_refused_with_a_remedy(optimizer: Any) -> None:
    x, w = normal(2, 5), normal(5).abs()
    with pytest.raises(idf.OptionError) as caught:
        idf.solve(Circle(), x, w, in_dims=(0, None), optimizer=optimizer)
    message = str(caught.value)
    assert type(optimizer).__name__ in message
    assert "2" in message
    assert "SLSQP" in message
    assert "Newton()" in message


def test_unrolling_another_method_than_newtons_is_refused() -> None:
    a, b = normal(2, 9, 4), normal(2, 9, seed=1).sign()
    layer = idf.DeclarativeLayer(Logistic(), backward="unrolled", optimizer=opt.LBFGS())
    with pytest.raises(idf.UnrollError, match="not LBFGS: leave optimizer= out"):
        layer(a, b)
