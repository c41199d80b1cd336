"""Optimal transport as a stranger might write it; the same kinds and the same solver must be found as in the
built-in.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import implicitdiff as idf
from tests.cases.base import SCHUR, Case, Draw, MakeInputs, Sizes
from tests.cases.transport import balanced, costs_and_marginals

GAMMA = 2.0


def entropy(P: Tensor) -> Tensor:
    """sum P (log P - 1) / gamma, the built-in's regulariser up to terms that are linear in P."""
    return (P * (torch.log(P) - 1)).sum() / GAMMA


class Transposed(idf.Problem):
    """Transport with the plan as (n, m):  <P', M> + entropy  s.t.  sum_j P_ji = r_i, sum_i P_ji = c_j."""

    def objective(self, u: Tensor, M: Tensor, r: Tensor, c: Tensor) -> Tensor:
        return (u.mT * M).sum() + entropy(u)

    def equality(self, u: Tensor, M: Tensor, r: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        return u.sum(0) - r, u.sum(1) - c

    def init(self, M: Tensor, r: Tensor, c: Tensor) -> Tensor:
        return c[:, None] * r[None, :]


class Flat(idf.Problem):
    """Transport with the plan as one vector of length m n."""

    def objective(self, u: Tensor, M: Tensor, r: Tensor, c: Tensor) -> Tensor:
        return u @ M.reshape(-1) + entropy(u)

    def equality(self, u: Tensor, M: Tensor, r: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        P = u.reshape(M.shape)
        return P.sum(1) - r, P.sum(0) - c

    def init(self, M: Tensor, r: Tensor, c: Tensor) -> Tensor:
        return (r[:, None] * c[None, :]).reshape(-1)


class PointClouds(idf.Problem):
    """Transport with M_ij = |a_i - b_j|^2 inside the objective,  a (m, d), b (n, d)."""

    def objective(self, u: Tensor, a: Tensor, b: Tensor, r: Tensor, c: Tensor) -> Tensor:
        M = ((a[:, None, :] - b[None, :, :]) ** 2).sum(-1)
        return (u * M).sum() + entropy(u)

    def equality(self, u: Tensor, a: Tensor, b: Tensor, r: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        return u.sum(1) - r, u.sum(0) - c

    def init(self, a: Tensor, b: Tensor, r: Tensor, c: Tensor) -> Tensor:
        return r[:, None] * c[None, :]


class ThreeMarginals(idf.Problem):
    """Transport with three marginals,  P and M (m, n, k): rank m + n + k - 2, two dependent rows."""

    def objective(self, u: Tensor, M: Tensor, r: Tensor, c: Tensor, d: Tensor) -> Tensor:
        return (u * M).sum() + entropy(u)

    def equality(self, u: Tensor, M: Tensor, r: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, ...]:
        return u.sum((1, 2)) - r, u.sum((0, 2)) - c, u.sum((0, 1)) - d

    def init(self, M: Tensor, r: Tensor, c: Tensor, d: Tensor) -> Tensor:
        return torch.einsum("i,j,k->ijk", r, c, d)


class OneMoreConstraint(idf.Problem):
    """Transport with one more linear constraint  <P, G> = t  (an average cost that must be met)."""

    def objective(self, u: Tensor, M: Tensor, r: Tensor, c: Tensor, G: Tensor, t: Tensor) -> Tensor:
        return (u * M).sum() + entropy(u)

    def equality(
        self, u: Tensor, M: Tensor, r: Tensor, c: Tensor, G: Tensor, t: Tensor
    ) -> tuple[Tensor, ...]:
        return u.sum(1) - r, u.sum(0) - c, (u * G).sum() - t

    def init(self, M: Tensor, r: Tensor, c: Tensor, G: Tensor, t: Tensor) -> Tensor:
        return r[:, None] * c[None, :]


def _clouds(draw: Draw, sizes: Sizes) -> tuple[Tensor, ...]:
    m, n = sizes
    return 0.6 * draw.normal(m, 2), 0.6 * draw.normal(n, 2), draw.mass(m), draw.mass(n)


def _three(draw: Draw, sizes: Sizes) -> tuple[Tensor, ...]:
    m, n, k = sizes
    return draw.normal(m, n, k), draw.mass(m), draw.mass(n), draw.mass(k)


def _one_more(draw: Draw, sizes: Sizes) -> tuple[Tensor, ...]:
    # t near the value at the independent plan r c', so that the constraint can be met inside the transport
    # polytope
    M, r, c = costs_and_marginals(draw, sizes)
    G = draw.normal(*sizes)
    t = torch.einsum("...i,...ij,...j->...", r, G, c)
    return M, r, c, G, t + 0.02


def _balanced_last(*inputs: Tensor, first: int) -> tuple[Tensor, ...]:
    return *inputs[:first], *(mass / mass.sum(-1, keepdim=True) for mass in inputs[first:])


def _case(
    name: str,
    problem: type[idf.Problem],
    inputs: MakeInputs,
    sizes: tuple[Sizes, ...],
    consistent: Callable[..., tuple[Any, ...]],
    schur: str | None = "block",
    notes: str = "",
) -> Case:
    return Case(
        name=f"transport-{name}",
        make_problem=problem,
        inputs=inputs,
        sizes=sizes,
        hessian="diagonal",
        schur=schur,
        solvers=SCHUR,
        consistent=consistent,
        dependent=True,
        built_in="transport",
        notes=notes,
    )


MATRIX = ((4, 3), (3, 3), (1, 3), (4, 1))

CASES = (
    _case("transposed", Transposed, costs_and_marginals, MATRIX, balanced),
    _case("flat", Flat, costs_and_marginals, MATRIX, balanced, notes="labels appear by reshape"),
    _case(
        "point-clouds",
        PointClouds,
        _clouds,
        MATRIX,
        lambda *inputs: _balanced_last(*inputs, first=2),
        notes="the largest array is not an input: gradients go to the clouds",
    ),
    _case(
        "three-marginals",
        ThreeMarginals,
        _three,
        ((2, 4, 3), (3, 3, 3), (1, 3, 2)),
        lambda *inputs: _balanced_last(*inputs, first=1),
        notes="two null vectors",
    ),
    _case(
        "one-more-constraint",
        OneMoreConstraint,
        _one_more,
        ((4, 3), (3, 3)),
        balanced,
        notes="a dense row next to the marginals",
    ),
)
