"""Labelled Jacobians: the derivative of a value by the variables as a short list of terms.

In: a ref. Out: `JacobianTerm`s. A term is a coefficient with labels; a label that an axis of the value and an axis of
the variable share is a Kronecker delta. For `u_i - x_ij` the term is (coefficient 1, variable axes (i)): the delta on i
costs nothing and is never stored. Next file: `curvature.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from implicitdiff.graph.build import Builder
from implicitdiff.graph.calculus import POINTWISE, chain, selection
from implicitdiff.graph.ir import Label, Node, Ref, Unsupported


@dataclass(frozen=True)
class JacobianTerm:
    """d value / d leaf = coefficient, with the leaf's axes called `columns` (a label of the value there is a delta)."""

    leaf: Node
    columns: tuple[Label, ...]
    coefficient: Ref


class Jacobians:
    """Jacobians by the variables, one per node, remembered."""

    def __init__(self, build: Builder, variables: frozenset[int]) -> None:
        self.build = build
        self.variables = variables
        self.known: dict[int, list[JacobianTerm]] = {}

    def of(self, ref: Ref) -> list[JacobianTerm]:
        """The terms of D_u ref in the labels of this use; labels that are the variable's own come fresh."""
        node = ref.node
        if not (node.leaves & self.variables):
            return []
        if node.id not in self.known:
            self.known[node.id] = self._merge(
                self.build.self_ref(node), self._derive(self.build.self_ref(node))
            )
        names = dict(zip(node.axes, ref.labels, strict=True))
        return [self._instance(term, names) for term in self.known[node.id]]

    def _instance(self, term: JacobianTerm, names: dict[Label, Label]) -> JacobianTerm:
        own = self.build.labels.fresh(k for k in term.columns if k not in names)
        all_names = {**names, **own}
        return JacobianTerm(
            term.leaf, tuple(all_names[k] for k in term.columns), term.coefficient.rename(all_names)
        )

    def _derive(self, ref: Ref) -> list[JacobianTerm]:
        build, node = self.build, ref.node
        one = build.number(1.0)
        if node.op == "leaf":
            return [JacobianTerm(node, ref.labels, one)]
        if node.op == "view":
            return [self._of_view(ref)]
        if node.op == "con":
            if node.data:
                raise Unsupported("a sum over the batch inside the objective")
            (body,), bound = build.open(ref)
            terms = []
            for term in self.of(body):
                names = build.labels.fresh(k for k in bound if k in term.columns)
                inner = build.con(term.coefficient, [k for k in bound if k not in term.columns])
                terms.append(
                    JacobianTerm(term.leaf, tuple(names.get(k, k) for k in term.columns), inner.rename(names))
                )
            return terms
        if node.op in POINTWISE:
            args, _ = build.open(ref)
            terms = []
            for k, a in enumerate(args):
                for term in self.of(a):
                    seeds = [build.number(0.0)] * len(args)
                    seeds[k] = term.coefficient
                    coefficient = chain(build, ref, args, seeds)
                    if not build.is_zero(coefficient):
                        terms.append(JacobianTerm(term.leaf, term.columns, coefficient))
            return terms
        raise Unsupported(f"{node.op} has no derivative rule")

    def _of_view(self, ref: Ref) -> JacobianTerm:
        """A slice of a variable: rows of the identity on the sliced axes, deltas on the others."""
        build = self.build
        leaf = ref.node.args[0].node
        columns, factors = [], []
        for k, (spec, label, row) in enumerate(build.view_axes(ref)):
            if spec[0] == "all":
                columns.append(label)
                continue
            column = build.labels.new(leaf.sizes[k])
            columns.append(column)
            factors.append(selection(build, spec, leaf.sizes[k], row, column))
        return JacobianTerm(leaf, tuple(columns), build.times(*factors))

    def _merge(self, value: Ref, terms: list[JacobianTerm]) -> list[JacobianTerm]:
        """Terms of equal leaf and equal deltas become one; hidden labels are renamed before any merge."""
        build = self.build
        groups: dict[tuple[int, tuple[Label, ...]], list[JacobianTerm]] = {}
        for term in terms:
            pattern = tuple(k if k in value.labels else -1 for k in term.columns)
            groups.setdefault((term.leaf.id, pattern), []).append(term)
        merged = []
        for group in groups.values():
            first = group[0]
            refs = [first.coefficient]
            for term in group[1:]:
                names = {k: f for k, f in zip(term.columns, first.columns, strict=True) if k != f}
                refs.append(term.coefficient.rename(names))
            total = build.plus(*refs)
            if not build.is_zero(total):
                merged.append(JacobianTerm(first.leaf, first.columns, total))
        return merged
