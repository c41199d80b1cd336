"""Labelled Jacobians: the derivative of a value by the variables as a short list of terms.

In: a ref. Out: `JacobianTerm`s. A term is a coefficient with labels; a label that an axis of the value and an axis of
the variable share is a Kronecker delta. For `u_i - x_ij` the term is (coefficient 1, variable axes (i)): the delta on i
costs nothing and is never stored. A slice is a delta with a place: `u[1:]` is (1, (i), variable index i + 1).
Next file: `curvature.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from implicitdiff.graph.build import Builder
from implicitdiff.graph.calculus import POINTWISE, chain
from implicitdiff.graph.ir import Label, Node, Ref, Unsupported
from implicitdiff.graph.maps import Place, pad, selection

Places = tuple[Place | None, ...]


@dataclass(frozen=True)
class JacobianTerm:
    """d value / d leaf = coefficient, with the leaf's axes called `columns` (a label of the value there is a delta).

    Where an axis has a place, its label runs along a slice of the leaf's axis, and the rest of that axis is zero; the
    label of a single entry is of size 1, and the coefficient does not have it.
    """

    leaf: Node
    columns: tuple[Label, ...]
    coefficient: Ref
    places: Places


class Jacobians:
    """Jacobians by the variables, one per node, remembered."""

    def __init__(self, build: Builder, variables: frozenset[int]) -> None:
        self.build = build
        self.variables = variables
        self.known: dict[int, list[JacobianTerm]] = {}
        self.known_written: dict[int, list[JacobianTerm]] = {}

    def of(self, ref: Ref) -> list[JacobianTerm]:
        """The terms of D_u ref in the labels of this use; labels that are the variable's own come fresh."""
        node = ref.node
        if not (node.leaves & self.variables):
            return []
        if node.id not in self.known:
            own = self.build.self_ref(node)
            self.known[node.id] = self._merge(own, self._derive(own))
        return self._used(self.known[node.id], ref)

    def written(self, ref: Ref) -> list[JacobianTerm]:
        """As `of`, without places: a slice is a product with a constant selection matrix."""
        node = ref.node
        if node.id not in self.known_written:
            own = self.build.self_ref(node)
            self.known_written[node.id] = self._merge(own, [self._written(own, t) for t in self.of(own)])
        return self._used(self.known_written[node.id], ref)

    def _used(self, terms: list[JacobianTerm], ref: Ref) -> list[JacobianTerm]:
        names = dict(zip(ref.node.axes, ref.labels, strict=True))
        return [self._instance(term, names) for term in terms]

    def _instance(self, term: JacobianTerm, names: dict[Label, Label]) -> JacobianTerm:
        own = self.build.labels.fresh(k for k in term.columns if k not in names)
        all_names = {**names, **own}
        return JacobianTerm(
            term.leaf,
            tuple(all_names[k] for k in term.columns),
            term.coefficient.rename(all_names),
            term.places,
        )

    def _derive(self, ref: Ref) -> list[JacobianTerm]:
        build, node = self.build, ref.node
        one = build.number(1.0)
        if node.op == "leaf":
            return [JacobianTerm(node, ref.labels, one, (None,) * len(ref.labels))]
        if node.op == "view":
            return [self._of_view(ref)]
        if node.op == "con":
            if node.data:
                raise Unsupported("a sum over the batch inside the objective")
            (body,), bound = build.open(ref)
            return [self._summed(term, bound) for term in self.of(body)]
        if node.op in POINTWISE:
            args, _ = build.open(ref)
            terms = []
            for k, a in enumerate(args):
                for term in self.of(a):
                    seeds = [build.number(0.0)] * len(args)
                    seeds[k] = term.coefficient
                    coefficient = chain(build, ref, args, seeds)
                    if not build.is_zero(coefficient):
                        terms.append(JacobianTerm(term.leaf, term.columns, coefficient, term.places))
            return terms
        raise Unsupported(f"{node.op} has no derivative rule")

    def _of_view(self, ref: Ref) -> JacobianTerm:
        """A slice of a variable: a delta with a place on the sliced axes, plain deltas on the others."""
        columns: list[Label] = []
        places: list[Place | None] = []
        for spec, label, row in self.build.view_axes(ref):
            places.append(None if spec[0] == "all" else spec)
            columns.append(label if spec[0] == "all" else self.build.labels.new(1) if row is None else row)
        return JacobianTerm(ref.node.args[0].node, tuple(columns), self.build.number(1.0), tuple(places))

    def _summed(self, term: JacobianTerm, bound: tuple[Label, ...]) -> JacobianTerm:
        """The term of a sum over `bound`: an axis of the variable that was summed over becomes dense."""
        build = self.build
        names = build.labels.fresh(k for k in bound if k in term.columns)
        inner = build.con(term.coefficient, [k for k in bound if k not in term.columns]).rename(names)
        columns = tuple(names.get(k, k) for k in term.columns)
        hidden = frozenset(names.values())
        return self._spread(JacobianTerm(term.leaf, columns, inner, term.places), hidden)

    def _spread(self, term: JacobianTerm, dense: frozenset[Label]) -> JacobianTerm:
        """The same term with the labels `dense` along whole axes of the variable: zero outside of their places."""
        build = self.build
        columns, places, axes = list(term.columns), list(term.places), []
        for k, (place, label) in enumerate(zip(term.places, term.columns, strict=True)):
            if place is not None and label in dense:
                columns[k], places[k] = build.labels.new(term.leaf.sizes[k]), None
                axes.append((place, label, columns[k]))
        return JacobianTerm(term.leaf, tuple(columns), pad(build, term.coefficient, axes), tuple(places))

    def _written(self, value: Ref, term: JacobianTerm) -> JacobianTerm:
        """The term without places: padded along dense axes, times a selection matrix along tied ones."""
        build = self.build
        term = self._spread(term, frozenset(k for k in term.columns if k not in value.labels))
        columns, factors = list(term.columns), [term.coefficient]
        for k, (place, label) in enumerate(zip(term.places, term.columns, strict=True)):
            if place is not None:
                columns[k] = build.labels.new(term.leaf.sizes[k])
                factors.append(selection(build, place, label, columns[k]))
        return JacobianTerm(term.leaf, tuple(columns), build.times(*factors), (None,) * len(columns))

    def _merge(self, value: Ref, terms: list[JacobianTerm]) -> list[JacobianTerm]:
        """Terms of equal leaf and equal deltas become one; hidden labels are renamed before any merge."""
        build = self.build
        groups: dict[tuple[int, tuple[Label, ...], Places], list[JacobianTerm]] = {}
        for term in terms:
            pattern = tuple(k if k in value.labels else -1 for k in term.columns)
            groups.setdefault((term.leaf.id, pattern, term.places), []).append(term)
        merged = []
        for group in groups.values():
            first = group[0]
            refs = [first.coefficient]
            for term in group[1:]:
                names = {k: f for k, f in zip(term.columns, first.columns, strict=True) if k != f}
                refs.append(term.coefficient.rename(names))
            total = build.plus(*refs)
            if not build.is_zero(total):
                merged.append(JacobianTerm(first.leaf, first.columns, total, first.places))
        return merged
