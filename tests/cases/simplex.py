"""Softmax as the entropic projection on the simplex, and logsumexp plus a quadratic."""

import torch
from torch import Tensor

import implicitdiff as idf
from tests.cases.base import LOW_RANK, ONE_ROW, Case


class Softmax(idf.Problem):
    """minimise over u  sum_i u_i log u_i - x'u  s.t.  sum(u) = 1,  x (m,)."""

    def objective(self, u: Tensor, x: Tensor) -> Tensor:
        return (u * u.log()).sum() - x @ u

    def equality(self, u: Tensor, x: Tensor) -> Tensor:
        return u.sum() - 1

    def init(self, x: Tensor) -> Tensor:
        return torch.full_like(x, 1 / x.shape[0])


class LogSumExp(idf.Problem):
    """minimise over u  log sum_i exp(a_i u_i) + |u - x|^2 / 2,  a and x (m,)."""

    def objective(self, u: Tensor, a: Tensor, x: Tensor) -> Tensor:
        return torch.logsumexp(a * u, 0) + 0.5 * torch.nn.functional.mse_loss(u, x, reduction="sum")

    def init(self, a: Tensor, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


CASES = (
    Case(
        name="softmax",
        make_problem=Softmax,
        inputs=lambda draw, sizes: (draw.normal(*sizes),),
        sizes=((5,), (2,), (1,)),
        hessian="diagonal",
        solvers=ONE_ROW,
        notes="one row of constraints: S is a number; at size 1 u is fixed and every gradient zero",
    ),
    Case(
        name="logsumexp-quadratic",
        make_problem=LogSumExp,
        inputs=lambda draw, sizes: (draw.normal(*sizes), draw.normal(*sizes)),
        sizes=((5,), (2,), (1,)),
        hessian="low-rank-plus-diagonal",
        solvers=LOW_RANK,
        notes="rank 1 with a negative weight",
    ),
)
