"""Quadratic programs with equality constraints: Q dense or diagonal, A an input, shared or batched."""

import torch
from torch import Tensor

import implicitdiff as idf
from tests.cases.base import DENSE_KKT, Case, Draw, Sizes


class Portfolio(idf.Problem):
    """minimise over u  u'Q u / 2 - mu'u  s.t.  sum(u) = 1,  Q (m, m) not symmetric, mu (m,)."""

    def objective(self, u: Tensor, Q: Tensor, mu: Tensor) -> Tensor:
        return 0.5 * u @ Q @ u - mu @ u

    def equality(self, u: Tensor, Q: Tensor, mu: Tensor) -> Tensor:
        return u.sum() - 1

    def init(self, Q: Tensor, mu: Tensor) -> Tensor:
        return torch.full_like(mu, 1 / len(mu))


class DenseQP(idf.Problem):
    """minimise over u  u'Q u / 2 + q'u  s.t.  A u = b,  Q (m, m), q (m,), A (p, m), b (p,)."""

    def objective(self, u: Tensor, Q: Tensor, q: Tensor, A: Tensor, b: Tensor) -> Tensor:
        return 0.5 * torch.einsum("i,ij,j->", u, Q, u) + torch.dot(q, u)

    def equality(self, u: Tensor, Q: Tensor, q: Tensor, A: Tensor, b: Tensor) -> Tensor:
        return A @ u - b

    def init(self, Q: Tensor, q: Tensor, A: Tensor, b: Tensor) -> Tensor:
        return torch.zeros_like(q)


class DiagonalQP(idf.Problem):
    """minimise over u  sum_i d_i u_i^2 / 2 + q'u  s.t.  A u = b,  d and q (m,), A (p, m), b (p,)."""

    def objective(self, u: Tensor, d: Tensor, q: Tensor, A: Tensor, b: Tensor) -> Tensor:
        return (0.5 * d * u * u + q * u).sum()

    def equality(self, u: Tensor, d: Tensor, q: Tensor, A: Tensor, b: Tensor) -> Tensor:
        return b - torch.mv(A, u)

    def init(self, d: Tensor, q: Tensor, A: Tensor, b: Tensor) -> Tensor:
        return torch.zeros_like(q)


def definite(draw: Draw, m: int, shared: bool) -> Tensor:
    """A matrix (m, m) whose symmetric part is well conditioned and whose skew part is not zero."""
    noise = draw.shared_normal(m, m) if shared else draw.normal(m, m)
    return 0.2 * noise + torch.diag(1.0 + torch.arange(m, dtype=draw.dtype) / 2)


def wide(draw: Draw, p: int, m: int) -> Tensor:
    """A matrix (p, m), p <= m, of full row rank for every seed."""
    return 0.3 * draw.normal(p, m) + torch.eye(p, m, dtype=draw.dtype)


def _dense(draw: Draw, sizes: Sizes) -> tuple[Tensor, ...]:
    m, p = sizes
    return definite(draw, m, shared=False), draw.normal(m), wide(draw, p, m), draw.normal(p)


def _diagonal(draw: Draw, sizes: Sizes) -> tuple[Tensor, ...]:
    m, p = sizes
    return draw.positive(m), draw.normal(m), wide(draw, p, m), draw.normal(p)


CASES = (
    Case(
        name="portfolio",
        make_problem=Portfolio,
        inputs=lambda draw, sizes: (definite(draw, sizes[0], shared=True), draw.normal(*sizes)),
        in_dims=(None, 0),
        sizes=((4,), (2,), (1,)),
        hessian="dense",
        solvers=DENSE_KKT,
        notes="Q shared and not symmetric: H = (Q + Q') / 2, its gradient the sum over the batch",
    ),
    Case(
        name="dense-qp",
        make_problem=DenseQP,
        inputs=_dense,
        sizes=((5, 2), (3, 3), (4, 1), (1, 1)),
        hessian="dense",
        schur="dense",
        solvers=DENSE_KKT,
    ),
    Case(
        name="dense-qp-in-dim-1",
        make_problem=DenseQP,
        inputs=lambda draw, sizes: tuple(t.movedim(0, min(1, t.dim() - 1)) for t in _dense(draw, sizes)),
        in_dims=1,
        sizes=((5, 2),),
        hessian="dense",
        schur="dense",
        solvers=DENSE_KKT,
        notes="the batch axis is the second of every input",
    ),
    Case(
        name="diagonal-qp",
        make_problem=DiagonalQP,
        inputs=_diagonal,
        sizes=((5, 2), (3, 3), (4, 1), (1, 1)),
        hessian="diagonal",
        schur="dense",
        solvers=DENSE_KKT,
        notes="h is b - A u: the sign of the constraints must not matter",
    ),
)
