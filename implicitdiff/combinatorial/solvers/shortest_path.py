"""Shortest paths in networkx graphs, directed ones with negative costs too.

In: edge costs (B, E). Out: 0/1 indicators of the edges of a path. Next file to read: ``grid.py``.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import networkx as nx
import numpy as np

from implicitdiff.combinatorial.base import NumpySolver, Shape
from implicitdiff.combinatorial.solvers.graphs import EdgeList
from implicitdiff.combinatorial.solvers.paths import Arcs, predecessors, walk
from implicitdiff.errors import InfeasibleError, InputError


class ShortestPath(NumpySolver):
    """min <w, y> over the paths from source to target.

    Directed graphs take negative costs as long as no cycle has a negative sum (a cycle that the source reaches is an
    error, by sample), which Bellman and Ford's method makes nonnegative before Dijkstra's. An undirected edge of
    negative cost is such a cycle by itself, so undirected graphs take none. Of a directed path, flow conservation is
    declared: the affine projection takes node potentials out.

    Args:
        graph: a networkx graph; costs are in the order of ``graph.edges``.
        source, target: two different nodes.

    Raises:
        InfeasibleError: the target is not reached from the source.
    """

    def __init__(self, graph: Any, source: Hashable, target: Hashable) -> None:
        self.graph = EdgeList.of(graph, "ShortestPath")
        self.source = self.graph.node(source, "ShortestPath")
        self.target = self.graph.node(target, "ShortestPath")
        if source == target:
            raise InputError("ShortestPath: source and target are the same node")
        if not nx.has_path(graph, source, target):
            raise InfeasibleError(f"ShortestPath: {target!r} is not reached from {source!r}")
        super().__init__(
            (self.graph.size,), domain="no_negative_cycle" if self.graph.directed else "nonnegative"
        )
        tail, head = self.graph.tail, self.graph.head
        if not self.graph.directed:
            tail, head = np.concatenate((tail, head)), np.concatenate((head, tail))
        self._arcs = Arcs.of(self.graph.order, tail, head)

    @property
    def edges(self) -> tuple[tuple[Hashable, Hashable], ...]:
        """The edges, in the order of the costs."""
        return self.graph.edges

    def solve_numpy(self, costs: np.ndarray) -> np.ndarray:
        """All samples of a batch in a few searches."""
        y = np.zeros(costs.shape)
        weights = costs.take(self._arcs.order % self.graph.size, axis=1)
        found = predecessors(self._arcs, weights, self.source, self.name)
        for samples, before, node in walk(found, self.source, self.target, self.name):
            y[samples, self._arcs.between(before, node) % self.graph.size] = 1
        return y

    def equalities(self, shape: Shape) -> np.ndarray | None:
        """Flow conservation in directed graphs."""
        return self.graph.incidence() if self.graph.directed else None


__all__ = ["ShortestPath"]
