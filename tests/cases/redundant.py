"""Dependent constraints other than transport's: rows repeated with a factor, a total next to its parts."""

import torch
from torch import Tensor

import implicitdiff as idf
from tests.cases.base import DENSE_KKT, SCHUR, Case, Draw, Sizes


class RepeatedRows(idf.Problem):
    """minimise over P (m, n)  sum P (log P - 1 + M)  s.t.  P 1 = r.

    -2 P 1 = -2 r: the same rows with a factor.
    """

    def objective(self, u: Tensor, M: Tensor, r: Tensor) -> Tensor:
        return (u * (torch.log(u) - 1 + M)).sum()

    def equality(self, u: Tensor, M: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        return u.sum(1) - r, 2 * (r - u.sum(1))

    def init(self, M: Tensor, r: Tensor) -> Tensor:
        return (r / M.shape[1])[:, None].expand_as(M)


class TotalAndRows(idf.Problem):
    """minimise over P (m, n)  |P - M|^2 / 2  s.t.  sum(P) = t,  P 1 = r: the total follows from the rows."""

    def objective(self, u: Tensor, M: Tensor, r: Tensor, t: Tensor) -> Tensor:
        return 0.5 * ((u - M) ** 2).sum()

    def equality(self, u: Tensor, M: Tensor, r: Tensor, t: Tensor) -> dict[str, Tensor]:
        return {"total": u.sum() - t, "rows": u.sum(1) - r}

    def init(self, M: Tensor, r: Tensor, t: Tensor) -> Tensor:
        return torch.zeros_like(M)


class QuadraticTransport(idf.Problem):
    """minimise over P (m, n)  <P, M> + |W P|^2 / 2 + |P|^2  s.t.  P 1 = r, P' 1 = c.

    W (k, m): H is not diagonal.
    """

    def objective(self, u: Tensor, M: Tensor, r: Tensor, c: Tensor, W: Tensor) -> Tensor:
        return (u * M).sum() + 0.5 * (W @ u).square().sum() + u.square().sum()

    def equality(self, u: Tensor, M: Tensor, r: Tensor, c: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
        return u.sum(1) - r, u.sum(0) - c

    def init(self, M: Tensor, r: Tensor, c: Tensor, W: Tensor) -> Tensor:
        return r[:, None] * c[None, :]


class DependentData(idf.Problem):
    """minimise over u  sum_i cosh(u_i - x_i)  s.t.  A u = A b with dependent rows in the data A (p, m)."""

    def objective(self, u: Tensor, x: Tensor, A: Tensor, b: Tensor) -> Tensor:
        return torch.cosh(u - x).sum()

    def equality(self, u: Tensor, x: Tensor, A: Tensor, b: Tensor) -> Tensor:
        return A @ (u - b)

    def init(self, x: Tensor, A: Tensor, b: Tensor) -> Tensor:
        return torch.zeros_like(x)


def _rows(draw: Draw, sizes: Sizes) -> tuple[Tensor, ...]:
    return draw.normal(*sizes), draw.positive(sizes[0])


def _total(draw: Draw, sizes: Sizes) -> tuple[Tensor, ...]:
    M, r = _rows(draw, sizes)
    return M, r, r.sum(-1)


def _transport(draw: Draw, sizes: Sizes) -> tuple[Tensor, ...]:
    m, n, k = sizes
    return draw.normal(m, n), draw.mass(m), draw.mass(n), 0.5 * draw.normal(k, m)


def _dependent_data(draw: Draw, sizes: Sizes) -> tuple[Tensor, ...]:
    m, p = sizes
    A = 0.3 * draw.normal(p + 1, m) + torch.eye(p + 1, m, dtype=draw.dtype)
    return _with_dependent_row(draw.normal(m), A, draw.normal(m))


def _with_dependent_row(x: Tensor, A: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    rows = A[..., :-1, :]
    last = (torch.arange(rows.shape[-2], dtype=A.dtype) - 0.4) @ rows
    return x, torch.cat([rows, last.unsqueeze(-2)], -2), b


CASES = (
    Case(
        name="repeated-rows",
        make_problem=RepeatedRows,
        inputs=_rows,
        sizes=((4, 3), (3, 3), (1, 3), (3, 1)),
        hessian="diagonal",
        solvers=SCHUR,
        dependent=True,
        notes="A carries the same rows twice, the second time with the factor -2; r occurs in both",
    ),
    Case(
        name="total-and-rows",
        make_problem=TotalAndRows,
        inputs=_total,
        sizes=((4, 3), (3, 3), (1, 3)),
        hessian="scaled-identity",
        solvers=SCHUR,
        consistent=lambda M, r, t: (M, r, r.sum(-1) + 0 * t),
        dependent=True,
    ),
    Case(
        name="quadratic-transport",
        make_problem=QuadraticTransport,
        inputs=_transport,
        sizes=((4, 3, 2), (3, 3, 3)),
        hessian="kronecker",
        solvers=DENSE_KKT,
        consistent=lambda M, r, c, W: (M, r / r.sum(-1, keepdim=True), c / c.sum(-1, keepdim=True), W),
        dependent=True,
        notes="marginals with blocks: the columns of P are coupled within the column",
    ),
    Case(
        name="dependent-data",
        make_problem=DependentData,
        inputs=_dependent_data,
        sizes=((5, 2),),
        hessian="diagonal",
        consistent=_with_dependent_row,
        dependent=True,
        notes="the dependence is in the numbers, not in the declaration: nothing proves it, a rank-revealing "
        "factorisation must find it; A's own gradient exists only along directions that keep the rank",
    ),
)
