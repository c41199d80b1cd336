"""Backward passes written by hand, as an experienced author would for each problem: what the derived ones race.

Pooling and transport are the published passes (tests/reference). `with_backward` makes an autograd.Function of
a pass; the others are closed forms. Used by works.py.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

Backward = Callable[..., Sequence[Tensor | None]]


class _ByHand(torch.autograd.Function):
    """u as a constant with a given backward pass behind it, as libraries ship theirs."""

    @staticmethod
    def forward(ctx: Any, backward: Backward, u: Tensor, *inputs: Tensor) -> Tensor:
        ctx.by_hand = backward
        ctx.save_for_backward(u, *inputs)
        return u.view_as(u)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        u, *inputs = ctx.saved_tensors
        return (None, None, *ctx.by_hand(u, v, *inputs))


def with_backward(backward: Backward) -> Callable[..., Tensor]:
    """(u, *inputs) -> u, differentiable by `backward(u, v, *inputs)`, which gives one gradient per input."""

    def forward(u: Tensor, *inputs: Tensor) -> Tensor:
        return _ByHand.apply(backward, u, *inputs)

    return forward


class QuadraticByHand(torch.autograd.Function):
    """min u'Q u / 2 + q'u  s.t.  A u = b: Cholesky of Q, Cholesky of A Q^-1 A', both kept for the backward pass.

    Gradients for q and b. Q (b, m, m), q (b, m), A (b, p, m), b (b, p).
    """

    @staticmethod
    def forward(ctx: Any, Q: Tensor, q: Tensor, A: Tensor, b: Tensor) -> Tensor:
        L = torch.linalg.cholesky_ex(Q).L
        half = torch.linalg.solve_triangular(L, A.mT, upper=False)
        S = torch.linalg.cholesky_ex(half.mT @ half).L
        q_half = torch.linalg.solve_triangular(L, q[..., None], upper=False)
        lam = torch.cholesky_solve(b[..., None] + half.mT @ q_half, S)
        ctx.save_for_backward(L, half, S)
        return torch.linalg.solve_triangular(L.mT, half @ lam - q_half, upper=True)[..., 0]

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        L, half, S = ctx.saved_tensors
        v_half = torch.linalg.solve_triangular(L, v[..., None], upper=False)
        s = torch.cholesky_solve(half.mT @ v_half, S)
        w = torch.linalg.solve_triangular(L.mT, half @ s - v_half, upper=True)
        return None, w[..., 0], None, s[..., 0]


def quadratic(u: Tensor, *inputs: Tensor) -> Tensor:
    """The layer above; it solves for itself, u is not used."""
    return QuadraticByHand.apply(*inputs)


def softmax(u: Tensor, x: Tensor) -> Tensor:
    """torch.softmax of the last axis."""
    return torch.softmax(x, -1)


def smoothing(u: Tensor, v: Tensor, x: Tensor, w: Tensor, mu: float) -> tuple[Tensor, Tensor]:
    """Gradients of u = (W + mu D'D)^-1 W x for x and w (b, m): one banded Cholesky of LAPACK per sample."""
    s = solve_smoothing(v, w, mu)
    return w * s, (x - u) * s


def solve_smoothing(rhs: Tensor, w: Tensor, mu: float) -> Tensor:
    """(W + mu D'D)^-1 rhs by SciPy, sample by sample; rhs, w (b, m)."""
    rows = []
    for weights, right in zip(w.detach().numpy(), rhs.detach().numpy(), strict=True):
        band = np.empty((2, len(weights)), weights.dtype)
        band[0] = -mu
        band[1] = weights + 2 * mu
        band[1, 0] -= mu
        band[1, -1] -= mu
        rows.append(torch.from_numpy(scipy.linalg.solveh_banded(band, right, check_finite=False)))
    return torch.stack(rows)


def logistic(u: Tensor, v: Tensor, X: Tensor, y: Tensor, mu: Tensor) -> tuple[Tensor, None, Tensor]:
    """Gradients for X (b, n, m) and mu (b,) of logistic regression with labels y (b, n): one m x m Cholesky."""
    z = -y * (X @ u[..., None])[..., 0]
    s = torch.sigmoid(z)
    curvature = y * y * s * (1 - s)
    H = X.mT @ (curvature[..., None] * X)
    H.diagonal(dim1=-2, dim2=-1).add_(mu[..., None])
    w = torch.cholesky_solve(v[..., None], torch.linalg.cholesky_ex(H).L)
    along = curvature * (X @ w)[..., 0]
    grad_X = torch.addcmul((y * s)[..., None] * w.mT, along[..., None], u[..., None, :], value=-1)
    return grad_X, None, -(u * w[..., 0]).sum(-1)


def median(u: Tensor, v: Tensor, x: Tensor, eps: float) -> tuple[Tensor]:
    """The gradient of the geometric median for x (b, m, n): one m x m Cholesky."""
    d = u[:, :, None] - x
    k1 = d.square().sum(1).add_(eps).rsqrt_()
    k2 = k1**3
    H = -(d * k2[:, None]) @ d.mT
    H.diagonal(dim1=-2, dim2=-1).add_(k1.sum(1, keepdim=True))
    w = torch.cholesky_solve(v[..., None], torch.linalg.cholesky_ex(H).L)
    along = (w.mT @ d)[:, 0] * k2
    return (torch.addcmul(k1[:, None] * w, along[:, None], d, value=-1),)
