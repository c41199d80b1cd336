"""Operators by their shapes alone: what the cost model looks at before there are numbers.

In: a form and a kind. Out: an operator of meta tensors. Next file: `route.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from implicitdiff import operators
from implicitdiff.graph.build import Builder
from implicitdiff.graph.ir import Unsupported
from implicitdiff.kkt.lowering import inner_axes, is_symmetric
from implicitdiff.kkt.patterns import meta_operator as entry_by_entry
from implicitdiff.structure.forms import Form, LowRankTerm


def rank_of(build: Builder, form: Form) -> int:
    """Number of columns of the joined low-rank factors."""
    return _columns(build, form.entry.low_rank)


def _columns(build: Builder, terms: Sequence[LowRankTerm]) -> int:
    total = 0
    for term in terms:
        size = 1
        for k in term.rank:
            size *= build.labels.sizes[k]
        total += size
    return total


def meta_operator(
    build: Builder, form: Form, kind: str, dtype: torch.dtype, batch: int = 1
) -> operators.LinearOperator:
    """An operator of the same shapes without data: what the cost model looks at."""

    def empty(*sizes: int) -> torch.Tensor:
        return torch.empty(batch, *sizes, dtype=dtype, device="meta")

    size = form.space.size
    if kind == "scaled-identity" or kind == "zero":
        return operators.ScaledIdentity(empty(), size)
    if kind == "diagonal":
        return operators.Diagonal(empty(size))
    if kind == "block-diagonal":
        sizes = form.space.sizes[0]
        inside = 1
        for k, s in enumerate(sizes):
            inside *= 1 if k in form.shared else s
        return operators.BlockDiagonal(
            empty(size // inside, inside, inside), tuple(sizes), tuple(sorted(form.shared))
        )
    if kind == "grouped":
        sizes, rank = form.space.sizes[0], _columns(build, form.grouped)
        number = math.prod(sizes[axis] for axis in form.shared)
        own = form.space.rows[0], form.space.columns[0]
        alike = all(is_symmetric(term, *own) for term in form.grouped)
        side, diagonal = empty(number, size // number, rank), empty(number, size // number)
        where = tuple(sizes), tuple(sorted(form.shared))
        return operators.GroupedLowRank(diagonal, side, empty(number, rank), None if alike else side, *where)
    if kind == "sparse":
        return entry_by_entry(build, form, dtype, batch)
    if kind == "banded" and form.chain is not None:
        sizes, chain = form.space.sizes[0], form.chain
        inside = math.prod(sizes[k] for k in inner_axes(form))
        count = size // (sizes[chain.axis] * inside)
        bands = empty(count, 2 * chain.reach + 1, sizes[chain.axis], inside, inside)
        return operators.Banded(
            bands, sizes, chain.axis, tuple(sorted(form.shared)), chain.reach, chain.reach
        )
    if kind == "kronecker":
        sizes = form.space.sizes[0]
        sides = [math.prod(sizes[k] for k in factor.axes) for factor in form.factors]
        matrices = tuple(empty(side, side) for side in sides)
        return operators.Kronecker(matrices, tuple(sizes), tuple(factor.axes for factor in form.factors))
    if kind in ("low-rank-plus-diagonal", "sum"):
        k = rank_of(build, form)
        entry = form.entry
        scalar = entry.diagonal is not None and not entry.diagonal.labels
        own = form.space.rows[0], form.space.columns[0]
        symmetric = all(is_symmetric(term, *own) for term in entry.low_rank)
        right = None if symmetric else empty(size, k)
        if form.base is not None:
            base = meta_operator(build, form.base, form.base.kind, dtype, batch)
            return operators.LowRankUpdate(base, empty(size, k), empty(k), right)
        return operators.LowRankPlusDiagonal(empty(1 if scalar else size), empty(size, k), empty(k), right)
    if kind in ("dense", "block"):
        return operators.Dense(empty(size, size), symmetric=True)
    raise Unsupported(f"no operator for the kind {kind}")
