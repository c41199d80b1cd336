"""What each emitted function computes: the answers of a plan as refs.

In: `Declared`, the form of H, the KKT solve in symbols. Out: a `Recipe` for each question. Next file: `plan.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch

from implicitdiff.derivatives.declared import Declared
from implicitdiff.graph.calls import Output, call
from implicitdiff.graph.ir import BATCHED, STACKED, Label, Ref, reachable
from implicitdiff.graph.purpose import Step
from implicitdiff.kkt import lowering
from implicitdiff.kkt.route import Route
from implicitdiff.kkt.symbolic import SymbolicKKT, jacobian_matrix
from implicitdiff.memory import over_limit
from implicitdiff.structure import banded, sparse
from implicitdiff.structure.forms import Entry, Form
from implicitdiff.structure.scale import cancelling
from implicitdiff.structured.arguments import Arguments
from implicitdiff.structured.writer import Recipe

Way = Literal["route", "refined", "anchored", "full", "transposed"]
"""How K is solved: by the route, by the route with refinements, with H + rho A'A in place of H, or as one matrix; for a
system of equations with J, or with J'."""


@dataclass(frozen=True)
class Anchor:
    """H + weight A'A: the form, and the weight of each sample."""

    form: Form
    weight: Ref


class Recipes:
    """The recipes of one problem; stateless but for what it was given."""

    def __init__(self, declared: Declared, form: Form, linear_solver: str, dtype: torch.dtype) -> None:
        self.declared, self.build, self.form = declared, declared.build, form
        self.linear_solver, self.dtype = linear_solver, dtype
        self.arguments = Arguments(declared)
        self.kkt = SymbolicKKT(declared, form, linear_solver, dtype)

    @property
    def route(self) -> Route:
        """How K is solved."""
        return self.kkt.route

    # ---------------------------------------------------------------- the point

    def value(self) -> Recipe:
        """f."""
        return Recipe([Output("value", self.declared.program.objective, ())], [])

    def stationarity(self) -> Recipe:
        """D_u L, h, and the largest of the terms that cancel in each."""
        declared, rows = self.declared, self.declared.space.rows
        slopes = declared.gradient(declared.lagrangian, rows)
        values = [c.value for c in declared.constraints]
        outputs = [Output(f"gradient{k}", ref, rows[k]) for k, ref in enumerate(slopes)]
        outputs += [Output(c.name, c.value, c.labels) for c in declared.constraints]
        outputs += [Output("scale", self._largest(refs), ()) for refs in (slopes, values)]
        return Recipe(outputs, [])

    def _largest(self, refs: Sequence[Ref]) -> Ref:
        """max |term| of each sample over the terms that cancel in `refs`."""
        terms = [term for ref in refs for term in cancelling(self.build, ref)]
        like = self.declared.variables[0].node
        args: list[tuple[Ref, Sequence[Label], int]] = [(self.build.self_ref(like), like.axes, BATCHED)]
        args += [(t, t.labels, BATCHED) for t in terms]
        text = ", ".join(f"{{{k}}}" for k in range(len(args)))
        return call(self.build, f"saddle.largest({text})", args, (), BATCHED)

    def multipliers(self) -> Recipe:
        """lam with A A' lam = A D_u f: the structured Schur solve with H replaced by the identity."""
        declared, count = self.declared, len(self.declared.variables)
        one = Entry(diagonal=self.build.number(1.0))
        grid = tuple(tuple(one if a == b else Entry() for b in range(count)) for a in range(count))
        form = Form(declared.space, grid, "scaled-identity", "the identity")
        solver = SymbolicKKT(declared, form, "auto", self.dtype, identity=True)
        lam, status = solver.least_squares(declared.gradient(declared.program.objective, declared.space.rows))
        outputs = [Output(c.name, ref, c.labels) for c, ref in zip(declared.constraints, lam, strict=True)]
        return Recipe([*outputs, self.verdict(status, lam)], lam)

    # ---------------------------------------------------------------- the KKT system

    def _sides(self, stem: str, constraint_stem: str, prefix: int) -> tuple[list[Ref], list[Ref]]:
        """Right-hand sides as leaves, over the rows of the variables and the labels of the constraints."""
        declared, build = self.declared, self.build
        on_u = [
            Ref(
                build.leaf(self.arguments.of_variable(stem, k), leaf.sizes, prefix).node,
                declared.space.rows[k],
            )
            for k, leaf in enumerate(declared.variables)
        ]
        return on_u, [declared.constraint_leaf(constraint_stem, c, prefix) for c in declared.constraints]

    def _pair(self, on_u: Sequence[Ref], on_h: Sequence[Ref]) -> list[Output]:
        declared = self.declared
        outputs = [Output(f"w{k}", ref, declared.space.rows[k], prefix=STACKED) for k, ref in enumerate(on_u)]
        return outputs + [
            Output(c.name, ref, c.labels, prefix=STACKED)
            for c, ref in zip(declared.constraints, on_h, strict=True)
        ]

    def _solver(self, way: Way, *, shifted: bool = False) -> SymbolicKKT:
        """The KKT solve along the plan's route, or the way that was asked for."""
        if not shifted and way == "route":
            return self.kkt
        anchor = self.anchor if way == "anchored" else None
        form = self.form if anchor is None else anchor.form
        return SymbolicKKT(
            self.declared,
            self.shifted(form) if shifted else form,
            self.linear_solver,
            self.dtype,
            full=way == "full",
            refined=way == "refined",
            weight=None if anchor is None else anchor.weight,
        )

    @cached_property
    def linear(self) -> bool:
        """Whether A = D_u h does not depend on u."""
        own = {leaf.node.id for leaf in self.declared.variables}
        rows = [term.coefficient.node for c in self.declared.constraints for term in c.terms]
        return not any(node.id in own for node in reachable(rows))

    @cached_property
    def anchor(self) -> Anchor | None:
        """H + rho A'A, where H is banded and constraints of few neighbours keep it so (u[0] = a).

        Differences do not see a constant: their H is singular, and K regular as soon as one entry is held. In exact
        arithmetic the solution of the KKT system is the same for every rho; it is chosen to add about as much as H has.
        """
        if self.form.kind != "banded" or self.route.name != "numeric":
            return None
        build, declared = self.build, self.declared
        like = build.self_ref(declared.variables[0].node)
        values = [band.value for band in self.form.entry.tied(len(like.labels))]
        rows = [t.coefficient for c in declared.constraints for t in declared.jacobians.of(c.value)]
        args: list[tuple[Ref, Sequence[Label], int]] = [(like, like.labels, BATCHED)]
        args += [(ref, ref.labels, BATCHED) for ref in (*values, *rows)]
        names = [f"{{{k}}}" for k in range(len(args))]
        of_h, of_a = ", ".join(names[: 1 + len(values)]), ", ".join([names[0], *names[1 + len(values) :]])
        text = f"saddle.anchor_weight(saddle.largest({of_h}), saddle.largest({of_a}))"
        weight = call(build, text, args, (), BATCHED)
        terms = [*declared.hessian_terms, *declared.anchor_terms(weight)]
        form = banded.form_of(build, declared.space, terms)
        return Anchor(form, weight) if form is not None and form.chain == self.form.chain else None

    @cached_property
    def whole_is_too_large(self) -> bool:
        """Whether K as one matrix is above the memory limit: then nothing comes after the other ways."""
        size = self.declared.space.size + self.declared.constraint_space.size
        return bool(over_limit("K", size, self.dtype.itemsize))

    @cached_property
    def first(self) -> Way:
        """The way that is tried first: an H of differences alone is not tried, since it is singular most likely."""
        if self.anchor is None or any(not term.has_places for term in self.declared.hessian_terms):
            return "route"
        return "anchored"

    def _cancelled(self, kkt: SymbolicKKT) -> list[Output]:
        """A flag that asks for the refined way; float64 has digits to spare."""
        flag = None if self.dtype == torch.float64 else kkt.cancelled()
        return [] if flag is None else [Output("cancelled", flag, (), prefix=-1)]

    def kkt_solve(self, way: Way, *, shifted: bool, given: bool = False) -> Recipe:
        """K^-1 (rhs_u, rhs_h), with H + shift I where asked; `given` the factorisation."""
        kkt = self._solver(way, shifted=shifted)
        w, s, status = kkt.solve(*self._sides("rhs_u", "rhs_h", STACKED), STACKED)
        outputs = [*self._pair(w, s), *self._cancelled(kkt), self.verdict(status, [*w, *s], STACKED)]
        return Recipe(outputs, [*s, *w], self.factors(kkt) if given else {})

    def kkt_factor(self, way: Way, *, shifted: bool) -> Recipe:
        """The factorisation that a solve with `given` takes: one object, or nothing where H is only divided by."""
        found = self.factors(self._solver(way, shifted=shifted))
        return Recipe([Output(name, ref, (), prefix=-1) for name, ref in found.items()], [])

    def factors(self, kkt: SymbolicKKT) -> dict[str, Ref]:
        """The factorisation that a solve works with, by its name; empty where H is only divided by."""
        ref = kkt.factor()
        return {} if ref is None else {ref.node.data[-1]: ref}

    def kkt_product(self) -> Recipe:
        """K (rhs_u, rhs_h) with H by its form: what the probe tests."""
        return Recipe(self._pair(*self.kkt.product(*self._sides("rhs_u", "rhs_h", STACKED))), [])

    def shifted(self, form: Form) -> Form:
        """H + shift I."""
        build = self.build
        shift = build.self_ref(build.leaf("shift", (), BATCHED, differentiable=False).node)

        if form.base is not None:
            return replace(form, base=self.shifted(form.base))

        def lifted(e: Entry) -> Entry:
            return replace(e, diagonal=shift if e.diagonal is None else build.plus(e.diagonal, shift))

        grid = tuple(
            tuple(lifted(e) if a == b else e for b, e in enumerate(row)) for a, row in enumerate(form.grid)
        )
        kinds = {"zero": "scaled-identity", "kronecker": "dense"}  # a product plus an identity is no product
        pattern = form.pattern
        if pattern:
            pattern += tuple(sparse.lifted(form.space, k, shift) for k in range(len(form.grid)))
        return replace(form, grid=grid, kind=kinds.get(form.kind, form.kind), pattern=pattern)

    def verdict(self, status: Sequence[Ref], answers: Sequence[Ref] = (), prefix: int = BATCHED) -> Output:
        """One verdict per sample; where nothing is factored it is read off the answers, if they can fail."""
        labelled = [ref for ref in answers if ref.node.prefix >= prefix]
        if not status:
            if not labelled or self._divides_by_numbers():
                return Output("status", self.build.number(0.0), ())
            return Output("status", self._divided(labelled, prefix, "status"), (), prefix=-1)
        if self._masked and labelled:
            # What is divided out of S, and H where it is diagonal, may be 0 on some active sets.
            status = [*status, self._divided(labelled, prefix)]
        if len(status) == 1:
            return Output("status", status[0], (), prefix=-1)
        text = ", ".join(f"{{{k}}}" for k in range(len(status)))
        merged = call(self.build, f"saddle.merged({text})", [(ref, (), -1) for ref in status], (), BATCHED)
        return Output("status", merged, (), prefix=-1)

    def _divided(self, answers: Sequence[Ref], prefix: int, name: str = "divided") -> Ref:
        """The verdict on answers that came by division."""
        text = f"saddle.divided({prefix - BATCHED}, {', '.join(f'{{{k}}}' for k in range(len(answers)))})"
        return call(self.build, text, [(ref, ref.labels, prefix) for ref in answers], (), BATCHED, name)

    @property
    def _masked(self) -> bool:
        """Whether the problem is one on an active set, and S is used as it stands in symbols."""
        masks = any(leaf.placeholder.role == "mask" for leaf in self.declared.theta)
        return masks and self.kkt.route.name == "range-space"

    def _divides_by_numbers(self) -> bool:
        """Whether H is a number times the identity, or numbers on the diagonal, and there is no S."""
        entries = [self.form.grid[k][k] for k in range(len(self.form.grid))]
        numbers = [None if e.diagonal is None else self.build.as_number(e.diagonal) for e in entries]
        return not self.declared.constraints and all(number not in (None, 0.0) for number in numbers)

    # ---------------------------------------------------------------- the backward pass

    def vjp(self, way: Way, wanted: Sequence[bool], *, with_lam: bool, given: bool = False) -> Recipe:
        """D_theta (D_u L w - h's) with K (w, s) = -(v, v_lam), for the theta that are wanted; `given` as above."""
        declared, build, rows = self.declared, self.build, self.declared.space.rows
        kkt = self._solver(way)
        on_u, on_h = self._sides("v", "v_lam", BATCHED)
        # Where the sign stands is a matter of taste: without constraints w = H^-1 v, with them s is a gradient itself.
        sign = -1.0 if on_h else 1.0
        b = [build.scale(sign, ref) if with_lam else build.number(0.0) for ref in on_h]
        w, s, status = kkt.solve([build.scale(sign, ref) for ref in on_u], b, BATCHED)
        # a number in front of w is left outside, where it may meet others or a smaller tensor
        apart = [
            self._without_number(ref.rename(dict(zip(rows[k], leaf.node.axes, strict=True))))
            for k, (ref, leaf) in enumerate(zip(w, declared.variables, strict=True))
        ]
        bare_w = [build.hold(ref) for _, ref in apart]
        held_w = [build.scale(number, ref) for (number, _), ref in zip(apart, bare_w, strict=True)]
        held_s = [build.hold(ref) for ref in s]
        gradients = declared.input_gradients(held_w, held_s)
        zeros = [] if with_lam else self._feasible_sums(held_w)
        outputs = self._gradient_outputs(gradients, wanted, -sign, zeros)
        flags = self._cancelled(kkt)
        first = [*held_s, *bare_w, *status, *(flag.ref for flag in flags)]
        verdict = self.verdict(status, [*bare_w, *held_s], BATCHED)
        steps = self._steps(outputs, bare_w, held_s, [number for number, _ in apart])
        return Recipe([*outputs, *flags, verdict], first, self.factors(kkt) if given else {}, steps)

    def _gradient_outputs(
        self, gradients: Mapping[int, Ref], wanted: Sequence[bool], sign: float, zeros: Sequence[Ref]
    ) -> list[Output]:
        """The gradients that are wanted and not 0, times the sign; the large ones last."""
        declared, build = self.declared, self.build
        outputs = []
        for need, leaf in zip(wanted, declared.theta, strict=True):
            ref = gradients.get(leaf.node.id)
            if not need or ref is None:
                continue
            (ref,) = build.replaced([self._signed(ref, sign)], zeros)
            if build.is_zero(ref):
                continue
            if not leaf.placeholder.batched:
                ref = build.con(ref, (), over_batch=True)
            outputs.append(Output(leaf.name, ref, leaf.node.axes, prefix=int(leaf.placeholder.batched)))
        outputs.sort(key=lambda o: len(o.order))
        return outputs

    def _without_number(self, ref: Ref) -> tuple[float, Ref]:
        """(number, ref / number): the coefficient of a product and its factors."""
        number, factors = self.build.split(ref)
        return (number, self.build.mul(factors)) if factors and number != 0.0 else (1.0, ref)

    def _steps(
        self, outputs: Sequence[Output], w: Sequence[Ref], s: Sequence[Ref], numbers: Sequence[float]
    ) -> list[tuple[Ref, Step]]:
        """What the gradients are, w and s pulled back to the inputs; what w and s are where they are no gradients."""
        constrained = bool(self.declared.constraints)
        text = "w' d2L/du d{0} - s' dh/d{0}" if constrained else "-w' d2f/du d{0}"
        shared = {leaf.name for leaf in self.declared.theta if not leaf.placeholder.batched}
        steps = []
        for o in outputs:
            summed = ", summed over the batch" if o.name in shared else ""
            equation = f"gradient of {o.name}: {text.format(o.name)}{summed}"
            steps.append((o.ref, Step(f"grad_{o.name}", equation)))
        solved = "H w = A's - v" if constrained else "H w = v"
        for refs, stem, equation in ((w, "w", solved), (s, "s", "S s = A H^-1 v")):
            for k, ref in enumerate(refs):
                part = "" if len(refs) == 1 else ", a part"
                if refs is w and numbers[k] != 1.0:
                    part += f", w divided by {numbers[k]:g}"
                steps.append((ref, Step(stem if len(refs) == 1 else f"{stem}{k}", equation + part)))
        return steps

    def _signed(self, ref: Ref, sign: float) -> Ref:
        """+-ref; a sum takes the sign in its terms."""
        if ref.node.op != "add" or sign == 1.0:
            return self.build.scale(sign, ref)
        constant, coefficients = ref.node.data
        args, _ = self.build.open(ref)
        return self.build.add(
            [(sign * c, arg) for c, arg in zip(coefficients, args, strict=True)], sign * constant
        )

    def _feasible_sums(self, w: Sequence[Ref]) -> list[Ref]:
        """Sums of w that are exactly a row of A w: they are 0 (in the gradients, which hold w fixed, not before)."""
        out = []
        for c in self.declared.constraints:
            _, factors = self.build.split(self.declared.constraint_tangent(c, w))
            sums = [ref for ref, power in factors if ref.node.op == "con" and power == 1.0]
            if len(sums) == 1 and len(factors) == 1:
                out.append(sums[0])
        return out

    # ---------------------------------------------------------------- the matrices

    def hessian(self) -> Recipe:
        """H as an operator."""
        return Recipe([Output("hessian", lowering.operator(self.build, self.form), (), prefix=-1)], [])

    def jacobian(self) -> Recipe:
        """A, rows in the order of the constraint blocks."""
        ref = jacobian_matrix(self.declared, self.declared.space.columns)
        return Recipe([Output("jacobian", ref, ref.labels)], [])
