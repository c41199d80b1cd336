"""Defects seen in other libraries of this kind, each as a case that must pass here.

A constraint that the gradient ignores, an option that is dropped, scalar inputs without gradient, means in the place of
sums, warnings in float32, NaN at large gamma, wrong second derivatives, transforms that raise. (Inequalities that are
not active and change the gradient all the same have their test beside the other inequalities.)
"""

import warnings

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jacfwd, jacrev, jvp, vmap

import implicitdiff as idf
from implicitdiff.derivatives import autodiff
from implicitdiff.problems import OptimalTransport
from implicitdiff.status import Status

DOUBLE = torch.float64
backwards = pytest.mark.parametrize("backward", ["auto", "dense"])


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE).to(dtype)


class Entropy(idf.Problem):
    """minimise sum_i u_i log u_i - x'u / t  s.t.  sum u = 1: the softmax of x / t, t a number or one a sample."""

    def objective(self, u, x, t):
        return (u * u.log()).sum() - x @ u / t

    def equality(self, u, x, t):
        return u.sum() - 1

    def init(self, x, t):
        return torch.full_like(x, 1 / x.shape[0])


class Linear(Entropy):
    """minimise |D u|^2 / 2 - x'u t  s.t.  a u = b with a and b inputs."""

    def objective(self, u, x, t, a, b):
        return 0.5 * (u * u * torch.arange(1, 5, dtype=u.dtype)).sum() - t * (x @ u)

    def equality(self, u, x, t, a, b):
        return a @ u - b

    def init(self, x, t, a, b):
        return torch.zeros_like(x)


@backwards
def test_linear_constraints_are_in_the_gradient(backward: str) -> None:
    """The row of one entry of the softmax is u_0 (1 - u_0), -u_0 u_i; without the constraint (u_0, 0, 0, 0)."""
    x = normal(3, 4).requires_grad_()
    layer = idf.DeclarativeLayer(Entropy(), in_dims=(0, None), backward=backward)
    u = layer(x, torch.tensor(1.0, dtype=DOUBLE))
    (row,) = torch.autograd.grad(u[:, 0].sum(), x)
    expected = -u[:, :1] * u
    expected[:, 0] += u[:, 0]
    torch.testing.assert_close(row, expected.detach(), rtol=1e-8, atol=1e-10)
    linear = idf.DeclarativeLayer(Linear(), in_dims=(0, None, 0, 0), backward=backward)
    given = (normal(2, 4), normal(1)[0].abs() + 1, normal(2, 2, 4, seed=2), normal(2, 2, seed=3))
    assert gradcheck(linear, tuple(t.requires_grad_() for t in given))


@pytest.mark.parametrize("problem", [Linear, Entropy])
def test_chunks_serve_constrained_problems_too(
    problem: type[idf.Problem], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of dense derivatives are made in chunks; of one row each, they must give what all at once give."""
    inputs = (normal(3, 4), torch.tensor(0.7, dtype=DOUBLE))
    dims: tuple[int | None, ...] = (0, None)
    if problem is Linear:
        inputs, dims = (*inputs, normal(3, 2, 4, seed=2), normal(3, 2, seed=3)), (0, None, 0, 0)
    found = []
    for entries in (autodiff.CHUNK_ENTRIES, 1):
        monkeypatch.setattr(autodiff, "CHUNK_ENTRIES", entries)
        calls = []
        plain = autodiff.flat.basis
        monkeypatch.setattr(
            autodiff.flat, "basis", lambda *given, p=plain, c=calls: (c.append(1), p(*given))[1]
        )
        leaves = tuple(t.clone().requires_grad_() for t in inputs)
        u = idf.DeclarativeLayer(problem(), in_dims=dims, backward="dense")(*leaves)
        calls.clear()
        found.append((torch.autograd.grad(u.square().sum(), leaves), len(calls)))
        monkeypatch.setattr(autodiff.flat, "basis", plain)
    (whole, few), (chunked, many) = found
    assert few < many
    assert many >= 4 + 1  # a row each: four variables, one constraint or two
    for mine, theirs in zip(chunked, whole, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)


@backwards
def test_scalar_inputs_have_gradients(backward: str) -> None:
    """d softmax(x / t) / dt = -(u / t^2) (x - u'x), for a t that all samples share and for one of each."""
    x, v = normal(3, 4), normal(3, 4, seed=1)
    for t, dim in ((torch.tensor(0.7, dtype=DOUBLE), None), (normal(3).abs() + 0.5, 0)):
        t = t.requires_grad_()
        u = idf.DeclarativeLayer(Entropy(), in_dims=(0, dim), backward=backward)(x, t)
        (found,) = torch.autograd.grad(u, t, v)
        (truth,) = torch.autograd.grad(torch.softmax(x / (t if dim is None else t[:, None]), 1), t, v)
        assert truth.abs().min() > 1e-3
        torch.testing.assert_close(found, truth, rtol=1e-7, atol=1e-9)


@backwards
@pytest.mark.parametrize("batch", [1, 4])
def test_shared_inputs_get_the_sum_over_the_batch(batch: int, backward: str) -> None:
    """Equal samples: the gradient of what they share is that of one sample, times their number."""
    a, x = normal(1, 2, 4, seed=2), normal(1, 4)
    b, t = normal(1, 2, seed=3), torch.tensor(1.3, dtype=DOUBLE)
    v = normal(1, 4, seed=5)
    found = []
    for count in (1, batch):
        leaves = [leaf.clone().requires_grad_() for leaf in (x[0], t, a[0], b[0])]
        layer = idf.DeclarativeLayer(Linear(), in_dims=(None, None, None, 0), backward=backward)
        u = layer(*leaves[:3], leaves[3].expand(count, -1))
        found.append(torch.autograd.grad(u, leaves, v.expand(count, -1)))
    for alone, together in zip(*found, strict=True):
        torch.testing.assert_close(together, batch * alone, rtol=1e-12, atol=1e-12)


@backwards
def test_float32_gives_no_warnings(backward: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = idf.DeclarativeLayer(Linear(), in_dims=(0, None, 0, 0), backward=backward)
        for seed in range(25):
            x = normal(4, 4, seed=seed, dtype=torch.float32).requires_grad_()
            a = normal(4, 2, 4, seed=seed + 100, dtype=torch.float32).requires_grad_()
            u = layer(x, torch.tensor(1.0), a, normal(4, 2, seed=seed + 200, dtype=torch.float32))
            u.square().sum().backward()
            assert x.grad is not None
            assert x.grad.isfinite().all()


@pytest.mark.parametrize("gamma", [300.0, 1e4])
def test_transport_at_large_gamma_is_finite_and_says_what_it_is(gamma: float) -> None:
    """Entries of P underflow, so that its support falls into parts, and S is singular once for each of them."""
    costs = torch.rand(2, 12, 10, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", idf.OptimalityWarning)
        solution = idf.solve(OptimalTransport(gamma=gamma), costs, on_failure="warn")
        (found,) = torch.autograd.grad((solution.u * normal(2, 12, 10, dtype=torch.float32)).sum(), costs)
    assert solution.u.isfinite().all()
    assert found.isfinite().all()
    # the gradient is -w, and A w = 0: its rows and columns sum to 0
    for dim in (1, 2):
        assert found.sum(dim).abs().max() <= 1e-4 * max(1.0, float(found.abs().max()))
    status = torch.as_tensor(solution.status)
    assert set(status.tolist()) <= {Status.OK, Status.NOT_CONVERGED, Status.NOT_OPTIMAL}


def test_transport_has_a_gradient_for_gamma() -> None:
    costs = torch.rand(2, 4, 3, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    gamma = torch.nn.Parameter(torch.tensor(3.0, dtype=DOUBLE))

    def value(g: float) -> Tensor:
        return (idf.DeclarativeLayer(OptimalTransport(gamma=g))(costs) * costs.square()).sum()

    (found,) = torch.autograd.grad(
        (idf.DeclarativeLayer(OptimalTransport(gamma=gamma))(costs) * costs.square()).sum(), gamma
    )
    torch.testing.assert_close(found, (value(3 + 1e-3) - value(3 - 1e-3)) / 2e-3, rtol=1e-4, atol=1e-9)


@backwards
def test_second_derivatives_are_right(backward: str) -> None:
    layer = idf.DeclarativeLayer(Linear(), in_dims=(0, None, 0, 0), backward=backward)
    given = (normal(2, 4), normal(1)[0].abs() + 1, normal(2, 2, 4, seed=2), normal(2, 2, seed=3))
    assert gradgradcheck(layer, tuple(t.requires_grad_() for t in given))
    smooth = idf.DeclarativeLayer(Entropy(), in_dims=(0, None), backward=backward)
    assert gradgradcheck(
        smooth, (normal(2, 3).requires_grad_(), torch.tensor(0.8, dtype=DOUBLE).requires_grad_())
    )


@backwards
def test_the_transforms_of_torch_func_work(backward: str) -> None:
    t = torch.tensor(0.8, dtype=DOUBLE)
    layer = idf.DeclarativeLayer(Entropy(), in_dims=None, backward=backward)
    x, d = normal(3, 4), normal(3, 4, seed=1)
    rows = vmap(jacrev(layer), in_dims=(0, None))(x, t)
    softmax = vmap(jacrev(lambda y: torch.softmax(y / t, 0)))(x)
    torch.testing.assert_close(rows, softmax, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(vmap(jacfwd(layer), in_dims=(0, None))(x, t), softmax, rtol=1e-7, atol=1e-9)
    _, tangent = jvp(lambda y: vmap(layer, in_dims=(0, None))(y, t), (x,), (d,))
    torch.testing.assert_close(tangent, (softmax @ d[:, :, None])[:, :, 0], rtol=1e-7, atol=1e-9)
    squares = vmap(grad(lambda y: layer(y, t).square().sum()))(x)
    assert squares.shape == x.shape


class Centre(idf.Problem):
    """The analytic centre of A u <= b: minimise -sum log(b - A u); another library transposes the wrong A."""

    def objective(self, u, a, b):
        return -(b - a @ u).log().sum()

    def init(self, a, b):
        return torch.zeros_like(a[0])


@backwards
def test_the_analytic_centre_has_the_gradient_of_its_matrix(backward: str) -> None:
    angles = torch.arange(5, dtype=DOUBLE) * 1.3
    a = torch.stack([angles.cos(), angles.sin()], 1)[None] + 0.1 * normal(2, 5, 2)
    b = normal(2, 5, seed=1).abs() + 1
    assert gradcheck(
        idf.DeclarativeLayer(Centre(), backward=backward), (a.requires_grad_(), b.requires_grad_())
    )


class OnSphere(idf.Problem):
    """The point of the unit sphere nearest to x; at x = 0 every point is, where others give infinite gradients."""

    def objective(self, u, x):
        return ((u - x) ** 2).sum()

    def equality(self, u, x):
        return u @ u - 1

    def init(self, x):
        return x + 1

    def solve(self, x):
        x = x.detach()
        return torch.nn.functional.normalize(torch.where(x == 0, torch.eye(3, dtype=x.dtype)[:1], x), dim=1)


@backwards
def test_a_projection_without_a_nearest_point_is_an_error_with_a_name(backward: str) -> None:
    x = normal(2, 3)
    x[1] = 0
    x.requires_grad_()
    with pytest.raises(idf.SingularError, match="sample 1 of 2"):
        idf.DeclarativeLayer(OnSphere(), backward=backward)(x)[:, 1].sum().backward()
    layer = idf.DeclarativeLayer(OnSphere(), backward=backward, on_failure="zero")
    (found,) = torch.autograd.grad(layer(x)[:, 1].sum(), x)
    (truth,) = torch.autograd.grad(torch.nn.functional.normalize(x, dim=1)[0, 1], x)
    torch.testing.assert_close(found[0], truth[0], rtol=1e-7, atol=1e-9)
    assert (found[1] == 0).all()


def test_one_instance_serves_batches_of_any_size() -> None:
    """No state of a call is kept on the problem: a backward that comes after another forward is not disturbed."""
    layer = idf.DeclarativeLayer(Entropy(), in_dims=(0, None))
    t = torch.tensor(1.0, dtype=DOUBLE)
    first, second = normal(2, 4).requires_grad_(), normal(5, 3, seed=1).requires_grad_()
    u = layer(first, t)
    later = layer(second, t)
    later.square().sum().backward()
    u.square().sum().backward()
    for x in (first, second):
        (truth,) = torch.autograd.grad(torch.softmax(x, 1).square().sum(), x)
        torch.testing.assert_close(x.grad, truth, rtol=1e-7, atol=1e-9)
