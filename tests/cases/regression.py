"""Regression: the data matrix is an input, so X'u is bilinear in the variable and an input."""

import torch
from torch import Tensor

import implicitdiff as idf
from tests.cases.base import DENSE, LOW_RANK, Case, Draw, Sizes


class LogisticRegression(idf.Problem):
    """minimise over u  sum_i w_i log(1 + exp(-y_i x_i'u)) + mu |u|^2 / 2.

    X (n, m), y and w (n,), mu a number.
    """

    def objective(self, u: Tensor, X: Tensor, y: Tensor, w: Tensor, mu: Tensor) -> Tensor:
        losses = torch.nn.functional.softplus(-y * (X @ u))
        return (w * losses).sum() + 0.5 * mu * (u * u).sum()

    def init(self, X: Tensor, y: Tensor, w: Tensor, mu: Tensor) -> Tensor:
        return torch.zeros_like(X[0])


class Ridge(idf.Problem):
    """minimise over u  |X u - y|^2 + mu |u|^2,  X (n, m), y (n,), mu a Parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.mu = torch.nn.Parameter(torch.tensor(0.6))

    def objective(self, u: Tensor, X: Tensor, y: Tensor) -> Tensor:
        return ((X @ u - y) ** 2).sum() + self.mu * u.square().sum()

    def init(self, X: Tensor, y: Tensor) -> Tensor:
        return torch.zeros_like(X[0])


class LeastSquares(idf.Problem):
    """minimise over u  |X u - y|^2,  X (n, m) with n >= m, y (n,)."""

    def objective(self, u: Tensor, X: Tensor, y: Tensor) -> Tensor:
        return torch.linalg.vector_norm(X @ u - y) ** 2

    def init(self, X: Tensor, y: Tensor) -> Tensor:
        return torch.zeros_like(X[0])


def _classification(draw: Draw, sizes: Sizes) -> tuple[Tensor, ...]:
    m, n = sizes
    return draw.normal(n, m), draw.normal(n), draw.positive(n), draw.positive()


def _data(draw: Draw, sizes: Sizes) -> tuple[Tensor, ...]:
    m, n = sizes
    return draw.normal(n, m), draw.normal(n)


def _tall(draw: Draw, sizes: Sizes) -> tuple[Tensor, ...]:
    # a dominant diagonal keeps X'X well away from singular for every seed
    m, n = sizes
    X = 0.3 * draw.normal(n, m) + 2.0 * torch.eye(n, m, dtype=draw.dtype)
    return X, draw.normal(n)


CASES = (
    Case(
        name="logistic-regression",
        make_problem=LogisticRegression,
        inputs=_classification,
        sizes=((5, 3), (4, 4), (1, 3), (4, 1), (1, 1)),
        hessian="low-rank-plus-diagonal",
        solvers=LOW_RANK,
    ),
    Case(
        name="logistic-regression-shared",
        make_problem=LogisticRegression,
        inputs=lambda draw, sizes: (
            draw.shared_normal(sizes[1], sizes[0]),
            draw.normal(sizes[1]),
            draw.shared_positive(sizes[1]),
            torch.tensor(0.7, dtype=draw.dtype),
        ),
        in_dims=(None, 0, None, None),
        sizes=((5, 3), (4, 4)),
        hessian="low-rank-plus-diagonal",
        solvers=LOW_RANK,
        notes="X, w and mu shared: their gradients are sums over the batch",
    ),
    Case(
        name="ridge",
        make_problem=Ridge,
        inputs=_data,
        sizes=((5, 3), (4, 4), (1, 3), (4, 1)),
        hessian="low-rank-plus-diagonal",
        solvers=LOW_RANK,
        notes="Woodbury's weights are constants; the ridge is a Parameter",
    ),
    Case(
        name="least-squares",
        make_problem=LeastSquares,
        inputs=_tall,
        sizes=((3, 5), (4, 4), (1, 3)),
        hessian="dense",
        solvers=DENSE,
        notes="no diagonal to add to: Woodbury must not be chosen on a zero diagonal",
    ),
    Case(
        name="least-squares-one-sample",
        make_problem=LeastSquares,
        inputs=_tall,
        in_dims=None,
        sizes=((3, 5), (4, 4)),
        hessian="dense",
        solvers=DENSE,
        notes="in_dims=None: no batch axis anywhere",
    ),
)
