"""Projections: values, derivatives against torch's own, and the directions in which they give nothing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import hessian, jacfwd, jacrev, vmap

import implicitdiff.combinatorial as co
from implicitdiff import InputError, OptionError
from implicitdiff.combinatorial.projections import resolve

NAMES = ["none", "mean", "norm", "std", "affine", "auto"]
SOLVER = co.Assignment()


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def squared(w: Tensor) -> Tensor:
    """A projection as a user may write one: not linear, and its Jacobian is not symmetric."""
    return w * (1 + w.square().flatten(1).cumsum(1).reshape(w.shape))


def bound(projection: object) -> co.Projection:
    return resolve(projection, SOLVER)  # type: ignore[arg-type]


PROJECTIONS = [*NAMES, co.Plane(draw(0, 3, 4)), co.Norm(co.Plane(draw(1, 3, 4))), co.Norm(eps=0.3), squared]
IDS = [*NAMES, "a plane", "norm after a plane", "norm with eps", "a function"]


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31))
@pytest.mark.parametrize("projection", PROJECTIONS, ids=IDS)
def test_derivatives_are_those_of_torch(projection: object, seed: int) -> None:
    P = bound(projection)
    w, v = draw(seed, 2, 3, 4), draw(seed + 1, 2, 3, 4)
    for sample in range(2):
        jacobian = jacrev(lambda one: P(one[None])[0])(w[sample]).reshape(12, 12)
        pulled = P.pull(w[sample : sample + 1], v[sample : sample + 1]).flatten()
        pushed = P.push(w[sample : sample + 1], v[sample : sample + 1]).flatten()
        torch.testing.assert_close(pulled, jacobian.T @ v[sample].flatten())
        torch.testing.assert_close(pushed, jacobian @ v[sample].flatten())
    torch.testing.assert_close(P.pull(w, v)[:1], P.pull(w[:1], v[:1]))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31))
@pytest.mark.parametrize("name", NAMES)
def test_projections_are_idempotent_and_blind_to_what_they_take_out(name: str, seed: int) -> None:
    P = bound(name)
    w, v = draw(seed, 2, 4, 4), draw(seed + 1, 2, 4, 4)
    torch.testing.assert_close(P(P(w)), P(w))
    out = P.pull(w, v)
    one = torch.ones_like(w)
    if name in ("mean", "std", "affine", "auto"):
        torch.testing.assert_close((out * one).flatten(1).sum(1), torch.zeros(2, dtype=w.dtype))
        torch.testing.assert_close(P(w + 3.0), P(w))
    if name in ("norm", "std", "auto"):
        torch.testing.assert_close(P(w).flatten(1).norm(dim=1), torch.ones(2, dtype=w.dtype))
        torch.testing.assert_close(P(2.5 * w), P(w))
        for direction in (w, P(w)):
            torch.testing.assert_close((out * direction).flatten(1).sum(1), torch.zeros(2, dtype=w.dtype))
    if name == "norm":
        # A step along the gradient is orthogonal to w, so that it never makes w shorter.
        lengths = (w + out).flatten(1).norm(dim=1) ** 2
        torch.testing.assert_close(lengths, w.flatten(1).norm(dim=1) ** 2 + out.flatten(1).norm(dim=1) ** 2)
    if name == "affine":
        torch.testing.assert_close(out.sum(1), torch.zeros_like(out.sum(1)))
        torch.testing.assert_close(out.sum(2), torch.zeros_like(out.sum(2)))


def test_affine_of_square_assignments_is_double_centring() -> None:
    w = draw(3, 2, 5, 5)
    centred = w - w.mean(2, keepdim=True) - w.mean(1, keepdim=True) + w.mean((1, 2), keepdim=True)
    torch.testing.assert_close(bound("affine")(w), centred)


def test_closed_forms_of_the_jacobians() -> None:
    w = draw(4, 1, 6)
    n, eye = 6, torch.eye(6, dtype=torch.float64)
    one = torch.ones(6, 6, dtype=torch.float64) / n
    u = w[0] - w[0].mean()
    expected = {
        "none": eye,
        "mean": eye - one,
        "norm": (eye - torch.outer(w[0], w[0]) / w[0].dot(w[0])) / w[0].norm(),
        "std": (eye - one - torch.outer(u, u) / u.dot(u)) / u.norm(),
    }
    for name, jacobian in expected.items():
        P = resolve(name, co.TopK(2))
        found = vmap(lambda t, P=P: P.push(w, t[None])[0])(eye)
        torch.testing.assert_close(found, jacobian)


def test_derivatives_can_be_differentiated_again() -> None:
    P, w, v = bound("std"), draw(5, 1, 2, 3), draw(6, 1, 2, 3)

    def through(w: Tensor) -> Tensor:
        return (P(w) * v).sum()

    def by_rule(w: Tensor) -> Tensor:
        return P.pull(w, v)

    torch.testing.assert_close(jacrev(by_rule)(w), hessian(through)(w))
    torch.testing.assert_close(jacfwd(by_rule)(w), hessian(through)(w))


def test_zero_costs_are_named() -> None:
    w = torch.ones(4, 3, dtype=torch.float64)
    w[2] = 0
    with pytest.raises(InputError, match="zero in sample 2 of 4"):
        co.Norm().check(w)
    # A constant cost is zero after the mean is taken out, but for rounding.
    with pytest.raises(InputError, match="samples 0, 1, 2, 3"):
        co.Norm(co.Mean()).check(w * 0.1)
    co.Norm(eps=1e-3).check(w)
    assert torch.isfinite(co.Norm(eps=1e-3).pull(w, w)).all()


def test_wrong_projections() -> None:
    with pytest.raises(OptionError, match="'median'"):
        bound("median")
    with pytest.raises(OptionError, match="linear"):
        co.Norm(co.Norm())
    with pytest.raises(OptionError, match="eps"):
        co.Norm(eps=-1.0)
    with pytest.raises(InputError, match="normal of Plane is zero"):
        co.Plane([0.0, 0.0])
    with pytest.raises(InputError, match=r"\(2,\)"):
        co.Plane([1.0, 0.0])(draw(0, 2, 3))


def test_single_precision_and_empty_batches() -> None:
    for name in NAMES:
        P = bound(name)
        w = draw(0, 3, 4, 4).float()
        assert P(w).dtype == P.pull(w, w).dtype == torch.float32
        assert P(w[:0]).shape == P.pull(w[:0], w[:0]).shape == (0, 4, 4)


def test_a_projection_in_front_of_another_estimator() -> None:
    solver, w, g = co.Assignment(), draw(1, 2, 3, 4, 4), draw(2, 2, 3, 4, 4)
    layer = co.DiscreteLayer(solver, co.Blackbox(0.5))
    x, z = w.clone().requires_grad_(), co.project(solver, w).requires_grad_()
    layer(co.project(solver, x)).backward(g)
    layer(z).backward(g)
    P = resolve("auto", solver)
    assert z.grad is not None
    expected = P.pull(w.flatten(0, 1), z.grad.flatten(0, 1)).reshape(w.shape)
    torch.testing.assert_close(x.grad, expected)
    with pytest.raises(InputError, match="zero in sample 1 of 2"):
        co.project(co.TopK(2), torch.tensor([[1.0, 2.0], [3.0, 3.0]]), "std")
