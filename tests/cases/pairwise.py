"""Terms that couple entries of u with each other: all pairs, running sums, neighbours."""

import torch
from torch import Tensor

import implicitdiff as idf
from tests.cases.base import DENSE, DIVIDE, LOW_RANK, Case


class PairwiseCosh(idf.Problem):
    """minimise over u  sum_ij w_ij cosh(u_i - u_j) + |u - x|^2 / 2,  w (m, m) not symmetric, x (m,)."""

    def objective(self, u: Tensor, w: Tensor, x: Tensor) -> Tensor:
        differences = u[:, None] - u[None, :]
        return (w * torch.cosh(differences)).sum() + 0.5 * ((u - x) ** 2).sum()

    def init(self, w: Tensor, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


class PairwiseSquares(idf.Problem):
    """minimise over u  sum_ij (u_i - u_j)^2 / 2 + sum_i c_i (u_i - x_i)^2,  x and c (m,)."""

    def objective(self, u: Tensor, x: Tensor, c: Tensor) -> Tensor:
        differences = u.unsqueeze(0) - u.unsqueeze(1)
        return 0.5 * differences.pow(2).sum() + (c * (u - x).square()).sum()

    def init(self, x: Tensor, c: Tensor) -> Tensor:
        return torch.zeros_like(x)


class RunningSums(idf.Problem):
    """minimise over u  sum_k cosh(u_1 + ... + u_k - y_k) + |u - x|^2 / 2,  x and y (m,)."""

    def objective(self, u: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return torch.cosh(torch.cumsum(u, 0) - y).sum() + 0.5 * ((u - x) ** 2).sum()

    def init(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.zeros_like(x)


class NeighbourDifferences(idf.Problem):
    """minimise over u  sum_i w_i sqrt(1 + (u_{i+1} - u_i)^2) + |u - x|^2 / 2,  x (m,), w (m - 1,)."""

    def objective(self, u: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return (w * torch.sqrt(1 + (u[1:] - u[:-1]) ** 2)).sum() + 0.5 * ((u - x) ** 2).sum()

    def init(self, x: Tensor, w: Tensor) -> Tensor:
        return torch.zeros_like(x)


class CancelledDifferences(idf.Problem):
    """minimise over u  sum_i relu(clamp(u_i - u_i + 0.5)^2) u_i^2 + |u - x|^2,  x (m,)."""

    def objective(self, u: Tensor, x: Tensor) -> Tensor:
        half = torch.clamp(u - u + 0.5, min=0.0) ** 2
        return (torch.relu(half) * u**2).sum() + ((u - x) ** 2).sum()

    def init(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


CASES = (
    Case(
        name="pairwise-cosh",
        make_problem=PairwiseCosh,
        inputs=lambda draw, sizes: (draw.positive(*sizes, *sizes), draw.normal(*sizes)),
        sizes=((4,), (2,), (1,)),
        hessian="dense",
        solvers=DENSE,
        notes="D carries both labels of H: dense, and the diagonal adds to it",
    ),
    Case(
        name="pairwise-squares",
        make_problem=PairwiseSquares,
        inputs=lambda draw, sizes: (draw.normal(*sizes), draw.positive(*sizes)),
        sizes=((5,), (2,), (1,)),
        hessian="low-rank-plus-diagonal",
        solvers=LOW_RANK,
        notes="H = diag(2 m + 2 c) - 2 11': the dense part has rank 1, provable from constant curvature",
    ),
    Case(
        name="cancelled-differences",
        make_problem=CancelledDifferences,
        inputs=lambda draw, sizes: (draw.normal(*sizes),),
        sizes=((4,), (1,)),
        hessian="scaled-identity",
        solvers=DIVIDE,
        notes="u - u cancels, so that the conditions of clamp and relu are constants",
    ),
    Case(
        name="running-sums",
        make_problem=RunningSums,
        inputs=lambda draw, sizes: (draw.normal(*sizes), draw.normal(*sizes)),
        sizes=((4,), (2,)),
        solvers=DENSE,
        may_fall_back=True,
        notes="cumsum ties entries by i <= j, which no label says",
    ),
    Case(
        name="neighbour-differences",
        make_problem=NeighbourDifferences,
        inputs=lambda draw, sizes: (draw.normal(*sizes), draw.positive(sizes[0] - 1)),
        sizes=((5,), (3,), (2,)),
        may_fall_back=True,
        notes="u is read through two slices: H is tridiagonal",
    ),
)
