"""The KKT solve in symbols: which route, S = A H^-1 A' by the labels, and the refs of (w, s).

In: `Declared` and the form of H. Out: `Route` (the decisions, made once) and refs of the solution for given right-hand
sides. Next file: `structured.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from implicitdiff import lowering, solvers
from implicitdiff.derivatives.declared import Declared
from implicitdiff.graph.build import Builder, Factor
from implicitdiff.graph.emit import call
from implicitdiff.graph.ir import BATCHED, STACKED, Label, Ref
from implicitdiff.kkt import Steps, range_space
from implicitdiff.structure import dependence
from implicitdiff.structure.analyze import Contribution, classify
from implicitdiff.structure.forms import Entry, Form

Refs = list[Ref]


@dataclass(frozen=True)
class Route:
    """How K is solved. `name`: "unconstrained", "range-space" (S by its labels), "numeric" (S formed densely), "full" (K as one matrix)."""

    name: str
    hessian: Form
    hessian_kind: str
    """The operator that H is handed over as (a dense twin where that is cheaper)."""
    hessian_solver: str
    schur: Form | None
    schur_solver: str
    common: tuple[Factor, ...]
    """Label-free factors that all blocks of S share; they are divided out."""
    common_coefficient: float
    dependent: dependence.Dependence | None
    solver: str
    rejected: tuple[tuple[str, str], ...]


def pairs_through(declared: Declared, inverse: dict[int, Ref] | None) -> list[Contribution]:
    """The terms of A W A' with W = H^-1 diagonal (leaf id -> ref over the leaf's axes), or the identity (None)."""
    build = declared.build
    out = []
    for i, first in enumerate(declared.constraints):
        for j, second in enumerate(declared.constraints):
            own = build.labels.fresh(second.labels)
            for a in first.terms:
                for b in second.terms:
                    if a.leaf.id == b.leaf.id:
                        out.append(_pair(build, (i, j), first.labels, tuple(own.values()), a, b, own, inverse))
    return out


def _pair(build, block, rows, columns, a, b, own, inverse) -> Contribution:  # type: ignore[no-untyped-def]
    """One product of two terms of A: columns of the variable that both leave free are summed."""
    hidden = build.labels.fresh(k for k in b.columns if k not in own)
    names = {**own, **hidden}
    left = a.coefficient
    right = b.coefficient.rename(names)
    theirs = [names[k] for k in b.columns]
    rename_left: dict[Label, Label] = {}
    rename_right: dict[Label, Label] = {}
    columns = list(columns)
    middle: list[Label] = []
    summed = []
    for mine, other in zip(a.columns, theirs, strict=True):
        if other in hidden.values():
            rename_right[other] = mine
            middle.append(mine)
            if mine not in rows:
                summed.append(mine)
        elif mine not in rows:
            rename_left[mine] = other
            middle.append(other)
        else:
            # a delta on both sides: the axis of one constraint is the axis of the other
            rename_right[other] = mine
            columns = [mine if k == other else k for k in columns]
            middle.append(mine)
    factors = [left.rename(rename_left), right.rename(rename_right)]
    if inverse is not None:
        weight = inverse[a.leaf.id]
        factors.append(weight.rename(dict(zip(a.leaf.axes, middle, strict=True))))
    return Contribution(block, tuple(rows), tuple(columns), tuple(factors), tuple(summed))


class SymbolicKKT:
    """Builds refs of KKT solves along one route."""

    def __init__(self, declared: Declared, form: Form, linear_solver: str, dtype: torch.dtype, *, full: bool = False,
                 identity: bool = False) -> None:
        self.declared, self.build = declared, declared.build
        self.identity = identity
        self.route = self._choose(form, linear_solver, dtype, full)

    # ---------------------------------------------------------------- decisions

    def _choose(self, form: Form, linear_solver: str, dtype: torch.dtype, full: bool) -> Route:
        build = self.build
        constrained = bool(self.declared.constraints)
        diagonal = form.kind in ("diagonal", "scaled-identity")
        dependent = dependence.find(build, self.declared.rows()) if constrained else None
        base = Route("unconstrained", form, form.kind, "Divide", None, "", (), 1.0, dependent, "divide", ())
        if constrained and (full or self._surely_singular(form)):
            reason = "H is singular for every input, so S = A H^-1 A' does not exist"
            return replace(base, name="full", solver="lu", rejected=(("schur", reason),))
        if not diagonal:
            kind, choice = self._hessian_solver(form, linear_solver if not constrained else "auto", dtype)
            base = replace(base, hessian_kind=kind, hessian_solver=type(choice.solver).__name__,
                           solver=choice.solver.name, rejected=tuple(choice.rejected))
            return replace(base, name="numeric", solver="schur") if constrained else base
        if not constrained:
            return base
        schur, common, coefficient = self._schur(form)
        corners = [k for k in range(len(schur.space.names)) if schur.grid[k][k].is_diagonal]
        if schur.kind in ("diagonal", "scaled-identity"):
            solver, name = "Divide", "divide"
        elif len(schur.space.names) > 1 and corners:
            solver, name = "Schur", "schur"
        else:
            solver, name = "Cholesky", "cholesky"
        return replace(base, name="range-space", schur=schur, schur_solver=solver, common=common,
                       common_coefficient=coefficient, solver=name)

    def _hessian_solver(self, form: Form, linear_solver: str, dtype: torch.dtype) -> tuple[str, solvers.Choice]:
        operator = lowering.meta_operator(self.build, form, form.kind, dtype)
        choice = solvers.choose(operator, linear_solver)
        structured = choice.solver.name in ("woodbury", "block-cholesky", "divide", "cg")
        return (form.kind if structured else "dense"), choice

    def _surely_singular(self, form: Form) -> bool:
        """Whether some variable has no curvature at all."""
        grid = form.grid
        return any(all(e.empty for e in grid[k]) for k in range(len(grid)))

    def _schur(self, form: Form) -> tuple[Form, tuple[Factor, ...], float]:
        """S with the common factor divided out."""
        build = self.build
        inverse = None if self.identity else self.inverse_diagonal(form)
        space = self.declared.constraint_space
        schur = classify(build, space, pairs_through(self.declared, inverse))
        if len(space.names) > 1 and schur.kind not in ("diagonal", "scaled-identity", "zero"):
            corners = sum(schur.grid[k][k].is_diagonal for k in range(len(space.names)))
            schur = replace(schur, kind="block", reason=f"one block row per constraint, {corners} of {len(space.names)} corners diagonal")
        common, coefficient = self._common(schur)
        if not common and coefficient == 1.0:
            return schur, (), 1.0
        inverse_common = [(ref, -power) for ref, power in common]
        return _scaled(build, schur, inverse_common, 1.0 / coefficient), tuple(common), coefficient

    def inverse_diagonal(self, form: Form) -> dict[int, Ref]:
        """H^-1 of a diagonal H: leaf id -> ref over the leaf's axes."""
        out = {}
        for k, leaf in enumerate(self.declared.variables):
            diagonal = form.grid[k][k].diagonal
            assert diagonal is not None
            names = dict(zip(form.space.rows[k], leaf.node.axes, strict=True))
            out[leaf.node.id] = self.build.power(diagonal.rename(names), -1.0)
        return out

    def _common(self, form: Form) -> tuple[list[Factor], float]:
        """The label-free factors of every block of S."""
        found: list[dict[Ref, float]] = []
        numbers = []
        for row in form.grid:
            for entry in row:
                refs = [*entry.dense, *(r for _, r in entry.partial), *(t.weights for t in entry.low_rank)]
                refs += [] if entry.diagonal is None else [entry.diagonal]
                for ref in refs:
                    coefficient, factors = self.build.split(ref)
                    numbers.append(coefficient)
                    found.append({r: p for r, p in factors if not r.labels})
        if not found:
            return [], 1.0
        common = [(r, p) for r, p in found[0].items() if all(other.get(r) == p for other in found)]
        same = len(set(numbers)) == 1 and numbers[0] != 0.0
        return common, numbers[0] if same else 1.0

    # ---------------------------------------------------------------- solving

    def solve(self, a: Refs, b: Refs, prefix: int) -> tuple[Refs, Refs, Refs]:
        """(w, s, status refs): a and w over the rows of the variables' space, b and s over the constraints' labels."""
        if self.route.name == "unconstrained":
            w, status = self._inverse(a, prefix)
            return w, [], status
        if self.route.name == "range-space":
            return self._range_space(a, b, prefix)
        return self._numbers(a, b, prefix)

    def product(self, w: Refs, s: Refs) -> tuple[Refs, Refs]:
        """K (w, s) = (H w - A's, -A w), H by its form: what the probe tests."""
        build, form = self.build, self.route.hessian
        space = form.space
        operator = lowering.operator(build, form)
        flat = lowering.pack(build, space, w, space.rows, STACKED)
        multiplied = call(build, "{0}.matvec({1})", [(operator, (), -1), (flat, flat.labels, STACKED)], flat.labels, STACKED)
        parts = lowering.unpack(build, space, multiplied, space.rows, [None] * len(space.names))
        pulled = self._spread(s)
        return ([build.minus(p, q) for p, q in zip(parts, pulled, strict=True)],
                [build.scale(-1.0, x) for x in self._constrain(w)])

    def least_squares(self, slope: Refs) -> tuple[Refs, Ref]:
        """lam with A A' lam = A slope (for the route of the identity), and its status."""
        return self._schur_solve(self._constrain(slope), BATCHED)

    def _inverse(self, a: Refs, prefix: int, name: str | None = "w") -> tuple[Refs, Refs]:
        """H^-1 a."""
        build, form = self.build, self.route.hessian
        if form.kind in ("diagonal", "scaled-identity"):
            refs = []
            for k, ref in enumerate(a):
                diagonal = form.grid[k][k].diagonal
                refs.append(ref if self.identity or diagonal is None else build.mul([(diagonal, -1.0), (ref, 1.0)]))
            return refs, []
        space = form.space
        factor = lowering.factorised(
            build, lowering.operator(build, form, self.route.hessian_kind), self.route.hessian_solver, "factor")
        rhs = lowering.pack(build, space, a, space.rows, prefix)
        flat = lowering.solve(build, factor, rhs, name)
        return lowering.unpack(build, space, flat, space.rows, [None] * len(space.names)), [lowering.status_of(build, factor)]

    def _range_space(self, a: Refs, b: Refs, prefix: int) -> tuple[Refs, Refs, Refs]:
        build = self.build
        status: Refs = []

        def schur(rhs: Refs) -> Refs:
            solution, verdict = self._schur_solve(rhs, prefix)
            status.append(verdict)
            return solution

        steps: Steps[Refs, Refs] = Steps(
            inverse=lambda x: self._inverse(x, prefix)[0],
            constrain=self._constrain,
            spread=self._spread,
            schur=schur,
            add=lambda x, y: [build.plus(p, q) for p, q in zip(x, y, strict=True)],
            negate=lambda x: [build.scale(-1.0, p) for p in x],
        )
        w, s = range_space(steps, a, b)
        return w, s, status

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

    def _schur_solve(self, rhs: Refs, prefix: int) -> tuple[Refs, Ref]:
        """S^-1 rhs, the common factor divided out before and after."""
        build, route = self.build, self.route
        form = route.schur
        assert form is not None
        space = form.space
        factor = lowering.factorised(build, self._schur_operator(form), route.schur_solver, "schur")
        flat = lowering.solve(build, factor, lowering.pack(build, space, rhs, space.rows, prefix))
        parts = lowering.unpack(build, space, flat, space.rows, [None] * len(space.names))
        inverse = [(ref, -power) for ref, power in route.common]
        scaled = [build.mul([(p, 1.0), *inverse], 1.0 / route.common_coefficient) for p in parts]
        return scaled, lowering.status_of(build, factor)

    def _schur_operator(self, form: Form) -> Ref:
        build, space = self.build, form.space
        if form.kind in ("diagonal", "scaled-identity") and self.route.schur_solver == "Divide":
            return lowering.operator(build, form, "diagonal")
        if self.route.schur_solver != "Schur":
            return lowering.operator(build, form, "dense")
        count = len(space.names)
        args: list[tuple[Ref, Sequence[Label], int]] = []
        cells: list[list[str]] = [["None"] * count for _ in range(count)]
        for i in range(count):
            for j in range(i, count):
                text = self._cell(form.grid[i][j], i, j, space, args)
                if text is not None:
                    cells[i][j] = text
                    if i != j:
                        cells[j][i] = f"{text}.mT"
        grid = ", ".join(f"({', '.join(row)},)" for row in cells)
        sizes = tuple(space.entries(k) for k in range(count))
        null = ", null_vectors=null_vectors" if self.route.dependent is not None else ""
        return call(build, f"operators.Block(({grid},), {sizes}{null})", args, (), BATCHED)

    def _cell(self, entry: Entry, i: int, j: int, space, args) -> str | None:  # type: ignore[no-untyped-def]
        """Template of one block; its arguments are appended to `args`."""
        build = self.build
        if entry.empty and i != j:
            return None
        if i == j and entry.is_diagonal:
            text = f"operators.Diagonal({lowering.flat_text([space.sizes[i]])})".replace("{0}", f"{{{len(args)}}}")
            args.append((entry.diagonal, space.rows[i], BATCHED))
            return text
        text, own = lowering.dense_block(build, entry, space.rows[i], space.columns[j], (space.entries(i), space.entries(j)))
        for k in reversed(range(len(own))):
            text = text.replace(f"{{{k}}}", f"{{{len(args) + k}}}")
        args.extend(own)
        return f"operators.Dense({text})" if i == j else text

    def _numbers(self, a: Refs, b: Refs, prefix: int) -> tuple[Refs, Refs, Refs]:
        """K by numbers: H structured or dense, A written out."""
        build, space, rows = self.build, self.route.hessian.space, self.declared.constraint_space
        jacobian = jacobian_matrix(self.declared, space.columns)
        if self.route.name == "full":
            hessian = lowering.dense_matrix(build, self.route.hessian)
            solver = call(build, "saddle.FullKKT({0}, {1})",
                          [(hessian, hessian.labels, BATCHED), (jacobian, jacobian.labels, BATCHED)], (), BATCHED, "kkt")
        else:
            factor = lowering.factorised(
                build, lowering.operator(build, self.route.hessian, self.route.hessian_kind), self.route.hessian_solver, "factor")
            null = ", null_vectors" if self.route.dependent is not None else ""
            solver = call(build, f"saddle.RangeSpace({{0}}, {{1}}{null})", [(factor, (), -1), (jacobian, jacobian.labels, BATCHED)], (),
                          BATCHED, "kkt")
        flat_a = lowering.pack(build, space, a, space.rows, prefix)
        flat_b = lowering.pack(build, rows, b, rows.rows, prefix)
        both = call(build, "{0}.solve({1}, {2})", [(solver, (), -1), (flat_a, flat_a.labels, prefix), (flat_b, flat_b.labels, prefix)],
                    (), prefix)
        out_w, out_s = build.labels.new(space.size), build.labels.new(rows.size)
        w = call(build, "{0}[0]", [(both, (), -1)], (out_w,), prefix, "w")
        s = call(build, "{0}[1]", [(both, (), -1)], (out_s,), prefix, "s")
        return (lowering.unpack(build, space, w, space.rows, [None] * len(space.names)),
                lowering.unpack(build, rows, s, rows.rows, [None] * len(rows.names)),
                [lowering.status_of(build, solver)])


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


def _scaled(build: Builder, form: Form, factors: Sequence[Factor], coefficient: float) -> Form:
    """A form with every block multiplied by a label-free factor."""
    def times(ref: Ref) -> Ref:
        return build.mul([(ref, 1.0), *factors], coefficient)

    def entry(e: Entry) -> Entry:
        return Entry(
            None if e.diagonal is None else times(e.diagonal), tuple((axes, times(r)) for axes, r in e.partial),
            tuple(replace(t, weights=times(t.weights)) for t in e.low_rank), tuple(times(r) for r in e.dense),
        )

    return replace(form, grid=tuple(tuple(entry(e) for e in row) for row in form.grid))
