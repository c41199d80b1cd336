"""Small instances of every solver, each with all of its solutions: the table that the solver tests run over.

The solutions are listed by brute force, by code that shares nothing with the solvers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import networkx as nx
import numpy as np
import torch
from torch import Tensor

import implicitdiff.combinatorial as co


@dataclass(frozen=True)
class Instance:
    """One solver on one small problem.

    Attributes:
        make: sense -> the solver.
        listed: () -> all solutions (K, *shape).
        kind: which costs it takes: "any", "nonnegative", or a function (rng, batch, ties) -> costs.
        dimension: of lin(Y - Y), where the declared equalities are meant to be all there are; None where not.
    """

    make: Callable[..., co.Solver]
    listed: Callable[[], Any]
    kind: str | Callable[[np.random.Generator, int, bool], np.ndarray] = "any"
    dimension: int | None = None

    def solutions(self) -> np.ndarray:
        return np.asarray(self.listed(), dtype=float)

    def costs(self, seed: int, batch: int, ties: bool = False) -> Tensor:
        """Random costs of the solver's domain; with ties they are small whole numbers."""
        rng = np.random.default_rng(seed)
        shape = self.solutions().shape[1:]
        if callable(self.kind):
            return torch.from_numpy(self.kind(rng, batch, ties))
        low = 0 if self.kind == "nonnegative" else -2
        if ties:
            return torch.from_numpy(rng.integers(low, 3, (batch, *shape)).astype(float))
        drawn = rng.standard_normal((batch, *shape))
        return torch.from_numpy(np.abs(drawn) if self.kind == "nonnegative" else drawn)


def indicators(size: int, chosen: Iterable[Iterable[int]]) -> np.ndarray:
    """0/1 rows with ones at the chosen places."""
    rows = []
    for places in chosen:
        row = np.zeros(size)
        row[list(places)] = 1
        rows.append(row)
    return np.array(rows)


def subsets(graph: Any, count: int, accept: Callable[[Any], bool]) -> np.ndarray:
    """All sets of `count` edges whose graph, on all nodes, is accepted."""
    edges = list(graph.edges)
    found = []
    for places in itertools.combinations(range(len(edges)), count):
        part = graph.__class__()
        part.add_nodes_from(graph.nodes)
        part.add_edges_from(edges[place] for place in places)
        if accept(part):
            found.append(places)
    return indicators(len(edges), found)


def permutation_matrices(n: int, m: int) -> np.ndarray:
    """All 0/1 matrices with one 1 in every line of the shorter side."""
    if n > m:
        return permutation_matrices(m, n).transpose(0, 2, 1)
    found = np.array([np.eye(m)[list(columns)] for columns in itertools.permutations(range(m), n)])
    return found


def paths(graph: Any, source: Any, target: Any) -> list[list[int]]:
    """The edges of all simple paths, by their numbers."""
    number = {edge: index for index, edge in enumerate(graph.edges)}
    if not graph.is_directed():
        number |= {(v, u): index for (u, v), index in number.items()}
    nodes = nx.all_simple_paths(graph, source, target)
    return [[number[edge] for edge in itertools.pairwise(path)] for path in nodes]


def grid_graph(height: int, width: int, neighbours: int) -> Any:
    graph = nx.DiGraph()
    cells = list(itertools.product(range(height), range(width)))
    for a, b in itertools.permutations(cells, 2):
        down, right = abs(a[0] - b[0]), abs(a[1] - b[1])
        if max(down, right) == 1 and (neighbours == 8 or down + right == 1):
            graph.add_edge(a, b)
    return graph


def cell_paths(height: int, width: int, neighbours: int) -> np.ndarray:
    graph = grid_graph(height, width, neighbours)
    found = nx.all_simple_paths(graph, (0, 0), (height - 1, width - 1))
    return indicators(height * width, ([r * width + c for r, c in path] for path in found)).reshape(
        -1, height, width
    )


def step_paths(solver: co.GridShortestPath, height: int, width: int) -> np.ndarray:
    graph = nx.DiGraph()
    graph.add_nodes_from(range(height * width))  # networkx lists edges by the order of their tails
    graph.add_edges_from(map(tuple, solver.steps.tolist()))
    return indicators(len(solver.steps), paths(graph, 0, height * width - 1))


LADDER = nx.grid_2d_graph(2, 4)
GENERAL = nx.complete_graph(6)
GENERAL.remove_edges_from([(0, 5), (1, 4)])
WHEEL = nx.wheel_graph(5)
DIRECTED = nx.DiGraph(
    [(0, 1), (0, 2), (1, 2), (2, 1), (1, 3), (2, 3), (3, 4), (2, 4), (4, 1), (3, 0), (1, 4), (4, 3)]
)
NETWORK = nx.DiGraph()
NETWORK.add_node("s", demand=-3)
NETWORK.add_node("t", demand=3)
for _edge, _capacity in [
    (("s", "a"), 2),
    (("s", "b"), 2),
    (("a", "b"), 1),
    (("b", "a"), 1),
    (("a", "t"), 2),
    (("b", "t"), 2),
    (("s", "t"), 1),
]:
    NETWORK.add_edge(*_edge, capacity=_capacity)

MEMBERSHIP = np.array([[1, 0, 1, 0, 0, 1], [0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 0], [1, 1, 0, 0, 1, 0]])
WEIGHTS, CAPACITY = [3, 1, 4, 2, 0, 3], 6
A_EQ, B_EQ = np.array([[1.0, 1, 1, 0, 0], [0, 0, 1, 1, 2]]), np.array([2.0, 3.0])
A_UB, B_UB = np.array([[1.0, 0, 2, 1, -1]]), np.array([4.0])
FIRST = [(0, 1), (1, 0), (1, 2), (2, 3)]
SECOND = [(0, 2), (2, 0), (1, 3), (3, 2), (1, 0)]


def flows() -> np.ndarray:
    edges = list(NETWORK.edges)
    ranges = [range(NETWORK.edges[edge]["capacity"] + 1) for edge in edges]
    found = []
    for flow in itertools.product(*ranges):
        balance = dict.fromkeys(NETWORK.nodes, 0)
        for (u, v), amount in zip(edges, flow, strict=True):
            balance[u] -= amount
            balance[v] += amount
        if all(balance[node] == NETWORK.nodes[node].get("demand", 0) for node in NETWORK.nodes):
            found.append(flow)
    return np.array(found)


def cuts(graph: Any, source: Any, sink: Any) -> np.ndarray:
    others = [node for node in graph.nodes if node not in (source, sink)]
    found = []
    for count in range(len(others) + 1):
        for part in itertools.combinations(others, count):
            inside = {source, *part}
            if graph.is_directed():
                crossing = [u in inside and v not in inside for u, v in graph.edges]
            else:
                crossing = [(u in inside) != (v in inside) for u, v in graph.edges]
            found.append(np.array(crossing, dtype=float))
    return np.array(found)


def programs() -> np.ndarray:
    points = np.array(list(itertools.product(range(3), repeat=5)), dtype=float)
    return points[(points @ A_EQ.T == B_EQ).all(1) & (points @ A_UB.T <= B_UB).all(1)]


def tours(cities: int) -> np.ndarray:
    number = {edge: index for index, edge in enumerate(itertools.combinations(range(cities), 2))}
    found = []
    for order in itertools.permutations(range(1, cities)):
        if order[0] < order[-1]:
            circle = [0, *order, 0]
            found.append([number[min(a, b), max(a, b)] for a, b in itertools.pairwise(circle)])
    return indicators(len(number), found)


def matchings_of_graphs(n: int = 4) -> np.ndarray:
    found = []
    for image in itertools.permutations(range(n)):
        unary = np.eye(n)[list(image)].ravel()
        pairs = [[float((image[i], image[j]) == pair) for pair in SECOND] for i, j in FIRST]
        found.append(np.concatenate((unary, np.ravel(pairs))))
    return np.array(found)


def without_negative_cycles(rng: np.random.Generator, batch: int, ties: bool) -> np.ndarray:
    """Nonnegative costs plus differences of node potentials: signs are mixed, and no cycle has a negative sum."""
    edges = list(DIRECTED.edges)
    if ties:
        base = rng.integers(0, 3, (batch, len(edges))).astype(float)
        height = rng.integers(-2, 3, (batch, 5)).astype(float)
    else:
        base, height = rng.random((batch, len(edges))), rng.standard_normal((batch, 5))
    tail, head = np.array(edges).T
    return base + height[:, tail] - height[:, head]


def take_k(costs: Tensor) -> Tensor:
    """A user's function, for the minimum: the two smallest of each row."""
    return torch.zeros_like(costs).scatter(1, costs.argsort(1)[:, :2], 1.0)


def take_k_max(costs: Tensor) -> Tensor:
    """The same for the maximum."""
    return take_k(-costs)


INSTANCES = {
    "top-k": Instance(
        lambda sense="min": co.TopK(3, sense=sense),
        lambda: indicators(6, itertools.combinations(range(6), 3)),
        dimension=5,
    ),
    "ranking": Instance(
        lambda sense="min": co.Ranking(sense=sense),
        lambda: list(itertools.permutations(range(1, 5))),
        dimension=3,
    ),
    "assignment": Instance(
        lambda sense="min": co.Assignment(sense=sense), lambda: permutation_matrices(4, 4), dimension=9
    ),
    "assignment-wide": Instance(
        lambda sense="min": co.Assignment(sense=sense), lambda: permutation_matrices(2, 4), dimension=6
    ),
    "assignment-tall": Instance(
        lambda sense="min": co.Assignment(sense=sense), lambda: permutation_matrices(4, 3), dimension=9
    ),
    "matching-bipartite": Instance(
        lambda sense="min": co.PerfectMatching(LADDER, sense=sense),
        lambda: subsets(LADDER, 4, lambda part: all(degree == 1 for _, degree in part.degree)),
    ),
    "matching-general": Instance(
        lambda sense="min": co.PerfectMatching(GENERAL, sense=sense),
        lambda: subsets(GENERAL, 3, lambda part: all(degree == 1 for _, degree in part.degree)),
        dimension=7,
    ),
    "spanning-tree": Instance(
        lambda sense="min": co.SpanningTree(WHEEL, sense=sense),
        lambda: subsets(WHEEL, 4, nx.is_connected),
        dimension=7,
    ),
    "spanning-tree-complete": Instance(
        lambda sense="min": co.SpanningTree(nx.complete_graph(5), sense=sense),
        lambda: subsets(nx.complete_graph(5), 4, nx.is_connected),
        dimension=9,
    ),
    "arborescence": Instance(
        lambda sense="min": co.Arborescence(DIRECTED, 0, sense=sense),
        lambda: subsets(DIRECTED, 4, lambda part: len(nx.descendants(part, 0)) == 4),
        dimension=7,
    ),
    "grid-8": Instance(lambda: co.GridShortestPath(3, 3), lambda: cell_paths(3, 3, 8), "nonnegative"),
    "grid-4": Instance(
        lambda: co.GridShortestPath(3, 4, neighbours=4), lambda: cell_paths(3, 4, 4), "nonnegative"
    ),
    "grid-steps": Instance(
        lambda: co.GridShortestPath(3, 3, neighbours=4, costs="edge"),
        lambda: step_paths(co.GridShortestPath(3, 3, neighbours=4, costs="edge"), 3, 3),
        "nonnegative",
    ),
    "path-directed": Instance(
        lambda: co.ShortestPath(DIRECTED, 0, 4),
        lambda: indicators(12, paths(DIRECTED, 0, 4)),
        without_negative_cycles,
    ),
    "path-undirected": Instance(
        lambda: co.ShortestPath(LADDER, (0, 0), (1, 3)),
        lambda: indicators(LADDER.number_of_edges(), paths(LADDER, (0, 0), (1, 3))),
        "nonnegative",
    ),
    "flow": Instance(lambda sense="min": co.MinCostFlow(NETWORK, sense=sense), flows, dimension=4),
    "cut-directed": Instance(lambda: co.MinCut(DIRECTED, 0, 4), lambda: cuts(DIRECTED, 0, 4), "nonnegative"),
    "cut-undirected": Instance(lambda: co.MinCut(WHEEL, 1, 3), lambda: cuts(WHEEL, 1, 3), "nonnegative"),
    "milp": Instance(
        lambda sense="min": co.MILP(5, A_eq=A_EQ, b_eq=B_EQ, A_ub=A_UB, b_ub=B_UB, upper=2, sense=sense),
        programs,
    ),
    "set-cover": Instance(
        lambda sense="min": co.SetCover(MEMBERSHIP, sense=sense),
        lambda: [y for y in itertools.product((0, 1), repeat=6) if (MEMBERSHIP @ np.array(y) >= 1).all()],
        dimension=6,
    ),
    "knapsack": Instance(
        lambda sense="max": co.Knapsack(WEIGHTS, CAPACITY, sense=sense),
        lambda: [y for y in itertools.product((0, 1), repeat=6) if np.dot(WEIGHTS, y) <= CAPACITY],
        dimension=6,
    ),
    "tsp-5": Instance(lambda sense="min": co.TSP(5, sense=sense), lambda: tours(5), dimension=5),
    "tsp-6": Instance(lambda sense="min": co.TSP(6, sense=sense), lambda: tours(6), dimension=9),
    "tsp-cuts": Instance(lambda sense="min": co.TSP(6, sense=sense, method="cuts"), lambda: tours(6)),
    "quadratic": Instance(
        lambda sense="min": co.QuadraticAssignment(4, FIRST, SECOND, sense=sense), matchings_of_graphs
    ),
    "function": Instance(
        lambda sense="min": co.solver(
            take_k if sense == "min" else take_k_max, cost_shape=(5,), sense=sense, equalities=np.ones(5)
        ),
        lambda: indicators(5, itertools.combinations(range(5), 2)),
        dimension=4,
    ),
    "enumerated": Instance(
        lambda sense="min": co.EnumeratedSolver(matchings_of_graphs(), sense=sense), matchings_of_graphs
    ),
}
BOTH_SENSES = [name for name, instance in INSTANCES.items() if instance.kind == "any"]
