"""Rows of the table of operators that are sparse matrices.

In: draws. Out: ``sparse``, the builder of ``Sparse`` operators and their twins. Next: operator_cases.py.
"""

from collections.abc import Callable

import numpy as np
import torch

from implicitdiff.operators import GroupedLowRank, LowRankUpdate, Sparse
from implicitdiff.operators.sparse import Pattern
from tests.operator_draws import Draw, Twin, array, batched


def sparse(size: int, edges: list[tuple[int, int]], kind: str = "definite", *, own: bool = False):
    """A diagonal and the entries of `edges`; kind: "definite", "indefinite", "unsymmetric" or "singular" (a Laplacian).

    With `own` the samples have patterns of their own: sample b leaves out the last b edges.
    """

    def build(draw: Draw) -> Twin:
        values = draw.signed(len(edges))
        diagonal = draw.signed(size) if kind == "indefinite" else draw.positive(size)
        batch = max(values.shape[0], diagonal.shape[0]) if 0 not in (len(values), len(diagonal)) else 0
        other = draw.signed(len(edges)) if kind == "unsymmetric" else values
        batch = max(batch, other.shape[0]) if batch else 0
        values, diagonal, other = (x.expand(batch, -1) for x in (values, diagonal, other))
        patterns, rows_of_values, twins = [], [], np.zeros((batch, size, size))
        for b in range(batch):
            count = max(1, len(edges) - b) if own else len(edges)
            weights, backward = array(values[b])[:count], array(other[b])[:count]
            main = array(diagonal[b]).copy()
            for k, (i, j) in enumerate(edges[:count]):
                twins[b, i, j] += weights[k]
                twins[b, j, i] += backward[k]
                if kind in ("definite", "singular"):
                    for e in (i, j):
                        main[e] += abs(weights[k])
            if kind == "singular":
                twins[b] = -np.abs(twins[b])
                main = -twins[b].sum(1)
            twins[b] += np.diag(main)
        places = [(i, j) for i, j in edges] + [(j, i) for i, j in edges] + [(i, i) for i in range(size)]
        for b in range(batch if own else 1):
            count = max(1, len(edges) - b) if own else len(edges)
            chosen = [*places[:count], *places[len(edges) : len(edges) + count], *places[2 * len(edges) :]]
            columns = torch.tensor([j for _, j in chosen]), torch.tensor([i for i, _ in chosen])
            patterns.append(Pattern.of(size, columns[1], columns[0])[0])
        if not patterns:
            patterns = [Pattern.of(size, torch.arange(size), torch.arange(size))[0]]
        widest = max(map(len, patterns))
        for b in range(batch):
            pattern = patterns[b if own else 0]
            entries = torch.from_numpy(twins[b])[pattern.rows, pattern.columns]
            rows_of_values.append(torch.nn.functional.pad(entries, (0, widest - len(pattern))))
        data = torch.stack(rows_of_values) if rows_of_values else torch.zeros(0, widest, dtype=torch.float64)
        operator = Sparse(data.to(draw.dtype), tuple(patterns), symmetric=kind != "unsymmetric")
        return operator, twins

    return build


def updated(base: Callable[[Draw], Twin], rank: int, *, right: bool = False):
    """Any row of the table plus a part of low rank."""

    def build(draw: Draw) -> Twin:
        operator, twin = base(draw)
        left, weights = 0.3 * draw.normal(operator.size, rank), draw.positive(rank)
        other = 0.3 * draw.normal(operator.size, rank) if right else None
        update = (array(left) * array(weights)[:, None]) @ np.swapaxes(
            array(left if other is None else other), 1, 2
        )
        return LowRankUpdate(operator, left, weights, other), twin + update

    return build


def grouped(
    shape: tuple[int, ...], axes: tuple[int, ...], rank: int, *, right: bool = False, scalar: bool = False
):
    """Blocks of low rank plus diagonal, numbered by ``axes`` of ``shape``."""

    def build(draw: Draw) -> Twin:
        inside = [axis for axis in range(len(shape)) if axis not in axes]
        number = int(np.prod([shape[a] for a in axes], dtype=int))
        size = int(np.prod([shape[a] for a in inside], dtype=int))
        diagonal = draw.positive(number, 1 if scalar else size)
        left, weights = draw.normal(number, size, rank), draw.signed(number, rank)
        other = draw.normal(number, size, rank) if right else None
        operator = GroupedLowRank(diagonal, left, weights, other, shape, axes)
        twin = np.zeros((operator.batch, number * size, number * size))
        v = left if other is None else other
        arrays = batched(array(diagonal), array(left), array(weights), array(v))
        for row in np.ndindex(*shape):
            for column in np.ndindex(*shape):
                if any(row[a] != column[a] for a in axes):
                    continue
                g = np.ravel_multi_index([row[a] for a in axes], [shape[a] for a in axes])
                i, j = (
                    np.ravel_multi_index([x[a] for a in inside], [shape[a] for a in inside])
                    for x in (row, column)
                )
                place = np.ravel_multi_index(row, shape), np.ravel_multi_index(column, shape)
                d, u, c, w = arrays
                twin[:, place[0], place[1]] = (u[:, g, i] * c[:, g] * w[:, g, j]).sum(-1)
                twin[:, place[0], place[1]] += d[:, g, 0 if scalar else i] * (i == j)
        return operator, twin

    return build


RING = [(0, 3), (3, 1), (1, 5), (5, 2), (2, 4), (4, 0)]
STAR = [(2, 0), (2, 1), (2, 3), (2, 4)]
TREE = [(0, 1), (1, 2), (1, 3), (3, 4), (3, 5), (5, 6)]
