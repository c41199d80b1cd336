"""A factorisation that is kept answers for its own point alone, and is gone with the graph.

In: calls on four rungs of the ladder. What shares a factorisation, and how often there is one, is in
`test_factorisations.py`.
"""

import gc
import threading
import time
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jvp

import implicitdiff as idf
from implicitdiff.autograd import Call, ImplicitFunction, KKTSolve
from implicitdiff.layer.options import Options
from implicitdiff.layer.prepare import prepare
from implicitdiff.problems import OptimalTransport, RobustPooling
from implicitdiff.solvers.cg import ConjugateGradientsFactorization
from tests.factor_count import count_factorisations
from tests.path_problems import Full
from tests.small_problems import Quartic, Sphere, draw


def numbers(*shape: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    return draw(*shape, seed=seed, scale=scale, shift=shift).detach()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The factorisations made so far."""
    return count_factorisations(monkeypatch)


def at_a_solution(problem: idf.Problem, *inputs: Tensor, **options: Any) -> tuple[Call, list[Tensor]]:
    """A call, and its point (*u, *lam, *theta)."""
    prepared = prepare(problem, inputs, Options(**options))
    call = prepared.call()
    outputs = ImplicitFunction.apply(call, *prepared.theta)
    return call, [leaf.detach().clone() for leaf in (*outputs[:-3], *prepared.theta)]


def sides(call: Call, point: list[Tensor]) -> list[Tensor]:
    count = call.variables + call.multipliers
    return [numbers(1, *leaf.shape, seed=40 + i) for i, leaf in enumerate(point[:count])]


def anew(call: Call, point: list[Tensor], rhs: list[Tensor]) -> list[Tensor]:
    """The solve without anything kept."""
    u, lam, theta = call.split_point(point)
    w, s, _ = call.plan.kkt_solve(u, lam, theta, tuple(rhs[: len(u)]), tuple(rhs[len(u) :]))
    return [*w, *s]


POINTS = numbers(2, 3, 5, seed=1)
COSTS = numbers(2, 3, 4, seed=1)
KEPT = {
    "structured": (lambda: RobustPooling("welsch", None), (POINTS, torch.tensor([1.5, 2.0]).double()), {}),
    "constrained": (Quartic, (numbers(2, 3, seed=3), numbers(3, seed=4, shift=1.0)), {"in_dims": (0, None)}),
    "dense": (Quartic, (numbers(2, 3, seed=3), numbers(3, seed=4, shift=1.0)),
              {"in_dims": (0, None), "backward": "dense"}),
    "matrix-free": (Full, (numbers(4, 4, seed=5), numbers(2, 4, seed=6)),
                    {"in_dims": (None, 0), "backward": "matrix-free"}),
}  # fmt: skip
kept = pytest.mark.parametrize("which", list(KEPT))


@kept
def test_a_tensor_changed_in_place_is_never_answered_with_the_old_factorisation(which: str) -> None:
    make, inputs, options = KEPT[which]
    call, point = at_a_solution(make(), *inputs, **options)
    rhs = sides(call, point)
    before = KKTSolve.apply(call, *rhs, *point)
    moved = 0
    for index, tensor in enumerate(point):
        old = KKTSolve.apply(call, *rhs, *point)
        tensor.mul_(1.07)  # the same memory, the same object
        found = KKTSolve.apply(call, *rhs, *point)
        for one, other in zip(found, anew(call, point, rhs), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
        moved += any((a - b).abs().max() > 1e-6 for a, b in zip(found, old, strict=True))
        point[index] = tensor.clone()  # other memory, the same numbers
        for one, other in zip(KKTSolve.apply(call, *rhs, *point), found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
    assert moved > 1  # K did change
    assert any((a - b).abs().max() > 1e-6 for a, b in zip(found, before, strict=True))


@kept
def test_other_data_of_the_same_shape_is_never_answered_with_the_old_factorisation(which: str) -> None:
    """Also where a freed tensor's address is handed out again."""
    make, inputs, options = KEPT[which]
    call, point = at_a_solution(make(), *inputs, **options)
    rhs = sides(call, point)
    for factor in (1.0, 1.1, 1.2, 1.1, 1.0):
        other = [leaf * factor for leaf in point]
        for one, two in zip(KKTSolve.apply(call, *rhs, *other), anew(call, other, rhs), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-11)
        del other
    for index in range(len(point)):  # one tensor alone
        other = [*point[:index], point[index] * 1.05, *point[index + 1 :]]
        for one, two in zip(KKTSolve.apply(call, *rhs, *other), anew(call, other, rhs), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-11)


def test_equal_bits_are_the_same_point_and_nothing_else_is() -> None:
    call, point = at_a_solution(RobustPooling("welsch", 1.5), POINTS)
    u, lam, theta = call.split_point(point)
    factors = call.factors
    assert factors.find(call.plan, u, lam, theta) is None
    made = factors.at(call.plan, u, lam, theta)
    assert made is not None
    same = {
        "itself": (u, theta),
        "copies": (tuple(t.clone() for t in u), tuple(t.clone() for t in theta)),
        "views": (tuple(t[:] for t in u), tuple(t.view_as(t) for t in theta)),
        "other strides": (u, tuple(t.mT.contiguous().mT if t.dim() > 1 else t for t in theta)),
    }
    for name, (one_u, one_theta) in same.items():
        assert factors.find(call.plan, one_u, lam, one_theta) is made, name
    flipped = u[0].clone()
    flipped[0, 0] = torch.nextafter(flipped[0, 0], flipped[0, 0] + 1)
    assert factors.find(call.plan, (flipped,), lam, theta) is None
    assert factors.find(call.plan, tuple(t.float() for t in u), lam, theta) is None
    assert factors.find(call.plan, tuple(t[:1] for t in u), lam, theta) is None
    zeros = torch.zeros_like(u[0])
    kept_at_zero = factors.at(call.plan, (zeros,), lam, theta)
    assert factors.find(call.plan, (-zeros,), lam, theta) is None  # 1 / -0 is not 1 / 0
    assert factors.find(call.plan, (zeros + 0,), lam, theta) is kept_at_zero
    dense = prepare(RobustPooling("welsch", 1.5), (POINTS,), Options(backward="dense")).plan
    assert factors.find(dense, (zeros,), lam, theta) is None


def test_tensors_without_a_version_are_not_kept() -> None:
    with torch.inference_mode():
        call, point = at_a_solution(Sphere(), numbers(2, 3, seed=4))
        rhs = sides(call, point)
        first = KKTSolve.apply(call, *rhs, *point)
        for leaf in point:
            leaf.mul_(1.1)
        second = KKTSolve.apply(call, *rhs, *point)
        for one, other in zip(second, anew(call, point, rhs), strict=True):
            torch.testing.assert_close(one, other)
        assert (first[0] - second[0]).abs().max() > 1e-6
        assert call.factors.find(call.plan, *call.split_point(point)) is None


def test_two_calls_of_a_layer_share_nothing() -> None:
    layer = idf.DeclarativeLayer(RobustPooling("welsch", 1.5))
    x, y = POINTS, 1.3 * POINTS.flip(0)
    along = numbers(*x.shape, seed=5)

    def product(x: Tensor) -> Tensor:
        return jvp(grad(lambda x: (layer(x) ** 3).sum()), (x,), (along,))[1]

    alone = [product(x), product(y)]
    leaves = [value.clone().requires_grad_() for value in (x, y)]
    solutions = [layer(leaf) for leaf in leaves]
    firsts = [
        torch.autograd.grad((u**3).sum(), leaf, create_graph=True)[0]
        for u, leaf in zip(solutions, leaves, strict=True)
    ]
    for first, leaf, expected in reversed(list(zip(firsts, leaves, alone, strict=True))):
        (found,) = torch.autograd.grad((first * along).sum(), leaf)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@kept
def test_threads_in_one_call_at_two_points(which: str) -> None:
    """Each thread alternates between two points of one call, whose one place is fought over."""
    make, inputs, options = KEPT[which]
    call, point = at_a_solution(make(), *inputs, **options)
    rhs = sides(call, point)
    points = [point, [leaf * 1.1 for leaf in point]]
    expected = [anew(call, one, rhs) for one in points]
    wrong: list[Any] = []

    def work(offset: int) -> None:
        try:
            for k in range(12):
                which = (k // 2 + offset) % 2
                found = KKTSolve.apply(call, *rhs, *points[which])
                for one, other in zip(found, expected[which], strict=True):
                    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong


def test_one_factorisation_solved_with_by_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Conjugate gradients leave their status in the factorisation: it must be that of one's own right-hand sides."""
    original = ConjugateGradientsFactorization.solve

    def slow(self: ConjugateGradientsFactorization, rhs: Tensor) -> Tensor:
        found = original(self, rhs)
        time.sleep(0.02)  # time for another thread to come between
        return found

    monkeypatch.setattr(ConjugateGradientsFactorization, "solve", slow)
    call, point = at_a_solution(Full(), *KEPT["matrix-free"][1], in_dims=(None, 0), linear_solver="cg")
    factor = call.plan.kkt_factor(*call.split_point(point))
    sides = numbers(1, 2, 4, seed=1), torch.full((1, 2, 4), torch.nan, dtype=torch.float64)
    alone = [factor.solve((side,), ())[2].tolist() for side in sides]
    assert alone[0] == [0, 0] != alone[1]
    found: dict[int, list[Any]] = {0: [], 1: []}

    def work(which: int) -> None:
        for _ in range(6):
            found[which].append(factor.solve((sides[which],), ())[2].tolist())

    threads = [threading.Thread(target=work, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {0: [alone[0]] * 6, 1: [alone[1]] * 6}


def test_unrolled_steps_take_one_factorisation_each(made: list[str]) -> None:
    """The point of unrolled Newton moves: nothing of one step is used in another."""
    problem, (x, a) = Quartic().requires_grad_(False), KEPT["dense"][1]
    steps = 6
    unrolled = idf.DeclarativeLayer(
        problem,
        in_dims=(0, None),
        backward="unrolled",
        optimizer=idf.optimizers.Newton(max_iter=steps),
        linear_solver="lu",  # by itself this problem divides by H, and there is nothing to count
    )
    implicit = idf.DeclarativeLayer(problem, in_dims=(0, None))
    found = {}
    for name, layer in (("unrolled", unrolled), ("implicit", implicit)):

        def f(x: Tensor, layer: idf.DeclarativeLayer = layer) -> Tensor:
            return (layer(x, a) ** 3).sum()

        found[name] = [f(x), grad(f)(x), hessian(f)(x)]
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-8)
    leaf = x.clone().requires_grad_()
    made.clear()
    u = unrolled(leaf, a)
    forward = len(made)
    assert forward >= steps
    made.clear()
    torch.autograd.grad((u**3).sum(), leaf)
    assert len(made) == steps - 1  # the last step's is still there


# ---------------------------------------------------------------- what is kept, and for how long


def test_an_ordinary_backward_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Call] = []
    original = ImplicitFunction.setup_context

    def noted(ctx: Any, inputs: Any, output: Any) -> None:
        calls.append(inputs[0])
        original(ctx, inputs, output)

    monkeypatch.setattr(ImplicitFunction, "setup_context", staticmethod(noted))
    for options in ({}, {"backward": "dense"}, {"linear_solver": "lu"}):
        layer = idf.DeclarativeLayer(OptimalTransport(1.5), **options)
        x = COSTS.clone().requires_grad_()
        (layer(x) ** 3).sum().backward(retain_graph=True)
        assert calls[-1].factors._kept is None
    assert len(calls) == 3


def test_the_factorisation_goes_with_the_graph() -> None:
    layer = idf.DeclarativeLayer(RobustPooling("welsch", 1.5))
    x = POINTS.clone().requires_grad_()
    gc.collect()
    gc.disable()
    try:
        u = layer(x)
        call = u.grad_fn.call
        (first,) = torch.autograd.grad((u**3).sum(), x, create_graph=True)
        assert call.factors._kept is not None
        alive = weakref.ref(call.factors._kept.factor)
        del call
        (second,) = torch.autograd.grad(first.square().sum(), x)
        del u, first
        assert alive() is None  # no cycle: nothing waits for the collector
    finally:
        gc.enable()
    assert second.isfinite().all()


def test_the_policies_for_failures_share_too(made: list[str]) -> None:
    """Under "nan" a sound sample stands in for each failed one: the mended point is new memory, but the same bits."""
    x = POINTS.clone()
    plain = idf.DeclarativeLayer(RobustPooling("welsch", 1.5))
    along = numbers(*x.shape, seed=5)

    def product(layer: idf.DeclarativeLayer) -> Tensor:
        return jvp(grad(lambda x: (layer(x) ** 3).sum()), (x,), (along,))[1]

    expected = product(plain)
    for policy in ("nan", "zero", "warn", "damp"):
        layer = idf.DeclarativeLayer(RobustPooling("welsch", 1.5), on_failure=policy)
        layer(x)
        made.clear()
        layer(x)
        forward = len(made)
        made.clear()
        torch.testing.assert_close(product(layer), expected, rtol=1e-10, atol=1e-12)
        assert len(made) == forward + 1, policy


def test_a_pass_after_a_derivative_of_it_uses_what_is_there(made: list[str]) -> None:
    layer = idf.DeclarativeLayer(OptimalTransport(1.5))
    x = COSTS.clone().requires_grad_()
    u = layer(x)
    v = numbers(*u.shape, seed=2)
    (alone,) = torch.autograd.grad(u, x, v, retain_graph=True)
    torch.autograd.grad((u**3).sum(), x, create_graph=True)
    made.clear()
    (again,) = torch.autograd.grad(u, x, v, retain_graph=True)
    assert made == []
    torch.testing.assert_close(again, alone, rtol=1e-11, atol=1e-13)
