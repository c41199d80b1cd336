"""Which way K is solved: decided once, from the forms of H and of S = A H^-1 A'.

In: `Declared` and the form of H. Out: a frozen `Route`. S is classified by the same labels as H, so that a transport
problem's diagonal corners are found, not known. Next file: `symbolic.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from implicitdiff import operators, solvers
from implicitdiff.derivatives.declared import Declared
from implicitdiff.derivatives.jacobian import JacobianTerm
from implicitdiff.errors import OptionError
from implicitdiff.graph.build import Builder, Factor
from implicitdiff.graph.ir import Label, Ref, Unsupported
from implicitdiff.kkt import patterns, shapes
from implicitdiff.kkt.grid import meta_grid
from implicitdiff.memory import over_limit
from implicitdiff.structure import dependence, sparse
from implicitdiff.structure.analyze import classify
from implicitdiff.structure.forms import Contribution, Entry, Form, SparseTerm


@dataclass(frozen=True)
class Route:
    """How K is solved.

    `name` is one of "unconstrained", "range-space" (S by its labels), "numeric" (S formed from p solves with H),
    "sparse" (K as one sparse matrix) and "full" (K as one dense matrix).
    """

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
    jacobian: tuple[SparseTerm, ...] = ()
    """For "sparse": A entry by entry."""

    @property
    def whole(self) -> bool:
        """Whether K itself is factored: nothing is left to try where it is singular."""
        return self.name in ("full", "sparse")


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
                        out.append(
                            _pair(build, (i, j), first.labels, tuple(own.values()), a, b, own, inverse)
                        )
    return out


def corner_terms(declared: Declared) -> list[Contribution]:
    """The diagonal D of K's corner, which makes S = A H^-1 A' to S + D: 1 in rows that are off."""
    terms = []
    for k, c in enumerate(declared.constraints):
        corner = declared.corner(c)
        if corner is not None:
            terms.append(Contribution((k, k), c.labels, c.labels, (corner,), ()))
    return terms


def _pair(
    build: Builder,
    block: tuple[int, int],
    rows: tuple[Label, ...],
    columns: tuple[Label, ...],
    a: JacobianTerm,
    b: JacobianTerm,
    own: dict[Label, Label],
    inverse: dict[int, Ref] | None,
) -> Contribution:
    """One product of two terms of A: columns of the variable that both leave free are summed."""
    hidden = build.labels.fresh(k for k in b.columns if k not in own)
    names = {**own, **hidden}
    left = a.coefficient
    right = b.coefficient.rename(names)
    theirs = [names[k] for k in b.columns]
    rename_left: dict[Label, Label] = {}
    rename_right: dict[Label, Label] = {}
    axes = list(columns)
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
            axes = [mine if k == other else k for k in axes]
            middle.append(mine)
    factors = [left.rename(rename_left), right.rename(rename_right)]
    if inverse is not None:
        weight = inverse[a.leaf.id]
        factors.append(weight.rename(dict(zip(a.leaf.axes, middle, strict=True))))
    return Contribution(block, rows, tuple(axes), tuple(factors), tuple(summed))


STRUCTURED = (
    "woodbury",
    "block-cholesky",
    "tridiagonal",
    "banded-cholesky",
    "kronecker",
    "divide",
    "cg",
    "schur",
    "schur-cg",
    "sparse-lu",
)
"""Solvers that use the form of H; the others are given its dense twin."""


SMALLEST_SPARSE = 100
"""K with fewer rows is factored densely: nothing else is asked."""


class RouteFinder:
    """Takes the decisions for one problem; `identity` replaces H by the identity (for least squares)."""

    def __init__(self, declared: Declared, dtype: torch.dtype, *, identity: bool = False) -> None:
        self.declared, self.build, self.dtype, self.identity = declared, declared.build, dtype, identity

    def choose(self, form: Form, linear_solver: str, *, full: bool = False) -> Route:
        """The route for H of this form."""
        constrained = bool(self.declared.constraints)
        diagonal = form.kind in ("diagonal", "scaled-identity")
        dependent = self.declared.dependent
        base = Route("unconstrained", form, form.kind, "Divide", None, "", (), 1.0, dependent, "divide", ())
        if dependent is not None and linear_solver == "ldl":
            raise OptionError(
                f"linear_solver='ldl' takes no dependent constraints, and here {dependent.sentences[0]}: "
                "choose auto or lu"
            )
        if constrained and linear_solver in ("auto", "sparse-lu") and not self.identity:
            found = self._sparse(base, linear_solver)
            if found is not None:
                return found
        if constrained and (full or linear_solver in ("lu", "ldl") or self._surely_singular(form)):
            reason = (
                "asked for"
                if linear_solver in ("lu", "ldl")
                else "H has no curvature for some variable: S does not exist"
            )
            rejected = () if linear_solver in ("lu", "ldl") else (("schur", reason),)
            size = form.space.size + self.declared.constraint_space.size
            if rejected and not full and (needed := over_limit("K", size, self.dtype.itemsize)):
                raise Unsupported(f"{reason}: {needed}")
            return replace(
                base, name="full", solver="ldl" if linear_solver == "ldl" else "lu", rejected=rejected
            )
        if constrained and diagonal:
            return self._range_space(base, linear_solver)
        if diagonal and linear_solver in ("auto", "divide"):
            return base
        kind, choice = self._hessian_solver(
            form, "auto" if linear_solver == "schur" and constrained else linear_solver, constrained
        )
        base = replace(
            base,
            hessian_kind=kind,
            hessian_solver=type(choice.solver).__name__,
            solver=choice.solver.name,
            rejected=tuple(choice.rejected),
        )
        if constrained and linear_solver == "auto":
            self._check_rows()
        return replace(base, name="numeric", solver="schur") if constrained else base

    def _check_rows(self) -> None:
        """Refuse an S without structure that is above the limit; it is formed by numbers, as A is."""
        if needed := over_limit("S = A H^-1 A'", self.declared.constraint_space.size, self.dtype.itemsize):
            raise Unsupported(needed)

    def _range_space(self, base: Route, linear_solver: str) -> Route:
        """The route through S of a diagonal H: the elimination of a diagonal corner if there is one."""
        schur, common, coefficient = self._schur(base.hessian)
        count = len(schur.space.names)
        found = {"cholesky": "Cholesky"}
        if schur.kind in ("diagonal", "scaled-identity"):
            found = {"divide": "Divide", **found}
        elif count > 1 and any(schur.grid[k][k].is_diagonal for k in range(count)):
            found = {"schur": "Schur", "schur-cg": "SchurConjugateGradients", **found}
        choice = None
        if "schur" in found and linear_solver in ("auto", "schur-cg"):
            choice = solvers.choose(meta_grid(schur, self.dtype), linear_solver)
        name = next(iter(found)) if linear_solver in ("auto", "schur") else linear_solver
        if choice is not None and choice.solver.name in found:
            name = choice.solver.name
        if name == "cholesky" and linear_solver == "auto":
            self._check_rows()
        if name not in found:
            known = ", ".join([*found, "lu", "ldl"])
            raise OptionError(
                f"linear_solver={linear_solver!r} does not fit: H is {base.hessian.kind} and "
                f"S = A H^-1 A' is {schur.kind}; choose auto, {known}"
            )
        return replace(
            base,
            name="range-space",
            schur=schur,
            schur_solver=found[name],
            common=common,
            common_coefficient=coefficient,
            solver=name,
            rejected=tuple(() if choice is None else choice.rejected),
        )

    def _hessian_solver(
        self, form: Form, linear_solver: str, constrained: bool
    ) -> tuple[str, solvers.Choice]:
        operator = (
            meta_grid(form, self.dtype)
            if form.kind == "block"
            else shapes.meta_operator(self.build, form, form.kind, self.dtype)
        )
        if form.grouped and linear_solver in ("auto", "woodbury", "block-cholesky"):
            groups = shapes.meta_operator(self.build, form, "grouped", self.dtype)
            choice = solvers.choose(groups, linear_solver)
            if choice.solver.name == "woodbury":
                return "grouped", choice
        choice = self._or_sparse(form, operator, linear_solver, constrained)
        if choice.solver.name == "sparse-lu":
            return "sparse", choice
        structured = choice.solver.name in STRUCTURED
        needed = "" if structured else over_limit("H", operator.size, self.dtype.itemsize)
        if needed and linear_solver == "auto":
            # the products with D + U C U' are cheap whatever the rank, also for many right-hand sides
            many = constrained and form.kind != "low-rank-plus-diagonal"
            large = {name: needed for name in solvers.candidates(operator) if name not in STRUCTURED}
            try:
                return form.kind, solvers.choose(operator, many=many, ruled_out=large)
            except OptionError:
                raise Unsupported(f"H is {form.kind}: {needed}") from None
        # a band is written into a dense matrix faster by its operator than term by term
        return (form.kind if structured or form.kind == "banded" else "dense"), choice

    def _or_sparse(
        self, form: Form, operator: operators.LinearOperator, linear_solver: str, many: bool
    ) -> solvers.Choice:
        """The solver of the form, or sparse LU on its entries where that is predicted to be faster."""
        if not form.pattern or form.kind == "sparse" or linear_solver not in ("auto", "sparse-lu"):
            return solvers.choose(operator, linear_solver, many=many)
        entries = solvers.choose(patterns.meta_operator(self.build, form, self.dtype), "sparse-lu")
        if linear_solver == "sparse-lu":
            return entries
        choice = solvers.choose(operator, linear_solver, many=many)
        ratio = entries.cost.seconds / choice.cost.seconds
        slower, faster, times = (entries, choice, ratio) if ratio > 1.0 else (choice, entries, 1.0 / ratio)
        reason = f"predicted to take {times:.1f} times as long as {faster.solver.name}"
        return replace(faster, rejected=(*choice.rejected, (slower.solver.name, reason)))

    def _sparse(self, base: Route, linear_solver: str) -> Route | None:
        """K as one sparse matrix, where every term of H is sparse and that is asked for or predicted to be faster."""
        form = base.hessian
        if not form.pattern:
            if (
                form.kind not in ("diagonal", "scaled-identity", "zero", "banded")
                or len(form.space.names) > 1
            ):
                return None
            bands = form.entry.tied(len(form.space.rows[0]))
            form = replace(form, pattern=sparse.of_bands(self.build, form.space, bands))
        if (
            linear_solver == "auto"
            and self.declared.constraint_space.size + form.space.size < SMALLEST_SPARSE
        ):
            return None
        jacobian = patterns.jacobian_terms(self.declared)
        if jacobian is None:
            return None
        if linear_solver == "auto":
            if form.kind in ("diagonal", "scaled-identity") and self._is_eliminated(base.hessian):
                return None
            mine = patterns.kkt_cost(self.declared, form, jacobian, self.dtype).seconds
            other = patterns.other_cost(
                self.build, form, self.declared.constraint_space.size, self.dtype
            ).seconds
            if mine > other:
                return None
        return replace(
            base, name="sparse", hessian=form, hessian_kind="sparse", solver="sparse-lu", jacobian=jacobian
        )

    def _is_eliminated(self, form: Form) -> bool:
        """Whether S = A H^-1 A' is diagonal or has a diagonal corner: no pattern of K beats that elimination.

        The predicted cost of K knows nothing of fill, which is complete for the marginals of a transport plan.
        """
        schur, _, _ = self._schur(form)
        corners = [schur.grid[k][k].is_diagonal for k in range(len(schur.space.names))]
        return schur.kind in ("diagonal", "scaled-identity") or (len(corners) > 1 and any(corners))

    def _surely_singular(self, form: Form) -> bool:
        """Whether some variable has no curvature at all."""
        grid = form.grid
        if form.kind == "sparse":
            return False
        return any(all(e.empty for e in grid[k]) for k in range(len(grid)))

    def _schur(self, form: Form) -> tuple[Form, tuple[Factor, ...], float]:
        """S with the common factor divided out."""
        build = self.build
        inverse = None if self.identity else self.inverse_diagonal(form)
        space = self.declared.constraint_space
        schur = classify(build, space, [*pairs_through(self.declared, inverse), *corner_terms(self.declared)])
        if len(space.names) > 1 and schur.kind not in ("diagonal", "scaled-identity", "zero"):
            corners = sum(schur.grid[k][k].is_diagonal for k in range(len(space.names)))
            schur = replace(
                schur,
                kind="block",
                reason=f"one block row per constraint, {corners} of {len(space.names)} corners diagonal",
            )
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


def _scaled(build: Builder, form: Form, factors: Sequence[Factor], coefficient: float) -> Form:
    """A form with every block multiplied by a label-free factor."""

    def times(ref: Ref) -> Ref:
        return build.mul([(ref, 1.0), *factors], coefficient)

    def entry(e: Entry) -> Entry:
        return Entry(
            None if e.diagonal is None else times(e.diagonal),
            tuple((axes, times(r)) for axes, r in e.partial),
            tuple(replace(t, weights=times(t.weights)) for t in e.low_rank),
            tuple(times(r) for r in e.dense),
        )

    return replace(form, grid=tuple(tuple(entry(e) for e in row) for row in form.grid))
