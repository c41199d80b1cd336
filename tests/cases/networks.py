"""A two-layer network inside the objective: two nested Jacobians of rank k, and in between a diagonal."""

import torch
from torch import Tensor

import implicitdiff as idf
from tests.cases.base import DENSE, LOW_RANK, Case, Draw, Sizes


class InverseNetwork(idf.Problem):
    """minimise over u  |W2 tanh(W1 u) - y|^2 / 2 + mu |u|^2 / 2.

    W1 (k, m) and W2 (q, k) Parameters, y (q,).
    """

    def __init__(self, m: int, k: int, q: int, mu: float) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        # close to an isometry, so that the fit alone (mu = 0) has a positive definite Hessian near u = 0
        noise = [
            0.2 * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((k, m), (q, k))
        ]
        self.W1 = torch.nn.Parameter(0.7 * torch.eye(k, m, dtype=torch.float64) + noise[0])
        self.W2 = torch.nn.Parameter(1.3 * torch.eye(q, k, dtype=torch.float64) + noise[1])
        self.mu = mu

    def objective(self, u: Tensor, y: Tensor) -> Tensor:
        error = self.W2 @ torch.tanh(self.W1 @ u) - y
        value = 0.5 * (error * error).sum()
        return value + 0.5 * self.mu * (u @ u) if self.mu else value

    def init(self, y: Tensor) -> Tensor:
        return torch.zeros_like(self.W1[0])


class InputNetwork(idf.Problem):
    """minimise over u  sum_j softplus(w_j + sum_k W2_jk tanh(W1 u)_k) + |u - x|^2.

    W1, W2, w and x inputs.
    """

    def objective(self, u: Tensor, W1: Tensor, W2: Tensor, w: Tensor, x: Tensor) -> Tensor:
        hidden = torch.tanh(torch.einsum("ki,i->k", W1, u))
        return (
            torch.nn.functional.softplus(torch.nn.functional.linear(hidden, W2, w)).sum()
            + ((u - x) ** 2).sum()
        )

    def init(self, W1: Tensor, W2: Tensor, w: Tensor, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def _layers(draw: Draw, sizes: Sizes) -> tuple[Tensor, ...]:
    m, k, q = sizes
    return draw.normal(k, m), draw.normal(q, k), draw.normal(q), draw.normal(m)


CASES = (
    Case(
        name="network",
        make_problem=lambda: InverseNetwork(3, 4, 5, mu=0.0),
        inputs=lambda draw, _: (0.3 * draw.normal(5),),
        sizes=((3, 4, 5),),
        hessian="dense",
        solvers=DENSE,
        notes="no ridge: only the fit makes H positive definite",
    ),
    Case(
        name="network-ridge",
        make_problem=lambda: InverseNetwork(5, 3, 2, mu=0.4),
        inputs=lambda draw, _: (0.5 * draw.normal(2),),
        sizes=((5, 3, 2),),
        hessian="low-rank-plus-diagonal",
        solvers=LOW_RANK,
        notes="rank 3 < m = 5, two low-rank terms with the same outer factor W1; wrong by 7 % when split by "
        "which factor mentions the row label",
    ),
    Case(
        name="network-inputs",
        make_problem=InputNetwork,
        inputs=_layers,
        sizes=((4, 3, 2), (3, 3, 3), (3, 1, 2), (1, 3, 2), (1, 1, 1)),
        hessian="low-rank-plus-diagonal",
        solvers=LOW_RANK,
        notes="both layers and the biases are inputs",
    ),
)
