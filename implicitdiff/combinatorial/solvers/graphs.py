"""Graphs as the solvers see them: numbered nodes, edges in the order of the user's networkx graph.

In: a networkx graph. Out: arrays, and the incidence matrix. Next file to read: ``spanning_tree.py``.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import networkx as nx
import numpy as np

from implicitdiff.errors import InputError


@dataclass(frozen=True, eq=False)
class EdgeList:
    """A simple graph as arrays; edge e runs from tail[e] to head[e] and is edges[e] of the user's graph.

    Attributes:
        nodes: the user's names of the nodes 0..N-1, in the order of his graph.
        edges: his edges, in the order of ``graph.edges``: that of the entries of a cost.
        tail, head: (E,) node numbers.
        directed: whether edges have a direction.
    """

    nodes: tuple[Hashable, ...]
    edges: tuple[tuple[Hashable, Hashable], ...]
    tail: np.ndarray
    head: np.ndarray
    directed: bool

    @classmethod
    def of(cls, graph: Any, owner: str, directed: bool | None = None) -> EdgeList:
        """Read a networkx graph.

        Args:
            graph: nx.Graph or nx.DiGraph.
            owner: the solver's class, for messages.
            directed: what it must be; None for either.

        Raises:
            InputError: not a graph, parallel edges, self-loops, no edge, or the wrong kind.
        """
        if not isinstance(graph, nx.Graph):
            raise InputError(f"{owner} expects a networkx graph, got {type(graph).__name__}")
        if graph.is_multigraph():
            raise InputError(f"{owner} takes no multigraph: give every edge its own pair of nodes")
        if directed is not None and graph.is_directed() != directed:
            raise InputError(f"{owner} expects {'a directed' if directed else 'an undirected'} graph")
        loops = list(nx.selfloop_edges(graph))
        if loops:
            raise InputError(f"{owner}: the graph has self-loops, for instance {loops[0]}")
        if graph.number_of_edges() == 0:
            raise InputError(f"{owner}: the graph has no edges")
        nodes = tuple(graph.nodes)
        number = {node: index for index, node in enumerate(nodes)}
        edges = tuple(graph.edges)
        ends = np.array([(number[u], number[v]) for u, v in edges], dtype=np.int64)
        return cls(nodes, edges, ends[:, 0], ends[:, 1], graph.is_directed())

    @property
    def order(self) -> int:
        """The number of nodes."""
        return len(self.nodes)

    @property
    def size(self) -> int:
        """The number of edges."""
        return len(self.edges)

    def node(self, name: Hashable, owner: str) -> int:
        """The number of a node.

        Raises:
            InputError: there is no such node.
        """
        try:
            return self.nodes.index(name)
        except ValueError:
            raise InputError(f"{owner}: {name!r} is not a node of the graph") from None

    def incidence(self) -> np.ndarray:
        """(N, E): +1 at the tail and -1 at the head of a directed edge, +1 at both ends of an undirected one."""
        matrix = np.zeros((self.order, self.size))
        columns = np.arange(self.size)
        matrix[self.tail, columns] = 1
        matrix[self.head, columns] = -1 if self.directed else 1
        return matrix


__all__ = ["EdgeList"]
