"""Reverse, forward and mixed modes of the layer: right against the truth, and how often they factorise.

The factorisations of a call are counted by the meter; the problems are solved in numpy, so that every one that
torch dispatches belongs to a derivative.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, functional
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import implicitdiff as idf
from implicitdiff.diagnostics.meter import measure
from implicitdiff.problems import OptimalTransport, RobustPooling
from tests.attached_newton import Attached
from tests.oracles import relative_error
from tests.small_problems import Point, Quartic, Sphere, draw

FACTORISATIONS = (
    "linalg_cholesky_ex",
    "linalg_lu_factor_ex",
    "linalg_ldl_factor_ex",
    "_linalg_eigh",
    "_linalg_svd",
)


def numbers(*shape: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    return draw(*shape, seed=seed, scale=scale, shift=shift).detach()


class Ridge(idf.Problem):
    """|X u - y|^2 / 2 + sum w u^2 / 2 with a Parameter w, solved in numpy."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = torch.nn.Parameter(torch.tensor([1.0, 0.7, 1.3, 0.4], dtype=torch.float64))

    def objective(self, u, X, y):
        return ((X @ u - y) ** 2).sum() / 2 + (self.weights * u * u).sum() / 2

    def init(self, X, y):
        return torch.zeros_like(X[0])

    def solve(self, X, y):
        data, target = X.detach().numpy(), y.detach().numpy()
        matrix = data.transpose(0, 2, 1) @ data + np.diag(self.weights.detach().numpy())
        right = np.einsum("bij,bi->bj", data, target)
        return torch.from_numpy(np.linalg.solve(matrix, right[..., None])[..., 0])


class Allocation(idf.Problem):
    """u'Q u / 2 - mu'u with two equalities C u = d, solved in numpy, multipliers and all."""

    def objective(self, u, Q, mu, d):
        return 0.5 * u @ Q @ u - mu @ u

    def equality(self, u, Q, mu, d):
        return torch.stack([u.sum(), u[0] - 2 * u[1]]) - d

    def init(self, Q, mu, d):
        return torch.zeros_like(mu)

    def solve(self, Q, mu, d):
        size = mu.shape[1]
        C = np.stack([np.ones(size), np.array([1.0, -2.0] + [0.0] * (size - 2))])
        K = np.zeros((len(mu), size + 2, size + 2))
        K[:, :size, :size], K[:, :size, size:], K[:, size:, :size] = Q.detach().numpy(), -C.T, C
        right = np.concatenate([mu.detach().numpy(), d.detach().numpy()], 1)
        z = torch.from_numpy(np.linalg.solve(K, right[..., None])[..., 0])
        return idf.Solution(z[:, :size].clone(), z[:, size:].clone())


FACTOR = numbers(4, 4, seed=5)
DATA = (numbers(6, 4, seed=1), numbers(6, seed=2))
CASES = {
    "ridge": (Ridge, 0, (numbers(2, 6, 4, seed=1), numbers(2, 6, seed=2))),
    "allocation": (
        Allocation,
        (None, 0, 0),
        (
            FACTOR @ FACTOR.mT + torch.eye(4, dtype=torch.float64),
            numbers(2, 4, seed=3),
            numbers(2, 2, seed=4),
        ),
    ),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "auto": {},
    "dense": {"backward": "dense"},
    "lu": {"linear_solver": "lu"},
    "ldl": {"linear_solver": "ldl"},
}
cases = pytest.mark.parametrize("case", list(CASES))
options = pytest.mark.parametrize("option", list(OPTIONS))


def factorisations(function: Callable[[], Any]) -> int:
    _, found = measure(function)
    return sum(total.count for total in found.by_operation if total.name in FACTORISATIONS)


def made(case: str, option: str = "auto") -> tuple[idf.DeclarativeLayer, tuple[Tensor, ...]]:
    problem, dims, inputs = CASES[case]
    return idf.DeclarativeLayer(problem().requires_grad_(False), in_dims=dims, **OPTIONS[option]), inputs


def truth_of(case: str) -> Callable[..., Tensor]:
    """u (B, m) as a torch function of the inputs of a case."""
    problem, dims, inputs = CASES[case]
    spread = dims if isinstance(dims, tuple) else (dims,) * len(inputs)
    declared = problem()
    own = {name: value.detach() for name, value in declared.named_parameters()}
    u = idf.solve(declared, *inputs, in_dims=dims).u

    def sample(values: tuple[Tensor, ...], index: int) -> list[Tensor]:
        return [x[index] if dim == 0 else x for x, dim in zip(values, spread, strict=True)]

    maps = [Attached(declared, u[i], sample(inputs, i)) for i in range(len(u))]
    return lambda *values: torch.stack([f(sample(values, i), own)[0] for i, f in enumerate(maps)])


@cases
@options
def test_every_first_derivative_takes_one_factorisation(case: str, option: str) -> None:
    layer, inputs = made(case, option)
    arguments = tuple(range(len(inputs)))
    assert factorisations(lambda: layer(*inputs)) == 0  # no derivative, nothing factorised
    leaves = [value.clone().requires_grad_() for value in inputs]
    u = layer(*leaves)
    first = numbers(*u.shape, seed=6)
    tangents = tuple(numbers(*value.shape, seed=7 + i) for i, value in enumerate(inputs))
    counted = {
        "backward": lambda: torch.autograd.grad((u * first).sum(), leaves, retain_graph=True),
        "create_graph": lambda: torch.autograd.grad(
            (layer(*leaves) * first).sum(), leaves, create_graph=True
        ),
        "rows at once": lambda: torch.autograd.grad(
            u, leaves, torch.stack([first, 2 * first, -first]), retain_graph=True, is_grads_batched=True
        ),
        "vjp": lambda: vjp(layer, *inputs)[1](first),
        "jvp": lambda: jvp(layer, inputs, tangents),
        "jacrev": lambda: jacrev(layer, arguments)(*inputs),
        "jacfwd": lambda: jacfwd(layer, arguments)(*inputs),
    }
    assert {name: factorisations(call) for name, call in counted.items()} == dict.fromkeys(counted, 1)


@cases
def test_jacobian_takes_one_factorisation_by_rows_and_by_columns(case: str) -> None:
    problem, dims, inputs = CASES[case]
    narrow = (1.5 * torch.ones(2, 1, dtype=torch.float64),)

    class Narrow(idf.Problem):
        """A ridge regression with one number for all data: fewer columns than rows."""

        def objective(self, u, t):
            return ((t * DATA[0] @ u - t * t * DATA[1]) ** 2).sum() / 2 + (u * u).sum()

        def init(self, t):
            return torch.zeros(4, dtype=t.dtype)

        def solve(self, t):
            found = []
            for value in t.detach().numpy():
                X, y = value * DATA[0].numpy(), value**2 * DATA[1].numpy()
                found.append(np.linalg.solve(X.T @ X + 2 * np.eye(4), X.T @ y))
            return torch.from_numpy(np.stack(found))

    found: list[Any] = []
    assert factorisations(lambda: found.append(idf.jacobian(problem(), *inputs, in_dims=dims))) == 1
    layer = idf.DeclarativeLayer(problem(), in_dims=None).requires_grad_(False)
    spread = dims if isinstance(dims, tuple) else (dims,) * len(inputs)
    for index in range(2):
        sample = [x[index] if dim == 0 else x for x, dim in zip(inputs, spread, strict=True)]
        for ours, theirs in zip(found[0], jacfwd(layer, tuple(range(len(inputs))))(*sample), strict=True):
            assert relative_error(ours[index], theirs) < 1e-10
    assert factorisations(lambda: found.append(idf.jacobian(Narrow(), *narrow))) == 1
    assert found[1].shape == (2, 4, 1)
    slope = torch.stack([jacrev(idf.DeclarativeLayer(Narrow(), in_dims=None))(t) for t in narrow[0]]).detach()
    assert relative_error(found[1], slope) < 1e-10


@cases
@options
def test_first_derivatives_are_the_truth(case: str, option: str) -> None:
    layer, inputs = made(case, option)
    truth, arguments = truth_of(case), tuple(range(len(inputs)))
    expected = jacrev(truth, arguments)(*inputs)
    tangents = tuple(numbers(*value.shape, seed=17 + i) for i, value in enumerate(inputs))
    along = sum(torch.tensordot(J, t, t.dim()) for J, t in zip(expected, tangents, strict=True))
    for found in (jacrev(layer, arguments)(*inputs), jacfwd(layer, arguments)(*inputs)):
        for ours, theirs in zip(found, expected, strict=True):
            assert relative_error(ours, theirs) < 1e-9
    u, pushed = jvp(layer, inputs, tangents)[:2]
    torch.testing.assert_close(u, layer(*inputs), rtol=0, atol=0)
    assert relative_error(pushed, along) < 1e-9
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(value, t) for value, t in zip(inputs, tangents, strict=True)]
        assert relative_error(forward_ad.unpack_dual(layer(*duals)).tangent, along) < 1e-9
    for index in arguments:  # one input alone moves, the others are constants
        with forward_ad.dual_level():
            mixed = [forward_ad.make_dual(x, tangents[i]) if i == index else x for i, x in enumerate(inputs)]
            one = torch.tensordot(expected[index], tangents[index], tangents[index].dim())
            assert relative_error(forward_ad.unpack_dual(layer(*mixed)).tangent, one) < 1e-9
    v = numbers(*u.shape, seed=27)
    for ours, J in zip(vjp(layer, *inputs)[1](v), expected, strict=True):
        assert relative_error(ours, torch.tensordot(v, J, v.dim())) < 1e-9


@cases
@pytest.mark.parametrize("vectorize", [False, True])
def test_the_older_functional_interface(case: str, vectorize: bool) -> None:
    layer, inputs = made(case)
    truth, arguments = truth_of(case), tuple(range(len(inputs)))
    expected = jacrev(truth, arguments)(*inputs)
    strategies = ("reverse-mode", "forward-mode") if vectorize else ("reverse-mode",)
    for strategy in strategies:
        found = functional.jacobian(layer, inputs, vectorize=vectorize, strategy=strategy)
        for ours, theirs in zip(found, expected, strict=True):
            assert relative_error(ours, theirs) < 1e-9

    def scalar(*values: Tensor) -> Tensor:
        return (layer(*values) ** 3).sum()

    curved = hessian(lambda *values: (truth(*values) ** 3).sum(), arguments)(*inputs)
    for row, expected_row in zip(
        functional.hessian(scalar, inputs, vectorize=vectorize), curved, strict=True
    ):
        for ours, theirs in zip(row, expected_row, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)


@cases
@options
def test_hessian_vector_products(case: str, option: str) -> None:
    """Five ways to the same product; however many the directions, K is factored once."""
    layer, inputs = made(case, option)
    truth = truth_of(case)
    x, rest = inputs[1], (inputs[0], *inputs[2:])
    along = numbers(*x.shape, seed=31)

    def of(solution: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: (solution(rest[0], x, *rest[1:]) ** 3).sum()

    scalar = of(layer)
    expected = torch.tensordot(hessian(of(truth))(x), along, along.dim())
    assert expected.abs().max() > 1e-3
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(scalar(leaf), leaf, create_graph=True)
    found = {
        "forward over reverse": jvp(grad(scalar), (x,), (along,))[1],
        "reverse over reverse": vjp(grad(scalar), x)[1](along)[0],
        "double backward": torch.autograd.grad((first * along).sum(), leaf, retain_graph=True)[0],
        "reverse over forward": grad(lambda x: jvp(scalar, (x,), (along,))[1])(x),
        "functional": functional.hvp(scalar, x, along)[1],
    }
    for name, value in found.items():
        assert relative_error(value, expected) < 1e-8, name
    many = numbers(5, *x.shape, seed=32)

    def product(direction: Tensor) -> Tensor:
        return jvp(grad(scalar), (x,), (direction,))[1]

    def double() -> None:
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(scalar(leaf), leaf, create_graph=True)
        torch.autograd.grad((first * along).sum(), leaf)

    counted: dict[str, Callable[[], Any]] = {
        "forward over reverse": lambda: product(along),
        "many directions": lambda: vmap(product)(many),
        "reverse over reverse": lambda: vjp(grad(scalar), x)[1](along),
        "double backward": double,
        "reverse over forward": lambda: grad(lambda x: jvp(scalar, (x,), (along,))[1])(x),
        "functional": lambda: functional.hvp(scalar, x, along),
        "hessian": lambda: hessian(scalar)(x),
    }
    assert {name: factorisations(call) for name, call in counted.items()} == dict.fromkeys(counted, 1)
    assert factorisations(lambda: torch.autograd.grad((first * along).sum(), leaf, retain_graph=True)) == 0
    torch.testing.assert_close(vmap(product)(many)[3], product(many[3]), rtol=1e-10, atol=1e-12)


def test_forward_over_forward_over_forward() -> None:
    """d^k u / dx^k of u^3 + u = x in closed form, by nested jvp along different directions."""
    layer = idf.DeclarativeLayer(Point())
    x = numbers(4, seed=3)
    u = layer(x)
    slope = 1 / (3 * u * u + 1)
    second = -6 * u * slope**3
    third = (-6 * slope**3 + 108 * u * u * slope**4) * slope
    a, b, c = (numbers(4, seed=40 + i) for i in range(3))

    def push(f: Callable[[Tensor], Tensor], along: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: jvp(f, (x,), (along,))[1]

    torch.testing.assert_close(push(layer, a)(x), slope * a)
    torch.testing.assert_close(push(push(layer, a), b)(x), second * a * b)
    torch.testing.assert_close(push(push(push(layer, a), b), c)(x), third * a * b * c)


def test_tangents_and_gradients_of_multipliers_and_value() -> None:
    x, a = numbers(2, 3, seed=3), numbers(3, seed=4, scale=0.2, shift=1.0)
    problem = Quartic()
    layer = idf.DeclarativeLayer(problem, in_dims=(0, None))
    theta = problem.theta.detach()
    u = layer(x, a).detach()
    maps = [Attached(problem, u[i], (x[i], a)) for i in range(2)]

    def truth(x: Tensor, a: Tensor, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        own = {"theta": theta}
        found = [f((x[i], a), own) for i, f in enumerate(maps)]
        values = [
            f.objective(u, (x[i], a), own) for i, (f, (u, _)) in enumerate(zip(maps, found, strict=True))
        ]
        return (
            torch.stack([pair[0] for pair in found]),
            torch.stack([pair[1] for pair in found])[:, 0],
            torch.stack(values),
        )

    class Solving(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            solution = self.layer.solve(x, a)
            assert solution.value is not None
            return solution.u, solution.equality_multipliers["plane"], solution.value

    module = Solving()

    def ours(x: Tensor, a: Tensor, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return functional_call(module, {"layer.problem.theta": theta}, (x, a))

    arguments = (x, a, theta)
    for mode in (jacrev, jacfwd):
        for found, expected in zip(
            mode(ours, (0, 1, 2))(*arguments), mode(truth, (0, 1, 2))(*arguments), strict=True
        ):
            for one, other in zip(found, expected, strict=True):
                assert relative_error(one, other) < 1e-9
    tangents = (numbers(2, 3, seed=8), numbers(3, seed=9), torch.ones_like(theta))
    for one, other in zip(jvp(ours, arguments, tangents)[1], jvp(truth, arguments, tangents)[1], strict=True):
        assert relative_error(one, other) < 1e-9


@pytest.mark.parametrize(
    ("problem", "inputs"),
    [
        (RobustPooling("welsch", 1.5), (numbers(2, 3, 5, seed=1),)),
        (OptimalTransport(2.0), (numbers(2, 3, 4, seed=1),)),
        (Sphere(), (numbers(2, 3, seed=1, shift=0.4),)),
    ],
    ids=["pooling", "transport", "sphere"],
)
def test_forward_mode_is_reverse_mode_transposed(problem: idf.Problem, inputs: tuple[Tensor, ...]) -> None:
    """<v, J t> = <J'v, t>, and both are the one Jacobian."""
    layer = idf.DeclarativeLayer(problem)
    (x,) = inputs
    t = numbers(*x.shape, seed=2)
    u, pushed = jvp(layer, (x,), (t,))[:2]
    v = numbers(*u.shape, seed=3)
    (pulled,) = vjp(layer, x)[1](v)
    assert pushed.abs().max() > 1e-3
    torch.testing.assert_close((v * pushed).sum(), (pulled * t).sum(), rtol=1e-10, atol=1e-12)
    J = idf.jacobian(problem, x)
    for i in range(len(x)):
        assert relative_error(torch.tensordot(J[i], t[i], t[i].dim()), pushed[i]) < 1e-9
        assert relative_error(torch.tensordot(v[i], J[i], v[i].dim()), pulled[i]) < 1e-9


def test_multipliers_of_an_unrolled_solve_move_with_it() -> None:
    M = numbers(2, 3, 4, seed=1)

    def weighed(backward: str) -> Callable[[Tensor], Tensor]:
        def scalar(M: Tensor) -> Tensor:
            rows, columns = idf.solve(OptimalTransport(1.5), M, backward=backward).equality_multipliers
            return (rows**3).sum() + (columns**2).sum()

        return scalar

    ours, expected = weighed("unrolled"), weighed("auto")
    leaf = M.clone().requires_grad_()
    plain = torch.autograd.grad(ours(leaf), leaf)[0]
    assert relative_error(ours(M), expected(M)) < 1e-9
    for found in (plain, grad(ours)(M), jacfwd(ours)(M)):
        assert relative_error(found, grad(expected)(M)) < 1e-9
    assert relative_error(hessian(ours)(M), hessian(expected)(M)) < 1e-8
