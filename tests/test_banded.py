"""Neighbours along one axis: the band is found, said in words, solved in linear time, and right at length.

The gradients of tests/cases/bands.py are checked at small sizes, where a dense solver may be cheaper. Here the chains
are long, and what must not be found is tried too.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import implicitdiff as idf
from implicitdiff.diagnostics import Measurement, measure
from implicitdiff.diagnostics.held import plan_of
from tests.cases import BY_NAME, Case
from tests.cases.bands import SINGULAR
from tests.oracles import compare_modulo, dense_vjp, solved

Objective = Callable[..., Tensor]


def declared(objective: Objective, equality: Any = None) -> idf.Problem:
    """A problem over u of the shape of its first input."""

    class Declared(idf.Problem):
        def objective(self, u: Tensor, *inputs: Tensor) -> Tensor:
            return objective(u, *inputs)

        def init(self, *inputs: Tensor) -> Tensor:
            return torch.zeros_like(inputs[0])

    if equality is not None:
        Declared.equality = lambda self, u, *inputs: equality(u, *inputs)  # type: ignore[method-assign]
    return Declared()


def near(u: Tensor, x: Tensor) -> Tensor:
    return (u - x).square().sum()


def steps(u: Tensor) -> Tensor:
    return u[1:] - u[:-1]


def series(*shape: int) -> tuple[Tensor, ...]:
    return (torch.randn(2, *shape, dtype=torch.float64),)


LONG: dict[str, tuple[Case, tuple[int, ...], str]] = {
    name: (BY_NAME[name], sizes, solver)
    for name, sizes, solver in (
        ("smoothing", (60,), "tridiagonal"),
        ("total-variation", (61,), "tridiagonal"),
        ("trend", (62,), "schur"),
        ("autoregressive", (63,), "tridiagonal"),
        ("series", (3, 50), "tridiagonal"),
        ("trajectory", (40, 3), "tridiagonal"),
        ("steered", (41, 2), "schur"),
        ("group-variation", (42, 2), "tridiagonal"),
        ("image", (40, 3), "tridiagonal"),
        ("pendulum", (40,), "schur"),
        ("pairs", (64,), "tridiagonal"),
        ("arc-length", (60,), "schur"),
    )
}


@pytest.mark.parametrize("name", list(LONG))
def test_long_chains_are_right(name: str) -> None:
    case, sizes, solver = LONG[name]
    problem, inputs = case.solvable(), case.make_inputs(seed=4, batch=2, sizes=sizes)
    found = idf.explain(case.problem(), *inputs, in_dims=case.in_dims)
    assert found.hessian.kind == "banded", found
    inputs = tuple(x.requires_grad_() for x in inputs)
    # at these lengths one dense factorisation takes less time, so the banded one is asked for
    asked = "auto" if solver == "schur" else solver
    u = idf.DeclarativeLayer(problem, in_dims=case.in_dims, linear_solver=asked)(*inputs)
    v = torch.randn(u.shape, generator=torch.Generator().manual_seed(1), dtype=u.dtype)
    sources = [*inputs, *problem.parameters()]
    actual = list(torch.autograd.grad(u, sources, v))
    assert compare_modulo(actual, dense_vjp(problem, u, v, inputs, case.in_dims).leaves()) < 1e-9


@pytest.mark.parametrize("name", list(LONG))
def test_shapes_without_data_give_the_same_explanation(name: str) -> None:
    case, sizes, _ = LONG[name]
    inputs = case.make_inputs(batch=2, sizes=sizes)
    without = tuple(x.to("meta") for x in inputs)
    found, expected = (idf.explain(case.problem(), *x, in_dims=case.in_dims) for x in (without, inputs))
    assert found == expected


@pytest.mark.parametrize("name", list(LONG))
def test_the_cost_grows_with_the_length(name: str) -> None:
    """Operations, bytes and peak at most double with T (the solvers end with a small dense block, a constant), and no
    tensor has more entries than the band.
    """
    case, sizes, _ = LONG[name]
    along = len(sizes) - 1 if name == "series" else 0
    small, large = (
        _cost(case, tuple(n * s if k == along else s for k, s in enumerate(sizes))) for n in (16, 32)
    )
    for quantity in ("flops", "bytes", "peak"):
        ratio = getattr(large[1], quantity) / getattr(small[1], quantity)
        assert 1.2 < ratio < 2.1, (quantity, ratio)
    shape, found = large
    blocks = shape[1] if len(shape) > 1 and name != "series" else 1
    width = 5 if name == "trend" else 3
    together = 2 * width * blocks * torch.Size(shape).numel()  # for a batch of two
    assert found.largest <= 2 * together, found.largest_operation


def _cost(case: Case, sizes: tuple[int, ...]) -> tuple[tuple[int, ...], Measurement]:
    """The shape of u, and what one backward pass does."""
    problem, inputs = case.problem(), case.make_inputs(seed=1, batch=2, sizes=sizes)
    planned = plan_of(problem, inputs, case.in_dims)
    generator = torch.Generator().manual_seed(1)
    shape, theta = planned.plan.trace.variables[0].shape, tuple(t.detach() for t in planned.theta)
    u, v = ((0.1 * torch.randn(2, *shape, generator=generator, dtype=torch.float64),) for _ in range(2))
    lam = planned.plan.multipliers(u, theta) if planned.plan.needs_multipliers else ()
    arguments = (u, lam, theta, v, None, planned.needs)
    planned.plan.vjp(*arguments)  # the first call with data also probes the structure
    return shape, measure(planned.plan.vjp, *arguments)[1]


REASONS: dict[str, tuple[Objective, tuple[int, ...], str]] = {
    "one difference": (
        lambda u, x: steps(u).square().sum() + near(u, x),
        (9,),
        "every term ties axis 0 of the variable to itself with offsets -1, 0, 1",
    ),
    "a gap": (
        lambda u, x: torch.cosh(u[3:] - u[:-3]).sum() + near(u, x),
        (9,),
        "every term ties axis 0 of the variable to itself with offsets -3, 0, 3",
    ),
    "chains": (
        lambda u, x: torch.diff(u, dim=1).square().sum() + near(u, x),
        (3, 7),
        "every term ties axis 1 of the variable to itself with offsets -1, 0, 1, separately for each entry of axis 0",
    ),
    "blocks": (
        lambda u, x: torch.sqrt(steps(u).square().sum((1, 2)) + 1).sum() + near(u, x),
        (7, 2, 3),
        "every term ties axis 0 of the variable to itself with offsets -1, 0, 1; inside a block: axes 1, 2",
    ),
    "chains of blocks": (
        lambda u, x: torch.sqrt(steps(u).square().sum(2) + 1).sum() + near(u, x),
        (7, 2, 3),
        "every term ties axis 0 of the variable to itself with offsets -1, 0, 1, separately for each entry of axis 1; "
        "inside a block: axis 2",
    ),
    "a loop": (
        lambda u, x: sum((u[t + 1] - u[t]) ** 2 for t in range(len(x) - 1)) + near(u, x),
        (8,),
        "every term ties axis 0 of the variable to itself with offsets -1, 0, 1",
    ),
    "reversed": (
        lambda u, x: (u.flip(0)[1:] - torch.tanh(u.flip(0)[:-1])).square().sum() + near(u, x),
        (8,),
        "every term ties axis 0 of the variable to itself with offsets -1, 0, 1",
    ),
    "a flat vector": (
        lambda u, x: steps(u.reshape(6, 2)).square().sum() + near(u, x),
        (12,),
        "every term ties axis 0 of the variable to itself with offsets -1, 0, 1, separately for each entry of axis 1",
    ),
}


@pytest.mark.parametrize("name", list(REASONS))
def test_the_reason_is_in_plain_words(name: str) -> None:
    objective, shape, reason = REASONS[name]
    problem, (x,) = declared(objective), series(*shape)
    found = idf.explain(problem, x)
    assert (found.hessian.kind, found.hessian.reason) == ("banded", reason)
    _check_gradient(problem, x)


NOT_BANDED: dict[str, tuple[Objective, tuple[int, ...], str]] = {
    "a slice alone": (lambda u, x: (u[2:] ** 4).sum() + near(u, x), (6,), "diagonal"),
    "single entries": (lambda u, x: torch.exp(u[0]) + u[-1] ** 4 + near(u, x), (6,), "diagonal"),
    "two columns": (lambda u, x: torch.exp(u[:, 0] * u[:, 1]).sum() + near(u, x), (6, 2), "block-diagonal"),
    "far entries": (lambda u, x: u[0] * u[3] + near(u, x), (6,), "low-rank-plus-diagonal"),
    "few entries": (lambda u, x: u[0] * u[1] + u[1] * u[2] + near(u, x), (6,), "low-rank-plus-diagonal"),
    "a band and a sum": (
        lambda u, x: steps(u).square().sum() + u.sum() ** 2 + near(u, x),
        (6,),
        "sum",
    ),
    "two steps apart against one": (
        lambda u, x: (u[:3] - u[::2]).square().sum() + near(u, x),
        (6,),
        "sparse",
    ),
    "a transposed slice": (
        lambda u, x: torch.exp(0.3 * u[1:, :-1] * u[1:, :-1].mT).sum() + near(u, x),
        (4, 4),
        "sparse",
    ),
    "backwards": (lambda u, x: (u - 0.5 * u.flip(0)).square().sum() + near(u, x), (6,), "sparse"),
    "turned round": (
        lambda u, x: torch.exp(0.2 * u * u.flip(0, 1)).sum() + (u * x.flip(1)).sum() + near(u, x),
        (3, 4),
        "sparse",
    ),
}


@pytest.mark.parametrize("name", list(NOT_BANDED))
def test_what_is_no_band(name: str) -> None:
    objective, shape, kind = NOT_BANDED[name]
    problem, (x,) = declared(objective), series(*shape)
    found = idf.explain(problem, x)
    assert (found.hessian.kind, found.fallbacks) == (kind, ())
    _check_gradient(problem, x)


def _check_gradient(problem: idf.Problem, x: Tensor) -> None:
    """Of u by x, against the dense formula."""
    x.requires_grad_()
    u = idf.DeclarativeLayer(solved(problem))(x)
    v = torch.randn(u.shape, generator=torch.Generator().manual_seed(1), dtype=u.dtype)
    actual = list(torch.autograd.grad(u, [x], v))
    assert compare_modulo(actual, dense_vjp(problem, u, v, (x,), 0).leaves()) < 1e-9


def test_a_diagonal_that_may_be_zero_is_none() -> None:
    """u_0 has no curvature: H is singular, K is regular. A division by the diagonal would give infinity."""
    problem = declared(lambda u, x: (u[1:] - x[1:]).square().sum(), lambda u, x: u[0] - 2 * x[0])
    (x,) = series(5)
    x.requires_grad_()
    assert idf.explain(problem, x).hessian.kind == "dense"
    u = idf.DeclarativeLayer(solved(problem))(x)
    (gradient,) = torch.autograd.grad(u, x, torch.ones_like(u))
    torch.testing.assert_close(gradient, torch.tensor([2.0, 1, 1, 1, 1]).double().expand(2, 5))


@pytest.mark.parametrize("seen", [False, True])
@pytest.mark.parametrize("length", [6, 90])
def test_a_singular_band_with_both_ends_held(length: int, seen: bool) -> None:
    """Differences alone: H has the null vector of ones, K is regular, and the solution is known.

    Seen: the variables have terms of their own, so that H may be regular, with weights that are 0.
    """

    def pull(u: Tensor, x: Tensor, a: Tensor, b: Tensor, w: Tensor) -> Tensor:
        own = (w * u).square().sum() if seen else w.sum()
        return 0.5 * steps(u).square().sum() - torch.dot(x, u) + own

    problem = declared(pull, lambda u, x, a, b, w: (u[0] - a, b - u[-1]))
    (x,) = series(length)
    a, b = torch.randn(2, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    inputs = tuple(t.requires_grad_() for t in (x, a, b))
    zeros = torch.zeros_like(x)
    assert idf.explain(problem, *inputs, zeros).hessian.kind == "banded"
    u = idf.DeclarativeLayer(solved(problem))(*inputs, zeros)
    # u is the solution of the Poisson equation on a line: linear in x, a and b
    inner = 2 * torch.eye(length - 2) - torch.ones(length - 3).diag(1) - torch.ones(length - 3).diag(-1)
    sides = torch.zeros(2, length - 2)
    sides[0, 0] = sides[1, -1] = 1
    right = x[:, 1:-1] + torch.stack([a, b], 1) @ sides.double()
    exact = torch.cholesky_solve(right[..., None], torch.linalg.cholesky(inner.double()))[..., 0]
    exact = torch.cat([a[:, None], exact, b[:, None]], 1)
    torch.testing.assert_close(u, exact, rtol=1e-9, atol=1e-9)
    v = torch.randn(u.shape, generator=torch.Generator().manual_seed(1), dtype=u.dtype)
    for actual, expected in zip(
        torch.autograd.grad(u, inputs, v), torch.autograd.grad(exact, inputs, v), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", SINGULAR, ids=str)
def test_a_singular_band_is_right(case: Case) -> None:
    """For all inputs and for the multipliers, with a shared matrix or not, by finite differences too."""
    for sizes in case.sizes:
        problem = case.solvable()
        inputs = tuple(x.requires_grad_() for x in case.make_inputs(seed=5, batch=3, sizes=sizes))
        assert idf.explain(case.problem(), *inputs).hessian.kind == case.hessian
        layer = idf.DeclarativeLayer(problem)
        u = layer(*inputs)
        v = torch.randn(u.shape, generator=torch.Generator().manual_seed(1), dtype=u.dtype)
        actual = list(torch.autograd.grad(u, inputs, v, materialize_grads=True, allow_unused=True))
        assert compare_modulo(actual, dense_vjp(problem, u, v, inputs, 0).leaves()) < 1e-9
        assert torch.autograd.gradcheck(
            lambda *t, layer=layer: tuple(layer.solve(*t).equality_multipliers), inputs, fast_mode=True
        )


@pytest.mark.parametrize("case", SINGULAR, ids=str)
def test_a_singular_band_costs_no_more(case: Case) -> None:
    """No dense matrix is formed where H + rho A'A is banded; only what fails first is done twice."""
    found = [_cost(case, (length,))[1] for length in (1000, 2000)]
    assert found[1].bytes < 2.1 * found[0].bytes
    assert found[1].largest <= 2 * 2 * 3 * 2000, found[1].largest_operation


def test_an_axis_beside_a_slice_can_be_split() -> None:
    """A view of u asks for finer axes of x, which is read through a slice of another axis."""
    problem = declared(lambda u, x, y: (u.reshape(2, 3) * y[1:].reshape(3, 2, 3)).sum() + near(u, x))
    found = idf.explain(problem, *series(6), *series(4, 6))
    assert (found.hessian.kind, found.fallbacks) == ("scaled-identity", ())
