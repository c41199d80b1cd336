"""What theory says of Identity: descent, orthogonality, the first change, agreement with the other estimators."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import jacfwd, jacrev

import implicitdiff.combinatorial as co
from implicitdiff.combinatorial.projections import resolve
from tests.combinatorial.instances import INSTANCES

SEEDS = st.integers(0, 2**31)
SETTINGS = settings(max_examples=8, deadline=None, derandomize=True)
FREE = [
    "top-k",
    "ranking",
    "assignment",
    "matching-general",
    "spanning-tree",
    "tsp-5",
    "flow",
    "quadratic",
    "enumerated",
]
CONSTANT_SUM = ["top-k", "ranking", "assignment", "matching-general", "spanning-tree", "tsp-5"]


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inner(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1)


def costs_and_gradient(name: str, seed: int, batch: int = 6) -> tuple[Tensor, Tensor]:
    w = INSTANCES[name].costs(seed, batch)
    return w, draw(seed ^ 1, *w.shape)


def gradient(layer: co.DiscreteLayer, w: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """(y, dl/dw) for the loss <g, y>."""
    w = w.clone().requires_grad_()
    y = layer(w)
    (found,) = torch.autograd.grad((y * g).sum(), w)
    return y.detach(), found


@SETTINGS
@given(seed=SEEDS, size=st.floats(1e-3, 1e3))
@pytest.mark.parametrize("name", FREE)
@pytest.mark.parametrize("projection", ["none", "affine"])
def test_a_step_of_any_size_descends(name: str, projection: str, seed: int, size: float) -> None:
    """<y(w + a P g) - y(w), g> <= 0 for every a > 0: the gradient is -P g, and descent adds a P g to w."""
    solver = INSTANCES[name].make()
    w, g = costs_and_gradient(name, seed)
    y, found = gradient(co.DiscreteLayer(solver, co.Identity(projection)), w, g)
    assert (inner(solver(w - size * found) - y, g) <= 1e-9).all()


@SETTINGS
@given(seed=SEEDS, size=st.floats(1e-3, 1e3))
@pytest.mark.parametrize("name", FREE)
@pytest.mark.parametrize("projection", ["norm", "auto"])
def test_with_a_norm_the_projected_loss_descends(name: str, projection: str, seed: int, size: float) -> None:
    solver = INSTANCES[name].make()
    w, g = costs_and_gradient(name, seed)
    y, found = gradient(co.DiscreteLayer(solver, co.Identity(projection)), w, g)
    assert (inner(solver(w - size * found) - y, -found) <= 1e-9).all()


@SETTINGS
@given(seed=SEEDS)
@pytest.mark.parametrize("name", [*CONSTANT_SUM, "flow", "quadratic"])
def test_the_gradient_is_orthogonal_to_what_is_projected_out(name: str, seed: int) -> None:
    solver = INSTANCES[name].make()
    w, g = costs_and_gradient(name, seed)
    rows = torch.from_numpy(solver.row_space(tuple(w.shape[1:])))
    projections = ["affine", "auto", *(["mean", "std"] if name in CONSTANT_SUM else [])]
    for projection in projections:
        _, found = gradient(co.DiscreteLayer(solver, co.Identity(projection)), w, g)
        out = torch.ones(1, rows.shape[1], dtype=w.dtype) if projection in ("mean", "std") else rows
        assert (found.flatten(1) @ out.mT).abs().max() < 1e-9
        if projection in ("std", "auto"):
            assert inner(found, w).abs().max() < 1e-9
            assert inner(found, resolve(projection, solver)(w)).abs().max() < 1e-9
    _, found = gradient(co.DiscreteLayer(solver, co.Identity("norm")), w, g)
    assert inner(found, w).abs().max() < 1e-9


@SETTINGS
@given(seed=SEEDS)
@pytest.mark.parametrize("name", sorted(set(INSTANCES) - {"tsp-cuts", "milp", "set-cover", "arborescence"}))
def test_the_declared_projection_does_not_change_the_solution(name: str, seed: int) -> None:
    """Tested on all solutions, so that it holds for solvers too that take no costs P(w)."""
    instance = INSTANCES[name]
    solver = instance.make()
    w = instance.costs(seed, 5)
    listed = torch.from_numpy(instance.solutions()).flatten(1)
    sign = 1 if solver.sense == "min" else -1
    for projection in ("affine", "norm", "auto"):
        values = sign * resolve(projection, solver)(w).flatten(1) @ listed.mT
        best = listed[values.argmin(1)]
        torch.testing.assert_close(inner(w.flatten(1), best), inner(w, solver(w)), rtol=0, atol=1e-9)


@SETTINGS
@given(seed=SEEDS)
@pytest.mark.parametrize("name", ["top-k", "assignment", "tsp-5"])
def test_the_first_change_lowers_the_linearised_loss(name: str, seed: int) -> None:
    """Theorem 1 of the paper, where w moves along w + t g until the solution changes."""
    solver = INSTANCES[name].make()
    w, g = costs_and_gradient(name, seed, batch=1)
    listed = torch.from_numpy(INSTANCES[name].solutions())
    y = solver(w)
    better = inner(listed - y, g.expand_as(listed)) < 0
    # y gives way to y' at t = <y' - y, w> / <y - y', g>; the first of them is what the solver must find.
    gain = -inner(listed - y, g.expand_as(listed))
    times = torch.where(better, inner(listed - y, w.expand_as(listed)) / gain, torch.inf)
    if not better.any():
        assert torch.equal(solver(w + 1e6 * g), y)
        return
    first = times.min()
    assert torch.equal(solver(w + 0.999 * first * g), y)
    changed = solver(w + (1 + 1e-6) * first * g + 0.0)
    assert inner(changed - y, g).item() < 0
    torch.testing.assert_close(changed[0], listed[times.argmin()])


@SETTINGS
@given(seed=SEEDS)
@pytest.mark.parametrize("name", ["top-k", "assignment"])
def test_identity_is_blackbox_in_direction_for_a_squared_loss(name: str, seed: int) -> None:
    """With l = |y - y*|^2 and a large lam, Blackbox moves to y*: lam / 2 of it is half of Identity's gradient."""
    solver = INSTANCES[name].make()
    w = INSTANCES[name].costs(seed, 4)
    y, target = solver(w), solver(w.flip(0))
    g = 2 * (y - target)
    lam = 1e3
    _, blackbox = gradient(co.DiscreteLayer(solver, co.Blackbox(lam)), w, g)
    _, identity = gradient(co.DiscreteLayer(solver, co.Identity("none")), w, g)
    torch.testing.assert_close(lam * blackbox, target - y)
    torch.testing.assert_close(identity, 2 * (target - y))


@SETTINGS
@given(seed=SEEDS, lam=st.floats(1e-2, 1e2))
@pytest.mark.parametrize("name", FREE)
def test_estimators_agree_where_they_are_the_same(name: str, seed: int, lam: float) -> None:
    solver = INSTANCES[name].make()
    w, g = costs_and_gradient(name, seed)
    found = {}
    for key, estimator in {
        "blackbox": co.Blackbox(lam),
        "right": co.LPGD(lam, side="right"),
        "left": co.LPGD(lam, side="left"),
        "both": co.LPGD(lam),
        "imle": co.IMLE(lam),
        "unscaled": co.IMLE(lam, scale=False),
        "identity": co.Identity("none"),
        "through": co.StraightThrough(),
    }.items():
        y, found[key] = gradient(co.DiscreteLayer(solver, estimator), w, g)
        assert torch.equal(y, solver(w))
    torch.testing.assert_close(found["right"], found["blackbox"])
    torch.testing.assert_close(found["imle"], found["blackbox"])
    torch.testing.assert_close(found["unscaled"], lam * found["blackbox"])
    torch.testing.assert_close(found["both"], (found["left"] + found["right"]) / 2)
    torch.testing.assert_close(found["identity"], -g)
    torch.testing.assert_close(found["through"], -g)
    for key in ("blackbox", "left", "both"):
        assert (inner(found[key], g) <= 1e-9).all(), "a descent direction"
        if name in CONSTANT_SUM:
            assert found[key].flatten(1).sum(1).abs().max() < 1e-9


@pytest.mark.parametrize("projection", ["none", "mean", "norm", "std", "affine", "auto"])
def test_the_jacobian_is_minus_that_of_the_projection(projection: str) -> None:
    solver, w = co.Assignment(), draw(8, 3, 3)
    layer = co.DiscreteLayer(solver, co.Identity(projection))
    P = resolve(projection, solver)
    expected = -jacrev(lambda one: P(one[None])[0])(w)
    torch.testing.assert_close(jacrev(layer)(w), expected)
    torch.testing.assert_close(jacfwd(layer)(w), expected)


@pytest.mark.parametrize("name", ["top-k", "assignment", "tsp-5"])
def test_a_step_against_a_squared_loss_reaches_the_target(name: str) -> None:
    """End to end: gradient descent on the costs themselves."""
    solver = INSTANCES[name].make()
    w = INSTANCES[name].costs(4, 3)
    target = solver(INSTANCES[name].costs(5, 3))
    assert not torch.equal(solver(w), target)
    for estimator, rate in ((co.Identity(), 0.2), (co.Identity("none"), 0.2), (co.Blackbox(20.0), 4.0)):
        layer, x = co.DiscreteLayer(solver, estimator), w.clone().requires_grad_()
        optimiser = torch.optim.SGD([x], lr=rate)
        for _ in range(100):
            optimiser.zero_grad()
            (layer(x) - target).square().sum().backward()
            optimiser.step()
        assert torch.equal(solver(x), target), estimator


SPHERES = {
    # solver, projection, n, centre, radius of a sphere that holds all solutions
    "cube": (co.EnumeratedSolver(list(itertools.product((0.0, 1.0), repeat=5))), "norm", 5, 0.5, 5**0.5 / 2),
    "ranks": (co.Ranking(), "std", 5, 3.0, (5 * 24 / 12) ** 0.5),
    "top-k": (co.TopK(2), "std", 5, 2 / 5, (2 * 3 / 5) ** 0.5),
}


@SETTINGS
@given(seed=SEEDS)
@pytest.mark.parametrize("name", sorted(SPHERES))
def test_the_gradient_is_that_of_a_relaxation_to_a_sphere(name: str, seed: int) -> None:
    """argmin of <w, y> over the sphere (and the plane of Y) that holds Y is c - r P(w), whose derivative is -r "
    "P'(w)."""
    solver, projection, n, centre, radius = SPHERES[name]
    w = draw(seed, n)
    y = solver(w)
    assert float((y - centre).norm()) == pytest.approx(radius)

    def relaxed(w: Tensor) -> Tensor:
        return centre - radius * resolve(projection, solver)(w[None])[0]

    # A relaxation: no solution is better than the relaxed one.
    assert (w * relaxed(w)).sum() <= (w * y).sum() + 1e-9
    layer = co.DiscreteLayer(solver, co.Identity(projection))
    torch.testing.assert_close(radius * jacrev(layer)(w), jacrev(relaxed)(w))
