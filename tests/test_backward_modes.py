"""The backward modes of the layer, held against each other."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jacfwd, vmap

import implicitdiff as idf
from implicitdiff.layer import DeclarativeLayer, solve
from implicitdiff.problems import OptimalTransport, RobustPooling
from implicitdiff.status import Status
from tests.oracles import relative_error
from tests.small_problems import BY_NAME, SMALL, GeometricMedian, Point, Portfolio, Small, Sphere, Torch, draw


@pytest.mark.parametrize("small", SMALL, ids=lambda small: small.name)
def test_matrix_free_agrees_with_dense(small: Small) -> None:
    inputs = small.inputs(3, 2)
    tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    found = {}
    for backward in ("dense", "matrix-free"):
        layer = DeclarativeLayer(small.make(), in_dims=small.in_dims, backward=backward)
        leaves = torch.utils._pytree.tree_leaves(layer(*inputs))
        loss = sum((leaf * (1 + leaf)).sum() for leaf in leaves)
        found[backward] = torch.autograd.grad(loss, [*tensors, *layer.parameters()])
    for a, b in zip(found["dense"], found["matrix-free"], strict=True):
        assert relative_error(b, a) < 1e-8


@pytest.mark.parametrize("name", ["median", "portfolio", "quartic"])
def test_unrolled_newton_agrees_with_dense(name: str) -> None:
    """No `solve`: Newton steps built of differentiable parts."""
    small = BY_NAME[name]
    inputs = small.inputs(2, 2)
    found = {}
    for backward in ("dense", "unrolled"):
        layer = DeclarativeLayer(small.make(), in_dims=small.in_dims, backward=backward)
        solution = layer.solve(*inputs)
        found[backward] = torch.autograd.grad((solution.u**2).sum(), [*inputs, *layer.parameters()])
    assert (solution.status == Status.OK).all()
    for a, b in zip(found["dense"], found["unrolled"], strict=True):
        assert relative_error(b, a) < 1e-8


def test_unrolled_goes_through_the_problem_s_own_solve() -> None:
    x = draw(2, 3, seed=1, scale=0.5)
    u = DeclarativeLayer(Torch(), backward="unrolled")(x)
    names = set()
    node, depth = u.grad_fn, 0
    while node is not None and depth < 400:
        names.add(type(node).__name__)
        node = node.next_functions[0][0] if node.next_functions else None
        depth += 1
    assert depth > 100, "the graph should hold the iterations"
    assert not any("Implicit" in name for name in names)
    found = torch.autograd.grad(u.sum(), x)[0]
    torch.testing.assert_close(found, 1 / (3 * u.detach() ** 2 + 1))


def test_unrolled_without_torch_or_init_says_so() -> None:
    class Numpy(Torch):
        init = idf.Problem.init

        def solve(self, x):
            return torch.from_numpy(Torch.solve(self, x.detach()).numpy().copy())

    x = draw(2, 3, seed=1, scale=0.5)
    with pytest.raises(idf.UnrollError, match="not all torch"):
        DeclarativeLayer(Numpy(), backward="unrolled")(x)


def test_unrolled_falls_back_on_newton_steps() -> None:
    x = draw(3, seed=1)
    u = DeclarativeLayer(Point(), backward="unrolled")(x)  # its solve is numpy
    torch.testing.assert_close(torch.autograd.grad(u.sum(), x)[0], 1 / (3 * u.detach() ** 2 + 1))


def test_approximate_ignores_the_constraints() -> None:
    Q, mu = BY_NAME["portfolio"].inputs(3, 1)
    u = DeclarativeLayer(Portfolio(), in_dims=(None, 0), backward="approximate")(Q, mu)
    torch.testing.assert_close(u.detach(), solve(Portfolio(), Q, mu, in_dims=(None, 0)).u.detach())
    found = torch.autograd.grad(u[:, 0].sum(), mu)[0]
    torch.testing.assert_close(found, torch.linalg.inv(Q.detach())[0].expand(3, 4))  # -H^-1 B with B = -I


class ByHand(Sphere):
    """The sphere with a hand-written vjp, which counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def vjp(self, u, v, x):
        self.calls.append(tuple(u.shape))
        # u = r x / |x| with r^2 = 1 + mean(x^2)
        size, radius = x.norm(dim=1, keepdim=True), (1 + (x * x).mean(1, keepdim=True)).sqrt()
        direction = x / size
        inner = (direction * v).sum(1, keepdim=True)
        return radius / size * (v - direction * inner) + x / (radius * x.shape[1]) * inner


def test_hand_calls_the_problem_s_vjp() -> None:
    x = draw(2, 3, seed=1, shift=0.3)
    problem = ByHand()
    weight = draw(2, 3, seed=2).detach()
    found = torch.autograd.grad((DeclarativeLayer(problem, backward="hand")(x) * weight).sum(), x)[0]
    assert problem.calls == [(2, 3)]
    expected = torch.autograd.grad((DeclarativeLayer(problem)(x) * weight).sum(), x)[0]
    assert problem.calls == [(2, 3)], "the automatic path must not call it"
    torch.testing.assert_close(found, expected)


def test_hand_under_transforms() -> None:
    x = draw(4, 2, 3, seed=1, shift=0.3).detach()
    by_hand, automatic = DeclarativeLayer(ByHand(), backward="hand"), DeclarativeLayer(ByHand())

    def slope(layer: DeclarativeLayer) -> Tensor:
        return vmap(grad(lambda x: (layer(x) ** 3).sum()))(x)

    torch.testing.assert_close(slope(by_hand), slope(automatic))
    # A shared input: summed over the batch, one gradient for each vmapped entry.
    one, weight = x[0, 0], draw(5, 3, seed=3).detach()

    def shared(layer_type: Any, x: Tensor, w: Tensor) -> Tensor:
        layer = DeclarativeLayer(ByShared(), in_dims=(None, 0), backward=layer_type)
        return (layer(x, w) ** 2).sum()

    for first, second in (("hand", "auto"),):
        found = vmap(grad(lambda w, mode=first: shared(mode, one, w[None])))(weight)
        expected = vmap(grad(lambda w, mode=second: shared(mode, one, w[None])))(weight)
        torch.testing.assert_close(found, expected)
        found = vmap(lambda w, mode=first: grad(lambda x: shared(mode, x, w[None]))(one))(weight)
        expected = vmap(lambda w, mode=second: grad(lambda x: shared(mode, x, w[None]))(one))(weight)
        torch.testing.assert_close(found, expected)


class ByShared(idf.Problem):
    """minimise |u - x w|^2 / 2, u = x w elementwise, with a vjp; x is shared."""

    def objective(self, u, x, w):
        return ((u - x * w) ** 2).sum() / 2

    def init(self, x, w):
        return torch.zeros_like(w)

    def vjp(self, u, v, x, w):
        return v * w, v * x


def test_hand_has_no_second_derivative_and_says_so() -> None:
    x = draw(2, 3, seed=1, shift=0.3)
    layer = DeclarativeLayer(ByHand(), backward="hand")
    first = torch.autograd.grad((layer(x) ** 2).sum(), x, create_graph=True)[0]
    with pytest.raises(idf.NotSupportedYetError, match="hand"):
        torch.autograd.grad(first.sum(), x)
    inner = grad(lambda x: (layer(x) ** 2).sum())
    with pytest.raises(idf.NotSupportedYetError, match="hand"):
        grad(lambda x: inner(x).sum())(x.detach())
    with pytest.raises(idf.NotSupportedYetError, match="hand"):
        jacfwd(layer)(x.detach())
    with pytest.raises(idf.NotSupportedYetError, match="hand"):
        jacfwd(inner)(x.detach())


def test_hand_refuses_a_parameter_that_needs_a_gradient() -> None:
    class Median(GeometricMedian):
        def vjp(self, u, v, x):
            return torch.zeros_like(x)

    layer = DeclarativeLayer(Median(), backward="hand")
    x = draw(2, 2, 5, seed=1)
    with pytest.raises(idf.ProblemDefinitionError, match=r"self\.eps"):
        layer(x)
    layer.requires_grad_(False)
    layer(x).sum().backward()
    assert (x.grad == 0).all()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda v: v[:, :1], "expected shape"),
        (lambda v: (v, v), "structure"),
        (lambda v: "no", "structure|gradient"),
    ],
)
def test_hand_checks_what_vjp_returns(answer: Any, message: str) -> None:
    class Bad(Sphere):
        def vjp(self, u, v, x):
            return answer(v)

    with pytest.raises(idf.ProblemDefinitionError, match=message):
        DeclarativeLayer(Bad(), backward="hand")(draw(2, 3, seed=1)).sum().backward()


def test_hand_never_fills_in_a_zero_for_a_gradient_it_does_not_give() -> None:
    """The paper's Fig. 4 has no gradient for gamma."""
    cost = torch.rand(2, 4, 5, dtype=torch.float64)
    gamma = torch.tensor([2.0, 3.0], dtype=torch.float64, requires_grad=True)
    layer = idf.DeclarativeLayer(OptimalTransport(None), backward="hand")
    with pytest.raises(idf.ProblemDefinitionError, match=r"no gradient for .*backward='auto'"):
        layer(cost, gamma).square().sum().backward()


def test_hand_under_vmap_of_a_problem_with_a_buffer() -> None:
    """The buffer is shared by the vmapped entries, and stays so."""
    x = torch.randn(4, 2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found = {}
    for backward in ("hand", "auto"):
        layer = idf.DeclarativeLayer(RobustPooling("welsch", 1.5).double(), backward=backward)
        found[backward] = vmap(grad(lambda one, layer=layer: (layer(one) ** 3).sum()))(x)
    assert relative_error(found["hand"], found["auto"]) < 1e-12
    with pytest.raises(idf.OptionError, match="dependent"):
        idf.DeclarativeLayer(OptimalTransport(2.0), linear_solver="ldl")(torch.rand(1, 3, 4))
