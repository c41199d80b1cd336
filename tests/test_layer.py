"""The layer's door: shapes, options, warm starts, precision, copies, threads and caches."""

import inspect
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.func import grad, vmap

import implicitdiff as idf
from implicitdiff.layer import DeclarativeLayer, solve
from implicitdiff.optimizers import Newton
from implicitdiff.status import Status
from tests.oracles import dense_vjp, relative_error
from tests.small_problems import (
    BY_NAME,
    GeometricMedian,
    Point,
    Portfolio,
    Quartic,
    Small,
    Sphere,
    Torch,
    Tree,
    draw,
)


def reference(small: Small, layer: DeclarativeLayer, inputs: tuple[Any, ...], u: Tensor) -> list[Tensor]:
    """The gradient of sum(u^2) by the dense formula."""
    return dense_vjp(layer.problem, u.detach(), 2 * u.detach(), inputs, small.in_dims).leaves()


# The contract's first examples


def test_geometric_median_of_the_contract() -> None:
    layer = DeclarativeLayer(GeometricMedian(), in_dims=0)
    x = draw(3, 2, 5, seed=1)
    u = layer(x)
    assert u.shape == (3, 2)
    u.square().sum().backward()
    expected = reference(BY_NAME["median"], layer, (x,), u)
    assert relative_error(x.grad, expected[0]) < 1e-10
    assert relative_error(layer.problem.eps.grad, expected[1]) < 1e-10
    again = layer.solve(x, init=u)
    torch.testing.assert_close(again.u, u)
    assert (again.iterations <= 1).all()
    assert again.status.dtype == torch.int8
    assert (again.status == Status.OK).all()
    assert again.equality_multipliers is None
    assert again.inequality_multipliers is None


def test_portfolio_of_the_contract_in_closed_form() -> None:
    Q, mu = BY_NAME["portfolio"].inputs(3, 1)
    solution = solve(Portfolio(), Q, mu, in_dims=(None, 0))
    inverse = torch.linalg.inv(Q.detach())
    one = torch.ones(4, dtype=torch.float64)
    # Q u - mu = lambda 1 with 1'u = 1, and lambda'A = D_u f
    lam = (1 - mu.detach() @ inverse @ one) / (one @ inverse @ one)
    expected = (mu.detach() + lam[:, None]) @ inverse
    torch.testing.assert_close(solution.u.detach(), expected)
    torch.testing.assert_close(solution.equality_multipliers.detach(), lam)
    value = 0.5 * torch.einsum("bi,ij,bj->b", expected, Q.detach(), expected) - (mu.detach() * expected).sum(
        1
    )
    torch.testing.assert_close(solution.value.detach(), value)
    # The envelope theorem: the value moves with mu by -u.
    torch.testing.assert_close(torch.autograd.grad(solution.value.sum(), mu, retain_graph=True)[0], -expected)
    # The multiplier is the price of the constraint: d lambda / d mu = -Q^-1 1 / (1'Q^-1 1).
    slope = torch.autograd.grad(solution.equality_multipliers.sum(), mu)[0]
    torch.testing.assert_close(slope, (-inverse @ one / (one @ inverse @ one)).expand(3, 4))


# Shapes


def test_one_sample_has_no_batch_axis() -> None:
    x = draw(2, 5, seed=1)
    layer = DeclarativeLayer(GeometricMedian(), in_dims=None)
    solution = layer.solve(x)
    assert solution.u.shape == (2,)
    assert (
        solution.value.shape
        == solution.status.shape
        == solution.iterations.shape
        == solution.residual.shape
        == ()
    )
    batched = DeclarativeLayer(GeometricMedian())(x[None])
    torch.testing.assert_close(solution.u, batched[0])
    torch.testing.assert_close(layer(x, init=solution.u), solution.u)
    gradient = torch.autograd.grad(solution.u.sum(), x)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(batched.sum(), x)[0])


def test_batch_axis_elsewhere() -> None:
    x = draw(2, 3, 5, seed=1)
    u = DeclarativeLayer(GeometricMedian(), in_dims=1)(x)
    torch.testing.assert_close(u, DeclarativeLayer(GeometricMedian())(x.movedim(1, 0)))
    gradient = torch.autograd.grad(u[2].sum(), x)[0]
    assert gradient.shape == x.shape
    assert (gradient[:, :2] == 0).all()
    assert (gradient[:, 2] != 0).any()


def test_pytrees_and_tensors_without_axes() -> None:
    inputs = BY_NAME["tree"].inputs(2, 1)
    solution = DeclarativeLayer(Tree()).solve(*inputs)
    assert {name: tuple(leaf.shape) for name, leaf in solution.u.items()} == {"a": (2, 3), "t": (2,)}
    assert [tuple(leaf.shape) for leaf in solution.equality_multipliers] == [(2,), (2, 1)]
    assert DeclarativeLayer(Point())(draw(4, seed=1)).shape == (4,)
    assert DeclarativeLayer(Point(), in_dims=None)(draw(seed=1)).shape == ()


def test_in_dims_of_a_pytree_of_inputs() -> None:
    """p batched, s shared: the gradient of s is the sum over the batch."""
    (x, scale) = BY_NAME["tree"].inputs(2, 1)
    shared = {"p": x["p"], "s": x["s"][0].detach().requires_grad_()}
    layer = DeclarativeLayer(Tree(), in_dims=({"p": 0, "s": None}, None))
    u = layer(shared, scale)
    expanded = {"p": x["p"], "s": shared["s"].detach().expand(2).clone().requires_grad_()}
    other = DeclarativeLayer(Tree())(expanded, scale)
    torch.testing.assert_close(u["a"], other["a"])
    found = torch.autograd.grad((u["a"] ** 2).sum(), shared["s"])[0]
    torch.testing.assert_close(found, torch.autograd.grad((other["a"] ** 2).sum(), expanded["s"])[0].sum())


@pytest.mark.parametrize("backward", ["auto", "dense", "matrix-free", "approximate", "unrolled"])
def test_an_empty_batch_has_an_empty_solution_and_zero_gradients(backward: str) -> None:
    layer = DeclarativeLayer(Quartic(), in_dims=(0, None), backward=backward)
    x, a = draw(0, 3, seed=1), draw(3, seed=2)
    solution = layer.solve(x, a)
    assert solution.u.shape == (0, 3)
    assert solution.equality_multipliers["plane"].shape == (0,)
    assert solution.value.shape == solution.status.shape == (0,)
    found = torch.autograd.grad(
        solution.u.sum() + solution.value.sum(), (x, a, layer.problem.theta), allow_unused=True
    )
    assert found[0].shape == (0, 3)
    assert torch.equal(found[1], torch.zeros(3, dtype=torch.float64))
    assert found[2] == 0


# Options at the door


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backward": "adjoint"}, "auto, dense, matrix-free, unrolled, hand, approximate"),
        ({"linear_solver": "magic"}, "woodbury"),
        ({"on_failure": "ignore"}, "raise, warn, nan, zero, damp"),
        ({"optimality_tol": -1.0}, "optimality_tol"),
        ({"optimizer": "newton"}, "Newton"),
    ],
)
def test_options_that_do_not_exist(options: dict[str, Any], message: str) -> None:
    with pytest.raises(idf.OptionError, match=message):
        DeclarativeLayer(Sphere(), **options)
    with pytest.raises(idf.OptionError, match=message):
        solve(Sphere(), draw(2, 3, seed=1), **options)


def test_things_that_are_not_problems_or_not_yet_possible() -> None:
    for thing in (torch.nn.Linear(2, 2), Sphere, None):
        with pytest.raises(idf.ProblemDefinitionError):
            DeclarativeLayer(thing)
    with pytest.raises(idf.ProblemDefinitionError, match="vjp"):
        DeclarativeLayer(Sphere(), backward="hand")


def test_the_function_takes_the_layer_s_options_and_no_others() -> None:
    names = set(inspect.signature(DeclarativeLayer).parameters) - {"problem"}
    assert names == set(inspect.signature(solve).parameters) - {"problem", "inputs", "init"}
    for callable_ in (DeclarativeLayer, solve):
        kinds = {parameter.kind for parameter in inspect.signature(callable_).parameters.values()}
        assert inspect.Parameter.VAR_KEYWORD not in kinds


def test_compile_method_of_modules_is_left_alone() -> None:
    assert callable(DeclarativeLayer(Sphere()).compile)


def test_repr_names_the_options_that_were_set() -> None:
    text = repr(DeclarativeLayer(Sphere(), in_dims=None, backward="dense"))
    assert "in_dims=None" in text
    assert "backward='dense'" in text
    assert "on_failure" not in text


@pytest.mark.parametrize("tol", [None, 1e-2])
def test_optimality_tol_and_optimizer_reach_the_forward(tol: float | None) -> None:
    class Rough(Torch):
        def solve(self, x):
            return 1.001 * Torch.solve(self, x)

    x = draw(2, 3, seed=1, scale=0.5)
    layer = DeclarativeLayer(Rough(), optimality_tol=tol)
    if tol is None:
        with pytest.raises(idf.NotOptimalError, match="of 2"):
            layer(x)
    else:
        assert (layer.solve(x).status == Status.OK).all()
    exact = DeclarativeLayer(Rough(), optimizer=Newton()).solve(x)
    torch.testing.assert_close(exact.u**3 + exact.u, x)


@pytest.mark.parametrize("init", [torch.zeros(2, 4, dtype=torch.float64), {"u": torch.zeros(2, 3)}, "zeros"])
def test_a_warm_start_of_the_wrong_kind(init: Any) -> None:
    with pytest.raises(idf.SolutionError):
        DeclarativeLayer(Quartic(), in_dims=(0, None))(*BY_NAME["quartic"].inputs(2, 1), init=init)


def test_a_warm_start_under_vmap_and_grad() -> None:
    x, a = (tensor.detach() for tensor in BY_NAME["quartic"].inputs(2, 1))
    layer = DeclarativeLayer(Quartic(), in_dims=(0, None))
    wide = torch.stack([x, x + 0.1, x - 0.1])
    start = vmap(lambda x: layer(x, a))(wide)
    again = vmap(lambda x, s: layer.solve(x, a, init=s).iterations)(wide, start)
    assert (again <= 1).all()
    found = vmap(lambda x, s: grad(lambda x: layer(x, a, init=s).sum())(x))(wide, start)
    torch.testing.assert_close(found[1], grad(lambda x: layer(x, a).sum())(wide[1]))
    # A start is no input: it has no gradient.
    leaf = start[0].clone().requires_grad_()
    assert not layer.requires_grad_(False)(x, a, init=leaf).requires_grad
