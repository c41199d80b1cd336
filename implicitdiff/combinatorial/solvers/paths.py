"""Shortest paths from a source to a target on a fixed directed graph, for many costs at once.

In: arc weights (B, A). Out: paths, as steps backwards from the target. ``shortest_path.py`` and ``grid.py`` use it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import dijkstra

from implicitdiff.errors import InputError, SolverError

# Nodes of the graphs that are searched together: enough that a call weighs nothing, few enough that they stay in cache.
NODES_TOGETHER = 8000

UNIONS = 8


@dataclass(frozen=True, eq=False)
class Arcs:
    """Arcs sorted by their tails, as SciPy's compressed rows hold them.

    Attributes:
        nodes: N.
        order: (A,): the arc, in the caller's numbering, at each place.
        tail, head: (A,) in sorted order, heads sorted within a tail.
        start: (N + 1,) where each tail's arcs begin.
        unions: what `union` made, by the number of copies.
    """

    nodes: int
    order: np.ndarray
    tail: np.ndarray
    head: np.ndarray
    start: np.ndarray
    unions: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    @classmethod
    def of(cls, nodes: int, tail: np.ndarray, head: np.ndarray) -> Arcs:
        """Sort arcs; there must be no parallel ones."""
        order = np.lexsort((head, tail))
        start = np.zeros(nodes + 1, dtype=np.int32)
        np.cumsum(np.bincount(tail, minlength=nodes), out=start[1:])
        return cls(nodes, order, tail[order], head[order], start)

    def union(self, copies: int) -> tuple[np.ndarray, np.ndarray]:
        """(indices, indptr) of a block-diagonal graph of copies; a few are kept, since the sizes of batches repeat."""
        found = self.unions.get(copies)
        if found is None:
            found = self._union(copies)
            if len(self.unions) >= UNIONS:
                self.unions.clear()
            self.unions[copies] = found
        return found

    def _union(self, copies: int) -> tuple[np.ndarray, np.ndarray]:
        offsets = np.arange(copies, dtype=np.int32)[:, None]
        indices = (self.head.astype(np.int32)[None] + offsets * self.nodes).ravel()
        starts = self.start[:-1][None] + offsets * len(self.head)
        return indices, np.append(starts.ravel(), np.int32(copies * len(self.head)))

    def between(self, tail: np.ndarray, head: np.ndarray) -> np.ndarray:
        """The arcs, in the caller's numbering, of pairs that are arcs."""
        keys = self.tail * self.nodes + self.head
        return self.order[np.searchsorted(keys, tail * self.nodes + head)]


def predecessors(arcs: Arcs, weights: np.ndarray, source: int, name: str) -> np.ndarray:
    """The node before each node on its shortest path, (B, N), negative where there is none; weights (B, A) are sorted.

    Dijkstra's method runs on the disjoint union of a chunk, which is one call of compiled code for all of it; explicit
    zeros stay arcs of cost zero. Negative weights are made nonnegative first, by distances as node potentials.

    Raises:
        InputError: a sample has a cycle of negative cost that the source reaches.
    """
    if weights.min() < 0:
        weights = _reduced(arcs, weights, source, name)
    together = max(1, NODES_TOGETHER // arcs.nodes)
    before = np.empty((len(weights), arcs.nodes), dtype=np.int32)
    for first in range(0, len(weights), together):
        chunk = weights[first : first + together]
        copies = len(chunk)
        nodes = copies * arcs.nodes
        graph = csr_matrix((chunk.ravel(), *arcs.union(copies)), shape=(nodes, nodes))
        offsets = arcs.nodes * np.arange(copies)
        _, found, _ = dijkstra(graph, indices=offsets + source, min_only=True, return_predecessors=True)
        np.subtract(
            found.reshape(copies, -1), offsets[:, None], out=before[first : first + copies], casting="unsafe"
        )
    return before


def _reduced(arcs: Arcs, weights: np.ndarray, source: int, name: str) -> np.ndarray:
    """w + d(tail) - d(head) >= 0, with the distances d of Bellman and Ford's method in all samples at once.

    Every path from the source to a node changes by the same amount. SciPy's own method is not used: it compares with an
    absolute tolerance, and where a cycle of sum zero rounds to less, its predecessors can run in a circle. Here what is
    below rounding of the largest weight counts as zero.
    """
    by_head = np.argsort(arcs.head, kind="stable")
    heads, begins = np.unique(arcs.head[by_head], return_index=True)
    tails, ordered = arcs.tail[by_head], weights[:, by_head]
    rounding = 8 * np.finfo(float).eps * arcs.nodes * np.abs(weights).max(axis=1, keepdims=True)
    distance = np.full((len(weights), arcs.nodes), np.inf)
    distance[:, source] = 0
    for _ in range(arcs.nodes):
        nearer = np.minimum.reduceat(distance[:, tails] + ordered, begins, axis=1)
        improves = nearer < distance[:, heads] - rounding
        if not improves.any():
            break
        distance[:, heads] = np.where(improves, nearer, distance[:, heads])
    else:
        sample = int(improves.any(axis=1).nonzero()[0][0])
        raise InputError(
            f"costs of {name} have a cycle of negative sum in sample {sample}, so that no path is shortest"
        )
    reached = np.isfinite(distance)
    potential = np.where(reached, distance, 0.0)
    slack = weights + potential[:, arcs.tail] - potential[:, arcs.head]
    return np.where(reached[:, arcs.tail], np.maximum(slack, 0.0), 0.0)


def walk(found: np.ndarray, source: int, target: int, name: str) -> Iterator[tuple[np.ndarray, ...]]:
    """Step back from the target in all samples at once: (samples, nodes before, nodes), until all are at the source.

    Raises:
        SolverError: the predecessors of a sample do not lead to the source.
    """
    missed = found[:, target] < 0
    if missed.any():
        raise SolverError(f"{name}: the target is not reached in sample {missed.nonzero()[0][0]}")
    samples = np.arange(len(found))
    node = np.full(len(found), target)
    for _ in range(found.shape[1]):
        going = node != source
        left = np.count_nonzero(going)
        if left == 0:
            return
        if left < len(node):
            samples, node = samples[going], node[going]
        before = found[samples, node]
        yield samples, before, node
        node = before
    raise SolverError(f"{name}: the predecessors of sample {samples[0]} run in a circle")


__all__ = ["Arcs", "predecessors", "walk"]
