"""Minimum spanning trees of undirected graphs and arborescences of directed ones.

In: edge costs (B, E). Out: 0/1 indicators of edges. Next file to read: ``matching.py``.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import networkx as nx
import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import minimum_spanning_tree

from implicitdiff.combinatorial.base import NumpySolver, Sense, Shape
from implicitdiff.combinatorial.solvers.graphs import EdgeList
from implicitdiff.errors import InfeasibleError


class SpanningTree(NumpySolver):
    """min <w, y> over the spanning trees of a connected graph, costs of any sign; Kruskal's method in SciPy.

    A tree depends only on the order of the costs, so their ranks 1..E are what SciPy sees: it would lose edges of cost
    zero, and ranks have no rounding. Ties go to the earlier edge. One call for the whole batch. All trees have N - 1
    edges, so "mean" is a valid projection.

    Args:
        graph: an undirected networkx graph; costs are in the order of ``graph.edges``.
        sense: "min" or "max".

    Raises:
        InfeasibleError: the graph is not connected.
    """

    def __init__(self, graph: Any, *, sense: Sense = "min") -> None:
        self.graph = EdgeList.of(graph, "SpanningTree", directed=False)
        if not nx.is_connected(graph):
            raise InfeasibleError("SpanningTree: the graph is not connected, so it has no spanning tree")
        super().__init__((self.graph.size,), sense=sense)

    @property
    def edges(self) -> tuple[tuple[Hashable, Hashable], ...]:
        """The edges, in the order of the costs."""
        return self.graph.edges

    def solve_numpy(self, costs: np.ndarray) -> np.ndarray:
        """The forest of the disjoint union of all samples."""
        batch, size = costs.shape
        order = np.argsort(costs, axis=1, kind="stable")
        ranks = np.empty_like(order)
        np.put_along_axis(ranks, order, np.arange(1, size + 1)[None], axis=1)
        offsets = self.graph.order * np.arange(batch)[:, None]
        tail, head = (self.graph.tail + offsets).ravel(), (self.graph.head + offsets).ravel()
        nodes = batch * self.graph.order
        union = csr_matrix((ranks.ravel().astype(float), (tail, head)), shape=(nodes, nodes))
        # A rank and its sample name an edge.
        forest = minimum_spanning_tree(union).tocoo()
        sample = forest.row // self.graph.order
        y = np.zeros((batch, size))
        y[sample, order[sample, forest.data.astype(np.int64) - 1]] = 1
        return y

    def equalities(self, shape: Shape) -> np.ndarray | None:
        """<1, y> = N - 1."""
        return np.ones((1, self.graph.size))


class Arborescence(NumpySolver):
    """min <w, y> over the spanning trees of a directed graph whose edges lead away from a root, costs of any sign.

    Edmonds' method in networkx, plain Python: milliseconds a sample. Every node but the root has one edge in, which are
    the declared equalities ("mean" is among them, if no edge leads into the root).

    Args:
        graph: a directed networkx graph; costs are in the order of ``graph.edges``.
        root: the node that all others are reached from.
        sense: "min" or "max".

    Raises:
        InfeasibleError: some node cannot be reached from the root.
    """

    def __init__(self, graph: Any, root: Hashable, *, sense: Sense = "min") -> None:
        self.graph = EdgeList.of(graph, "Arborescence", directed=True)
        self.root = self.graph.node(root, "Arborescence")
        unreached = set(graph.nodes) - set(nx.descendants(graph, root)) - {root}
        if unreached:
            raise InfeasibleError(
                f"Arborescence: {sorted(map(repr, unreached))[0]} is not reached from {root!r}"
            )
        super().__init__((self.graph.size,), sense=sense)

    @property
    def edges(self) -> tuple[tuple[Hashable, Hashable], ...]:
        """The edges, in the order of the costs."""
        return self.graph.edges

    def solve_numpy(self, costs: np.ndarray) -> np.ndarray:
        """One networkx call a sample, on the graph without the edges into the root."""
        y = np.zeros(costs.shape)
        index = {}
        for edge, (u, v) in enumerate(zip(self.graph.tail.tolist(), self.graph.head.tolist(), strict=True)):
            if v != self.root:
                index[u, v] = edge
        for cost, chosen in zip(costs, y, strict=True):
            graph = nx.DiGraph()
            graph.add_nodes_from(range(self.graph.order))
            graph.add_weighted_edges_from((u, v, float(cost[edge])) for (u, v), edge in index.items())
            tree = nx.minimum_spanning_arborescence(graph)
            chosen[[index[u, v] for u, v in tree.edges]] = 1
        return y

    def equalities(self, shape: Shape) -> np.ndarray | None:
        """One edge into every node but the root, none into the root."""
        rows = np.zeros((self.graph.order, self.graph.size))
        rows[self.graph.head, np.arange(self.graph.size)] = 1
        into_root = np.flatnonzero(self.graph.head == self.root)
        never = np.zeros((len(into_root), self.graph.size))
        never[np.arange(len(into_root)), into_root] = 1
        return np.concatenate((np.delete(rows, self.root, axis=0), never))


__all__ = ["Arborescence", "SpanningTree"]
