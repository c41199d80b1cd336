"""One small problem for each structure of the Hessian, so that each solver has one it is right for.

In: nothing. Out: five problems. Next: `test_second_order.py`, which takes each down its path.
"""

import torch

import implicitdiff as idf


class Separable(idf.Problem):  # H is diagonal
    def objective(self, u, x):
        return (torch.cosh(u) + 0.5 * u * u * (1 + x * x) - x * u).sum()

    def init(self, x):
        return torch.zeros_like(x)


class Rows(idf.Problem):
    """Each row for itself: H is block-diagonal."""

    def objective(self, u, x):
        return (torch.cosh(u.sum(1)) + ((u - x) ** 2).sum(1) + 0.1 * (u**4).sum(1)).sum()

    def init(self, x):
        return torch.zeros_like(x)


class Regression(idf.Problem):
    """A smooth robust regression with one ridge weight per coefficient: diagonal plus low rank."""

    def __init__(self) -> None:
        super().__init__()
        weights = torch.tensor([0.3, -0.2, 0.1, -0.4], dtype=torch.float64)
        self.log_weights = torch.nn.Parameter(weights)

    def objective(self, u, X, y):
        return torch.log(torch.cosh(X @ u - y)).sum() + 0.5 * (self.log_weights.exp() * u * u).sum()

    def init(self, X, y):
        return torch.zeros_like(X[0])


class Full(idf.Problem):
    """No structure in H."""

    def objective(self, u, Q, x):
        return 0.5 * u @ (Q @ Q.mT) @ u + torch.cosh(u).sum() - x @ u

    def init(self, Q, x):
        return torch.zeros_like(x)


class Cumulative(idf.Problem):
    """An operation without a structural rule: the dense fallback."""

    def objective(self, u, x):
        return torch.cosh(u.cumsum(0) - x).sum() + 0.5 * (u * u).sum()

    def init(self, x):
        return torch.zeros_like(x)
