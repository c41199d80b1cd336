"""Sparse forms as calls in the emitted code, and what K would cost as one sparse matrix.

In: a form with a pattern, the constraints. Out: refs of `entries.sparse` calls. Next file: `route.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from implicitdiff import operators
from implicitdiff.derivatives.declared import Declared
from implicitdiff.graph.build import Builder
from implicitdiff.graph.calls import call
from implicitdiff.graph.ir import BATCHED, Label, Ref
from implicitdiff.operators.sparse import Pattern
from implicitdiff.solvers.base import Cost
from implicitdiff.solvers.sparse_lu import factor_cost
from implicitdiff.structure import sparse
from implicitdiff.structure.forms import Contribution, Form, Position, Space, SparseTerm

Arguments = list[tuple[Ref, Sequence[Label], int]]
PIVOTED = 2.0
"""What exchanging rows costs: K is not definite, and its ordering cannot assume that the diagonal is taken."""


def operator(build: Builder, form: Form) -> Ref:
    """`operators.Sparse` of a form with a pattern."""
    args: Arguments = []
    terms = [_term(build, t, form.space, form.space, args) for t in form.pattern]
    return call(build, _sparse_text(form.space.size, terms), args, (), BATCHED)


def meta_operator(build: Builder, form: Form, dtype: torch.dtype, batch: int = 1) -> operators.Sparse:
    """The same without data: entries that may fall together are counted apart."""
    count = count_entries(build, form.pattern)
    none = torch.empty(count, dtype=torch.int64, device="meta")
    pattern = Pattern(form.space.size, none, none)
    return operators.Sparse(torch.empty(batch, count, dtype=dtype, device="meta"), (pattern,))


def count_entries(build: Builder, terms: Sequence[SparseTerm]) -> int:
    """Entries of all terms together."""
    return sum(math.prod(build.labels.sizes[k] for k in t.labels) for t in terms)


def jacobian_terms(declared: Declared) -> tuple[SparseTerm, ...] | None:
    """A as sparse terms (constraint block, variable block); rows without any tie are dense rows."""
    ids = [leaf.node.id for leaf in declared.variables]
    found: list[SparseTerm] = []
    for i, c in enumerate(declared.constraints):
        for t in declared.jacobians.of(c.value):
            block = (i, ids.index(t.leaf.id))
            own = Contribution(block, c.labels, t.columns, (t.coefficient,), (), (), t.places)
            made = sparse.terms_of(declared.build, own, loose=True)
            if made is None:
                return None
            found += made
    return sparse.merged(declared.build, found)


def kkt_operator(declared: Declared, form: Form, jacobian: Sequence[SparseTerm]) -> Ref:
    """K = [[H, -A'], [-A, 0]] as `operators.Sparse`."""
    build, space, rows = declared.build, form.space, declared.constraint_space
    args: Arguments = []
    terms = [_term(build, t, space, space, args) for t in form.pattern]
    for t in jacobian:
        negative = SparseTerm(t.block, t.labels, build.scale(-1.0, t.value), t.rows, t.columns)
        terms.append(_term(build, negative, rows, space, args, base=(space.size, 0)))
        terms.append(_term(build, negative, rows, space, args, base=(space.size, 0), turned=True))
    return call(build, _sparse_text(space.size + rows.size, terms), args, (), BATCHED)


def kkt_cost(declared: Declared, form: Form, jacobian: Sequence[SparseTerm], dtype: torch.dtype) -> Cost:
    """The predicted cost of factoring K as one sparse matrix and of one solve."""
    build = declared.build
    count = count_entries(build, form.pattern) + 2 * count_entries(build, jacobian)
    size = form.space.size + declared.constraint_space.size
    cost = factor_cost(1, size, count, dtype.itemsize)
    factor = round(PIVOTED * 16) / 16
    return Cost(
        round(cost.flops * factor), round(cost.bytes * factor), cost.peak, round(cost.operations * factor)
    )


def other_cost(build: Builder, form: Form, constraints: int, dtype: torch.dtype) -> Cost:
    """The predicted cost of the way that S = A H^-1 A' is formed: p solves with H, and a factorisation of S."""
    size, item = form.space.size, dtype.itemsize
    if form.kind in ("diagonal", "scaled-identity"):
        formed = Cost(2 * constraints**2 * size, 2 * constraints * size * item, 0, 20)
    elif form.kind == "banded" and form.chain is not None:
        width = (2 * form.chain.reach + 1) * size // form.space.sizes[0][form.chain.axis]
        formed = Cost(4 * size * width * (width + 2 * constraints), 8 * size * constraints * item, 0, 60)
    else:
        formed = Cost(size**3 // 3 + 2 * size**2 * constraints, 6 * size**2 * item, 0, 40 + size // 8)
    formed = formed + Cost(2 * constraints**2 * size, 0, 0, 0)
    return formed + Cost(constraints**3 // 3, 6 * constraints**2 * item, 0, 40 + constraints // 8)


def _sparse_text(size: int, terms: Sequence[str]) -> str:
    return f"entries.sparse({size}, {', '.join(terms)})"


def _term(
    build: Builder,
    term: SparseTerm,
    rows: Space,
    columns: Space,
    args: Arguments,
    base: tuple[int, int] = (0, 0),
    *,
    turned: bool = False,
) -> str:
    """`entries.Term(...)`; `turned` is the transposed term. Arguments are appended to `args`."""
    value = _argument(args, term.value, term.labels, BATCHED)
    sides = []
    for space, block, side, first in zip(
        (rows, columns), term.block, (term.rows, term.columns), base, strict=True
    ):
        offset = first + sum(space.entries(k) for k in range(block))
        axes = [_axis(p, n, term.labels, args) for p, n in zip(side, space.sizes[block], strict=True)]
        sides.append((f"({', '.join(axes)}{',' if len(axes) == 1 else ''})", offset))
    if turned:
        sides.reverse()
    (on_rows, row), (on_columns, column) = sides
    offset_text = f", ({row}, {column})" if row or column else ""
    return f"entries.Term({{{value}}}, {on_rows}, {on_columns}{offset_text})"


def _axis(position: Position, size: int, labels: Sequence[Label], args: Arguments) -> str:
    index, where = position.index, position.where
    if index is not None and where is not None:
        dims = tuple(labels.index(k) for k in index.labels)
        place = _argument(args, index, index.labels, index.node.prefix)
        how = (where.length, where.divisor, where.part, where.start, where.step)
        rest = [] if where.plain else [str(how)]
        batched = [str(index.node.prefix)] if index.node.prefix or rest else []
        return f"entries.Pointed({', '.join([str(size), f'{{{place}}}', str(dims), *batched, *rest])})"
    if position.label is None:
        return f"entries.At({size}, {position.start})"
    dim = labels.index(position.label)
    moved = f", {position.start}, {position.step}" if (position.start, position.step) != (0, 1) else ""
    return f"entries.Along({size}, {dim}{moved})"


def _argument(args: Arguments, ref: Ref, labels: Sequence[Label], prefix: int) -> int:
    """The number of an argument, which is added if it is new."""
    own = (ref, tuple(labels), prefix)
    if own not in args:
        args.append(own)
    return args.index(own)
