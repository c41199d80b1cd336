"""Systems of equations r(u, x) = 0, by automatic differentiation: the symmetric system K with nothing but J in it.

In: a trace whose ``equality`` is the residual r and whose objective is 0. Out: ``EquationsLagrangian``, and the plans
``EquationsPlan`` (J by rows, one LU for J and J'), ``EquationsMatrixFreePlan`` (GMRES on products) and
``OneStepPlan``. Next: ``plan.py``, which chooses among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from implicitdiff.derivatives import flat
from implicitdiff.derivatives.autodiff import AutodiffPlan, largest, signs
from implicitdiff.derivatives.factor import FactoredBy, KKTFactor, Solution
from implicitdiff.derivatives.lagrangian import (
    Given,
    Lagrangian,
    Leaves,
    gradient_of,
    pullback,
    replaced,
    sum_of_products,
)
from implicitdiff.derivatives.stationarity import Stationarity
from implicitdiff.graph.trace import Trace
from implicitdiff.operators import Dense, LinearOperator, MatrixFree
from implicitdiff.solvers.gmres import gmres
from implicitdiff.solvers.lu import LUFactorization
from implicitdiff.status import Status


class EquationsLagrangian(Lagrangian):
    """L = -lam'r at lam = 0, the multipliers of a system of equations.

    u(x) minimises 0 under r(u, x) = 0, with lam = 0 for every x: D_u L = -J'lam and H = -sum lam_i D_uu r_i are 0
    there, and so are all their derivatives but those in lam, which does not move. What is left of K is
    [[0, -J'], [-J, 0]]: w is the solution of a system with J, s of one with J'. The methods say so, so that nothing is
    computed that is 0.
    """

    def objective(self, u: Given, theta: Given) -> Tensor:
        """0 for every sample, (B,)."""
        return u[0].new_zeros(u[0].shape[0])

    def gradient(self, u: Given, lam: Given, theta: Given) -> Leaves:
        """D_u L = 0, with the shapes of u."""
        return tuple(torch.zeros_like(leaf) for leaf in u)

    def inside(self, u: Given, lam: Given, theta: Given) -> tuple[Leaves, Leaves]:
        """u as it is: a residual has no edge of a domain to move off."""
        return tuple(u), tuple(torch.zeros_like(leaf, dtype=torch.bool) for leaf in u)

    def pull_inputs(
        self, u: Given, lam: Given, theta: Given, w: Given, s: Given, needs: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        """The gradient in theta of -<r, s>; None where not needed."""
        active = [index for index, need in enumerate(needs) if need]

        def weighted(*values: Tensor) -> Tensor:
            return -sum_of_products(self.constraints(u, replaced(theta, active, values)), s)

        found = dict(zip(active, gradient_of(weighted, [theta[i] for i in active]), strict=True))
        return tuple(found.get(index) for index in range(len(theta)))

    def kkt_product(self, u: Given, lam: Given, theta: Given, w: Given, s: Given) -> tuple[Leaves, Leaves]:
        """K z = (-J's, -J w)."""
        pulled = self.constraint_pullback(u, theta, s)
        pushed = gradient_of(lambda *t: sum_of_products(self.constraint_pullback(u, theta, t), w), tuple(s))
        return tuple(-leaf for leaf in pulled), tuple(-leaf for leaf in pushed)

    def kkt_form(
        self, u: Given, lam: Given, theta: Given, q: tuple[Leaves, Leaves], z: tuple[Leaves, Leaves]
    ) -> Tensor:
        """q'K z = -<J'z_s, q_w> - <J'q_s, z_w>, summed over the batch and over the right-hand sides (R, B, *shape)."""

        def one(q_u: Leaves, q_h: Leaves, z_u: Leaves, z_h: Leaves) -> Tensor:
            first = sum_of_products(self.constraint_pullback(u, theta, z_h), q_u)
            return -first - sum_of_products(self.constraint_pullback(u, theta, q_h), z_u)

        return torch.func.vmap(one)(*q, *z).sum()

    def input_tangent(
        self, u: Given, lam: Given, theta: Given, tangents: Sequence[Tensor | None]
    ) -> tuple[Leaves, Leaves]:
        """(0, -D_theta r theta'); by transposing the pullback twice, as in ``Lagrangian``."""
        active = [index for index, tangent in enumerate(tangents) if tangent is not None]
        moved = [tangent for tangent in tangents if tangent is not None]

        def paired(*s: Tensor) -> Tensor:
            def weighted(*values: Tensor) -> Tensor:
                return -sum_of_products(self.constraints(u, replaced(theta, active, values)), s)

            return sum_of_products(gradient_of(weighted, [theta[i] for i in active]), moved)

        return self.gradient(u, lam, theta), gradient_of(paired, [torch.zeros_like(leaf) for leaf in lam])


def lagrangian_of(trace: Trace, batched: tuple[bool, ...]) -> Lagrangian:
    """The differentiable functions of a trace: those of an optimisation problem, or of a system of equations."""
    return EquationsLagrangian(trace, batched) if trace.square else Lagrangian(trace, batched)


class EquationsPlan(AutodiffPlan):
    """A Plan (see ``plan.Plan``) for a system of equations: J dense by vmapped pullbacks, LU of J for J and J'.

    K (w, s) = (a, b) is J w = -b and J's = -a. With a shift sigma, which damping and Newton's method ask for, J^-1 is
    replaced by (J'J + sigma^2 I)^-1 J', the least-squares solution that pays for its length; it exists for every J.
    Costs, with m unknowns: m gradients of r for J, 2/3 m^3 for its factors, 2 m^2 for each right-hand side.
    """

    def __init__(self, trace: Trace, analysis: Any) -> None:
        super().__init__(trace, analysis)
        self.lagrangian = lagrangian_of(trace, self.lagrangian.batched)
        self.needs_multipliers = False

    def value(self, u: Leaves, theta: Leaves) -> Tensor:
        """0: there is no objective."""
        return self.lagrangian.objective(u, theta)

    def stationarity(self, u: Leaves, lam: Leaves, theta: Leaves) -> Stationarity:
        """r, with the scale it is measured against; D_u L is 0.

        The terms that cancel inside r are not visible to automatic differentiation. What stands in for them is the
        larger of |J d|_inf with d = (+-|u_i|)_i, for a fixed pattern of signs and for all positive ones: the size of
        the part of r that is linear in u. A u that is 0 altogether counts as sqrt(eps) times the largest input.
        """
        residual = self.lagrangian.constraints(u, theta)
        return Stationarity(
            self.lagrangian.gradient(u, lam, theta),
            u[0].new_zeros(u[0].shape[0]),
            residual,
            self.linear_scale(u, theta, residual),
        )

    def linear_scale(self, u: Leaves, theta: Leaves, residual: Leaves) -> Tensor:
        """max |J d|_inf (B,), see ``stationarity``: two products with J."""
        zeros = tuple(torch.zeros_like(leaf) for leaf in residual)
        _, push = pullback(lambda *s: self.lagrangian.constraint_pullback(u, theta, s), zeros)
        steps = self.steps(u, theta)
        signed = tuple(step * signs(step) for step in steps)
        return torch.stack([largest(push(direction)) for direction in (signed, steps)]).amax(0)

    def multipliers(self, u: Leaves, theta: Leaves) -> Leaves:
        """0."""
        return tuple(u[0].new_zeros((u[0].shape[0], *shape)) for shape in self.constraint_shapes)

    def hessian(self, u: Leaves, lam: Leaves, theta: Leaves) -> LinearOperator:
        """J = D_u r, which takes the place of H for a system of equations; not symmetric."""
        return Dense(self.constraint_jacobian(u, theta), symmetric=False)

    def kkt_factor(self, u: Leaves, lam: Leaves, theta: Leaves, shift: Tensor | None = None) -> KKTFactor:
        """J factored once, for solves with J and with J'."""
        jacobian = self.constraint_jacobian(u, theta)
        if shift is None:
            return self._by(_DenseJacobian(jacobian))
        return self._by(_DampedJacobian(jacobian, shift))

    def _by(self, factored: _DenseJacobian | _DampedJacobian) -> KKTFactor:
        """The solves of K by those of J and J', on leaves."""

        def solve(rhs_u: Leaves, rhs_h: Leaves) -> Solution:
            a, b = flat.join(rhs_u, 2), flat.join(rhs_h, 2)
            w = factored.solve(b, transposed=False) if bool(b.any()) else torch.zeros_like(a)
            s = factored.solve(a, transposed=True) if bool(a.any()) else torch.zeros_like(b)
            return (
                flat.split(-w, self.variable_shapes),
                flat.split(-s, self.constraint_shapes),
                factored.status,
            )

        return FactoredBy(solve)

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
        """The gradients in theta: J's = v, then the pullback of -<r, s>. Multipliers do not move: v_lam is not read."""
        rhs = tuple(-v[None] for v in v_u), tuple(torch.zeros_like(leaf)[None] for leaf in lam)
        _, s, status = (self.kkt_factor(u, lam, theta) if factor is None else factor).solve(*rhs)
        return self.lagrangian.pull_inputs(u, lam, theta, (), tuple(leaf[0] for leaf in s), needs), status


class _DenseJacobian:
    """J^-1 and J'^-1 by one LU with scaling and a condition estimate; see ``solvers/scaled.py``."""

    def __init__(self, jacobian: Tensor) -> None:
        self._factor = LUFactorization(jacobian, symmetric=False)
        self.status = self._factor.status

    def solve(self, rows: Tensor, *, transposed: bool) -> Tensor:
        """J^-1 or J'^-1 applied to rows (R, B, m)."""
        return self._factor.solve_transposed(rows) if transposed else self._factor.solve(rows)


class _DampedJacobian:
    """J (J'J + sigma^2 I)^-1 in the place of J'^-1, its transpose in that of J^-1, from the singular values of J."""

    def __init__(self, jacobian: Tensor, shift: Tensor) -> None:
        finite = torch.isfinite(jacobian).all(-1).all(-1)
        left, values, right = torch.linalg.svd(torch.where(finite[:, None, None], jacobian, 0.0))
        damped = values * values + (shift * shift)[:, None]
        zero = damped <= (torch.finfo(values.dtype).eps * values.amax(1, keepdim=True)) ** 2
        inverse = torch.where(zero, torch.nan, values / torch.where(zero, 1.0, damped))
        self._forward = right.mT @ (inverse[:, :, None] * left.mT)
        lost = torch.where(zero.any(1), Status.SINGULAR.value, Status.OK.value)
        self.status = torch.where(finite, lost, Status.NONFINITE.value).to(torch.int8)

    def solve(self, rows: Tensor, *, transposed: bool) -> Tensor:
        """The damped inverse, or its transpose, applied to rows (R, B, m)."""
        matrix = self._forward.mT if transposed else self._forward
        return (matrix @ rows[..., None])[..., 0]


class EquationsMatrixFreePlan(EquationsPlan):
    """A Plan whose solves are runs of GMRES on products with J or J'; nothing m x m is formed."""

    def kkt_factor(self, u: Leaves, lam: Leaves, theta: Leaves, shift: Tensor | None = None) -> KKTFactor:
        """Products with J and J', linearised once. A shift adds sigma^2 by the normal equations."""
        residual, pull = pullback(lambda *v: self.lagrangian.constraints(v, theta), u)
        zeros = tuple(torch.zeros_like(leaf) for leaf in residual)
        _, push = pullback(lambda *s: self.lagrangian.constraint_pullback(u, theta, s), zeros)

        def by_j(x: Tensor) -> Tensor:
            return flat.join(torch.func.vmap(push)(flat.split(x, self.variable_shapes)), 2)

        def by_jt(x: Tensor) -> Tensor:
            return flat.join(torch.func.vmap(pull)(flat.split(x, self.constraint_shapes)), 2)

        def one(rhs: Tensor, *, transposed: bool) -> tuple[Tensor, Tensor]:
            product, other = (by_jt, by_j) if transposed else (by_j, by_jt)
            if shift is None:
                return gmres(product, rhs)
            weight = (shift * shift)[:, None]
            return gmres(lambda x: other(product(x)) + weight * x, other(rhs))

        def solve(rhs_u: Leaves, rhs_h: Leaves) -> Solution:
            w, first = one(flat.join(rhs_h, 2), transposed=False)
            s, second = one(flat.join(rhs_u, 2), transposed=True)
            converged = (first & second).all(0)
            status = torch.where(converged, Status.OK.value, Status.NOT_CONVERGED.value).to(torch.int8)
            finite = (torch.isfinite(w).all(2) & torch.isfinite(s).all(2)).all(0)
            status = torch.where(finite, status, Status.NONFINITE.value).to(torch.int8)
            return flat.split(-w, self.variable_shapes), flat.split(-s, self.constraint_shapes), status

        return FactoredBy(solve)

    def hessian(self, u: Leaves, lam: Leaves, theta: Leaves) -> LinearOperator:
        """J as its products."""
        residual, pull = pullback(lambda *v: self.lagrangian.constraints(v, theta), u)
        zeros = tuple(torch.zeros_like(leaf) for leaf in residual)
        _, push = pullback(lambda *s: self.lagrangian.constraint_pullback(u, theta, s), zeros)
        batch, first = u[0].shape[0], u[0]

        def lifted(map_rows: Any, shapes: flat.Shapes) -> Any:
            def product(x: Tensor) -> Tensor:
                rows = x.reshape(-1, batch, self.size)
                return flat.join(torch.func.vmap(map_rows)(flat.split(rows, shapes)), 2).reshape(x.shape)

            return product

        return MatrixFree(
            lifted(push, self.variable_shapes),
            self.size,
            batch,
            first.dtype,
            first.device,
            lifted(pull, self.constraint_shapes),
        )


class OneStepPlan(EquationsPlan):
    """J taken for the identity: the gradient of one step from the solution, v' D_x step, which is not exact.

    Known as one-step or Jacobian-free differentiation (Fung et al., 2022; Bolte et al., 2023): the error is of the
    order of |D_u step|.
    """

    def kkt_factor(self, u: Leaves, lam: Leaves, theta: Leaves, shift: Tensor | None = None) -> KKTFactor:
        """w = -b, s = -a."""

        def solve(rhs_u: Leaves, rhs_h: Leaves) -> Solution:
            status = torch.zeros(rhs_u[0].shape[1], dtype=torch.int8, device=rhs_u[0].device)
            return tuple(-leaf for leaf in rhs_h), tuple(-leaf for leaf in rhs_u), status

        return FactoredBy(solve)
