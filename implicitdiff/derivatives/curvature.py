"""The Hessian of a scalar as labelled terms: H = sum over sums of the graph of J_a' D J_b.

In: a scalar ref. Out: `QuadraticTerm`s. Every sum node of the graph has a pointwise body over a few sources; for each
pair (a, b) of sources the term is (row side J_a) * (middle: adjoint * d2 body / da db) * (column side J_b). There is no
special case for products: bilinear terms, repeated use of a variable and chains of sums are all pairs of sources.
Next file: `structure/analyze.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from implicitdiff.derivatives.jacobian import Jacobians, Places
from implicitdiff.graph.build import Builder
from implicitdiff.graph.calculus import adjoints, partial, sources
from implicitdiff.graph.ir import Label, Node, Ref, reachable


@dataclass(frozen=True)
class QuadraticTerm:
    """sum over `summed` of row * middle * column; a label in both `rows` and `columns` is a delta.

    An axis with a place runs along a slice of its variable's axis (`JacobianTerm`).
    """

    row_leaf: Node
    rows: tuple[Label, ...]
    column_leaf: Node
    columns: tuple[Label, ...]
    row: Ref
    middle: Ref
    column: Ref
    summed: tuple[Label, ...]
    row_places: Places
    column_places: Places


def quadratic_terms(
    build: Builder, jacobians: Jacobians, root: Ref, *, written: bool = False
) -> list[QuadraticTerm]:
    """The terms of the second derivative of the scalar `root` by the variables; `written`: without places."""
    variables = jacobians.variables
    weights = adjoints(build, root, variables)
    terms = _pairs(build, jacobians, root, build.number(1.0), (), written)
    for node in reachable([root.node]):
        if node.op == "con" and node.id in weights:
            ref = build.self_ref(node)
            (body,), bound = build.open(ref)
            terms += _pairs(build, jacobians, body, weights[node.id], (*ref.labels, *bound), written)
    return terms


def _pairs(
    build: Builder,
    jacobians: Jacobians,
    body: Ref,
    weight: Ref,
    scope: tuple[Label, ...],
    written: bool,
) -> list[QuadraticTerm]:
    terms = []
    derivatives = jacobians.written if written else jacobians.of
    found = sources(build, body, jacobians.variables)
    for a in found:
        slope = partial(build, body, a)
        for b in found:
            bend = partial(build, slope, b)
            if build.is_zero(bend):
                continue
            middle = build.times(weight, bend)
            if build.is_zero(middle):
                continue
            for left in derivatives(a):
                for right in derivatives(b):
                    taken = {*left.columns, *right.columns}
                    terms.append(
                        QuadraticTerm(
                            left.leaf,
                            left.columns,
                            right.leaf,
                            right.columns,
                            left.coefficient,
                            middle,
                            right.coefficient,
                            tuple(k for k in scope if k not in taken),
                            left.places,
                            right.places,
                        )
                    )
    return terms
