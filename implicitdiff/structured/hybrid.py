"""The plan of a problem that declares its Hessian: the structure is the user's, everything else is derived.

In: a trace and a `DeclaredHessian`. Out: `HybridPlan`. Every H is held against a Hessian-vector product by automatic
differentiation before it is used, since a promise is no proof. Next file: `plan.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from implicitdiff import solvers
from implicitdiff.derivatives import flat
from implicitdiff.derivatives.autodiff import AutodiffPlan
from implicitdiff.derivatives.factor import FactoredBy, KKTFactor, Solution
from implicitdiff.derivatives.lagrangian import Leaves, pullback
from implicitdiff.errors import OptionError, StructureError
from implicitdiff.graph.trace import Trace
from implicitdiff.kkt import saddle
from implicitdiff.memory import over_limit
from implicitdiff.operators import Autodiff, LinearOperator, MatrixFree, simplified
from implicitdiff.status import Status
from implicitdiff.structure.probe import direction
from implicitdiff.structure.report import Analysis, Fallback, MatrixReport
from implicitdiff.structured.hook import DeclaredHessian, rebuilt

SAMPLES_NAMED = 8
WRITTEN_OUT = 500
"""Up to this many variables terms of automatic differentiation are written out, one product a column; beyond, a sum
with such terms is solved by conjugate gradients, with the diagonal of the other terms as preconditioner."""


class HybridPlan(AutodiffPlan):
    """An `AutodiffPlan` whose H is the declared operator, factored by what its kind allows.

    Without constraints a solve is one with H; with them K is solved through S = A H^-1 A', which takes p solves with H,
    and samples where that fails (a singular H) by K as one matrix, unless that is too large. Damped solves take the
    dense H.
    """

    def __init__(self, trace: Trace, declared: DeclaredHessian, linear_solver: str) -> None:
        super().__init__(trace, None)
        self.declared = declared
        operator = self._as_one(rebuilt(declared.template, lambda tensor: tensor, _without_data))
        constrained = self.constraints > 0
        wanted = "auto" if constrained and linear_solver == "schur" else linear_solver
        try:
            self.choice = solvers.choose(operator, wanted, many=constrained)
        except OptionError as error:
            raise OptionError(f"{declared.name}: {error}") from error
        self.analysis = self._found(declared.template, operator)

    def _found(self, declared: LinearOperator, used: LinearOperator) -> Analysis:
        reason = f"declared by {self.declared.name}, held against a product by automatic differentiation at each solve"
        if declared.kind != used.kind:
            reason += f"; solved as {used.kind}"
        p, m = self.constraints, self.size
        return Analysis(
            hessian=MatrixReport(declared.kind, (m, m), reason),
            constraint_jacobian=MatrixReport("dense" if p else "zero", (p, m), "by automatic differentiation")
            if p
            else MatrixReport("zero", (0, m), "there are no constraints"),
            schur=MatrixReport("dense", (p, p), "formed from p solves with H") if p else None,
            solver="schur" if p else self.choice.solver.name,
            rejected=tuple(self.choice.rejected),
            fallbacks=(Fallback("", "", "A and the input gradients are differentiated automatically"),),
        )

    def _as_one(self, operator: LinearOperator) -> LinearOperator:
        """The operator that is factored: of one kind where its terms make one, written out where it is small enough."""
        return simplified(operator, write_out=self.size <= WRITTEN_OUT)

    def hessian(self, u: Leaves, lam: Leaves, theta: Leaves) -> LinearOperator:
        """H as declared, after the probe."""
        given = theta[: len(theta) - len(self.trace.captured)] if self.trace.captured else theta
        batched = self.lagrangian.batched[: len(given)]
        operator = self.declared.operator(u, lam, given, batched)
        self._probe(operator, u, lam, theta)
        return operator

    def _probe(self, operator: LinearOperator, u: Leaves, lam: Leaves, theta: Leaves) -> None:
        """Hold H x against D_u (D_u L) x for a fixed x, in every sample.

        Raises:
            StructureError: they differ by more than eps^(1/3) of the larger one; samples whose product is not finite
                prove nothing.
        """
        batch = u[0].shape[0]
        if not batch or u[0].is_meta:
            return
        _, pull = pullback(lambda *v: self.lagrangian.gradient(v, lam, theta), u)
        x = tuple(direction(leaf[0], 1.0 + k).expand_as(leaf) for k, leaf in enumerate(u))
        truth, claimed = flat.join(pull(x), 1), operator.matvec(flat.join(x, 1))
        size = torch.maximum(truth.abs().amax(1), claimed.abs().amax(1))
        finite = torch.isfinite(truth).all(1)
        wrong = finite & ~((claimed - truth).abs().amax(1) <= torch.finfo(size.dtype).eps ** (1 / 3) * size)
        samples = torch.nonzero(wrong)[:, 0].tolist()
        if not samples:
            return
        entry = int((claimed - truth)[samples[0]].abs().argmax())
        pair = f"{float(claimed[samples[0], entry]):.6g} and {float(truth[samples[0], entry]):.6g}"
        shown = ", ".join(map(str, samples[:SAMPLES_NAMED])) + (
            ", ..." if len(samples) > SAMPLES_NAMED else ""
        )
        raise StructureError(
            f"{self.declared.name} contradicts the declared functions in sample{'s' * (len(samples) > 1)} {shown} of "
            f"{batch}: entry {entry} of a product with it is {pair} by automatic differentiation. It has to be D_uu of "
            "the Lagrangian f - lambda'h, over the entries of u in order; leave it out, or use backward='dense', to go "
            "without it"
        )

    def kkt_factor(self, u: Leaves, lam: Leaves, theta: Leaves, shift: Tensor | None = None) -> KKTFactor:
        """H factored by its kind, and S with constraints; the dense K where that has no answer."""
        _, fixed = self._inside(u, lam, theta)
        if shift is not None or fixed is not None:
            return super().kkt_factor(u, lam, theta, shift)
        factor = self.choice.solver.factor(self._as_one(self.hessian(u, lam, theta)))
        count, shapes = len(u), (*self.variable_shapes, *self.constraint_shapes)
        system = saddle.RangeSpace(factor, self.constraint_jacobian(u, theta)) if self.constraints else None

        def solve(rhs_u: Leaves, rhs_h: Leaves) -> Solution:
            a, batch = flat.join(rhs_u, 2), rhs_u[0].shape[1]
            if system is None:
                leaves = flat.split(factor.solve(a), shapes)
                status = factor.status.expand(batch)
                bad = status == Status.NOT_CONVERGED
            else:
                w, s = system.solve(a, flat.join(rhs_h, 2))
                status = system.status.expand(batch)
                leaves = flat.split(torch.cat([w, s], 2), shapes)
                bad = (status != Status.OK) & (status != Status.INDEFINITE)
            if not bool(bad.any()) or over_limit("K", self.size + self.constraints, a.element_size()):
                return leaves[:count], leaves[count:], status
            whole_w, whole_s, verdict = super(HybridPlan, self).kkt_factor(u, lam, theta).solve(rhs_u, rhs_h)
            mended = tuple(
                torch.where(bad.reshape(1, -1, *(1,) * (mine.dim() - 2)), theirs, mine)
                for mine, theirs in zip(leaves, (*whole_w, *whole_s), strict=True)
            )
            return mended[:count], mended[count:], torch.where(bad, verdict, status)

        return FactoredBy(solve)


def _without_data(term: Autodiff) -> LinearOperator:
    """A matrix of the same size known by its products, for the choice of a solver."""
    return MatrixFree(lambda x: x, term.size, 1, term.dtype, term.device)
