"""The structured plan of a system of equations r(u, x) = 0: emitted code around solves with J and with J'.

In: a `Trace` whose `equality` is the residual. Out: `SquarePlan`, a `StructuredPlan` with J in the place of H: D_x u =
-J^-1 D_x r, so the backward pass is one solve with J' and one pullback of -<r, s>. Next file: `plan.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from implicitdiff.derivatives.declared import Declared
from implicitdiff.derivatives.equations import EquationsPlan
from implicitdiff.derivatives.factor import KKTFactor, Solution
from implicitdiff.derivatives.stationarity import Stationarity
from implicitdiff.graph.calls import Output
from implicitdiff.graph.ir import BATCHED, STACKED, Ref
from implicitdiff.kkt.route import Route
from implicitdiff.kkt.square import SquareSystem, jacobian_form
from implicitdiff.structure.forms import Form
from implicitdiff.structure.report import Analysis, MatrixReport
from implicitdiff.structured import merge
from implicitdiff.structured.arguments import Arguments, Leaves
from implicitdiff.structured.describe import jacobian_derivation
from implicitdiff.structured.factor import StructuredFactor
from implicitdiff.structured.outputs import Recipes, Way
from implicitdiff.structured.plan import StructuredPlan, Values
from implicitdiff.structured.writer import Recipe, Written

FORWARD: Way = "route"
"""The way of a solve with J."""
TRANSPOSED: Way = "transposed"
"""The way of a solve with J'."""


class SquareRecipes(Recipes):
    """What each emitted function computes."""

    def __init__(self, declared: Declared, form: Form, linear_solver: str, dtype: torch.dtype) -> None:
        self.declared, self.build, self.form = declared, declared.build, form
        self.linear_solver, self.dtype = linear_solver, dtype
        self.arguments = Arguments(declared)
        self.system = SquareSystem(declared, form, linear_solver, dtype)

        self.first = TRANSPOSED

    @property
    def route(self) -> Route:
        """How systems with J are solved."""
        return self.system.route

    def stationarity(self) -> Recipe:
        """r, and the largest of the terms that cancel in it."""
        values = [c.value for c in self.declared.constraints]
        outputs = [Output(c.name, c.value, c.labels) for c in self.declared.constraints]
        return Recipe([*outputs, Output("scale", self._largest(values), ())], [])

    def one_side(self, way: Way, *, given: bool) -> Recipe:
        """-J^-1 rhs_h, or -J'^-1 rhs_u."""
        on_u, on_h = self._sides("rhs_u", "rhs_h", STACKED)
        transposed = way == TRANSPOSED
        rhs = on_u if transposed else self.system.joined(on_h, STACKED)
        found, status = self.system.solve(
            [self.build.scale(-1.0, ref) for ref in rhs], STACKED, transposed=transposed
        )
        if transposed:
            found = self.system.parts(found)
            outputs = [
                Output(c.name, ref, c.labels, prefix=STACKED)
                for c, ref in zip(self.declared.constraints, found, strict=True)
            ]
        else:
            rows = self.declared.space.rows
            outputs = [Output(f"w{k}", ref, rows[k], prefix=STACKED) for k, ref in enumerate(found)]
        return Recipe(
            [*outputs, self.verdict(status, found, STACKED)], found, self._given(way) if given else {}
        )

    def kkt_factor(self, way: Way, *, shifted: bool) -> Recipe:
        """The factorisation of J or J'; nothing where J is only divided by."""
        return Recipe([Output(name, ref, (), prefix=-1) for name, ref in self._given(way).items()], [])

    def _given(self, way: Way) -> dict[str, Ref]:
        ref = self.system.factor(transposed=way == TRANSPOSED)
        return {} if ref is None else {ref.node.data[-1]: ref}

    def kkt_product(self) -> Recipe:
        """K (rhs_u, rhs_h) = (-J' rhs_h, -J rhs_u): what the probe tests."""
        on_u, on_h = self._sides("rhs_u", "rhs_h", STACKED)
        pulled = self.system.product(self.system.joined(on_h, STACKED), STACKED, transposed=True)
        pushed = self.system.parts(self.system.product(on_u, STACKED, transposed=False))
        return Recipe(
            self._pair(*([self.build.scale(-1.0, ref) for ref in refs] for refs in (pulled, pushed))), []
        )

    def vjp(self, way: Way, wanted: Sequence[bool], *, with_lam: bool, given: bool = False) -> Recipe:
        """-D_theta <r, s> with J's = v, for the theta that are wanted."""
        declared, build = self.declared, self.build
        v, _ = self._sides("v", "v_lam", BATCHED)
        found, status = self.system.solve(v, BATCHED, transposed=True)
        held = [build.hold(ref) for ref in self.system.parts(found)]
        gradients = declared.input_gradients([build.number(0.0) for _ in v], held)
        outputs = self._gradient_outputs(gradients, wanted, 1.0, [])
        verdict = self.verdict(status, held, BATCHED)
        return Recipe([*outputs, verdict], [*held, *status], self._given(way) if given else {})

    def hessian(self) -> Recipe:
        """J as an operator."""
        return Recipe([Output("jacobian", self.system.operator(), (), prefix=-1)], [])


class SquarePlan(StructuredPlan):
    """A system of equations' plan; see `StructuredPlan`. Where values are not finite or J is damped, the dense plan
    answers."""

    document: ClassVar[str] = "-D_theta <r, s> with J's = v, J = D_u r"
    dense: EquationsPlan
    recipes: SquareRecipes

    def _derived(self, linear_solver: str, dtype: torch.dtype) -> tuple[Form, Recipes]:
        form = jacobian_form(self.declared)
        return form, SquareRecipes(self.declared, form, linear_solver, dtype)

    def _reported(self, form: Form, code: str) -> Analysis:
        route, m = self.recipes.route, form.space.size
        return Analysis(
            hessian=MatrixReport(form.kind, (m, m), form.reason),
            constraint_jacobian=MatrixReport("zero", (0, m), "there are no constraints"),
            schur=None,
            solver=route.solver,
            rejected=route.rejected,
            code=code,
            derivation=jacobian_derivation(self.declared, form),
        )

    def value(self, u: Leaves, theta: Leaves) -> Tensor:
        """0: there is no objective."""
        return self.dense.value(u, theta)

    def stationarity(self, u: Leaves, lam: Leaves, theta: Leaves) -> Stationarity:
        """r, with the largest of the terms that cancel in it; D_u L is 0.

        Where that term is no larger than r, as in r = tanh(u - x), the part of r that is linear in u counts too.
        """
        function = self.writer.function("stationarity", "stationarity", "r, scale", self.recipes.stationarity)
        out = function(self.arguments.point(u, lam, theta))
        batch = u[0].shape[0]
        residual = self.arguments.joined([c.expand(batch, *c.shape[1:]) for c in out[:-1]], 1)
        scale = out[-1].expand(batch)
        size = torch.stack([leaf.reshape(batch, -1).abs().amax(1) for leaf in residual if leaf.numel()]).amax(
            0
        )
        small = size <= torch.finfo(size.dtype).eps ** 0.5 * scale
        if not bool(small.all()):  # the others keep their bits
            linear = self.dense.linear_scale(u, theta, residual)
            scale = torch.where(small, scale, torch.maximum(scale, linear))
        nothing = tuple(torch.zeros_like(leaf) for leaf in u)
        return Stationarity(nothing, torch.zeros_like(size), residual, scale)

    def multipliers(self, u: Leaves, theta: Leaves) -> Leaves:
        """0."""
        return self.dense.multipliers(u, theta)

    def constraint_jacobian(self, u: Leaves, theta: Leaves) -> Tensor:
        """J, dense, (B, m, m)."""
        return self.dense.constraint_jacobian(u, theta)

    def kkt_solve(
        self, u: Leaves, lam: Leaves, theta: Leaves, rhs_u: Leaves, rhs_h: Leaves, shift: Tensor | None = None
    ) -> Solution:
        """(w, s, status): J w = -rhs_h and J's = -rhs_u; a side of zeros is not solved for."""
        if shift is not None:
            return self.dense.kkt_solve(u, lam, theta, rhs_u, rhs_h, shift)
        return super().kkt_solve(u, lam, theta, rhs_u, rhs_h)

    def kkt_factor(self, u: Leaves, lam: Leaves, theta: Leaves, shift: Tensor | None = None) -> KKTFactor:
        """J, J' or both factored, when a solve first asks for one."""
        if shift is not None:
            return self.dense.kkt_factor(u, lam, theta, shift)
        return super().kkt_factor(u, lam, theta)

    def _solved(
        self,
        point: Mapping[str, Tensor],
        rhs_u: Leaves,
        rhs_h: Leaves,
        factor: StructuredFactor | None = None,
    ) -> Solution:
        values = {**point, **self.arguments.sides("rhs_u", "rhs_h", rhs_u, rhs_h)}
        w, s = (
            tuple(torch.zeros_like(leaf) for leaf in rhs_u),
            tuple(torch.zeros_like(leaf) for leaf in rhs_h),
        )
        lead, device = rhs_u[0].shape[:2], rhs_u[0].device
        status = torch.zeros(lead[1], dtype=torch.int8, device=device)
        for way, side in ((FORWARD, rhs_h), (TRANSPOSED, rhs_u)):
            if not any(bool(leaf.any()) for leaf in side):  # NaN counts as something
                continue
            function = self._one_side(way, factor is not None)
            out = function(values if factor is None else {**values, **factor.given(way)})
            found = [x.expand(*lead, *x.shape[2:]) for x in out[:-1]]
            if way == FORWARD:
                shapes = [leaf.placeholder.shape for leaf in self.declared.variables]
                w = tuple(x.reshape(*lead, *shape) for x, shape in zip(found, shapes, strict=True))
            else:
                s = self.arguments.joined(found, 2)
            status = torch.maximum(status, self._verdicts(out[-1], lead[1], device))
        return w, s, status

    def _one_side(self, way: Way, given: bool) -> Written:
        document = "J's = -rhs_u" if way == TRANSPOSED else "J w = -rhs_h"
        return self.writer.function(
            ("side", way, given), "solve", document, lambda: self.recipes.one_side(way, given=given)
        )

    def _next(
        self, way: Way, tried: merge.Attempt[merge.A], status: Tensor, values: Values
    ) -> tuple[Way | None, Tensor, Tensor] | None:
        return None

    def _vjp(self, way: Way, wanted: tuple[bool, ...], with_lam: bool, given: bool = False) -> Written:
        # A residual has no edge of a domain to move u off: see `EquationsLagrangian.inside`.
        return replace(super()._vjp(way, wanted, with_lam, given), fragile=frozenset())
