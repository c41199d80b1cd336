"""Robust pooling as a stranger might write it; the same kinds and the same solver must be found as in the
built-in.
"""

import torch
from torch import Tensor

import implicitdiff as idf
from tests.cases.base import LOW_RANK, Case, Draw, MakeInputs, Sizes


class PointsInRows(idf.Problem):
    """Pseudo-Huber pooling with x as (n, m):  sum_j sqrt(1 + |u - x_j|^2) - 1."""

    def objective(self, u: Tensor, x: Tensor) -> Tensor:
        return (torch.sqrt(1 + torch.sum((x - u) ** 2, dim=-1)) - 1).sum()

    def init(self, x: Tensor) -> Tensor:
        return x.mean(0)


class Expanded(idf.Problem):
    """Pseudo-Huber pooling with the square multiplied out:  |u|^2 - 2 u'x_j + |x_j|^2,  x (m, n)."""

    def objective(self, u: Tensor, x: Tensor) -> Tensor:
        squared = (u * u).sum() - 2 * (u @ x) + (x * x).sum(0)
        return (torch.sqrt(1 + squared) - 1).sum()

    def init(self, x: Tensor) -> Tensor:
        return x.mean(1)


class Weighted(idf.Problem):
    """Pseudo-Huber pooling with a weight per point:  sum_j w_j (sqrt(1 + |u - x_j|^2) - 1),  x (m, n), w
    (n,).
    """

    def objective(self, u: Tensor, x: Tensor, w: Tensor) -> Tensor:
        distances = (u[:, None] - x).square().sum(0)
        return w @ (torch.sqrt(1 + distances) - 1)

    def init(self, x: Tensor, w: Tensor) -> Tensor:
        return x.mean(1)


class WithRidge(idf.Problem):
    """Pseudo-Huber pooling with a ridge:  sum_j (sqrt(1 + |u - x_j|^2) - 1) + mu |u|^2,  x (m, n), mu a
    number.
    """

    def objective(self, u: Tensor, x: Tensor, mu: Tensor) -> Tensor:
        distances = torch.einsum("ij,ij->j", u[:, None] - x, u[:, None] - x)
        return (torch.sqrt(1 + distances) - 1).sum() + mu * torch.linalg.vector_norm(u) ** 2

    def init(self, x: Tensor, mu: Tensor) -> Tensor:
        return x.mean(1)


SIZES = ((5, 3), (4, 4), (1, 3), (4, 1), (1, 1))


def _points(draw: Draw, sizes: Sizes) -> Tensor:
    return draw.normal(*sizes)


def _case(name: str, problem: type[idf.Problem], inputs: MakeInputs, notes: str = "") -> Case:
    return Case(
        name=f"pooling-{name}",
        make_problem=problem,
        inputs=inputs,
        sizes=SIZES,
        hessian="low-rank-plus-diagonal",
        solvers=LOW_RANK,
        built_in="pooling-pseudo-huber",
        notes=notes,
    )


CASES = (
    _case("points-in-rows", PointsInRows, lambda draw, sizes: (_points(draw, sizes).mT,)),
    _case(
        "expanded", Expanded, lambda draw, sizes: (_points(draw, sizes),), "2 u - 2 x_j is put together again"
    ),
    _case("weighted", Weighted, lambda draw, sizes: (_points(draw, sizes), draw.positive(sizes[1]))),
    _case("with-ridge", WithRidge, lambda draw, sizes: (_points(draw, sizes), draw.positive())),
)
