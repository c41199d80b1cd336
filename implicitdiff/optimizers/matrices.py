"""A quadratic program as its matrices, made once a call: everything an optimizer asks of it is then a few products.

A plan for interior-point steps comes in; `Matrices` goes out. Next: limited.py, which answers with them where the
operations of a problem show that it is a quadratic program, and kernels.py, which steps with them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from implicitdiff.derivatives.kkt import SymmetricKKT
from implicitdiff.derivatives.lagrangian import Lagrangian
from implicitdiff.optimizers.iterate import pack
from implicitdiff.plan import Plan


@dataclass(frozen=True)
class Matrices:
    """min u'Hu/2 + c'u s.t. A u + b = 0, G u + d <= 0, for each sample.

    Attributes:
        hessian: H (B, m, m). slope: c (B, m). equality: A (B, p, m). offset: b (B, p). rows: G (B, q, m).
        limit: d (B, q).
    """

    hessian: Tensor
    slope: Tensor
    equality: Tensor
    offset: Tensor
    rows: Tensor
    limit: Tensor

    @staticmethod
    def of(
        plan: Plan,
        lagrangian: Lagrangian,
        zero: tuple[Tensor, ...],
        multipliers: tuple[Tensor, ...],
        theta: tuple[Tensor, ...],
        p: int,
    ) -> Matrices:
        """From the derivatives of a plan at u = 0; the first p of its constraints are equalities."""
        batch, like = zero[0].shape[0], zero[0]
        hessian = plan.hessian(zero, multipliers, theta).to_dense()
        jacobian = plan.constraint_jacobian(zero, theta)
        offset = pack(lagrangian.constraints(zero, theta), batch, like)
        m = hessian.shape[-1]
        return Matrices(
            ((hessian + hessian.mT) / 2).expand(batch, m, m),
            pack(lagrangian.objective_gradient(zero, theta), batch, like),
            jacobian[:, :p],
            offset[:, :p],
            jacobian[:, p:],
            offset[:, p:],
        )

    def at(self, keep: Tensor) -> Matrices:
        """Some samples, by their indices."""
        return Matrices(
            self.hessian[keep],
            self.slope[keep],
            self.equality[keep],
            self.offset[keep],
            self.rows[keep],
            self.limit[keep],
        )

    # ---------------------------------------------------------------- at a point

    def terms(self, u: Tensor, multipliers: Tensor) -> list[Tensor]:
        """The terms of D_u (f - lam'h - mu'g), (B, m) each."""
        p = self.offset.shape[1]
        found = [times(self.hessian, u), self.slope]
        if p:
            found.append(-times(self.equality.mT, multipliers[:, :p]))
        if self.limit.shape[1]:
            found.append(-times(self.rows.mT, multipliers[:, p:]))
        return found

    def constraints(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """(h, g)."""
        return times(self.equality, u) + self.offset, times(self.rows, u) + self.limit

    def row_sizes(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """(size of each row of G, size of the terms that cancel in each entry of g), (B, q)."""
        if not self.limit.shape[1]:
            return self.limit, self.limit
        size = self.rows.abs()
        return size.amax(2), torch.maximum((size * u.abs()[:, None]).amax(2), self.limit.abs())

    def gradient_scale(self, u: Tensor) -> Tensor:
        """The largest of the terms that cancel in D_u f, (B,)."""
        return torch.maximum(times(self.hessian, u).abs().amax(1), self.slope.abs().amax(1))

    # ---------------------------------------------------------------- on an active set

    def on_active_set(
        self, u: Tensor, multipliers: Tensor, limit: Tensor, fixed: Tensor, rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The solution with some entries fixed to `limit` (B, m) and some rows of g held at 0: (u, (lam, mu)).

        Two Newton steps with one factorisation, the second for the digits: F H F + (I - F) and S + D by Cholesky; as
        one matrix where these fail.
        """
        p = self.offset.shape[1]
        u = torch.where(fixed, limit, u)
        free, on = (~fixed).to(u.dtype), rows.to(u.dtype)
        matrix = free[:, :, None] * self.hessian * free[:, None, :]
        matrix.diagonal(dim1=1, dim2=2).add_(1 - free)
        jacobian = torch.cat([self.equality, on[:, :, None] * self.rows], 1) * free[:, None]
        keep = torch.nn.functional.pad(on, (p, 0), value=1.0)
        multipliers = multipliers * keep
        factor, info = torch.linalg.cholesky_ex(matrix)
        half = torch.linalg.solve_triangular(factor, jacobian.mT, upper=False)
        whole = half.mT @ half
        whole.diagonal(dim1=1, dim2=2).add_(1 - keep)
        schur, failed = torch.linalg.cholesky_ex(whole)
        spread = torch.linalg.solve_triangular(factor.mT, half, upper=True)
        pivots = schur.diagonal(dim1=1, dim2=2).square() / whole.diagonal(dim1=1, dim2=2)
        eps = torch.finfo(u.dtype).eps
        bad = (
            (info > 0)
            | (failed > 0)
            | (factor.diagonal(dim1=1, dim2=2).square().amin(1) <= eps * size_of(matrix))
        )
        if pivots.shape[1]:
            bad = bad | (pivots.amin(1) <= 1e3 * eps)
        rescue = None
        if bool(bad.any()):
            corner = torch.diag_embed(keep - 1)
            top = torch.cat([matrix, -jacobian.mT], 2)
            rescue = SymmetricKKT(torch.cat([top, torch.cat([-jacobian, corner], 2)], 1)[bad], u.shape[1])
        for _ in range(2):
            gradient = torch.stack(self.terms(u, multipliers)).sum(0) * free
            h, g = self.constraints(u)
            below = torch.cat([h, on * g], 1)
            w = -torch.cholesky_solve(gradient[:, :, None], factor)[:, :, 0]
            s = -torch.cholesky_solve((below + times(jacobian, w))[:, :, None], schur)[:, :, 0]
            w = w + times(spread, s)
            if rescue is not None:
                columns = torch.cat([-gradient, below], 1)[bad][:, :, None]
                z = rescue.solve(columns)[0][:, :, 0]
                w, s = w.index_put((bad,), z[:, : u.shape[1]]), s.index_put((bad,), z[:, u.shape[1] :])
            u, multipliers = u + free * w, multipliers + keep * s
        return u, multipliers


def times(matrix: Tensor, vector: Tensor) -> Tensor:
    """Matrix (B, r, m) by vector (B, m)."""
    return (matrix @ vector[:, :, None])[:, :, 0]


def size_of(matrix: Tensor) -> Tensor:
    """The largest entry of each diagonal, (B,)."""
    return matrix.diagonal(dim1=1, dim2=2).abs().amax(1)
