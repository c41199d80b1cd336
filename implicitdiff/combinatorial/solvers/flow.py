"""Min-cost flow and minimum cut, exactly, by networkx on whole numbers.

In: arc costs or capacities (B, E). Out: integral flows, or 0/1 indicators of cut edges. Next file to read: ``milp.py``.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any

import networkx as nx
import numpy as np

from implicitdiff.combinatorial.base import NumpySolver, Sense, Shape
from implicitdiff.combinatorial.solvers.graphs import EdgeList
from implicitdiff.errors import InfeasibleError, InputError

BITS = 60


def whole_numbers(cost: np.ndarray) -> list[int]:
    """Costs times a power of two, as Python integers: the largest has 60 bits, so that rounding stays below float64's.

    networkx' network simplex does not end on some float costs, and its cuts compare flows for equality.
    """
    largest = float(np.abs(cost).max())
    if largest == 0:
        return [0] * len(cost)
    shift = BITS - math.frexp(largest)[1]
    # ldexp is exact unless it underflows, which is a cost of less than 2^-900 of the largest.
    return [round(math.ldexp(value, shift)) for value in cost.tolist()]


class MinCostFlow(NumpySolver):
    """min <w, y> over the integral flows y with 0 <= y <= capacity and node balances, costs of any sign.

    By networkx' network simplex on whole numbers, about a millisecond a sample; solutions are vertices, so integral.
    Flow conservation is declared.

    Args:
        graph: a directed networkx graph; costs are in the order of ``graph.edges``. As networkx has it, the edge
            attribute "capacity" (a whole number; left out: no limit) and the node attribute "demand" (inflow minus
            outflow, a whole number, negative for supply; left out: 0) are read.
        sense: "min" or "max"; without limits only "min", and no cycle of negative cost may have unlimited capacity.

    Raises:
        InfeasibleError: no flow meets the demands.
    """

    def __init__(self, graph: Any, *, sense: Sense = "min") -> None:
        self.graph = EdgeList.of(graph, "MinCostFlow", directed=True)
        self.demand = [
            _whole(graph.nodes[node].get("demand", 0), "demand", node) for node in self.graph.nodes
        ]
        limits = [graph.edges[edge].get("capacity", math.inf) for edge in self.graph.edges]
        self.capacity = [
            limit if limit == math.inf else _whole(limit, "capacity", edge)
            for limit, edge in zip(limits, self.graph.edges, strict=True)
        ]
        unlimited = math.inf in self.capacity
        super().__init__((self.graph.size,), sense=sense, domain="no_negative_cycle" if unlimited else "any")
        try:
            nx.network_simplex(self._network([0] * self.graph.size))
        except nx.NetworkXUnfeasible as error:
            raise InfeasibleError(f"MinCostFlow: no flow meets the demands: {error}") from error

    @property
    def edges(self) -> tuple[tuple[Hashable, Hashable], ...]:
        """The edges, in the order of the costs."""
        return self.graph.edges

    def _network(self, cost: list[int]) -> Any:
        network = nx.DiGraph()
        for node, demand in enumerate(self.demand):
            network.add_node(node, demand=demand)
        ends = zip(self.graph.tail.tolist(), self.graph.head.tolist(), strict=True)
        for (u, v), weight, capacity in zip(ends, cost, self.capacity, strict=True):
            network.add_edge(u, v, weight=weight, capacity=capacity)
        return network

    def solve_numpy(self, costs: np.ndarray) -> np.ndarray:
        """One network simplex a sample."""
        y = np.zeros(costs.shape)
        for sample, cost in enumerate(costs):
            try:
                _, flow = nx.network_simplex(self._network(whole_numbers(cost)))
            except nx.NetworkXUnbounded as error:
                raise InputError(
                    f"costs of MinCostFlow have a cycle of negative sum and unlimited capacity in sample {sample}: "
                    "give every edge a capacity"
                ) from error
            y[sample] = [
                flow[u][v] for u, v in zip(self.graph.tail.tolist(), self.graph.head.tolist(), strict=True)
            ]
        return y

    def equalities(self, shape: Shape) -> np.ndarray | None:
        """Flow conservation."""
        return self.graph.incidence()


class MinCut(NumpySolver):
    """min <w, y> over the cuts between source and sink, capacities w >= 0; y is 1 on the edges from the source's side
    to the sink's (in an undirected graph on all edges between the sides).

    By networkx' preflow-push on whole numbers, 1 to 10 ms a sample. The optimal value is that of the largest flow,
    whose gradient for the capacities is y: `optimal_value` is exact. No direction may be taken out.

    Args:
        graph: a networkx graph; capacities are in the order of ``graph.edges``.
        source, sink: two different nodes.
    """

    def __init__(self, graph: Any, source: Hashable, sink: Hashable) -> None:
        self.graph = EdgeList.of(graph, "MinCut")
        self.source, self.sink = self.graph.node(source, "MinCut"), self.graph.node(sink, "MinCut")
        if source == sink:
            raise InputError("MinCut: source and sink are the same node")
        super().__init__((self.graph.size,), domain="nonnegative")

    @property
    def edges(self) -> tuple[tuple[Hashable, Hashable], ...]:
        """The edges, in the order of the capacities."""
        return self.graph.edges

    def solve_numpy(self, costs: np.ndarray) -> np.ndarray:
        """One flow a sample."""
        y = np.zeros(costs.shape)
        for cost, cut in zip(costs, y, strict=True):
            network = nx.DiGraph() if self.graph.directed else nx.Graph()
            network.add_nodes_from(range(self.graph.order))
            ends = zip(self.graph.tail.tolist(), self.graph.head.tolist(), strict=True)
            for (u, v), capacity in zip(ends, whole_numbers(cost), strict=True):
                network.add_edge(u, v, capacity=capacity)
            _, (near, _) = nx.minimum_cut(network, self.source, self.sink)
            inside = np.zeros(self.graph.order, dtype=bool)
            inside[list(near)] = True
            out, into = inside[self.graph.tail], inside[self.graph.head]
            cut[out & ~into if self.graph.directed else out != into] = 1
        return y


def _whole(value: Any, what: str, where: Any) -> int:
    if not math.isfinite(value) or value != round(value):
        raise InputError(f"MinCostFlow: {what}={value} at {where} is not a whole number: scale them all")
    return round(value)


__all__ = ["MinCostFlow", "MinCut", "whole_numbers"]
