"""Robust pooling with every penalty, and alpha as a number, a Parameter and an input."""

import torch
from torch import Tensor

from implicitdiff.problems import RobustPooling
from tests.cases.base import DIVIDE, LOW_RANK, Case, Draw, MakeInputs, Sizes


def points(spread: float, outlier: float = 0.0) -> MakeInputs:
    """Inputs x (m, n): normal points, the first of them moved by `outlier` where there are at least three."""

    def inputs(draw: Draw, sizes: Sizes) -> tuple[Tensor, ...]:
        m, n = sizes
        x = spread * draw.normal(m, n)
        if n > 2:
            x = torch.cat([x[..., :1] + outlier, x[..., 1:]], -1)
        return (x,)

    return inputs


def points_and_alpha(draw: Draw, sizes: Sizes) -> tuple[Tensor, ...]:
    """x (m, n) and alpha, one positive number per sample."""
    return (*points(0.8)(draw, sizes), draw.positive())


SIZES = ((5, 3), (4, 4), (1, 3), (4, 1), (1, 1))


def _case(penalty: str, hessian: str, spread: float, outlier: float = 0.0, notes: str = "") -> Case:
    return Case(
        name=f"pooling-{penalty}",
        make_problem=lambda: RobustPooling(penalty=penalty),
        inputs=points(spread, outlier),
        sizes=SIZES,
        hessian=hessian,
        solvers=DIVIDE if hessian == "scaled-identity" else LOW_RANK,
        own_solver=True,
        notes=notes,
    )


CASES = (
    _case("quadratic", "scaled-identity", 1.0),
    _case("pseudo-huber", "low-rank-plus-diagonal", 1.0),
    _case("huber", "low-rank-plus-diagonal", 0.45, outlier=1.0, notes="points on both sides of alpha"),
    _case("welsch", "low-rank-plus-diagonal", 0.3, notes="not convex; the points lie in one basin"),
    _case(
        "truncated-quadratic",
        "scaled-identity",
        0.2,
        outlier=3.0,
        notes="rho'' = 0 everywhere, so kappa_2 vanishes and H is 2 (number of inliers) rho' I; one outlier",
    ),
    Case(
        name="pooling-alpha-input",
        make_problem=lambda: RobustPooling(penalty="pseudo-huber", alpha=None),
        inputs=points_and_alpha,
        sizes=SIZES,
        hessian="low-rank-plus-diagonal",
        solvers=LOW_RANK,
        own_solver=True,
        notes="a 0-dim input per sample",
    ),
    Case(
        name="pooling-alpha-parameter",
        make_problem=lambda: RobustPooling(
            penalty="pseudo-huber", alpha=torch.nn.Parameter(torch.tensor(0.8))
        ),
        inputs=points(1.0),
        sizes=SIZES,
        hessian="low-rank-plus-diagonal",
        solvers=LOW_RANK,
        own_solver=True,
        notes="a 0-dim Parameter, its gradient summed over the batch",
    ),
)
