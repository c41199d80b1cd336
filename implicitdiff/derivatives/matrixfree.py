"""The last rung of the ladder: nothing is formed, K is known by its products alone and solved by MINRES.

In: a trace. Out: a `MatrixFreePlan`, exact to its tolerance, with memory of a few vectors. Next: `plan.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from implicitdiff.derivatives import flat
from implicitdiff.derivatives.autodiff import AutodiffPlan
from implicitdiff.derivatives.factor import FactoredBy, KKTFactor, Solution
from implicitdiff.derivatives.lagrangian import Leaves, pullback
from implicitdiff.operators import LinearOperator, MatrixFree
from implicitdiff.status import Status

Product = Callable[[Tensor], Tensor]


class MatrixFreePlan(AutodiffPlan):
    """A Plan whose solves are iterations of one Hessian-vector product and two products with A each."""

    def kkt_factor(self, u: Leaves, lam: Leaves, theta: Leaves, shift: Tensor | None = None) -> KKTFactor:
        """Products with K, linearised once; each solve is a run of MINRES, which needs K symmetric but not definite.

        Started at 0 its iterates stay in the range of K, so dependent constraints give the solution of minimum norm. A
        right-hand side that is not in the range (a solution that is not unique) does not converge: NOT_CONVERGED.
        """
        shapes = (*self.variable_shapes, *self.constraint_shapes)
        count = len(u)

        def residual(*point: Tensor) -> Leaves:
            h = self.lagrangian.constraints(point[:count], theta)
            return (*self.lagrangian.gradient(point[:count], point[count:], theta), *(-leaf for leaf in h))

        _, pull = pullback(residual, (*u, *lam))
        diagonal = self.lagrangian.corner(theta, u[0])
        corner = None if diagonal is None else flat.join(diagonal, 1)

        def product(z: Tensor) -> Tensor:
            moved = flat.join(torch.func.vmap(pull)(flat.split(z, shapes)), 2)
            if corner is not None:
                moved = moved - torch.nn.functional.pad(z[..., self.size :] * corner, (self.size, 0))
            if shift is not None:
                moved = moved + torch.nn.functional.pad(
                    z[..., : self.size] * shift[:, None], (0, self.constraints)
                )
            return moved

        def solve(rhs_u: Leaves, rhs_h: Leaves) -> Solution:
            z, converged = minres(product, flat.join((*rhs_u, *rhs_h), 2))
            status = torch.where(converged.all(0), Status.OK.value, Status.NOT_CONVERGED.value).to(torch.int8)
            finite = torch.isfinite(z).all(2).all(0)
            status = torch.where(finite, status, Status.NONFINITE.value).to(torch.int8)
            leaves = flat.split(z, shapes)
            return leaves[:count], leaves[count:], status

        return FactoredBy(solve)

    def multipliers(self, u: Leaves, theta: Leaves) -> Leaves:
        """lam by conjugate gradients on A A'lam = A D_u f, which is consistent; of minimum norm, started at 0."""
        if not self.constraint_shapes:
            return ()
        slope = self.lagrangian.objective_gradient(u, theta)
        zeros = tuple(
            leaf.new_zeros((leaf.shape[0], *shape)) for leaf in u[:1] for shape in self.constraint_shapes
        )
        _, pull = pullback(lambda *v: self.lagrangian.constraints(v, theta), u)
        _, push = pullback(lambda *s: self.lagrangian.constraint_pullback(u, theta, s), zeros)

        def product(s: Tensor) -> Tensor:
            return flat.join(push(pull(flat.split(s[0], self.constraint_shapes))), 1)[None]

        lam, _ = minres(product, flat.join(push(slope), 1)[None])
        return flat.split(lam[0], self.constraint_shapes)

    def hessian(self, u: Leaves, lam: Leaves, theta: Leaves) -> LinearOperator:
        """H as its product."""
        _, pull = pullback(lambda *v: self.lagrangian.gradient(v, lam, theta), u)
        batch, first = u[0].shape[0], u[0]

        def product(x: Tensor) -> Tensor:
            lead = x.shape[:-2]
            rows = x.reshape(-1, batch, self.size)
            moved = flat.join(torch.func.vmap(pull)(flat.split(rows, self.variable_shapes)), 2)
            return moved.reshape(*lead, batch, self.size)

        return MatrixFree(product, self.size, batch, first.dtype, first.device)


def minres(product: Product, rhs: Tensor, restarts: int = 4) -> tuple[Tensor, Tensor]:
    """Solve K x = rhs row by row, K symmetric, by MINRES (Paige and Saunders 1975), restarted on the true residual.

    Args:
        product: K applied to each row of a (R, B, N) tensor.
        rhs: (R, B, N).
        restarts: how often the true residual may be taken up again; each restart gains the digits that the
            recurrences of the one before lost.

    Returns:
        x (R, B, N), and (R, B) bool where |K x - rhs| <= eps^0.75 |rhs|. A row of zeros converges at once, to exact
        zeros.
    """
    size = torch.linalg.vector_norm(rhs, dim=-1)
    target = size * torch.finfo(rhs.dtype).eps ** 0.75
    x, residual = torch.zeros_like(rhs), rhs
    for _ in range(restarts):
        left = torch.linalg.vector_norm(residual, dim=-1)
        if not bool((left > target).any()):
            break
        x = x + _minres_run(product, residual, 0.5 * target)
        residual = rhs - product(x)
    return x, torch.linalg.vector_norm(residual, dim=-1) <= target


def _minres_run(product: Product, rhs: Tensor, target: Tensor) -> Tensor:
    """One run from x = 0 until each row's recurrence promises |residual| <= target, or the limit 5 N + 50 is reached.

    Lanczos builds a tridiagonal T with K V = V T; a QR factorisation of T by plane rotations is updated column by
    column (delta, epsilon the entries above the diagonal, gamma the diagonal), and x moves along d = V R^-1.
    """
    beta = torch.linalg.vector_norm(rhs, dim=-1, keepdim=True)
    x = torch.zeros_like(rhs)
    v_old, v = torch.zeros_like(rhs), _divide(rhs, beta)
    d_old, d = torch.zeros_like(rhs), torch.zeros_like(rhs)
    cosine, sine = -torch.ones_like(beta), torch.zeros_like(beta)
    above, epsilon, rest, beta_old = (torch.zeros_like(beta) for _ in range(4))
    rest = beta
    for _ in range(5 * rhs.shape[-1] + 50):
        active = rest.abs() > target[..., None]
        if not bool(active.any()):
            break
        moved = product(v) - beta_old * v_old
        alpha = (v * moved).sum(-1, keepdim=True)
        moved = moved - alpha * v
        beta_new = torch.linalg.vector_norm(moved, dim=-1, keepdim=True)
        # The previous rotation acts on this column, then a new one removes beta_new below the diagonal.
        upper = cosine * above + sine * alpha
        bar = sine * above - cosine * alpha
        next_epsilon, next_above = sine * beta_new, -cosine * beta_new
        gamma = torch.sqrt(bar * bar + beta_new * beta_new)
        cosine, sine = _divide(bar, gamma), _divide(beta_new, gamma)
        step = torch.where(active, cosine * rest, 0.0)
        rest = torch.where(active, sine * rest, rest)
        d_old, d = d, _divide(v - epsilon * d_old - upper * d, gamma)
        x = x + step * d
        v_old, v = v, _divide(moved, beta_new)
        beta_old, epsilon, above = beta_new, next_epsilon, next_above
    return x


def _divide(value: Tensor, by: Tensor) -> Tensor:
    """value / by, and 0 where `by` is 0: a row that is finished."""
    return torch.where(by == 0, 0.0, value / torch.where(by == 0, 1.0, by))
