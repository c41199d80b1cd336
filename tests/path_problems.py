"""One small problem for each structure of the Hessian, so that each solver has one it is right for.

In: nothing. Out: eight problems. Next: `test_second_order.py`, which takes each down its path.
"""

import torch

import implicitdiff as idf

WEIGHTS = torch.tensor([[0.6, -0.3], [0.2, 0.5]], dtype=torch.float64)


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


class Chain(idf.Problem):
    """Neighbours are coupled: H is banded, block tridiagonal for the rows of a matrix."""

    def objective(self, u, x):
        steps = u[1:] - torch.sin(u[:-1]) if u.dim() == 1 else u[1:] - torch.sin(u[:-1]) @ WEIGHTS
        return torch.cosh(0.7 * steps).sum() + ((u - x) ** 2).sum() + 0.2 * torch.exp(u[0]).sum()

    def init(self, x):
        return torch.zeros_like(x)


class Ring(idf.Problem):
    """Neighbours on a ring, by an index tensor: H is sparse, and no band."""

    def objective(self, u, x):
        ahead = torch.arange(1, len(u) + 1, device=u.device) % len(u)
        return torch.cosh(0.7 * (u[ahead] - torch.sin(u))).sum() + ((u - x) ** 2).sum()

    def init(self, x):
        return torch.zeros_like(x)


class Bent(idf.Problem):
    """Second differences, with one constraint: H is banded with two diagonals to each side."""

    def objective(self, u, x, c):
        return (
            torch.cosh(u[2:] - 2 * u[1:-1] + u[:-2]).sum() + 0.5 * ((u - x) ** 2).sum() + 0.1 * (u**4).sum()
        )

    def equality(self, u, x, c):
        return (u + 0.2 * torch.sin(u)).sum() - c

    def init(self, x, c):
        return torch.zeros_like(x)


class Held(idf.Problem):
    """Differences with both ends held: H is banded and singular, K is regular."""

    def objective(self, u, x, ends):
        return torch.cosh(u[1:] - u[:-1]).sum() - x @ u

    def equality(self, u, x, ends):
        return u[0] - ends[0] ** 2, u[-1] + torch.sin(u[-1]) / 2 - ends[1]

    def init(self, x, ends):
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


class Outputs(idf.Problem):
    """Least squares with several outputs: H is the same d x d matrix for every column of U (d, k)."""

    def __init__(self) -> None:
        super().__init__()
        self.log_ridge = torch.nn.Parameter(torch.tensor(-0.3, dtype=torch.float64))

    def objective(self, u, X, Y):
        return ((X @ u - Y) ** 2).sum() / 2 + self.log_ridge.exp() * (u * u).sum() / 2

    def init(self, X, Y):
        return X.mT @ Y


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
