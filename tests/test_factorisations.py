"""How often K is factored: once for all derivatives of one call at one point, on every route.

The values of the derivatives are the matter of `test_second_order.py`; that a factorisation answers for no other
point is that of `test_shared_factor.py`.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jvp, vjp, vmap

import implicitdiff as idf
from implicitdiff.diagnostics.meter import measure
from implicitdiff.layer.options import Options
from implicitdiff.layer.prepare import prepare
from implicitdiff.problems import OptimalTransport, RobustPooling
from tests.factor_count import count_factorisations
from tests.path_problems import Cumulative, Full, Regression, Rows, Separable
from tests.small_problems import Portfolio, Quartic, draw

OPERATIONS = (
    "linalg_cholesky_ex",
    "linalg_lu_factor_ex",
    "linalg_ldl_factor_ex",
    "_linalg_eigh",
    "_linalg_svd",
)


def numbers(*shape: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    return draw(*shape, seed=seed, scale=scale, shift=shift).detach()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The factorisations made so far."""
    return count_factorisations(monkeypatch)


@dataclass(frozen=True)
class Case:
    """A problem on one route; `made` is what one factorisation of K is made of."""

    name: str
    problem: Callable[[], idf.Problem]
    inputs: tuple[Tensor, ...]
    made: tuple[str, ...]
    in_dims: Any = 0
    options: dict[str, Any] = field(default_factory=dict)
    moves: int = 0


RISK = numbers(4, 4, seed=9)
ASSETS = (RISK @ RISK.mT + torch.eye(4, dtype=torch.float64), numbers(2, 4, seed=7))
COSTS = (numbers(2, 3, 4, seed=1),)
POINTS = (numbers(2, 3, 5, seed=1),)
ROUTES = (
    Case("pooling", lambda: RobustPooling("welsch", 1.5), POINTS, ("factor",)),
    Case("pooling-woodbury", lambda: RobustPooling("welsch", 2.5), (numbers(2, 5, 2, seed=2),), ("factor",)),
    Case("transport", lambda: OptimalTransport(1.5), COSTS, ("factor",)),
    Case("transport-lu", lambda: OptimalTransport(1.5), COSTS, ("K",), options={"linear_solver": "lu"}),
    Case("portfolio", Portfolio, ASSETS, (), (None, 0), {}, 1),  # quadratic: H and S are factored in the forward pass
    Case("portfolio-ldl", Portfolio, ASSETS, ("K", "factor"), (None, 0), {"linear_solver": "ldl"}, 1),
    Case("portfolio-dense", Portfolio, ASSETS, ("H",), (None, 0), {"backward": "dense"}, 1),
    Case("quartic", Quartic, (numbers(2, 3, seed=3), numbers(3, seed=4, scale=0.2, shift=1.0)), (),
         (0, None)),
    Case("rows", Rows, (numbers(2, 3, 2, seed=2),), ("factor",)),
    Case("separable", Separable, (numbers(2, 3, seed=2),), ()),  # H is only divided by
    Case("full-cg", Full, (numbers(4, 4, seed=5), numbers(2, 4, seed=6)), ("factor",), (None, 0),
         {"linear_solver": "cg"}, 1),
    Case("regression-approximate", Regression, (numbers(2, 6, 4, seed=3), numbers(2, 6, seed=4)), ("H",), 0,
         {"backward": "approximate"}, 1),
    Case("cumulative", Cumulative, (numbers(2, 4, seed=8),), ("H",)),
)  # fmt: skip
routes = pytest.mark.parametrize("case", ROUTES, ids=lambda case: case.name)


def scalar_of(case: Case, layer: idf.DeclarativeLayer) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """A scalar of the layer's output as a function of the one input that moves, and this input."""
    before, x, after = case.inputs[: case.moves], case.inputs[case.moves], case.inputs[case.moves + 1 :]
    return (lambda x: (layer(*before, x, *after) ** 3).sum()), x


def products(f: Callable[[Tensor], Tensor], along: Tensor) -> dict[str, Callable[[Tensor], Any]]:
    """Every way to a Hessian-vector product, and two derivatives of the third order."""

    def double(x: Tensor) -> Tensor:
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(f(leaf), leaf, create_graph=True)
        return torch.autograd.grad((first * along).sum(), leaf)[0]

    def dual(x: Tensor) -> Tensor:
        with torch.autograd.forward_ad.dual_level():
            leaf = torch.autograd.forward_ad.make_dual(x.clone().requires_grad_(), along)
            (first,) = torch.autograd.grad(f(leaf), leaf, create_graph=True)
            return torch.autograd.forward_ad.unpack_dual(first).tangent

    def forward_over_reverse(x: Tensor) -> Tensor:
        return jvp(grad(f), (x,), (along,))[1]

    return {
        "forward over reverse": forward_over_reverse,
        "reverse over reverse": lambda x: vjp(grad(f), x)[1](along)[0],
        "reverse over forward": lambda x: grad(lambda x: jvp(f, (x,), (along,))[1])(x),
        "double backward": double,
        "dual over reverse": dual,
        "functional": lambda x: torch.autograd.functional.hvp(f, x, along)[1],
        "many directions": lambda x: vmap(lambda t: jvp(grad(f), (x,), (t,))[1])(
            torch.stack([along, -along])
        )[0],
        "hessian": lambda x: torch.tensordot(hessian(f)(x), along, along.dim()),
        "reverse over forward over reverse": grad(lambda x: (forward_over_reverse(x) ** 2).sum()),
        "forward over forward over reverse": lambda x: jvp(forward_over_reverse, (x,), (along,))[1],
    }


@routes
def test_one_factorisation_for_derivatives_of_any_order(case: Case, made: list[str]) -> None:
    layer = idf.DeclarativeLayer(case.problem().requires_grad_(False), in_dims=case.in_dims, **case.options)
    f, x = scalar_of(case, layer)
    along = numbers(*x.shape, seed=31)
    f(x)  # the first call probes
    torch.func.grad(f)(x)
    made.clear()
    f(x)
    forward = tuple(made)
    leaf = x.clone().requires_grad_()
    ways: dict[str, Callable[[Tensor], Any]] = {
        "backward": lambda x: torch.autograd.grad(f(leaf), leaf),
        "jvp": lambda x: jvp(f, (x,), (along,)),
        "vjp": grad(f),
        **products(f, along),
    }
    found = {}
    for name, way in ways.items():
        made.clear()
        way(x)
        found[name] = tuple(made)
    expected = (*forward, *case.made)
    assert {name: sorted(made) for name, made in found.items()} == dict.fromkeys(ways, sorted(expected))
    if not case.options:  # it has none of its own
        made.clear()
        idf.jacobian(layer.problem, *case.inputs, in_dims=case.in_dims)
        assert sorted(made) == sorted(expected)


@routes
def test_shared_and_separate_factorisations_give_the_same_numbers(case: Case) -> None:
    """The emitted solve cut in two, first and later solves of the dense plan, against the solve in one piece."""
    prepared = prepare(case.problem(), case.inputs, Options(in_dims=case.in_dims, **case.options))
    call = prepared.call()
    theta = tuple(tensor.detach() for tensor in prepared.theta)
    found = prepared.apply()
    u, lam = (tuple(leaf.detach() for leaf in leaves) for leaves in (found.u, found.multipliers))
    factor = call.plan.kkt_factor(u, lam, theta)
    for k in range(3):
        rhs_u = tuple(numbers(k + 1, *leaf.shape, seed=60 + k) for leaf in u)
        rhs_h = tuple(numbers(k + 1, *leaf.shape, seed=70 + k) for leaf in lam)
        w, s, status = call.plan.kkt_solve(u, lam, theta, rhs_u, rhs_h)
        shared_w, shared_s, shared_status = factor.solve(rhs_u, rhs_h)
        assert torch.equal(status, shared_status)
        for one, other in zip((*w, *s), (*shared_w, *shared_s), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    v = tuple(numbers(*leaf.shape, seed=80) for leaf in u)
    needs = tuple(tensor.is_floating_point() for tensor in theta)
    v_lam = tuple(numbers(*leaf.shape, seed=81) for leaf in lam) or None
    for given in (None, v_lam):
        alone, status = call.plan.vjp(u, lam, theta, v, given, needs)
        with_factor, shared_status = call.plan.vjp(u, lam, theta, v, given, needs, factor)
        assert torch.equal(status, shared_status)
        for one, other in zip(alone, with_factor, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


WEIGHTS = [[1.0, 2.0, 0.0], [1.0, 2.0, 3.0]]  # a singular H with a regular K beside a regular H


@pytest.mark.parametrize(
    ("problem", "inputs", "way"),
    [
        (OptimalTransport(50.0), (numbers(2, 20, 30, seed=1).abs().float(),), "refined"),
        (Portfolio(), (torch.diag_embed(torch.tensor(WEIGHTS).double()), numbers(2, 3, seed=2)), "full"),
    ],
    ids=["refined", "full"],
)
def test_the_other_ways_share_too(
    problem: idf.Problem, inputs: tuple[Tensor, ...], way: str, made: list[str]
) -> None:
    """Where digits cancelled, and where the route's factorisation fails and K is taken as one matrix."""
    leaves = tuple(value.clone().requires_grad_() for value in inputs)
    u = idf.DeclarativeLayer(problem)(*leaves)
    call, saved = u.grad_fn.call, u.grad_fn.saved_tensors
    count = call.variables + call.multipliers
    point = call.split_point([leaf.detach() for leaf in (*saved[:count], *saved[count + 1 :])])
    v = tuple(numbers(*leaf.shape, seed=5).to(leaf.dtype) for leaf in point[0])
    needs = tuple(value.is_floating_point() and i < len(inputs) for i, value in enumerate(point[2]))
    sides = tuple(leaf[None] for leaf in v), tuple(torch.ones_like(leaf)[None] for leaf in point[1])
    expected = [*call.plan.kkt_solve(*point, *sides), *call.plan.vjp(*point, v, None, needs)]
    factor = call.plan.kkt_factor(*point)
    factor.solve(*sides)
    once = len(made)
    found = [*factor.solve(*sides), *call.plan.vjp(*point, v, None, needs, factor)]
    assert len(made) == once
    assert {("kkt", False, way, True), ("vjp", way, needs, False, True)} <= set(call.plan.writer.known)
    torch.testing.assert_close(found, expected, rtol=1e-5 if way == "refined" else 1e-11, atol=1e-9)


def test_emitted_code_takes_the_factorisation_and_makes_none() -> None:
    x = COSTS[0].clone().requires_grad_()
    layer = idf.DeclarativeLayer(OptimalTransport(1.5))
    u = layer(x)
    (first,) = torch.autograd.grad((u**3).sum(), x, create_graph=True)
    torch.autograd.grad(first.square().sum(), x)
    written = u.grad_fn.call.plan.writer.known
    texts = {
        key[0]: w.emitted.source for key, w in written.items() if isinstance(key, tuple) and key[-1] is True
    }
    assert set(texts) == {"kkt", "vjp"}
    assert all(".factor(" not in text and "schur" in text for text in texts.values())
    (made,) = (w.emitted.source for key, w in written.items() if key[0] == "factor")
    assert made.count(".factor(") == 1


def test_minres_linearises_once(monkeypatch: pytest.MonkeyPatch) -> None:
    matrixfree = importlib.import_module("implicitdiff.derivatives.matrixfree")
    pulls: list[int] = []
    original = matrixfree.pullback

    def counted(*args: Any) -> Any:
        pulls.append(1)
        return original(*args)

    monkeypatch.setattr(matrixfree, "pullback", counted)
    layer = idf.DeclarativeLayer(Portfolio(), in_dims=(None, 0), backward="matrix-free")
    f, x = lambda mu: (layer(ASSETS[0], mu) ** 3).sum(), ASSETS[1]
    f(x)
    pulls.clear()
    f(x)
    forward = len(pulls)
    expected = idf.DeclarativeLayer(Portfolio(), in_dims=(None, 0))
    along = numbers(2, 4, seed=3)
    truth = jvp(grad(lambda mu: (expected(ASSETS[0], mu) ** 3).sum()), (x,), (along,))[1]
    for name, way in products(f, along).items():
        pulls.clear()
        found = way(x)
        assert len(pulls) - forward == 1, name
        if found.shape == truth.shape and "over forward over" not in name:
            torch.testing.assert_close(found, truth, rtol=1e-8, atol=1e-9)


def test_operations_by_torch_agree_with_the_count() -> None:
    """The same count without knowing the library: LAPACK calls that torch dispatches."""
    layer = idf.DeclarativeLayer(Full().requires_grad_(False), in_dims=(None, 0), linear_solver="cholesky")
    Q, x = numbers(4, 4, seed=5), numbers(2, 4, seed=6)
    leaf = x.clone().requires_grad_()
    u = layer(Q, leaf)

    def product() -> None:
        (first,) = torch.autograd.grad((u**3).sum(), leaf, create_graph=True)
        torch.autograd.grad(first.square().sum(), leaf, retain_graph=True)

    _, found = measure(product)
    assert sum(total.count for total in found.by_operation if total.name in OPERATIONS) == 1
