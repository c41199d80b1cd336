"""Perfect matchings, in bipartite and in general graphs.

In: edge costs (B, E). Out: 0/1 indicators of edges. Next file to read: ``paths.py``.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import networkx as nx
import numpy as np
from scipy.optimize import linear_sum_assignment

from implicitdiff.combinatorial.base import NumpySolver, Sense, Shape
from implicitdiff.combinatorial.solvers.graphs import EdgeList
from implicitdiff.errors import InfeasibleError


class PerfectMatching(NumpySolver):
    """min <w, y> over the perfect matchings of a graph, costs of any sign.

    Bipartite graphs (grids, for instance) go to SciPy's linear_sum_assignment, 1 to 50 us a sample; others to networkx'
    blossom method, plain Python, 1 to 50 ms. Every node has one edge of a matching: the incidence matrix holds the
    declared equalities, and "mean" is among them.

    Args:
        graph: an undirected networkx graph; costs are in the order of ``graph.edges``.
        sense: "min" or "max".

    Raises:
        InfeasibleError: the graph has no perfect matching.
    """

    def __init__(self, graph: Any, *, sense: Sense = "min") -> None:
        self.graph = EdgeList.of(graph, "PerfectMatching", directed=False)
        largest = nx.max_weight_matching(graph, maxcardinality=True)
        if 2 * len(largest) != self.graph.order:
            raise InfeasibleError(
                f"PerfectMatching: the graph has {self.graph.order} nodes and no matching of more than "
                f"{len(largest)} edges"
            )
        super().__init__((self.graph.size,), sense=sense)
        self._sides = _sides(graph, self.graph)

    @property
    def edges(self) -> tuple[tuple[Hashable, Hashable], ...]:
        """The edges, in the order of the costs."""
        return self.graph.edges

    @property
    def bipartite(self) -> bool:
        """Which of the two methods is used."""
        return self._sides is not None

    def solve_numpy(self, costs: np.ndarray) -> np.ndarray:
        """One matching after the other."""
        y = np.zeros(costs.shape)
        if self._sides is None:
            for cost, chosen in zip(costs, y, strict=True):
                chosen[self._blossom(cost)] = 1
            return y
        row, column = self._sides
        half = self.graph.order // 2
        matrix = np.full((half, half), np.inf)
        edge = np.zeros((half, half), dtype=np.int64)
        edge[row, column] = np.arange(self.graph.size)
        for cost, chosen in zip(costs, y, strict=True):
            matrix[row, column] = cost
            chosen[edge[linear_sum_assignment(matrix)]] = 1
        return y

    def _blossom(self, cost: np.ndarray) -> list[int]:
        index = {}
        graph = nx.Graph()
        ends = zip(self.graph.tail.tolist(), self.graph.head.tolist(), strict=True)
        for edge, (u, v) in enumerate(ends):
            index[u, v] = index[v, u] = edge
            graph.add_edge(u, v, weight=-float(cost[edge]))
        return [index[pair] for pair in nx.max_weight_matching(graph, maxcardinality=True)]

    def equalities(self, shape: Shape) -> np.ndarray | None:
        """One edge at every node."""
        return self.graph.incidence()


def _sides(graph: Any, edges: EdgeList) -> tuple[np.ndarray, np.ndarray] | None:
    """For each edge its place on the two sides of a bipartite graph."""
    if not nx.is_bipartite(graph):
        return None
    colour = nx.bipartite.color(graph)
    side = np.array([colour[node] for node in edges.nodes])
    place = np.where(side == 0, np.cumsum(side == 0), np.cumsum(side == 1)) - 1
    first = np.where(side[edges.tail] == 0, edges.tail, edges.head)
    second = np.where(side[edges.tail] == 0, edges.head, edges.tail)
    return place[first], place[second]


__all__ = ["PerfectMatching"]
