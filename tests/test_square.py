"""Structured Jacobians that are not symmetric: the kind, the solver, and every derivative against the dense formula."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

import implicitdiff as idf
from implicitdiff.operators import Block, Dense, Diagonal
from implicitdiff.solvers import LU
from implicitdiff.solvers.substitution import SubstitutionFactorization, substitution_order
from tests.equation_problems import draw

EYE3, EYE4 = torch.eye(3, dtype=torch.float64), torch.eye(4, dtype=torch.float64)


class Entries(idf.Root):
    """u_i + a_i tanh(u_i) = sum_k x_ki."""

    def residual(self, u, x, a):
        return u + a * torch.tanh(u) - x.sum(0)

    def init(self, x, a):
        return x.sum(0)


class Scaled(idf.Root):
    """s u = x, s a shared number."""

    def residual(self, u, s, x):
        return s * u - x

    def init(self, s, x):
        return x * 0


class LowRank(idf.Root):
    """D(u) - Y C X': the left factor is not the right one."""

    def residual(self, u, x, y):
        return 2 * u + torch.sinh(u) - y @ torch.tanh(u @ x) / 5 + x[:, 0]

    def init(self, x, y):
        return x[:, 0] * 0


class Recurrent(idf.FixedPoint):
    """A step of rank two and one more: u = 0.2 tanh(U V'u + x) + ...."""

    def step(self, u, U, V, x):
        return 0.2 * torch.tanh(U @ (V.T @ u) + x) + 0.01 * (u @ V).sum() * U[:, 0]

    def init(self, U, V, x):
        return x * 0


class Euler(idf.Root):
    """Implicit steps of u' = sin(u) + x: a lower bidiagonal Jacobian, its first row a boundary condition."""

    def residual(self, u, x, start):
        first = u[:1] - start
        return torch.cat([first, u[1:] - u[:-1] - 0.1 * (torch.sin(u[1:]) + x * u[:-1])])

    def init(self, x, start):
        return torch.cat([x * 0, start * 0])


class Upwind(idf.Root):
    """Two chains beside each other, (T, 2), with one-sided differences and both ends held."""

    def residual(self, u, x):
        inner = 2.2 * u[1:-1] - 1.5 * u[:-2] - 0.5 * u[2:] + 0.1 * u[1:-1] ** 3 - x[1:-1]
        return torch.cat([u[:1] - x[:1], inner, u[-1:] - x[-1:]])

    def init(self, x):
        return x * 0


class Rows(idf.Root):
    """Each row of u (4, 3) by itself, coupled inside by a matrix that is not symmetric."""

    def residual(self, u, W, x):
        return u @ W + u**3 - x

    def init(self, W, x):
        return x * 0


class Sylvester(idf.Root):
    """W u V = x: a Kronecker product of matrices that are not symmetric."""

    def residual(self, u, W, V, x):
        return W @ u @ V - x

    def init(self, W, V, x):
        return x * 0


class Arrow(idf.Root):
    """Two variables, one with a diagonal corner, the couplings not each other's transposes."""

    def residual(self, u, x, W):
        a, b = u
        return 3 * a + torch.sin(a) + W @ b - x, 0.3 * W.T @ a + torch.tanh(W[:3] @ b) + 4 * b

    def init(self, x, W):
        return x * 0, x[:3] * 0


class Plain(idf.Root):
    """No structure but that of a matrix."""

    def residual(self, u, W, x):
        return W @ torch.tanh(u) + 3 * u - x

    def init(self, W, x):
        return x * 0


class Reshaped(idf.Root):
    """Six equations of another shape than the (2, 3) unknowns: no rows belong to an axis of u."""

    def residual(self, u, x):
        return (u + 0.2 * torch.sin(u)).reshape(-1) + 0.1 * u.sum() - x

    def init(self, x):
        return x.reshape(2, 3) * 0


class Rolled(idf.Root):
    """An operation without a rule of its own: the dense path, with the line in the report."""

    def residual(self, u, x):
        return u + 0.3 * torch.cumsum(torch.sin(u), 0) - x

    def init(self, x):
        return x * 0


@dataclass(frozen=True)
class Case:
    """A problem with inputs, and what has to be found."""

    problem: idf.Problem
    inputs: tuple[Any, ...]
    in_dims: Any
    kind: str
    solver: str


B = 2
CASES = {
    "entries": Case(Entries(), (draw(B, 2, 4), draw(4, seed=1).abs()), (0, None), "diagonal", "divide"),
    "scaled": Case(Scaled(), (2 + draw(seed=1).abs(), draw(B, 4)), (None, 0), "scaled-identity", "divide"),
    "low rank": Case(
        LowRank(), (draw(B, 7, 2), draw(B, 7, 2, seed=1)), 0, "low-rank-plus-diagonal", "woodbury"
    ),
    "recurrent": Case(
        Recurrent(),
        (draw(B, 9, 2), draw(B, 9, 2, seed=1), draw(B, 9, seed=2)),
        0,
        "low-rank-plus-diagonal",
        "woodbury",
    ),
    "euler": Case(Euler(), (0.3 * draw(B, 6), draw(B, 1, seed=1)), 0, "banded", "tridiagonal"),
    "upwind": Case(Upwind(), (draw(B, 40, 2),), 0, "banded", "tridiagonal"),
    "rows": Case(
        Rows(), (3 * EYE3 + 0.4 * draw(3, 3), draw(B, 4, 3)), (None, 0), "block-diagonal", "block-cholesky"
    ),
    "sylvester": Case(
        Sylvester(),
        (4 * EYE4 + draw(4, 4), 3 * EYE3 + 0.7 * draw(B, 3, 3), draw(B, 4, 3, seed=2)),
        (None, 0, 0),
        "kronecker",
        "kronecker",
    ),
    "arrow": Case(Arrow(), (draw(B, 5), draw(5, 3, seed=1)), (0, None), "block", "schur"),
    "plain": Case(Plain(), (draw(4, 4), draw(B, 4, seed=1)), (None, 0), "dense", "lu"),
    "reshaped": Case(Reshaped(), (draw(B, 6),), 0, "dense", "lu"),
    "cumulated": Case(Rolled(), (draw(B, 5),), 0, "dense", "lu"),
}


def flat(u: Any) -> Tensor:
    return torch.cat([leaf.reshape(leaf.shape[0], -1) for leaf in (u if isinstance(u, tuple) else (u,))], 1)


@pytest.mark.parametrize("name", CASES)
def test_kind_solver_and_derivatives(name: str) -> None:
    case = CASES[name]
    found = idf.explain(case.problem, *case.inputs, in_dims=case.in_dims)
    assert (found.hessian.kind, found.solver) == (case.kind, case.solver)
    inputs = [tensor.clone().requires_grad_() for tensor in case.inputs]
    structured = idf.DeclarativeLayer(case.problem, in_dims=case.in_dims)
    dense = idf.DeclarativeLayer(case.problem, in_dims=case.in_dims, backward="dense")
    u = flat(structured(*inputs))
    v = draw(*u.shape, seed=7)
    first = [
        torch.autograd.grad(flat(layer(*inputs)), inputs, v, create_graph=True)
        for layer in (structured, dense)
    ]
    lean = torch.autograd.grad(u, inputs, v)
    for mine, theirs, emitted in zip(*first, lean, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(emitted, theirs, rtol=1e-11, atol=1e-12)
    second = [
        torch.autograd.grad(sum(g.pow(2).sum() for g in grads), inputs, allow_unused=True) for grads in first
    ]
    for mine, theirs in zip(*second, strict=True):
        if theirs is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-11)
    assert gradcheck(structured, inputs, check_forward_ad=True, fast_mode=True)
    assert idf.check(case.problem, *case.inputs, in_dims=case.in_dims).ok


@pytest.mark.parametrize("solver", ["lu", "gmres"])
@pytest.mark.parametrize("name", ["low rank", "upwind", "arrow", "plain"])
def test_solvers_by_name(name: str, solver: str) -> None:
    case = CASES[name]
    inputs = [tensor.clone().requires_grad_() for tensor in case.inputs]
    grads = []
    for options in ({"linear_solver": solver}, {"backward": "dense"}):
        u = flat(idf.DeclarativeLayer(case.problem, in_dims=case.in_dims, **options)(*inputs))
        grads.append(torch.autograd.grad(u, inputs, draw(*u.shape, seed=7)))
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)


def test_solvers_that_need_symmetry_are_refused() -> None:
    case = CASES["plain"]
    with pytest.raises(idf.OptionError, match="not symmetric"):
        idf.DeclarativeLayer(case.problem, in_dims=case.in_dims, linear_solver="cholesky")(*case.inputs)


def test_the_reason_for_a_dense_jacobian_is_given() -> None:
    found = idf.explain(Rolled(), draw(B, 5))
    assert [step.operation for step in found.fallbacks] == ["aten.cumsum.default"]
    assert "torch.cumsum" in found.fallbacks[0].line
    assert "has not the shape of u" in idf.explain(Reshaped(), draw(B, 6)).hessian.reason


def test_one_singular_sample_leaves_the_others_alone() -> None:
    s = torch.tensor([2.0, 0.0, 5.0], dtype=torch.float64)
    x = torch.tensor([[2.0, 4.0], [0.0, 0.0], [10.0, 5.0]], dtype=torch.float64, requires_grad=True)

    class Solved(Scaled):
        def solve(self, s, x):
            return torch.where(s[:, None] == 0, 0.0, x / torch.where(s == 0, 1.0, s)[:, None])

    with pytest.raises(idf.SingularError, match="sample 1 of 3"):
        idf.DeclarativeLayer(Solved())(s, x).sum().backward()
    (found,) = torch.autograd.grad(idf.DeclarativeLayer(Solved(), on_failure="zero")(s, x).sum(), x)
    assert found.tolist() == [[0.5, 0.5], [0.0, 0.0], [0.2, 0.2]]


def test_emitted_code_solves_with_the_transposed_jacobian() -> None:
    code = idf.explain(*[CASES["euler"].problem, *CASES["euler"].inputs]).code
    assert "solvers.Tridiagonal()" in code
    assert "transpose=True" in code
    assert "J's = v" in code


def test_a_long_chain_costs_in_proportion_to_its_length() -> None:
    def work(length: int) -> int:
        inputs = (torch.empty(1, length, device="meta"), torch.empty(1, 1, device="meta"))
        found = idf.explain(Euler(), *inputs)
        assert found.solver == "tridiagonal"
        return found.bytes

    assert work(4000) < 2.5 * work(2000)


class Cascade(idf.Root):
    """Three variables, each fed by those before it: a block triangular Jacobian, in another order than theirs."""

    def residual(self, u, x, W):
        a, b, c = u
        first = W @ torch.tanh(a) + 4 * a + b.sum() * (W.T @ c) - x
        second = 3 * b + 0.3 * W[:2, :2] @ torch.sin(b) - x[:2]
        third = 2 * c + 0.2 * torch.tanh(W @ c) - (W[:, :2] @ b) * x.sum()
        return first, second, third

    def init(self, x, W):
        return x * 0, x[:2] * 0, x * 0


def test_blocks_that_feed_each_other_one_way_are_solved_one_by_one() -> None:
    x, W = draw(B, 4), draw(4, 4, seed=1)
    found = idf.explain(Cascade(), x, W, in_dims=(0, None))
    assert (found.hessian.kind, found.solver) == ("block", "lu")
    inputs = [x.clone().requires_grad_(), W.clone().requires_grad_()]
    grads = []
    for backward in ("auto", "dense"):
        u = flat(idf.DeclarativeLayer(Cascade(), in_dims=(0, None), backward=backward)(*inputs))
        grads.append(torch.autograd.grad(u, inputs, draw(*u.shape, seed=7)))
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)


def test_substitution_against_the_dense_inverse() -> None:
    corners = [Dense(draw(2, 3, 3) + 3 * EYE3, symmetric=False), Diagonal(2 + draw(2, 4, seed=1).abs())]
    below = draw(1, 4, 3, seed=2)
    operator = Block(((corners[0], None), (below, corners[1])), (3, 4), symmetric=False)
    rhs = draw(3, 2, 7, seed=3)
    for grid in (operator, operator.transpose()):
        assert substitution_order(grid) == ((0, 1) if grid is operator else (1, 0))
        factor = LU().factor(grid)
        assert isinstance(factor, SubstitutionFactorization)
        truth = torch.einsum("bij,rbj->rbi", torch.linalg.inv(grid.to_dense()), rhs)
        torch.testing.assert_close(factor.solve(rhs), truth, rtol=1e-11, atol=1e-12)
    both = Block(((corners[0], below.mT), (below, corners[1])), (3, 4), symmetric=False)
    assert substitution_order(both) is None
    singular = corners[1].diagonal.clone()
    singular[1, 2] = 0.0
    factor = LU().factor(Block(((corners[0], None), (below, Diagonal(singular))), (3, 4), symmetric=False))
    assert factor.status.tolist() == [idf.Status.OK, idf.Status.SINGULAR]
    solution = factor.solve(rhs)
    assert bool(torch.isfinite(solution[:, 0]).all())
    assert bool(solution[:, 1].isnan().any())
