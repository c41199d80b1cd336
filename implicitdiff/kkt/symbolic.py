"""The KKT solve in symbols: refs of (w, s) for given right-hand sides, along one route.

In: `Declared`, a `Route`, right-hand sides as refs. Out: refs, with calls of solvers where numbers are needed.
Next file: `structured/plan.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch

from implicitdiff.derivatives.declared import Declared
from implicitdiff.graph.calls import call
from implicitdiff.graph.ir import BATCHED, STACKED, Label, Ref, reachable
from implicitdiff.kkt import lowering, patterns
from implicitdiff.kkt.formula import Steps, range_space
from implicitdiff.kkt.grid import grid_operator
from implicitdiff.kkt.route import RouteFinder
from implicitdiff.structure.forms import Entry, Form
from implicitdiff.structure.scale import cancelling

Refs = list[Ref]

ELIMINATING = ("Schur", "SchurConjugateGradients")
"""The solver classes that take S as a grid and eliminate its diagonal corners."""
REFINEMENTS = 2
"""Corrections where digits cancelled in S: each gains about as many as the factorisation has."""


class SymbolicKKT:
    """Builds refs of KKT solves along one route."""

    def __init__(
        self,
        declared: Declared,
        form: Form,
        linear_solver: str,
        dtype: torch.dtype,
        *,
        full: bool = False,
        identity: bool = False,
        refined: bool = False,
        weight: Ref | None = None,
    ) -> None:
        """Takes the route of `form`; with a `weight` rho, `form` is that of H + rho A'A instead of H."""
        self.weight = weight
        self.refinements = REFINEMENTS if refined else 0
        self.declared, self.build, self.identity = declared, declared.build, identity
        self.route = RouteFinder(declared, dtype, identity=identity).choose(form, linear_solver, full=full)

    def solve(self, a: Refs, b: Refs, prefix: int) -> tuple[Refs, Refs, Refs]:
        """(w, s, status refs): a and w over the rows of the variables' space, b and s over the constraints' labels."""
        if self.route.name == "unconstrained":
            w, status = self._inverse(a, prefix)
            return w, [], status
        if self.route.name == "range-space":
            return self._range_space(a, b, prefix)
        if self.weight is not None:
            # H w - A's = a and -A w = b give (H + rho A'A) w - A's = a - rho A'b: s is the same
            build, weight, pulled = self.build, self.weight, self._spread(b)
            a = [build.minus(x, build.times(weight, y)) for x, y in zip(a, pulled, strict=True)]
        return self._numbers(a, b, prefix)

    def factor(self) -> Ref | None:
        """The factorisation that `solve` works with, the same node in every solve; None where H is only divided by."""
        if self.route.name == "unconstrained":
            return None if self._divides else self._hessian_factor()
        if self._schur_numbers is not None:
            return None
        return self._schur_factor() if self.route.name == "range-space" else self._system()

    def product(self, w: Refs, s: Refs) -> tuple[Refs, Refs]:
        """K (w, s) = (H w - A's, -A w - D s), H by its form: what the probe tests."""
        curved, pulled, constrained = self.terms(w, s, STACKED)
        build = self.build
        return (
            [build.minus(p, q) for p, q in zip(curved, pulled, strict=True)],
            [build.scale(-1.0, build.plus(x, y)) for x, y in zip(constrained, self._corner(s), strict=True)],
        )

    def terms(self, w: Refs, s: Refs, prefix: int) -> tuple[Refs, Refs, Refs]:
        """H w, A's and A w, one ref a variable or constraint."""
        build, form = self.build, self.route.hessian
        space = form.space
        operator = lowering.operator(build, form)
        flat = lowering.pack(build, space, w, space.rows, prefix)
        multiplied = call(
            build, "{0}.matvec({1})", [(operator, (), -1), (flat, flat.labels, prefix)], flat.labels, prefix
        )
        curved = lowering.unpack(build, space, multiplied, space.rows, [None] * len(space.names))
        return curved, self._spread(s), self._constrain(w)

    def least_squares(self, slope: Refs) -> tuple[Refs, Refs]:
        """lam with A A' lam = A slope (for the route of the identity), and its status, if something was factored."""
        return self._schur_solve(self._constrain(slope), BATCHED)

    @property
    def _divides(self) -> bool:
        return self.route.hessian.kind in ("diagonal", "scaled-identity")

    def _hessian_factor(self) -> Ref:
        """The factorisation of H."""
        route = self.route
        if route.hessian_kind == "block":
            operator = grid_operator(self.build, route.hessian)
        else:
            operator = lowering.operator(self.build, route.hessian, route.hessian_kind)
        return lowering.factorised(self.build, operator, route.hessian_solver, "factor")

    def _inverse(self, a: Refs, prefix: int, name: str | None = "w") -> tuple[Refs, Refs]:
        """H^-1 a."""
        build, form = self.build, self.route.hessian
        if self._divides:
            refs = []
            for k, ref in enumerate(a):
                diagonal = form.grid[k][k].diagonal
                refs.append(
                    ref if self.identity or diagonal is None else build.mul([(diagonal, -1.0), (ref, 1.0)])
                )
            return refs, []
        space = form.space
        factor = self._hessian_factor()
        rhs = lowering.pack(build, space, a, space.rows, prefix)
        flat = lowering.solve(build, factor, rhs, name)
        return lowering.unpack(build, space, flat, space.rows, [None] * len(space.names)), [
            lowering.status_of(build, factor)
        ]

    def _range_space(self, a: Refs, b: Refs, prefix: int) -> tuple[Refs, Refs, Refs]:
        build = self.build
        status: Refs = []

        def schur(rhs: Refs) -> Refs:
            solution, verdict = self._schur_solve(rhs, prefix)
            status.extend(verdict)
            return solution

        def add(x: Refs, y: Refs) -> Refs:
            return [build.plus(p, q) for p, q in zip(x, y, strict=True)]

        steps: Steps[Refs, Refs] = Steps(
            inverse=lambda x: self._inverse(x, prefix)[0],
            constrain=self._constrain,
            spread=self._spread,
            schur=schur,
            add_x=add,
            add_y=add,
            negate=lambda x: [build.scale(-1.0, p) for p in x],
            hold=lambda x: [build.hold(p) for p in x],
            corner=self._corner if self.declared.cornered else None,
        )
        w, s = range_space(steps, a, b, self.refinements)
        return w, s, [*status, *([] if self.identity else self._vanished())]

    def _vanished(self) -> Refs:
        """The status of a diagonal H in which multipliers may cancel: what is left may be rounding alone (2 - 2 lam).

        No scale tells then, since S and w are as large as H is small.
        """
        build, form = self.build, self.route.hessian
        found = []
        for k, rows in enumerate(form.space.rows):
            diagonal = form.grid[k][k].diagonal
            if diagonal is None or diagonal.node.op != "add" or not self._has_multipliers(diagonal):
                continue
            labels = rows if diagonal.labels else ()
            refs = [diagonal, *cancelling(build, diagonal)]
            if any(not set(ref.labels) <= set(labels) for ref in refs):
                continue
            text = f"saddle.vanished({', '.join(f'{{{i}}}' for i in range(len(refs)))})"
            found.append(call(build, text, [(ref, labels, BATCHED) for ref in refs], (), BATCHED, "vanished"))
        return found

    def _has_multipliers(self, ref: Ref) -> bool:
        names = {
            self.declared.constraint_leaf_name("lam", k) for k in range(len(self.declared.output_shapes))
        }
        return any(node.op == "leaf" and node.data[0] in names for node in reachable([ref.node]))

    def _constrain(self, x: Refs) -> Refs:
        """A x, one ref a constraint."""
        build, declared, rows = self.build, self.declared, self.route.hessian.space.rows
        ids = [leaf.node.id for leaf in declared.variables]
        out = []
        for c in declared.constraints:
            pieces = []
            for term in c.terms:
                k = ids.index(term.leaf.id)
                vector = x[k].rename(dict(zip(rows[k], term.columns, strict=True)))
                gone = [j for j in term.columns if j not in c.labels]
                pieces.append(build.con(build.times(term.coefficient, vector), gone))
            out.append(build.plus(*pieces))
        return out

    def _spread(self, y: Refs) -> Refs:
        """A' y, one ref a variable."""
        build, declared, rows = self.build, self.declared, self.route.hessian.space.rows
        out = []
        for k, leaf in enumerate(declared.variables):
            pieces = []
            for c, weight in zip(declared.constraints, y, strict=True):
                for term in c.terms:
                    if term.leaf.id == leaf.node.id:
                        gone = [j for j in c.labels if j not in term.columns]
                        inner = build.con(build.times(term.coefficient, weight), gone)
                        pieces.append(inner.rename(dict(zip(term.columns, rows[k], strict=True))))
            out.append(build.plus(*pieces) if pieces else build.number(0.0))
        return out

    def _corner(self, y: Refs) -> Refs:
        """D y, one ref a constraint."""
        return [self.build.times(d, p) for d, p in zip(self._corners(), y, strict=True)]

    @cached_property
    def _schur_numbers(self) -> list[float] | None:
        """The diagonal of S without its common factor, where that is a number for each constraint; else None."""
        form = self.route.schur
        if form is None or form.kind not in ("diagonal", "scaled-identity"):
            return None
        if self.route.schur_solver != "Divide":
            return None
        entries = [row[k].diagonal for k, row in enumerate(form.grid)]
        numbers = [None if entry is None else self.build.as_number(entry) for entry in entries]
        known = [number for number in numbers if number]
        return known if len(known) == len(numbers) else None

    def _schur_solve(self, rhs: Refs, prefix: int) -> tuple[Refs, Refs]:
        """S^-1 rhs; the common factor of S is divided out of the right-hand side, where it usually cancels."""
        build, route = self.build, self.route
        form = route.schur
        assert form is not None
        space = form.space
        inverse = [(ref, -power) for ref, power in route.common]
        scaled = [build.mul([(r, 1.0), *inverse], 1.0 / route.common_coefficient) for r in rhs]
        if self._schur_numbers is not None:
            return [build.scale(1.0 / n, r) for n, r in zip(self._schur_numbers, scaled, strict=True)], []
        factor = self._schur_factor()
        flat = lowering.solve(build, factor, lowering.pack(build, space, scaled, space.rows, prefix))
        status = [lowering.status_of(build, factor)]
        return lowering.unpack(build, space, flat, space.rows, [None] * len(space.names)), status

    def _schur_factor(self) -> Ref:
        """The factorisation of S, one call however often it is asked for."""
        form = self.route.schur
        assert form is not None
        return lowering.factorised(self.build, self._schur_operator(form), self.route.schur_solver, "schur")

    def cancelled(self) -> Ref | None:
        """Whether the elimination in S lost digits, as a flag of the emitted code; None where nothing is eliminated."""
        if self.route.name != "range-space" or self.route.schur_solver not in ELIMINATING or self.refinements:
            return None
        return call(self.build, "{0}.cancelled", [(self._schur_factor(), (), -1)], (), BATCHED, "cancelled")

    def _schur_operator(self, form: Form) -> Ref:
        build = self.build
        if form.kind in ("diagonal", "scaled-identity") and self.route.schur_solver == "Divide":
            return lowering.operator(build, form, "diagonal")
        if self.route.schur_solver not in ELIMINATING:
            return lowering.operator(build, form, "dense")
        return grid_operator(build, form, null_vectors=self.route.dependent is not None)

    def _system(self) -> Ref:
        """K by numbers: H structured or dense, A written out."""
        build, space = self.build, self.route.hessian.space
        if self.route.name == "sparse":
            null = ", null_vectors" if self.route.dependent is not None else ""
            matrix = patterns.kkt_operator(self.declared, self.route.hessian, self.route.jacobian)
            text = f"entries.SparseKKT({{0}}, {space.size}{null})"
            return call(build, text, [(matrix, (), -1)], (), BATCHED, "kkt")
        jacobian = jacobian_matrix(self.declared, space.columns)
        args: list[tuple[Ref, Sequence[Label], int]] = [(jacobian, jacobian.labels, BATCHED)]
        corner = ""
        if self.declared.cornered:
            rows = self.declared.constraint_space
            flat = lowering.pack(build, rows, self._corners(), rows.rows, BATCHED)
            corner = ", corner={2}"
            args.append((flat, flat.labels, BATCHED))
        if self.route.name == "full":
            hessian = lowering.dense_matrix(build, self.route.hessian)
            option = ", ldl=True" if self.route.solver == "ldl" else ""
            text = f"saddle.FullKKT({{0}}, {{1}}{option}{corner})"
            return call(build, text, [(hessian, hessian.labels, BATCHED), *args], (), BATCHED, "kkt")
        null = ", null_vectors" if self.route.dependent is not None else ""
        text = f"saddle.RangeSpace({{0}}, {{1}}{null}{corner})"
        return call(build, text, [(self._hessian_factor(), (), -1), *args], (), BATCHED, "kkt")

    def _corners(self) -> Refs:
        """D, one ref a constraint."""
        found = [self.declared.corner(c) for c in self.declared.constraints]
        return [self.build.number(0.0) if ref is None else ref for ref in found]

    def _numbers(self, a: Refs, b: Refs, prefix: int) -> tuple[Refs, Refs, Refs]:
        """(w, s) by the numbers of `_system`."""
        build, space, rows = self.build, self.route.hessian.space, self.declared.constraint_space
        solver = self._system()
        flat_a = lowering.pack(build, space, a, space.rows, prefix)
        flat_b = lowering.pack(build, rows, b, rows.rows, prefix)
        both = call(
            build,
            "{0}.solve({1}, {2})",
            [(solver, (), -1), (flat_a, flat_a.labels, prefix), (flat_b, flat_b.labels, prefix)],
            (),
            prefix,
        )
        out_w, out_s = build.labels.new(space.size), build.labels.new(rows.size)
        w = call(build, "{0}[0]", [(both, (), -1)], (out_w,), prefix, "w")
        s = call(build, "{0}[1]", [(both, (), -1)], (out_s,), prefix, "s")
        return (
            lowering.unpack(build, space, w, space.rows, [None] * len(space.names)),
            lowering.unpack(build, rows, s, rows.rows, [None] * len(rows.names)),
            [lowering.status_of(build, solver)],
        )


def jacobian_matrix(declared: Declared, columns: Sequence[tuple[Label, ...]]) -> Ref:
    """A written out, (B, p, m), over two labels."""
    build, space = declared.build, declared.constraint_space
    ids = [leaf.node.id for leaf in declared.variables]
    cells = []
    for i, c in enumerate(declared.constraints):
        row = []
        for k, leaf_id in enumerate(ids):
            pieces = []
            for term in c.terms:
                if term.leaf.id != leaf_id:
                    continue
                names, deltas = {}, []
                for own, column in zip(term.columns, columns[k], strict=True):
                    if own in c.labels:
                        deltas.append(build.eye(own, column))
                    else:
                        names[own] = column
                pieces.append(build.times(term.coefficient.rename(names), *deltas))
            total = build.plus(*pieces) if pieces else None
            entry = Entry() if total is None or build.is_zero(total) else Entry(dense=(total,))
            size = 1
            for s in declared.variables[k].sizes:
                size *= s
            row.append((entry, c.labels, columns[k], (space.entries(i), size)))
        cells.append(row)
    return lowering.joined(build, cells)
