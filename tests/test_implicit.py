"""`implicit`: existing solvers, of NumPy and of torch, batched, shared and for one sample, made differentiable."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import jacfwd, jacrev, vmap

import implicitdiff as idf
from tests.equation_problems import draw


def cubic_residual(u, a, b):
    return u**3 + a * u - b


@idf.implicit(cubic_residual)
def cubic(a, b):
    """The real root of u^3 + a u = b, by NumPy."""
    rows = [np.roots([1, 0, float(x), -float(y)]) for x, y in zip(a, b, strict=True)]
    return torch.tensor([float(r[np.abs(r.imag).argmin()].real) for r in rows], dtype=a.dtype)


def test_a_numpy_solver_has_the_derivatives_of_its_equation() -> None:
    a, b = (0.2 + draw(4, seed=1).abs()).requires_grad_(), draw(4, seed=2).requires_grad_()
    u = cubic(a, b)
    by_a, by_b = torch.autograd.grad(u.sum(), (a, b))
    slope = (3 * u * u + a).detach()
    torch.testing.assert_close(by_a, -u.detach() / slope, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(by_b, 1 / slope, rtol=1e-11, atol=1e-12)
    assert gradcheck(cubic, (a, b), check_forward_ad=True)
    assert gradgradcheck(cubic, (a, b), fast_mode=True)
    assert cubic.__name__ == "cubic"
    assert cubic.__doc__.startswith("The real root")
    assert type(cubic.layer.problem).__name__ == "cubic"


class Mixing(torch.nn.Module):
    """r(u, x) = u - tanh(W u + c) - x."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Linear(3, 3, dtype=torch.float64)
        with torch.no_grad():
            self.w.weight.copy_(0.4 * draw(3, 3, seed=3))

    def forward(self, u, x):
        return u - torch.tanh(self.w(u)) - x


def test_a_module_as_residual_for_one_sample() -> None:
    net = Mixing()

    @idf.implicit(net, in_dims=None)
    def solve(x):
        u = x.clone()
        for _ in range(400):
            u = torch.tanh(net.w(u)) + x
        return u

    x = draw(3, seed=4).requires_grad_()
    assert gradcheck(lambda *_: solve(x), (x, net.w.weight, net.w.bias))
    jacobian = jacrev(lambda v: net(v, x.detach()))(solve(x).detach()).detach()
    torch.testing.assert_close(jacrev(solve)(x).detach(), torch.linalg.inv(jacobian), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(jacfwd(solve)(x), jacrev(solve)(x), rtol=1e-11, atol=1e-12)
    both = vmap(solve)(torch.stack([x, 2 * x]))
    torch.testing.assert_close(both[1], solve(2 * x), rtol=1e-12, atol=1e-13)


def test_shared_inputs_and_other_axes_reach_the_solver_as_they_were_given() -> None:
    seen = []

    @idf.implicit(lambda u, A, b: A @ u + u**3 - b, in_dims=(None, 1))
    def solve(A, b):
        seen.append((tuple(A.shape), tuple(b.shape)))
        u = torch.zeros_like(b)
        for _ in range(60):
            jacobian = A[None] + torch.diag_embed(3 * u.T**2)
            u = u - torch.linalg.lstsq(jacobian, (A @ u + u**3 - b).T[..., None]).solution[..., 0].T
        return u.T

    A = (draw(3, 3, seed=5) + 3 * torch.eye(3, dtype=torch.float64)).requires_grad_()
    b = draw(3, 4, seed=6).requires_grad_()
    assert solve(A, b).shape == (4, 3)
    assert set(seen) == {((3, 3), (3, 4))}
    assert gradcheck(solve, (A, b))
    moved = vmap(solve, in_dims=(0, None))(torch.stack([A, 2 * A]), b)
    torch.testing.assert_close(moved[1], solve(2 * A, b), rtol=1e-12, atol=1e-13)


def test_a_solver_that_is_wrong_is_refused() -> None:
    @idf.implicit(cubic_residual)
    def wrong(a, b):
        return b.clone()

    with pytest.raises(idf.NotOptimalError, match="solve of wrong"):
        wrong(draw(2, seed=1).abs(), draw(2, seed=2))
    with pytest.raises(idf.ProblemDefinitionError, match="needs a function residual"):
        idf.implicit(3)  # type: ignore[arg-type]
    with pytest.raises(idf.ProblemDefinitionError, match="decorates a solver"):
        idf.implicit(cubic_residual)("solver")  # type: ignore[arg-type]


def test_a_weight_in_a_closure_would_get_no_gradient_and_is_refused() -> None:
    weight = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)

    @idf.implicit(lambda u, x: weight * u - x)
    def divide(x: Tensor) -> Tensor:
        return x / weight

    with pytest.raises(idf.CapturedTensorError):
        divide(draw(3, 2))


def test_compiled() -> None:
    a, b = (0.2 + draw(3, seed=1).abs()).requires_grad_(), draw(3, seed=2).requires_grad_()
    compiled = torch.compile(lambda a, b: cubic(a, b).square().sum(), fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(a, b), (a, b))
    truth = torch.autograd.grad(cubic(a, b).square().sum(), (a, b))
    for one, other in zip(found, truth, strict=True):
        assert torch.equal(one, other)
