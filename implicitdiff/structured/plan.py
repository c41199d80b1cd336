"""The structured plan: every question about a problem answered by code emitted from its proved structure.

In: a `Trace`. Out: `StructuredPlan`, which satisfies `implicitdiff.plan.Plan`. Translation, derivatives, classification
and the choice of the solver happen once. Where a factorisation fails, K is taken as one matrix; where the probe finds
the structure wrong, the dense plan answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from implicitdiff.derivatives.autodiff import AutodiffPlan
from implicitdiff.derivatives.declared import Declared
from implicitdiff.derivatives.factor import KKTFactor, Solution
from implicitdiff.derivatives.stationarity import Stationarity
from implicitdiff.graph import rules
from implicitdiff.graph.trace import Trace
from implicitdiff.graph.translate import translate
from implicitdiff.operators import LinearOperator
from implicitdiff.status import Status, all_ok, is_all_ok
from implicitdiff.structure.analyze import classify
from implicitdiff.structure.forms import Form
from implicitdiff.structure.probe import agree
from implicitdiff.structure.report import Analysis
from implicitdiff.structured import edges, merge
from implicitdiff.structured.arguments import Leaves
from implicitdiff.structured.factor import Given, StructuredFactor
from implicitdiff.structured.module import module
from implicitdiff.structured.outputs import Recipes, Way
from implicitdiff.structured.probe import Probe, warn_of_a_contradiction
from implicitdiff.structured.report import report
from implicitdiff.structured.run import Run
from implicitdiff.structured.writer import Writer, Written

Values = Callable[[], Mapping[str, Tensor]]

assert rules.__all__  # importing the package is what registers the translation rules


class StructuredPlan:
    """One problem's plan; nothing changes after it is built but for functions that are written on first use.

    Attributes:
        trace: the traced functions.
        analysis: what was found.
        needs_multipliers: whether lam reaches H or an input gradient.
        dense: the plan that answers where this one must not.
    """

    document: ClassVar[str] = "D_theta (D_u L w - h's) with K (w, s) = -(v, 0)"

    def __init__(
        self,
        trace: Trace,
        linear_solver: str,
        dense: AutodiffPlan,
        shown: Sequence[bool] = (),
        *,
        compiled: bool = False,
    ) -> None:
        """Derives everything.

        Args:
            trace: the traced functions.
            linear_solver: the layer's option.
            dense: the plan to fall back on.
            shown: the theta whose gradients `analysis.code` computes; all that are floating where it is left out.
            compiled: whether the emitted functions go through torch.compile.

        Raises:
            Unsupported: something is not covered; it names the operation, the user's line and the reason.
        """
        self.trace, self.dense = trace, dense
        dtype = next(p.dtype for p in trace.placeholders if p.dtype.is_floating_point)
        program = translate(trace)
        outputs = () if trace.equality is None else trace.equality.output_shapes
        self.declared = Declared(program, [tuple(shape) for shape in outputs], trace.corner)
        declared = self.declared
        form, self.recipes = self._derived(linear_solver, dtype)
        self.arguments = self.recipes.arguments
        route = self.recipes.route
        null = () if route.dependent is None else tuple(route.dependent.vectors.to(dtype).unbind(1))
        self.writer = Writer(self.arguments, program.constants, null, compiled=compiled)
        self.probe = Probe(self.recipes, self.writer, dense)
        floating = [leaf.placeholder.moves for leaf in self.declared.theta]
        every = self._vjp(self.recipes.first, tuple(floating), False)
        self.needs_multipliers = any(
            self.arguments.of_constraint("lam", k) in every.arguments for k in range(len(outputs))
        )
        asked = [*shown, *floating[len(shown) :]]
        wanted = tuple(a and b for a, b in zip(floating, asked, strict=True))
        code = self._vjp(self.recipes.first, wanted, False) if shown and any(wanted) else every
        self.analysis = self._reported(form, module(code.emitted.source, self.writer.namespace))
        self._batched = tuple(leaf.placeholder.batched for leaf in declared.theta)
        self._contradiction: bool | None = None
        self._runs: dict[tuple[Way, tuple[bool, ...], bool, bool], Run] = {}

    def _derived(self, linear_solver: str, dtype: torch.dtype) -> tuple[Form, Recipes]:
        d = self.declared
        form = classify(d.build, d.space, d.hessian_terms, d.written_hessian_terms)
        return form, Recipes(d, form, linear_solver, dtype)

    def _reported(self, form: Form, code: str) -> Analysis:
        return report(
            self.declared, form, self.recipes.route, code, anchored=self.recipes.first == "anchored"
        )

    def value(self, u: Leaves, theta: Leaves) -> Tensor:
        """The objective of each sample, (B,)."""
        function = self.writer.function("value", "value", "f", self.recipes.value)
        found: Tensor = function(self.arguments.point(u, (), theta))[0]
        if not bool(torch.isfinite(found).all()):
            inside = function(self.arguments.point(edges.off_zero(u), (), theta))[0]
            found = torch.where(torch.isfinite(found), found, inside)  # the other samples keep their bits
        return found.expand(u[0].shape[0])

    def value_and_gradient(
        self, u: Leaves, theta: Leaves, lam: Leaves = (), penalty: Tensor | None = None
    ) -> tuple[Tensor, Leaves]:
        """f - lam'h + penalty |h|^2 / 2 and its gradient in u, by the dense plan: one reverse pass, no matrix."""
        return self.dense.value_and_gradient(u, theta, lam, penalty)

    def stationarity(self, u: Leaves, lam: Leaves, theta: Leaves) -> Stationarity:
        """D_u L and h, with the largest of the terms that cancel in each."""
        function = self.writer.function(
            "stationarity", "stationarity", "D_u L, h, scales", self.recipes.stationarity
        )
        out = function(self.arguments.point(u, lam, theta))
        count, batch = len(u), u[0].shape[0]
        gradient = tuple(
            g.expand(batch, *leaf.sizes).reshape(t.shape)
            for g, leaf, t in zip(out, self.declared.variables, u, strict=False)
        )
        constraint = self.arguments.joined([c.expand(batch, *c.shape[1:]) for c in out[count:-2]], 1)
        return Stationarity(gradient, out[-2].expand(batch), constraint, out[-1].expand(batch))

    def multipliers(self, u: Leaves, theta: Leaves) -> Leaves:
        """The least-squares solution of A'lam = D_u f, of minimum norm where constraints are proved dependent."""
        if not self.declared.constraints:
            return ()
        function = self.writer.function(
            "multipliers", "multipliers", "A A' lam = A D_u f", self.recipes.multipliers
        )
        out = function(self.arguments.point(u, (), theta))
        batch = u[0].shape[0]
        found = self.arguments.joined([b.expand(batch, *b.shape[1:]) for b in out[:-1]], 1)
        status = self._verdicts(out[-1], batch, u[0].device)
        if is_all_ok(status) or not bool(status.any()):
            return found
        bad = status != Status.OK
        mended = self.dense.multipliers(u, theta)  # for the bad samples: the others keep their bits
        return tuple(
            torch.where(bad.reshape(-1, *(1,) * (mine.dim() - 1)), theirs, mine)
            for mine, theirs in zip(found, mended, strict=True)
        )

    # ---------------------------------------------------------------- the KKT system

    def kkt_solve(
        self, u: Leaves, lam: Leaves, theta: Leaves, rhs_u: Leaves, rhs_h: Leaves, shift: Tensor | None = None
    ) -> Solution:
        """(w, s, status) for right-hand sides (R, B, *shape): one factorisation."""
        if self.contradicted(u, lam, theta):
            return self.dense.kkt_solve(u, lam, theta, rhs_u, rhs_h, shift)
        return self._solved(self._point(u, lam, theta, shift), rhs_u, rhs_h)

    def kkt_factor(self, u: Leaves, lam: Leaves, theta: Leaves, shift: Tensor | None = None) -> KKTFactor:
        """K factored, by the same code as that of `kkt_solve`, cut in two."""
        if self.contradicted(u, lam, theta):
            return self.dense.kkt_factor(u, lam, theta, shift)
        return StructuredFactor(self._point(u, lam, theta, shift), self._factors, self._solved)

    def factored(self, u: Leaves, lam: Leaves, theta: Leaves, made: Given) -> StructuredFactor:
        """K at a point, by a factorisation along the first way that was made elsewhere."""
        point = self._point(u, lam, theta, None)
        return StructuredFactor(point, self._factors, self._solved, _made={self.recipes.first: made})

    def _point(self, u: Leaves, lam: Leaves, theta: Leaves, shift: Tensor | None) -> dict[str, Tensor]:
        values = self.arguments.point(u, lam, theta)
        return values if shift is None else {**values, "shift": shift}

    def _solved(
        self,
        point: Mapping[str, Tensor],
        rhs_u: Leaves,
        rhs_h: Leaves,
        factor: StructuredFactor | None = None,
    ) -> Solution:
        """K^-1 rhs along the ways, with the factorisations of `factor` if there is one."""
        values = {**point, **self.arguments.sides("rhs_u", "rhs_h", rhs_u, rhs_h)}
        shifted = "shift" in point

        def attempt(way: Way) -> merge.Attempt[Leaves]:
            function = self._kkt(shifted, way, factor is not None)
            out = function(values if factor is None else {**values, **factor.given(way)})
            verdict = self._verdicts(out[-1], rhs_u[0].shape[1], rhs_u[0].device)
            return merge.Attempt(self.arguments.pair(out, rhs_u[0].shape[:2]), verdict, function, out)

        answer, status = self._settled(
            attempt, lambda redo, new, old: merge.merged_leaves(redo, new, old, 1), lambda: point
        )
        count = len(self.declared.variables)
        return answer[:count], answer[count:], status

    def _kkt(self, shifted: bool, way: Way, given: bool) -> Written:
        key, document = ("kkt", shifted, way, given), "K (w, s) = (rhs_u, rhs_h)"
        return self.writer.function(
            key, "kkt_solve", document, lambda: self.recipes.kkt_solve(way, shifted=shifted, given=given)
        )

    def _factors(self, way: Way, point: Mapping[str, Tensor]) -> Given:
        """The factorisations of a way, by name."""
        shifted = "shift" in point
        key = ("factor", shifted, way)
        function = self.writer.function(
            key, "kkt_factor", "K factored", lambda: self.recipes.kkt_factor(way, shifted=shifted)
        )
        names = function.emitted.results
        return dict(zip(names, function(point), strict=True)) if names else {}

    def _settled(
        self,
        attempt: Callable[[Way], merge.Attempt[merge.A]],
        mend: Callable[[Tensor, merge.A, merge.A], merge.A],
        values: Values,
    ) -> tuple[merge.A, Tensor]:
        """The answer and the status along the ways; each sample keeps that of the first way that served it."""
        tried = attempt(self.recipes.first)
        answer, status = tried.answer, tried.status
        further = self._next(self.recipes.first, tried, status, values)
        while further is not None:
            way, redo, status = further
            if way is None:
                break
            tried = attempt(way)
            answer, status = mend(redo, tried.answer, answer), torch.where(redo, tried.status, status)
            further = self._next(way, tried, status, values)
        return answer, status

    def _next(
        self, way: Way, tried: merge.Attempt[merge.A], status: Tensor, values: Values
    ) -> tuple[Way | None, Tensor, Tensor] | None:
        """What to try after `way`, and for which samples (B,); the others keep what they have.

        Refinements where digits cancelled, K as one matrix where H or S is singular: a singular H with a regular K, and
        constraints that depend on each other by their values. A singular H that is banded is anchored first, where
        that leaves it banded.
        """
        found = tried.function.emitted.results
        if len(found) > 1 and found[-2] == "cancelled":
            cancelled = merge.flagged(tried.out[-2], len(status), status)
            if cancelled is not None:
                return "refined", cancelled, status
        whole = way == "full" or self.recipes.route.whole or not self.declared.constraints
        if is_all_ok(status) or whole or not bool(status.any()):
            return None
        # on an active set what S was divided by may be 0, and then there is no answer to absolve
        if self.recipes.route.name == "range-space" and way != "full" and not self.trace.masks:
            status = merge.absolved(
                status, tried.status, lambda: self._hessian(values()), self.recipes.linear
            )
        singular = merge.unsolved(status, self.declared)
        anchored = way == "route" and self.recipes.anchor is not None
        if singular is None or (self.recipes.whole_is_too_large and not anchored):
            return None, status, status
        return ("anchored" if anchored else "full"), singular, status

    def _verdicts(self, status: Any, batch: int, device: torch.device) -> Tensor:
        if isinstance(status, Tensor) and status.dtype == torch.int8 and not is_all_ok(status):
            return status.expand(batch)
        return all_ok(batch, device)

    # ---------------------------------------------------------------- the backward pass

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
        """A gradient per theta that needs one, and the status of each sample."""
        if self.contradicted(u, lam, theta):
            return self.dense.vjp(u, lam, theta, v_u, v_lam, needs, factor)
        given = (u, lam, theta, v_u, () if v_lam is None else v_lam)
        if isinstance(factor, StructuredFactor):
            with factor.lock:
                pulled = self._pulled(given, tuple(needs), v_lam is not None, factor)
            if pulled is not None:
                return pulled

        def attempt(way: Way) -> merge.Attempt[merge.Gradients]:
            run = self._run(way, tuple(needs), v_lam is not None)
            out = run.call(given)
            if run.function.fragile and edges.lost(run.function, out, u):
                out = run.call((edges.off_zero(u), *given[1:]))
            verdict = self._verdicts(out[-1], u[0].shape[0], u[0].device)
            return merge.Attempt(run.gradients(out, theta), verdict, run.function, out)

        return self._settled(attempt, self._merged, lambda: self.arguments.point(u, lam, theta))

    def _pulled(
        self, given: tuple[Leaves, ...], needs: tuple[bool, ...], with_lam: bool, factor: StructuredFactor
    ) -> tuple[tuple[Tensor | None, ...], Tensor] | None:
        """The same with the factorisations of `factor`; None where u has to move off zero, and K with it."""
        u, lam, theta, *_ = given
        moved = False

        def attempt(way: Way) -> merge.Attempt[merge.Gradients]:
            nonlocal moved
            run = self._run(way, needs, with_lam, given=True)
            out = run.call((*given, tuple(factor.given(way).values())))
            moved = moved or bool(run.function.fragile and edges.lost(run.function, out, u))
            verdict = self._verdicts(out[-1], u[0].shape[0], u[0].device)
            return merge.Attempt(run.gradients(out, theta), verdict, run.function, out)

        found = self._settled(attempt, self._merged, lambda: self.arguments.point(u, lam, theta))
        return None if moved else found

    def _merged(self, redo: Tensor, new: merge.Gradients, old: merge.Gradients) -> merge.Gradients:
        return merge.merged_gradients(redo, new, old, self._batched)

    def _run(self, way: Way, needs: tuple[bool, ...], with_lam: bool, given: bool = False) -> Run:
        """The emitted backward pass for the theta that need a gradient, and where its arguments come from."""
        found = self._runs.get((way, needs, with_lam, given))
        if found is None:
            function, places = self._placed(way, needs, with_lam, given=given)
            sources = self.arguments.sources("v", "v_lam")
            objects = [name for name in function.arguments if name not in sources]
            sources |= {name: (5, k) for k, name in enumerate(objects)}  # factorisations that are given
            found = Run(function, tuple(sources[name] for name in function.arguments), places)
            self._runs[way, needs, with_lam, given] = found
        return found

    def _placed(
        self, way: Way, needs: tuple[bool, ...], with_lam: bool, *, given: bool
    ) -> tuple[Written, tuple[int | None, ...]]:
        """The emitted function, and for each theta the place of its gradient among the results."""
        theta = self.declared.theta
        wanted = tuple(
            need and leaf.placeholder.dtype.is_floating_point for need, leaf in zip(needs, theta, strict=True)
        )
        function = self._vjp(way, wanted, with_lam, given)
        results = function.emitted.results
        places = tuple(
            None if not want else results.index(leaf.name) if leaf.name in results else -1
            for want, leaf in zip(wanted, theta, strict=True)
        )
        return function, places

    def _vjp(self, way: Way, wanted: tuple[bool, ...], with_lam: bool, given: bool = False) -> Written:
        key = ("vjp", way, wanted, with_lam, given)
        return self.writer.function(
            key,
            "backward",
            self.document,
            lambda: self.recipes.vjp(way, wanted, with_lam=with_lam, given=given),
        )

    # ---------------------------------------------------------------- the probe

    probed = property(
        lambda self: self._contradiction is False, doc="Whether the structure was compared, and agreed."
    )

    def contradicted(self, u: Leaves, lam: Leaves, theta: Leaves) -> bool:
        """Whether the product tested on the first call with data differs from automatic differentiation."""
        if self._contradiction is None and u[0].shape[0] and not u[0].is_meta:
            self._contradiction = not agree(*self.probe(u, lam, theta))
            if self._contradiction:
                warn_of_a_contradiction(self.analysis.hessian.kind)
        return bool(self._contradiction)

    # ---------------------------------------------------------------- the matrices

    def hessian(self, u: Leaves, lam: Leaves, theta: Leaves) -> LinearOperator:
        """H = D_uu L, of the kind that was proved."""
        return self._hessian(self.arguments.point(u, lam, theta))

    def _hessian(self, values: Mapping[str, Tensor]) -> LinearOperator:
        function = self.writer.function("hessian", "hessian", "H = D_uu L", self.recipes.hessian)
        found = function(values)[0]
        assert isinstance(found, LinearOperator)
        return found

    def constraint_jacobian(self, u: Leaves, theta: Leaves) -> Tensor:
        """A, (B, p, m)."""
        batch = u[0].shape[0]
        if not self.declared.constraints:
            return u[0].new_zeros((batch, 0, self.declared.space.size))
        function = self.writer.function("jacobian", "constraint_jacobian", "A = D_u h", self.recipes.jacobian)
        rows: Tensor = function(self.arguments.point(u, (), theta))[0].expand(batch, -1, -1)
        return rows[:, self.arguments.constraint_order(rows.device)]
