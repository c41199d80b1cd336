"""What may reach a problem besides batched inputs: Parameters, buffers, tensor attributes, shared inputs,
several inputs.
"""

import torch
from torch import Tensor

import implicitdiff as idf
from tests.cases.base import DIVIDE, LOW_RANK, Case, Draw, Sizes


class GeometricMedian(idf.Problem):
    """minimise over u  sum_j sqrt(|u - x_j|^2 + eps),  x (m, n), eps a Parameter."""

    def __init__(self, eps: float = 0.05) -> None:
        super().__init__()
        self.eps = torch.nn.Parameter(torch.tensor(eps))

    def objective(self, u: Tensor, x: Tensor) -> Tensor:
        return torch.sqrt(((u[:, None] - x) ** 2).sum(0) + self.eps).sum()

    def init(self, x: Tensor) -> Tensor:
        return x.mean(1)


class ManyTensors(idf.Problem):
    """minimise over u  sum_i [s_i cosh(u_i - x_i) + (a y_i + b_i) u_i^2].

    With a, s Parameters, b a buffer, s shared.
    """

    def __init__(self, m: int) -> None:
        super().__init__()
        self.net = torch.nn.Linear(m, m, dtype=torch.float64)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            self.net.weight.copy_(torch.randn(m, m, generator=generator, dtype=torch.float64))
            self.net.bias.copy_(torch.randn(m, generator=generator, dtype=torch.float64))
        self.a = torch.nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
        self.b: Tensor
        self.register_buffer("b", torch.linspace(0.5, 1.0, m, dtype=torch.float64))
        self.shift = 0.25

    def objective(self, u: Tensor, x: Tensor, y: Tensor, s: Tensor) -> Tensor:
        centre = torch.tanh(self.net(x)) + self.shift
        return (s * torch.cosh(u - centre) + (self.a * y**2 + self.b) * u**2).sum()

    def init(self, x: Tensor, y: Tensor, s: Tensor) -> Tensor:
        return torch.zeros_like(x)


class Broadcast(idf.Problem):
    """minimise over u (m,)  sum_ij w_j (u_i - x_ij)^2 + t sum_i u_i.

    x (m, n) shared, w (n,), t a number per sample.
    """

    def objective(self, u: Tensor, x: Tensor, w: Tensor, t: Tensor) -> Tensor:
        return (w * (u.unsqueeze(-1) - x).square()).sum() + t * u.sum()

    def init(self, x: Tensor, w: Tensor, t: Tensor) -> Tensor:
        return x.mean(1)


def _many(draw: Draw, sizes: Sizes) -> tuple[Tensor, ...]:
    return draw.normal(*sizes), draw.normal(*sizes), draw.shared_positive(*sizes)


CASES = (
    Case(
        name="geometric-median",
        make_problem=GeometricMedian,
        inputs=lambda draw, sizes: (draw.normal(*sizes),),
        sizes=((3, 5), (4, 4), (1, 3), (3, 1), (1, 1)),
        hessian="low-rank-plus-diagonal",
        solvers=LOW_RANK,
        notes="the contract's first example",
    ),
    Case(
        name="many-tensors",
        make_problem=lambda: ManyTensors(4),
        inputs=_many,
        in_dims=(0, 0, None),
        sizes=((4,),),
        hessian="diagonal",
        solvers=DIVIDE,
        notes="a module inside the problem, a buffer, a number as attribute, a shared input",
    ),
    Case(
        name="broadcast-shared",
        make_problem=Broadcast,
        inputs=lambda draw, sizes: (draw.shared_normal(*sizes), draw.positive(sizes[1]), draw.normal()),
        in_dims=(None, 0, 0),
        sizes=((5, 3), (3, 3), (1, 4), (4, 1)),
        hessian="scaled-identity",
        solvers=DIVIDE,
        notes="the curvature 2 sum_j w_j has no row label; the largest input is shared",
    ),
)
