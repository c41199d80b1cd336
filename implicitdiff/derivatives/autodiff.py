"""The dense rung of the ladder: Eqn. 3 of the seed paper by automatic differentiation, batched, for any traceable
problem.

In: a trace. Out: an `AutodiffPlan`, which answers every question a Plan is asked, exactly and without any structure:
A and H dense by vmapped vector-Jacobian products, K by LU. Next: `plan.py`, which takes this plan where nothing
better is proved, and `autograd/implicit.py`, which calls it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from implicitdiff.derivatives import flat
from implicitdiff.derivatives.factor import FactoredBy, KKTFactor, Solution
from implicitdiff.derivatives.kkt import SymmetricKKT
from implicitdiff.derivatives.lagrangian import Lagrangian, Leaves, pullback
from implicitdiff.derivatives.stationarity import Stationarity
from implicitdiff.graph.trace import Trace
from implicitdiff.operators import Dense, LinearOperator

# Rows of a dense derivative are made in chunks whose live intermediates stay near this many numbers:
# measured, eight rows at a time are two to three times faster than all of them where the inputs are large.
CHUNK_ENTRIES = 2**21


class AutodiffPlan:
    """A Plan (see `plan.Plan`) by torch.func on the traced functions of one sample.

    All tensors are plain (no gradient recorded, no functorch wrappers). Costs, with m variables, p constraints and n
    entries of theta a sample: H takes m gradients, (B, m, m) numbers; A takes p of h; K one LU of (m + p)^2.
    """

    def __init__(self, trace: Trace, analysis: Any) -> None:
        self.trace = trace
        self.analysis = analysis
        theta = (*trace.inputs, *trace.tensors)
        self.lagrangian = Lagrangian(trace, tuple(placeholder.batched for placeholder in theta))
        self.variable_shapes = tuple(tuple(placeholder.shape) for placeholder in trace.variables)
        self.constraint_shapes: tuple[tuple[int, ...], ...] = (
            () if trace.equality is None else tuple(tuple(shape) for shape in trace.equality.output_shapes)
        )
        self.size = sum(flat.sizes(self.variable_shapes))
        self.constraints = sum(flat.sizes(self.constraint_shapes))
        self.needs_multipliers = bool(self.constraint_shapes)

    # The point

    def value(self, u: Leaves, theta: Leaves) -> Tensor:
        """f, (B,)."""
        return self.lagrangian.objective(u, theta)

    def value_and_gradient(
        self, u: Leaves, theta: Leaves, lam: Leaves = (), penalty: Tensor | None = None
    ) -> tuple[Tensor, Leaves]:
        """f - lam'h + penalty |h|^2 / 2, (B,), with penalty (B,), and its gradient in u: one reverse pass."""

        def total(*v: Tensor) -> tuple[Tensor, Tensor]:
            value = self.lagrangian.objective(v, theta)
            if penalty is not None:
                h = flat.join(self.lagrangian.constraints(v, theta), 1)
                value = value - (flat.join(lam, 1) * h).sum(1) + 0.5 * penalty * (h * h).sum(1)
            return value.sum(), value

        gradient, value = torch.func.grad(total, argnums=tuple(range(len(u))), has_aux=True)(*u)
        return value, gradient

    def stationarity(self, u: Leaves, lam: Leaves, theta: Leaves) -> Stationarity:
        """D_u L and h with their scales.

        The terms that cancel inside D_u f are not visible to automatic differentiation. What stands in for them is
        |H d|_inf with d = (+-|u_i|)_i for a fixed pattern of signs: the size of D_u f's linear part in u, one
        Hessian-vector product. With constraints also |D_u f|_inf and |A'lam|_inf, which cancel each other. For h
        likewise: the larger of |A d|_inf and |A |u||_inf. A u that is 0 altogether counts as sqrt(eps) times the
            largest input, so
        that a minimum at 0 found up to rounding is a minimum.
        """
        gradient, pull = pullback(lambda *v: self.lagrangian.gradient(v, lam, theta), u)
        steps = self.steps(u, theta)
        signed = tuple(step * signs(step) for step in steps)
        scale = largest(pull(signed))
        if not self.constraint_shapes:
            return Stationarity(gradient, scale, (), torch.zeros_like(scale))
        constraint, pull_constraint = pullback(lambda *v: self.lagrangian.constraints(v, theta), u)
        pulled = pull_constraint(lam)
        slope = tuple(g + a for g, a in zip(gradient, pulled, strict=True))
        scale = torch.stack([scale, largest(slope), largest(pulled)]).amax(0)
        # A d by transposing the pullback s -> A's once more.
        zeros = tuple(torch.zeros_like(leaf) for leaf in constraint)
        _, push = pullback(lambda *s: self.lagrangian.constraint_pullback(u, theta, s), zeros)
        pushed = [push(direction) for direction in (signed, steps)]
        constraint_scale = torch.stack([largest(leaves) for leaves in pushed]).amax(0)
        return Stationarity(gradient, scale, constraint, constraint_scale)

    def steps(self, u: Leaves, theta: Leaves) -> Leaves:
        """|u|, or sqrt(eps) times the largest input where u is smaller altogether: see `stationarity`."""
        batch = u[0].shape[0]
        floor = torch.zeros(batch, dtype=u[0].dtype, device=u[0].device)
        for value, batched in zip(theta, self.lagrangian.batched, strict=True):
            if value.is_floating_point() and value.numel():
                entries = value.detach().abs()
                floor = torch.maximum(floor, entries.reshape(batch, -1).amax(1) if batched else entries.max())
        floor = floor * torch.finfo(u[0].dtype).eps ** 0.5
        lift = torch.where(largest(u) > floor, 0.0, floor)
        return tuple(leaf.abs() + _per_sample(lift, leaf) for leaf in u)

    def multipliers(self, u: Leaves, theta: Leaves) -> Leaves:
        """lam of smallest norm among those that minimise |A'lam - D_u f|, from the singular values of A: O(m p^2)."""
        if not self.constraint_shapes:
            return ()
        slope = flat.join(self.lagrangian.objective_gradient(u, theta), 1)
        jacobian = self.constraint_jacobian(u, theta)
        finite = torch.isfinite(jacobian).all(-1).all(-1) & torch.isfinite(slope).all(-1)
        left, values, right = torch.linalg.svd(
            torch.where(finite[:, None, None], jacobian, 0.0), full_matrices=False
        )
        cutoff = 10 * max(jacobian.shape[1:]) ** 0.5 * torch.finfo(values.dtype).eps
        zero = values <= cutoff * values.amax(1, keepdim=True)
        inverse = torch.where(zero, 0.0, 1 / torch.where(zero, 1.0, values))
        lam = (left @ (inverse[:, :, None] * (right @ slope[:, :, None])))[:, :, 0]
        return flat.split(torch.where(finite[:, None], lam, torch.nan), self.constraint_shapes)

    # The matrices

    def constraint_jacobian(self, u: Leaves, theta: Leaves) -> Tensor:
        """A, (B, p, m)."""
        batch = u[0].shape[0]
        if not self.constraint_shapes:
            return u[0].new_zeros((batch, 0, self.size))
        _, pull = pullback(lambda *v: self.lagrangian.constraints(v, theta), u)
        return self._rows(pull, self.constraint_shapes, u, theta)

    def hessian_matrix(self, u: Leaves, lam: Leaves, theta: Leaves) -> Tensor:
        """H = D_uu L, (B, m, m), symmetrised."""
        _, pull = pullback(lambda *v: self.lagrangian.gradient(v, lam, theta), u)
        rows = self._rows(pull, self.variable_shapes, u, theta)
        return (rows + rows.mT) / 2

    def hessian(self, u: Leaves, lam: Leaves, theta: Leaves) -> LinearOperator:
        """H as an operator."""
        return Dense(self.hessian_matrix(u, lam, theta), symmetric=True)

    def _rows(self, pull: Callable[..., Leaves], shapes: flat.Shapes, u: Leaves, theta: Leaves) -> Tensor:
        """The matrix (B, rows, m) whose rows are pull(e_i), in chunks."""
        batch, total = u[0].shape[0], sum(flat.sizes(shapes))
        live = sum(leaf.numel() for leaf in (*u, *theta)) + 1
        chunk = max(1, min(total, CHUNK_ENTRIES // live))
        parts = []
        for start in range(0, total, chunk):
            units = flat.basis(shapes, start, min(start + chunk, total), batch, u[0])
            parts.append(flat.join(torch.func.vmap(pull)(units), 2))
        rows = torch.cat(parts) if parts else u[0].new_zeros((0, batch, self.size))
        return rows.movedim(0, 1)

    def kkt_matrix(self, u: Leaves, lam: Leaves, theta: Leaves, shift: Tensor | None = None) -> Tensor:
        """K = [[H + shift I, -A'], [-A, -D]], (B, m + p, m + p); D = 0 but for rows that may be off."""
        hessian = self.hessian_matrix(u, lam, theta)
        if shift is not None:
            hessian = hessian + shift[:, None, None] * torch.eye(
                self.size, dtype=hessian.dtype, device=hessian.device
            )
        if not self.constraint_shapes:
            return hessian
        jacobian = self.constraint_jacobian(u, theta)
        diagonal = self.lagrangian.corner(theta, u[0])
        if diagonal is None:
            corner = hessian.new_zeros((hessian.shape[0], self.constraints, self.constraints))
        else:
            corner = torch.diag_embed(-flat.join(diagonal, 1))
        return torch.cat([torch.cat([hessian, -jacobian.mT], 2), torch.cat([-jacobian, corner], 2)], 1)

    def _inside(self, u: Leaves, lam: Leaves, theta: Leaves) -> tuple[Leaves, Tensor | None]:
        """u moved off the edge of the domain, and which unknowns (B, m + p) stay fixed there; None if none does."""
        if not any(bool((leaf == 0).any()) for leaf in u):
            return u, None
        moved, lost = self.lagrangian.inside(u, lam, theta)
        fixed = flat.join(lost, 1)
        if not bool(fixed.any()):
            return u, None
        return moved, torch.nn.functional.pad(fixed, (0, self.constraints))

    # The solves

    def kkt_factor(self, u: Leaves, lam: Leaves, theta: Leaves, shift: Tensor | None = None) -> KKTFactor:
        """K formed; its solutions are of minimum norm where constraints are dependent.

        Entries of u that underflowed to the edge of the domain do not move: their rows and columns are those of the
        identity, their w is 0.
        """
        inside, fixed = self._inside(u, lam, theta)
        matrix = self.kkt_matrix(inside, lam, theta, shift)
        if fixed is not None:
            identity = torch.eye(matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
            matrix = torch.where(fixed[:, :, None] | fixed[:, None, :], identity, matrix)
        factored = SymmetricKKT(matrix, self.size)
        count = len(u)

        def solve(rhs_u: Leaves, rhs_h: Leaves) -> Solution:
            columns = flat.join((*rhs_u, *rhs_h), 2).permute(1, 2, 0)
            if fixed is not None:
                columns = torch.where(fixed[:, :, None], 0.0, columns)
            z, status = factored.solve(columns)
            leaves = flat.split(z.permute(2, 0, 1), (*self.variable_shapes, *self.constraint_shapes))
            return leaves[:count], leaves[count:], status

        return FactoredBy(solve)

    def kkt_solve(
        self, u: Leaves, lam: Leaves, theta: Leaves, rhs_u: Leaves, rhs_h: Leaves, shift: Tensor | None = None
    ) -> Solution:
        """(w, s, status): K^-1 rhs for right-hand sides (R, B, *shape); see `kkt_factor`."""
        return self.kkt_factor(u, lam, theta, shift).solve(rhs_u, rhs_h)

    def vjp(
        self,
        u: Leaves,
        lam: Leaves,
        theta: Leaves,
        v_u: Leaves,
        v_lam: Leaves | None,
        needs: Sequence[bool],
        factor: KKTFactor | None = None,
    ) -> tuple[tuple[Tensor | None, ...], Tensor]:
        """The gradients in theta: K (w, s) = -(v_u, v_lam), then one pullback of <D_u L, w> - <h, s>."""
        if v_lam is None:
            v_lam = tuple(torch.zeros_like(leaf) for leaf in lam)
        rhs_u, rhs_h = tuple(-v[None] for v in v_u), tuple(-v[None] for v in v_lam)
        if factor is None:
            w, s, status = self.kkt_solve(u, lam, theta, rhs_u, rhs_h)
        else:
            w, s, status = factor.solve(rhs_u, rhs_h)
        first_w, first_s = tuple(leaf[0] for leaf in w), tuple(leaf[0] for leaf in s)
        u, _ = self._inside(u, lam, theta)
        return self.lagrangian.pull_inputs(u, lam, theta, first_w, first_s, needs), status


class ApproximatePlan(AutodiffPlan):
    """The constraints ignored: K is replaced by H alone, so the gradient is B'w with H w = -v, and s = 0."""

    def kkt_factor(self, u: Leaves, lam: Leaves, theta: Leaves, shift: Tensor | None = None) -> KKTFactor:
        """w = H^-1 rhs_u and s = 0."""
        matrix = self.hessian_matrix(u, lam, theta)
        if shift is not None:
            matrix = matrix + shift[:, None, None] * torch.eye(
                self.size, dtype=matrix.dtype, device=matrix.device
            )
        factored = SymmetricKKT(matrix, self.size)

        def solve(rhs_u: Leaves, rhs_h: Leaves) -> Solution:
            z, status = factored.solve(flat.join(rhs_u, 2).permute(1, 2, 0))
            w = flat.split(z.permute(2, 0, 1), self.variable_shapes)
            return w, tuple(torch.zeros_like(r) for r in rhs_h), status

        return FactoredBy(solve)


def largest(leaves: Sequence[Tensor]) -> Tensor:
    """The largest finite magnitude in each sample, (B,); 0 where there is none."""
    parts = [torch.nan_to_num(leaf.abs(), nan=0.0, posinf=0.0) for leaf in leaves if leaf.numel()]
    if not parts:
        return leaves[0].new_zeros(leaves[0].shape[0])
    return torch.stack([part.reshape(part.shape[0], -1).amax(1) for part in parts]).amax(0)


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *(1,) * (like.dim() - 1))


def signs(like: Tensor) -> Tensor:
    """A fixed pattern of +-1 without period, the same for each sample."""
    count = like[0].numel()
    index = torch.arange(count, dtype=torch.float64, device=like.device)
    pattern = torch.where(torch.cos(1.0 + 2.399963 * index + 0.37 * index.sqrt()) > 0, 1.0, -1.0)
    return pattern.to(like.dtype).reshape(like.shape[1:])
