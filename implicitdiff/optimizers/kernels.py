"""What an interior-point iteration asks of a problem: residuals, and steps through [[H + W, -A'], [-A, -D]].

A `Limited` comes in; a `Kernel` in flat form goes out: by the plan, with the structure of H in every step, or by
constant matrices where the problem is a quadratic program. Next: interior.py, which iterates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from implicitdiff.optimizers.iterate import pack, unpack
from implicitdiff.optimizers.limited import Limited
from implicitdiff.optimizers.matrices import Matrices, size_of, times
from implicitdiff.plan import Plan, interior_plan

Solve = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Residual:
    """At one point of every sample.

    Attributes:
        gradient: D_u (f - lam'h - mu'g), (B, m).
        scale: the largest of the terms that cancel in it, (B,).
        equality: h, (B, p).
        rows: g, (B, q).
        finite: whether all of it is, (B,).
    """

    gradient: Tensor
    scale: Tensor
    equality: Tensor
    rows: Tensor
    finite: Tensor

    def at(self, keep: Tensor) -> Residual:
        """Some samples, by their indices."""
        return Residual(
            self.gradient[keep], self.scale[keep], self.equality[keep], self.rows[keep], self.finite[keep]
        )


class Kernel(Protocol):
    """One call's functions for an interior-point method, in flat form: u (B, m), (lam, mu) (B, p + q)."""

    @property
    def exact(self) -> bool:
        """Whether a step of length t leaves exactly 1 - t of every linear residual: a quadratic program."""

    def residual(self, u: Tensor, multipliers: Tensor) -> Residual:
        """The first-order conditions."""

    def factor(self, u: Tensor, multipliers: Tensor, weight: Tensor, corner: Tensor) -> Solve:
        """(a, b) -> (w, s) with K (w, s) = (a, b), for W = diag(weight) (B, m), D = (0, corner) with corner (B, q)."""

    def narrowed(self, keep: Tensor) -> Kernel:
        """The kernel of some samples, by their indices."""


def kernel_of(limited: Limited) -> Kernel:
    """The cheaper kernel of a call."""
    if limited.matrices is not None:
        return QuadraticKernel(limited.matrices)
    return PlanKernel.of(limited)


@dataclass(frozen=True)
class PlanKernel:
    """By the interior plan: its KKT solve, with whatever structure H has."""

    limited: Limited
    plan: Plan
    exact: bool = False

    @staticmethod
    def of(limited: Limited) -> PlanKernel:
        """The kernel of a call."""
        return PlanKernel(limited, interior_plan(limited.plan))

    def residual(self, u: Tensor, multipliers: Tensor) -> Residual:
        """One pass of the plan."""
        limited, p = self.limited, self.limited.equalities
        corner = u.new_zeros((u.shape[0], multipliers.shape[1] - p))
        theta = limited.interior_theta(torch.zeros_like(u), corner)
        leaves = unpack(multipliers, limited.multiplier_shapes)
        found = self.plan.stationarity(limited.leaves(u), leaves, theta)
        gradient, joined = pack(found.gradient, u.shape[0], u), pack(found.constraint, u.shape[0], u)
        finite = torch.isfinite(torch.cat([u, multipliers, gradient, joined], 1)).all(1)
        return Residual(gradient, found.gradient_scale, joined[:, :p], joined[:, p:], finite)

    def factor(self, u: Tensor, multipliers: Tensor, weight: Tensor, corner: Tensor) -> Solve:
        """One factorisation of the plan."""
        limited = self.limited
        leaves = unpack(multipliers, limited.multiplier_shapes)
        factor = self.plan.kkt_factor(limited.leaves(u), leaves, limited.interior_theta(weight, corner))

        def solve(top: Tensor, bottom: Tensor) -> tuple[Tensor, Tensor]:
            w, s, _ = factor.solve(
                unpack(top[None], limited.variable_shapes), unpack(bottom[None], limited.multiplier_shapes)
            )
            batch = top.shape[0]
            return (
                pack([leaf[0] for leaf in w], batch, top),
                pack([leaf[0] for leaf in s], batch, top),
            )

        return solve

    def narrowed(self, keep: Tensor) -> PlanKernel:
        """Fewer samples."""
        return replace(self, limited=self.limited.narrowed(keep))


@dataclass(frozen=True)
class QuadraticKernel:
    """By the matrices of a quadratic program.

    A step eliminates the rows of G into H + W + G' D^-1 G, which stays positive definite for a convex program, and then
    works with S = A (.)^-1 A': two Cholesky factorisations of m and p.
    """

    matrices: Matrices
    exact: bool = True

    def residual(self, u: Tensor, multipliers: Tensor) -> Residual:
        """Four products."""
        terms = torch.stack(self.matrices.terms(u, multipliers))
        gradient = terms.sum(0)
        h, g = self.matrices.constraints(u)
        return Residual(gradient, terms.abs().amax(2).amax(0), h, g, torch.isfinite(gradient).all(1))

    def factor(self, u: Tensor, multipliers: Tensor, weight: Tensor, corner: Tensor) -> Solve:
        """With M = H + W + G' D^-1 G: M w - A's = a - G' D^-1 b_g, -A w = b_h, then s_g = -D^-1 (b_g + G w)."""
        rows, equality = self.matrices.rows, self.matrices.equality
        matrix = self.matrices.hessian.clone()
        matrix.diagonal(dim1=1, dim2=2).add_(weight)
        p = equality.shape[1]
        if rows.shape[1]:
            matrix.baddbmm_(rows.mT, rows / corner[:, :, None])
        # A direction without curvature that no constraint has in sight gets a breath of it.
        size = size_of(matrix)
        factor, info = torch.linalg.cholesky_ex(matrix)
        shift = 10 * torch.finfo(matrix.dtype).eps
        for _ in range(5):
            bad = info > 0
            if not bool(bad.any()):
                break
            matrix.diagonal(dim1=1, dim2=2).add_(torch.where(bad, shift * size, 0.0)[:, None])
            factor, info = torch.linalg.cholesky_ex(matrix)
            shift *= 100
        schur = None
        if p:
            half = torch.linalg.solve_triangular(factor, equality.mT, upper=False)
            whole = half.mT @ half
            # dependent equalities: the least that lets them pass
            whole.diagonal(dim1=1, dim2=2).add_(torch.finfo(whole.dtype).eps * size_of(whole)[:, None])
            schur, _ = torch.linalg.cholesky_ex(whole)
            spread = torch.linalg.solve_triangular(factor.mT, half, upper=True)

        def solve(top: Tensor, bottom: Tensor) -> tuple[Tensor, Tensor]:
            b_h, b_g = bottom[:, :p], bottom[:, p:]
            top = top - times(rows.mT, b_g / corner)
            w = torch.cholesky_solve(top[:, :, None], factor)[:, :, 0]
            s = b_h
            if schur is not None:
                s = -torch.cholesky_solve((b_h + times(equality, w))[:, :, None], schur)[:, :, 0]
                w = w + times(spread, s)
            return w, torch.cat([s, -(b_g + times(rows, w)) / corner], 1)

        return solve

    def narrowed(self, keep: Tensor) -> QuadraticKernel:
        """Fewer samples."""
        return QuadraticKernel(self.matrices.at(keep))
