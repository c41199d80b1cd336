"""Pytrees and 0-dim tensors, as variables and as inputs; constants among the inputs."""

from typing import Any

import torch
from torch import Tensor

import implicitdiff as idf
from tests.cases.base import ONE_ROW, Case, Draw, Sizes


class PairOfVectors(idf.Problem):
    """minimise over (a, b)  |a - x|^2 + sum cosh(b) - y'b + (1'a)(1'b) / 4,  a and x (m,), b and y (k,)."""

    def objective(self, u: tuple[Tensor, Tensor], x: Tensor, y: Tensor) -> Tensor:
        a, b = u
        return ((a - x) ** 2).sum() + torch.cosh(b).sum() - y @ b + a.sum() * b.sum() / 4

    def init(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(x), torch.zeros_like(y)


class Arrow(idf.Problem):
    """minimise over (p, q)  sum_i softplus(p_i + a_i'q) + |p - x|^2 + |q|^2,  x (n,), a (n, k): H is diagonal but for a
    border of k rows and columns.
    """

    def objective(self, u: dict[str, Tensor], x: Tensor, a: Tensor) -> Tensor:
        fit = torch.nn.functional.softplus(u["p"] + a @ u["q"]).sum()
        return fit + ((u["p"] - x) ** 2).sum() + (u["q"] ** 2).sum()

    def init(self, x: Tensor, a: Tensor) -> dict[str, Tensor]:
        return {"p": x, "q": a.sum(0)}


class SharedCurvature(idf.Problem):
    """minimise over (a, b)  sum x_i a_i^2 / 2 - 1'a + y b^2 + (1'a) b / 8,  x (m,), y and b numbers."""

    def objective(self, u: tuple[Tensor, Tensor], x: Tensor, y: Tensor) -> Tensor:
        a, b = u
        return (0.5 * x * a * a - a).sum() + y * b**2 + a.sum() * b / 8

    def init(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(x), torch.zeros_like(y)


class AffineClassifier(idf.Problem):
    """Logistic regression with a bias:  {"weight": w (m,), "bias": b ()},  inputs {"X": (n, m), "y": (n,)},
    mu ().
    """

    def objective(self, u: dict[str, Tensor], data: dict[str, Tensor], mu: Tensor) -> Tensor:
        margins = data["y"] * (data["X"] @ u["weight"] + u["bias"])
        return torch.nn.functional.softplus(-margins).sum() + mu * (
            u["weight"].square().sum() + u["bias"] ** 2
        )

    def init(self, data: dict[str, Tensor], mu: Tensor) -> dict[str, Tensor]:
        return {"weight": torch.zeros_like(data["X"][0]), "bias": torch.zeros_like(mu)}


class Location(idf.Problem):
    """minimise over a number u  sum_j w_j cosh(u - x_j),  x and w (n,)."""

    def objective(self, u: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return (w * torch.cosh(u - x)).sum()

    def init(self, x: Tensor, w: Tensor) -> Tensor:
        return x.mean()


class Scalar(idf.Problem):
    """minimise over a number u  exp(u - x) - y u,  x and y numbers: u = x + log y."""

    def objective(self, u: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return torch.exp(u - x) - y * u

    def init(self, x: Tensor, y: Tensor) -> Tensor:
        return x


class SplitSimplex(idf.Problem):
    """minimise over (P (m, n), q ())  sum P log P + <M, P> + q log q + t q  s.t.  sum(P) + q = 1."""

    def objective(self, u: tuple[Tensor, Tensor], costs: tuple[Tensor, Tensor]) -> Tensor:
        P, q = u
        M, t = costs
        return (P * torch.log(P) + M * P).sum() + q * torch.log(q) + t * q

    def equality(self, u: tuple[Tensor, Tensor], costs: tuple[Tensor, Tensor]) -> Tensor:
        return u[0].sum() + u[1] - 1

    def init(self, costs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        count = costs[0].numel() + 1
        return torch.full_like(costs[0], 1 / count), torch.full_like(costs[1], 1 / count)


class MixedConstants(idf.Problem):
    """minimise over u  sum_i |u_i - x[index_i]|^p + |u|^2 / 2.

    With index integers, p a number, x shared or not.
    """

    def objective(self, u: Tensor, x: Tensor, index: Tensor, options: dict[str, Any]) -> Tensor:
        residual = u - x[index]
        scaled = residual if options["scale"] is None else options["scale"] * residual
        return (scaled ** options["power"]).sum() + 0.5 * (u * u).sum()

    def init(self, x: Tensor, index: Tensor, options: dict[str, Any]) -> Tensor:
        return torch.zeros_like(x[index])


def _classifier(draw: Draw, sizes: Sizes) -> tuple[Any, ...]:
    m, n = sizes
    return {"X": draw.normal(n, m), "y": draw.normal(n)}, draw.positive()


def _indexed(draw: Draw, sizes: Sizes) -> tuple[Any, ...]:
    index = torch.tensor([1, 0, 1, 2])  # an entry used twice, and the order changed
    return draw.normal(*sizes), index, {"power": 4, "scale": None}


CASES = (
    Case(
        name="tuple-variable",
        make_problem=PairOfVectors,
        inputs=lambda draw, sizes: (draw.normal(sizes[0]), draw.normal(sizes[1])),
        sizes=((3, 2), (2, 2), (1, 2), (1, 1)),
        hessian="block",
        notes="two vectors coupled by a product of their sums",
    ),
    Case(
        name="tuple-variable-shared",
        make_problem=SharedCurvature,
        inputs=lambda draw, sizes: (draw.positive(*sizes), draw.shared_positive()),
        in_dims=(0, None),
        sizes=((3,), (1,)),
        hessian="block",
        notes="one variable's curvature depends on a shared input alone, next to a batched one",
    ),
    Case(
        name="arrow",
        make_problem=Arrow,
        inputs=lambda draw, sizes: (draw.normal(sizes[0]), draw.normal(*sizes)),
        sizes=((7, 2), (3, 3), (1, 1)),
        hessian="block",
        solvers=frozenset({"schur", "cholesky"}),
        notes="the diagonal corner is eliminated, the border is factored",
    ),
    Case(
        name="dict-variable",
        make_problem=AffineClassifier,
        inputs=_classifier,
        sizes=((3, 5), (4, 4), (1, 2)),
        hessian="block",
        notes="a vector and a 0-dim variable; a dict of inputs",
    ),
    Case(
        name="number-variable",
        make_problem=Location,
        inputs=lambda draw, sizes: (draw.normal(*sizes), draw.positive(*sizes)),
        sizes=((4,), (2,), (1,)),
        hessian="scaled-identity",
        notes="u is 0-dim",
    ),
    Case(
        name="number-everything",
        make_problem=Scalar,
        inputs=lambda draw, _: (draw.normal(), draw.positive()),
        sizes=((),),
        hessian="scaled-identity",
        notes="every tensor is 0-dim",
    ),
    Case(
        name="tuple-constrained",
        make_problem=SplitSimplex,
        inputs=lambda draw, sizes: ((draw.normal(*sizes), draw.normal()),),
        sizes=((3, 2), (2, 2), (1, 1)),
        hessian="diagonal",
        solvers=ONE_ROW,
        notes="softmax over m n + 1 entries, split in a matrix and a number, with one tuple as input",
    ),
    Case(
        name="constants",
        make_problem=MixedConstants,
        inputs=_indexed,
        in_dims=(0, None, None),
        sizes=((3,),),
        may_fall_back=True,
        notes="an integer tensor, a number and None among the inputs get no gradient; x is read by an index",
    ),
)
