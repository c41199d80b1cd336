"""Nonlinear constraints: the multipliers enter H, and h depends on the inputs (C is not zero)."""

import torch
from torch import Tensor

import implicitdiff as idf
from tests.cases.base import DENSE_KKT, ONE_ROW, Case, Draw, Sizes


class Sphere(idf.Problem):
    """minimise over u  -x'u  s.t.  |u|^2 = 1:  u = x / |x|; all of H comes from the multiplier."""

    def objective(self, u: Tensor, x: Tensor) -> Tensor:
        return -(x * u).sum()

    def equality(self, u: Tensor, x: Tensor) -> Tensor:
        return (u**2).sum() - 1

    def init(self, x: Tensor) -> Tensor:
        return x / (2 * torch.linalg.vector_norm(x))


class Ellipsoid(idf.Problem):
    """minimise over u  sum_i w_i (u_i - x_i)^2  s.t.  sum_i a_i u_i^2 = 1,  w, x and a (m,)."""

    def objective(self, u: Tensor, x: Tensor, w: Tensor, a: Tensor) -> Tensor:
        return (w * (u - x) ** 2).sum()

    def equality(self, u: Tensor, x: Tensor, w: Tensor, a: Tensor) -> Tensor:
        return torch.dot(a, u * u) - 1

    def init(self, x: Tensor, w: Tensor, a: Tensor) -> Tensor:
        return x / torch.sqrt((a * x * x).sum())


class Exponentials(idf.Problem):
    """minimise over u  |u - x|^2 / 2 + sum_i cosh(u_i)  s.t.  sum_i exp(c_ki u_i) = d_k.

    x (m,), c (p, m), d (p,).
    """

    def objective(self, u: Tensor, x: Tensor, c: Tensor, d: Tensor) -> Tensor:
        return 0.5 * (u - x).square().sum() + torch.cosh(u).sum()

    def equality(self, u: Tensor, x: Tensor, c: Tensor, d: Tensor) -> Tensor:
        return torch.exp(c * u).sum(1) - d

    def init(self, x: Tensor, c: Tensor, d: Tensor) -> Tensor:
        return torch.zeros_like(x)


class TwoBlocks(idf.Problem):
    """minimise over u  |u - x|^2 + (sum u)^4 / 8  s.t.  tanh(c u) = d, |u|^2 = 2.

    x (m,), c (p, m), d (p,).
    """

    def objective(self, u: Tensor, x: Tensor, c: Tensor, d: Tensor) -> Tensor:
        return ((u - x) ** 2).sum() + u.sum() ** 4 / 8

    def equality(self, u: Tensor, x: Tensor, c: Tensor, d: Tensor) -> dict[str, Tensor]:
        return {"tanh": torch.tanh(c @ u) - d, "norm": (u * u).sum() - 2.0}

    def init(self, x: Tensor, c: Tensor, d: Tensor) -> Tensor:
        return x / torch.linalg.vector_norm(x)


def _exponentials(draw: Draw, sizes: Sizes) -> tuple[Tensor, ...]:
    m, p = sizes
    c = 0.3 * draw.normal(p, m) + torch.eye(p, m, dtype=draw.dtype)
    return draw.normal(m), c, m - 0.5 + draw.positive(p)


def _two_blocks(draw: Draw, sizes: Sizes) -> tuple[Tensor, ...]:
    m, p = sizes
    c = 0.3 * draw.normal(p, m) + torch.eye(p, m, dtype=draw.dtype)
    return 1.0 + 0.5 * draw.normal(m), c, 0.3 * draw.normal(p).tanh()


CASES = (
    Case(
        name="sphere",
        make_problem=Sphere,
        inputs=lambda draw, sizes: (draw.normal(*sizes) + 0.5,),
        sizes=((4,), (2,), (1,)),
        hessian="scaled-identity",
        solvers=ONE_ROW,
        notes="D_uu f = 0: H is -2 lambda I",
    ),
    Case(
        name="ellipsoid",
        make_problem=Ellipsoid,
        inputs=lambda draw, sizes: (
            1.5 * draw.normal(*sizes) + 1.0,
            draw.positive(*sizes),
            draw.positive(*sizes),
        ),
        sizes=((4,), (2,), (1,)),
        hessian="diagonal",
        solvers=ONE_ROW,
        notes="the constraint's curvature depends on an input",
    ),
    Case(
        name="exponential-constraints",
        make_problem=Exponentials,
        inputs=_exponentials,
        sizes=((5, 2), (4, 3), (3, 1)),
        hessian="diagonal",
        schur="dense",
        solvers=DENSE_KKT,
        notes="H sums the curvature of all constraints, weighted by their multipliers",
    ),
    Case(
        name="constraint-dict",
        make_problem=TwoBlocks,
        inputs=_two_blocks,
        sizes=((5, 2), (3, 1)),
        hessian="low-rank-plus-diagonal",
        solvers=DENSE_KKT,
        notes="a pytree of nonlinear constraints and H of low rank plus diagonal: H^-1 A' has columns",
    ),
)
