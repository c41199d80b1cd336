"""Systems of equations in symbols: J = D_u r by the labels of its terms, and refs of the solutions with J and with J'.

In: `Declared`, whose constraints are the residual. Out: the form of J, the solver chosen for it, and refs. What is a
symmetric H for an optimisation problem is J here, classified by the same rules. Next file: `structured/square.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from implicitdiff import operators, solvers
from implicitdiff.derivatives.declared import Constrained, Declared
from implicitdiff.graph.build import Builder
from implicitdiff.graph.calls import call
from implicitdiff.graph.ir import BATCHED, Label, Ref, Unsupported
from implicitdiff.graph.maps import Place
from implicitdiff.graph.values import shape
from implicitdiff.kkt import lowering, shapes
from implicitdiff.kkt.grid import grid_cell, meta_grid
from implicitdiff.kkt.route import STRUCTURED, Route
from implicitdiff.memory import over_limit
from implicitdiff.structure.analyze import classify
from implicitdiff.structure.forms import Contribution, Form

Refs = list[Ref]


def jacobian_form(declared: Declared) -> Form:
    """J by its kind: rows are the entries of the residual, columns those of the variables, paired leaf by leaf.

    Raises:
        Unsupported: the residual has not the leaves and the shapes of the variables, or is a concatenation whose parts
            make no band.
    """
    build = declared.build
    if len(declared.output_shapes) != len(declared.variables):
        raise Unsupported("the residual has another number of leaves than the variables")
    for leaf, wanted in zip(declared.variables, declared.output_shapes, strict=True):
        if list(leaf.sizes) != [size for size in wanted if size != 1]:
            raise Unsupported(
                f"the residual has not the shape of {leaf.name}, so its rows belong to no axis of it"
            )
    whole = all(_is_whole(declared, c) for c in declared.constraints)
    for c in declared.constraints:
        sizes = [build.labels.sizes[k] for k in c.labels]
        if whole and sizes != list(declared.variables[c.block.output].sizes):
            raise Unsupported("views of the residual split its axes otherwise than those of the variables")
    form = classify(
        build,
        declared.space,
        _contributions(declared, written=False),
        (lambda: _contributions(declared, written=True)) if whole else _refuse,
    )
    if not whole and form.kind not in ("banded", "block-diagonal", "diagonal"):
        _refuse()
    return form


def _refuse() -> list[Contribution]:
    raise Unsupported("the residual is a concatenation whose parts make no band")


def _is_whole(declared: Declared, constraint: Constrained) -> bool:
    return sum(c.block.output == constraint.block.output for c in declared.constraints) == 1


def _contributions(declared: Declared, *, written: bool) -> list[Contribution]:
    """The terms of J."""
    index = {leaf.node.id: k for k, leaf in enumerate(declared.variables)}
    found = []
    for c in declared.constraints:
        rows: tuple[Label, ...] = c.labels
        places: tuple[Place | None, ...] = ()
        if not _is_whole(declared, c):
            rows, places = _placed_rows(declared, c)
        terms = c.terms if written else declared.jacobians.of(c.value)
        for term in terms:
            block = (c.block.output, index[term.leaf.id])
            for factors, summed in _opened(declared.build, term.coefficient, {*rows, *term.columns}):
                across = () if written else term.places
                found.append(Contribution(block, rows, term.columns, factors, summed, places, across))
    return found


def _opened(
    build: Builder, coefficient: Ref, taken: set[Label]
) -> list[tuple[tuple[Ref, ...], tuple[Label, ...]]]:
    """A coefficient as a sum of products, (factors, summed labels) each: sum_k U_ik V_jk shows its rank only so."""
    node = coefficient.node
    if node.op == "add" and not node.data[0]:
        args, _ = build.open(coefficient)
        scaled = [build.scale(c, a) for c, a in zip(node.data[1], args, strict=True)]
        return [pair for ref in scaled for pair in _opened(build, ref, taken)]
    free = tuple(k for k in coefficient.labels if k not in taken)
    number, powers = build.split(coefficient)
    sums = [k for k, (ref, power) in enumerate(powers) if ref.node.op == "con" and power == 1.0]
    if len(sums) != 1 or powers[sums[0]][0].node.data:
        return [((coefficient,), free)]
    (body,), bound = build.open(powers[sums[0]][0])
    rest = build.mul([p for k, p in enumerate(powers) if k != sums[0]], number)
    return [((rest, body), (*free, *bound))]


def _placed_rows(
    declared: Declared, constraint: Constrained
) -> tuple[tuple[Label, ...], tuple[Place | None, ...]]:
    """The rows of one part of a concatenated residual: labels, and where they lie along the axis it is joined in."""
    build, block = declared.build, constraint.block
    rows: list[Label] = []
    places: list[Place | None] = []
    for d, size in enumerate(declared.output_shapes[block.output]):
        own = block.value.dims[d]
        if size == 1:
            continue
        if d != block.dim:
            rows += own
            places += [None] * len(own)
            continue
        length = shape(build, block.value)[d]
        if length == 1:
            rows.append(build.labels.new(1))
            places.append(("index", block.offset))
        elif len(own) == 1:
            rows.append(own[0])
            places.append(("slice", block.offset, 1, length))
        else:
            raise Unsupported("a concatenation of residuals along an axis that views have split")
    return tuple(rows), tuple(places)


class SquareSystem:
    """Builds refs of solutions with J and J', along one route."""

    def __init__(self, declared: Declared, form: Form, linear_solver: str, dtype: torch.dtype) -> None:
        """Chooses the solver.

        Raises:
            OptionError: `linear_solver` does not take a J of this kind.
            Unsupported: J would have to be written down, and is too large for that.
        """
        self.declared, self.build, self.form = declared, declared.build, form
        self.route = _route(declared.build, form, linear_solver, dtype)

    @property
    def _divides(self) -> bool:
        return self.route.solver == "divide"

    def operator(self, *, transposed: bool = False) -> Ref:
        """J or J' as an operator that is not stated to be symmetric."""
        kind = self.route.hessian_kind
        plain = (
            _grid(self.build, self.form)
            if kind == "block"
            else lowering.operator(self.build, self.form, kind)
        )
        option = ", transpose=True" if transposed else ""
        return call(self.build, f"operators.general({{0}}{option})", [(plain, (), -1)], (), BATCHED)

    def factor(self, *, transposed: bool) -> Ref | None:
        """The factorisation of J or J', the same node in every solve; None where J is only divided by."""
        if self._divides:
            return None
        operator = self.operator(transposed=transposed)
        return lowering.factorised(self.build, operator, self.route.hessian_solver, "factor")

    def solve(self, rhs: Refs, prefix: int, *, transposed: bool) -> tuple[Refs, Refs]:
        """(J^-1 rhs or J'^-1 rhs, status refs); rhs and the answer over the rows of the space."""
        build, space = self.build, self.form.space
        factor = self.factor(transposed=transposed)
        if factor is None:
            diagonals = [self.form.grid[k][k].diagonal for k in range(len(rhs))]
            return [
                build.mul([(diagonal, -1.0), (ref, 1.0)]) if diagonal is not None else ref
                for ref, diagonal in zip(rhs, diagonals, strict=True)
            ], []
        packed = lowering.pack(build, space, rhs, space.rows, prefix)
        flat = lowering.solve(build, factor, packed, "s" if transposed else "w")
        answer = lowering.unpack(build, space, flat, space.rows, [None] * len(space.names))
        return answer, [lowering.status_of(build, factor)]

    def product(self, rhs: Refs, prefix: int, *, transposed: bool) -> Refs:
        """J rhs or J' rhs, over the rows of the space."""
        build, space = self.build, self.form.space
        packed = lowering.pack(build, space, rhs, space.rows, prefix)
        operator = self.operator(transposed=transposed)
        args: list[tuple[Ref, Sequence[Label], int]] = [(operator, (), -1), (packed, packed.labels, prefix)]
        flat = call(build, "{0}.matvec({1})", args, packed.labels, prefix)
        return lowering.unpack(build, space, flat, space.rows, [None] * len(space.names))

    # ---------------------------------------------------------------- rows of J and blocks of the residual

    def parts(self, rows: Refs) -> Refs:
        """Refs over the rows of the space as one ref for each constraint block, over its labels."""
        build, space, found = self.build, self.form.space, []
        for c in self.declared.constraints:
            own, labels = rows[c.block.output], space.rows[c.block.output]
            if _is_whole(self.declared, c):
                found.append(own.rename(dict(zip(labels, c.labels, strict=True))))
                continue
            place = self._axis(c)
            length = shape(build, c.block.value)[c.block.dim]
            start, behind = c.block.offset, ", :" * (len(labels) - place - 1)
            inside = f"{start}" if length == 1 else f"{start}:{start + length}"
            args = [(own, labels, own.node.prefix)]
            found.append(call(build, f"{{0}}[..., {inside}{behind}]", args, c.labels, own.node.prefix))
        return found

    def joined(self, parts: Refs, prefix: int) -> Refs:
        """One ref for each constraint block as refs over the rows of the space: the inverse of `parts`."""
        build, space = self.build, self.form.space
        pieces: dict[int, list[tuple[Constrained, Ref]]] = {}
        for c, ref in zip(self.declared.constraints, parts, strict=True):
            pieces.setdefault(c.block.output, []).append((c, ref))
        found = []
        for k, labels in enumerate(space.rows):
            if len(pieces[k]) == 1:
                c, ref = pieces[k][0]
                found.append(ref.rename(dict(zip(c.labels, labels, strict=True))))
                continue
            texts: list[str] = []
            args: list[tuple[Ref, Sequence[Label], int]] = []
            for c, ref in pieces[k]:
                behind = len(labels) - self._axis(c) - 1
                single = shape(build, c.block.value)[c.block.dim] == 1
                texts.append(f"{{{len(args)}}}" + (f".unsqueeze(-{behind + 1})" if single else ""))
                args.append((ref, c.labels, prefix))
            behind = len(labels) - self._axis(pieces[k][0][0])
            found.append(call(build, f"torch.cat(({', '.join(texts)}), dim=-{behind})", args, labels, prefix))
        return found

    def _axis(self, constraint: Constrained) -> int:
        """Along which axis (of those that are not 1) the parts of a residual are joined."""
        shaped, dim = self.declared.output_shapes[constraint.block.output], constraint.block.dim
        return sum(len(constraint.block.value.dims[d]) for d in range(dim) if shaped[d] != 1)


def _route(build: Builder, form: Form, linear_solver: str, dtype: torch.dtype) -> Route:
    """The solver for J: dividing where it is diagonal, else the cheapest of those that need no symmetry."""
    base = Route("equations", form, form.kind, "Divide", None, "", (), 1.0, None, "divide", ())
    if form.kind in ("diagonal", "scaled-identity") and linear_solver in ("auto", "divide"):
        return base
    if form.kind == "block":
        operator: operators.LinearOperator = meta_grid(form, dtype)
    else:
        operator = shapes.meta_operator(build, form, form.kind, dtype)
    choice = solvers.choose(operators.general(operator), linear_solver, definite=False)
    structured = choice.solver.name in (*STRUCTURED, "gmres") or form.kind == "banded"
    needed = "" if structured else over_limit("J", operator.size, dtype.itemsize)
    if needed and linear_solver == "auto":
        raise Unsupported(f"J is {form.kind}: {needed}")
    return replace(
        base,
        hessian_kind=form.kind if structured else "dense",
        hessian_solver=type(choice.solver).__name__,
        solver=choice.solver.name,
        rejected=tuple(choice.rejected),
    )


def _grid(build: Builder, form: Form) -> Ref:
    """J over several variables as a grid, both triangles computed."""
    space = form.space
    number = range(len(space.names))
    args: list[tuple[Ref, Sequence[Label], int]] = []
    cells = [[grid_cell(build, form.grid[i][j], i, j, space, args) or "None" for j in number] for i in number]
    grid = ", ".join(f"({', '.join(row)},)" for row in cells)
    sizes = tuple(space.entries(k) for k in number)
    return call(build, f"operators.Block(({grid},), {sizes})", args, (), BATCHED)
