"""Graphs: index tensors name which entries meet, so that H, or A, is sparse."""

from typing import Any

import torch
from torch import Tensor

import implicitdiff as idf
from tests.cases.base import DENSE, DENSE_KKT, Case, Draw, Sizes


def edges(nodes: int) -> tuple[Tensor, Tensor]:
    """A chain, a loop closure (counted from the end), one edge twice; different at both ends."""
    tail = [*range(nodes - 1), 0, 0]
    head = [*range(1, nodes), -1, min(2, nodes - 1)]
    return torch.tensor(tail), torch.tensor(head)


class Smoothed(idf.Problem):
    """minimise over u  sum_e w_e sqrt((u_i - u_j)^2 + eps) + |u - x|^2, edges e = (i, j) fixed, x (n,), w (n + 1,)."""

    def __init__(self, nodes: int) -> None:
        super().__init__()
        self.eps = torch.nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
        tail, head = edges(nodes)
        self.register_buffer("tail", tail)
        self.register_buffer("head", head)

    def objective(self, u: Tensor, x: Tensor, w: Tensor) -> Tensor:
        apart = u[self.tail] - u[self.head]
        return (w * torch.sqrt(apart.square() + self.eps)).sum() + ((u - x) ** 2).sum()

    def init(self, x: Tensor, w: Tensor) -> Tensor:
        return x.clone()


class Poses(idf.Problem):
    """minimise over u  sum_e |R_e u_i - u_j|^2 + log cosh(a'(u_i - u_j)) + |u - x|^2, with the edges as inputs.

    x (n, d), R (e, d, d), a (d,) shared, i (e,), j (e,): a graph for each sample.
    """

    def objective(self, u: Tensor, x: Tensor, R: Tensor, a: Tensor, i: Tensor, j: Tensor) -> Tensor:
        turned = torch.einsum("eab,eb->ea", R, u[i])
        bent = torch.log(torch.cosh((u[i] - u[j]) @ a)).sum()
        return (turned - u[j]).square().sum() + bent + (u - x).square().sum()

    def init(self, x: Tensor, R: Tensor, a: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.zeros_like(x)


def _poses(draw: Draw, sizes: Sizes) -> tuple[Any, ...]:
    nodes, space = sizes
    x = draw.normal(*sizes)
    tail, head = edges(nodes)
    lead = x.shape[0]
    tails = torch.stack([tail.roll(b) for b in range(lead)])
    heads = torch.stack([head % nodes for _ in range(lead)])
    turns = 0.4 * draw.normal(len(tail), space, space)
    return x, turns, draw.shared_normal(space), tails, heads


class Flow(idf.Problem):
    """minimise over f  sum_e c_e f_e^2 / 2 + softplus(f_e)  s.t.  what flows into each node is b, c (e,), b (n,).

    The equations of all nodes add up to zero: one follows from the others, and b has to add up to zero as well.
    """

    def __init__(self, nodes: int) -> None:
        super().__init__()
        tail, head = edges(nodes)
        self.register_buffer("tail", tail)
        self.register_buffer("head", head % nodes)

    def objective(self, f: Tensor, c: Tensor, b: Tensor) -> Tensor:
        return (c * f.square()).sum() / 2 + torch.nn.functional.softplus(f).sum()

    def equality(self, f: Tensor, c: Tensor, b: Tensor) -> Tensor:
        return torch.zeros_like(b).index_add(0, self.head, f).index_add(0, self.tail, f, alpha=-1) - b

    def init(self, c: Tensor, b: Tensor) -> Tensor:
        return torch.zeros_like(c)


class Pinned(idf.Problem):
    """minimise over u  sum_e w_e (u_i - u_j)^2 + x'u  s.t.  u_0^3 + u_0 = x_0: H has the null vector of ones."""

    def __init__(self, nodes: int) -> None:
        super().__init__()
        tail, head = edges(nodes)
        self.register_buffer("tail", tail)
        self.register_buffer("head", head)

    def objective(self, u: Tensor, x: Tensor, w: Tensor) -> Tensor:
        pulled = torch.dot(x - x.mean(), u)
        return (w * (u[self.tail] - u[self.head]).square()).sum() + pulled

    def equality(self, u: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return u[0] ** 3 + u[0] - x[0]

    def init(self, x: Tensor, w: Tensor) -> Tensor:
        return torch.zeros_like(x)


class Entries(idf.Problem):
    """minimise over U  sum_e cosh(U_ij - y_e) + sum exp(0.3 (U - U')) + |U|^2 over observed entries e; y (e,)."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rows", torch.tensor([0, 1, 2, 0, 1]))
        self.register_buffer("columns", torch.tensor([1, 2, 0, 2, 1]))

    def objective(self, U: Tensor, y: Tensor) -> Tensor:
        seen = U[self.rows, self.columns] - y
        return torch.cosh(seen).sum() + torch.exp(0.3 * (U - U.mT)).sum() + U.square().sum()

    def init(self, y: Tensor) -> Tensor:
        return torch.zeros(3, 3, dtype=y.dtype)


def _balanced(c: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return c, b - b.mean(-1, keepdim=True)


def _sized(case: type[idf.Problem], name: str, nodes: int, **options: Any) -> Case:
    return Case(
        name=f"{name}-{nodes}",
        make_problem=lambda: case(nodes),
        sizes=((nodes,),),
        **options,
    )


CASES: tuple[Case, ...] = (
    *(
        _sized(
            Smoothed,
            "graph-smoothing",
            nodes,
            inputs=lambda draw, sizes: (draw.normal(*sizes), draw.positive(sizes[0] + 1)),
            hessian="sparse",
            solvers=DENSE,
        )
        for nodes in (7, 3)
    ),
    Case(
        name="pose-graph",
        make_problem=Poses,
        inputs=_poses,
        sizes=((5, 2), (3, 3)),
        in_dims=(0, 0, None, 0, 0),
        hessian="sparse",
        solvers=DENSE,
        notes="a graph for each sample, blocks on its edges",
    ),
    _sized(
        Flow,
        "network-flow",
        6,
        inputs=lambda draw, sizes: _balanced(draw.positive(sizes[0] + 1), draw.normal(*sizes)),
        hessian="diagonal",
        solvers=DENSE_KKT,
        consistent=_balanced,
        dependent=True,
        notes="the constraints of all nodes add up to zero, which is proved from the index tensors' sums",
    ),
    _sized(
        Pinned,
        "pinned-graph",
        6,
        inputs=lambda draw, sizes: (draw.normal(*sizes), draw.positive(sizes[0] + 1)),
        hessian="sparse",
        solvers=DENSE_KKT,
    ),
    Case(
        name="observed-entries",
        make_problem=Entries,
        inputs=lambda draw, sizes: (draw.normal(*sizes),),
        sizes=((5,),),
        hessian="sparse",
        solvers=DENSE,
        notes="a tie of two different axes, and entries by two index tensors",
    ),
)
