"""Wrong declarations of solvers and layers, and instances without a solution."""

import networkx as nx
import numpy as np
import pytest
import torch
from torch import Tensor

import implicitdiff.combinatorial as co
from implicitdiff import InfeasibleError, InputError, OptionError, SolverError
from tests.combinatorial.instances import INSTANCES

GRID = co.GridShortestPath(3, 3)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: co.PerfectMatching(nx.path_graph(3)), "3 nodes and no matching"),
        (lambda: co.PerfectMatching(nx.star_graph(3)), "4 nodes and no matching of more than 1"),
        (lambda: co.SpanningTree(nx.Graph([(0, 1), (2, 3)])), "not connected"),
        (lambda: co.Arborescence(nx.DiGraph([(0, 1), (2, 1)]), 0), "2 is not reached from 0"),
        (lambda: co.ShortestPath(nx.DiGraph([(0, 1), (2, 1)]), 0, 2), "2 is not reached from 0"),
        (lambda: co.SetCover([[1, 0], [0, 0]]), "element 1 is in no set"),
        (lambda: co.MinCostFlow(demanding(3)), "no flow meets the demands"),
    ],
)
def test_problems_without_solutions(make: object, message: str) -> None:
    with pytest.raises(InfeasibleError, match=message):
        make()  # type: ignore[operator]


def demanding(amount: float) -> object:
    graph = nx.DiGraph()
    graph.add_node(0, demand=-amount)
    graph.add_node(1, demand=amount)
    graph.add_edge(0, 1, capacity=2)
    return graph


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: co.SpanningTree(nx.MultiGraph([(0, 1), (0, 1)])), "multigraph"),
        (lambda: co.SpanningTree(nx.Graph([(0, 1), (1, 1)])), "self-loops"),
        (lambda: co.SpanningTree(nx.DiGraph([(0, 1)])), "undirected"),
        (lambda: co.Arborescence(nx.Graph([(0, 1)]), 0), "directed"),
        (lambda: co.SpanningTree([(0, 1)]), "networkx graph, got list"),
        (lambda: co.ShortestPath(nx.path_graph(3), 0, 7), "7 is not a node"),
        (lambda: co.MinCut(nx.path_graph(3), 1, 1), "same node"),
        (lambda: co.MinCostFlow(demanding(1.5)), "not a whole number"),
        (lambda: co.GridShortestPath(3, 3, target=(3, 0)), "outside of the grid"),
        (lambda: co.Knapsack([1.5, 2], 3), "use MILP"),
        (lambda: co.MILP(3, A_eq=np.ones((1, 3))), "belong together"),
        (lambda: co.MILP(3, A_eq=np.ones((1, 2)), b_eq=[1]), r"\(1, 2\), expected \(1, 3\)"),
        (lambda: co.EnumeratedSolver(torch.zeros(0, 3)), "K >= 1"),
        (lambda: co.QuadraticAssignment(3, [(0, 3)], [(0, 1)]), "out of the nodes"),
        (lambda: co.QuadraticAssignment(3, [(0, 1), (0, 1)], [(0, 1)]), "twice"),
    ],
)
def test_wrong_declarations(make: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()  # type: ignore[operator]


@pytest.mark.parametrize(
    "make",
    [
        lambda: co.TopK(0),
        lambda: co.TopK(2, sense="least"),
        lambda: co.solver(co.TopK(2), domain="positive"),
        lambda: co.solver(co.TopK(2), domain="nonnegative", sense="max"),
        lambda: co.TSP(2),
        lambda: co.TSP(5, method="luck"),
        lambda: co.GridShortestPath(3, 3, neighbours=6),
        lambda: co.QuadraticAssignment(9, [], []),
        lambda: co.MILP(3, time_limit=0.0),
        lambda: co.DiscreteLayer(lambda w: w, co.Identity()),
        lambda: co.DiscreteLayer(co.TopK(2), co.Identity),
        lambda: co.DiscreteLayer(co.TopK(2), co.Identity("middle")),
        lambda: co.DiscreteLayer(co.TopK(2), co.Identity(), domain="ignore"),
        lambda: co.DiscreteLayer(co.TopK(2), co.Identity(), eps=0.0),
    ],
)
def test_wrong_options(make: object) -> None:
    with pytest.raises(OptionError, match=r"expected|one of|cannot maximise|4 or 8|1 to 8"):
        make()  # type: ignore[operator]


def test_programs_that_are_not_solved_name_the_sample() -> None:
    infeasible = co.MILP(2, A_eq=[[1.0, 1.0]], b_eq=[3.0])
    with pytest.raises(InfeasibleError, match="sample 0"):
        infeasible(draw(0, 2, 2))
    unbounded = co.MILP(2, lower=-np.inf, upper=np.inf, integer=False)
    with pytest.raises(SolverError, match="sample 1: HiGHS stopped with status"):
        unbounded(torch.tensor([[0.0, 0.0], [1.0, 0.0]]))


def test_small_differences_of_costs_count_in_programs() -> None:
    """HiGHS' tolerances are absolute: without scaling all of these costs would be zero."""
    costs = draw(3, 4, 6) * 1e-9
    listed = torch.from_numpy(INSTANCES["set-cover"].solutions())
    y = INSTANCES["set-cover"].make()(costs)
    torch.testing.assert_close((y * costs).sum(1), (costs @ listed.T).amin(1), rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda w: None, "returned None"),
        (lambda w: w[:, :2], r"returned shape \(4, 2\) for costs \(4, 5\)"),
        (lambda w: w * torch.tensor([1, 1, float("nan"), 1]).reshape(4, 1), "NaN or inf for sample 2 of 4"),
    ],
)
def test_functions_that_give_no_solution(function: object, message: str) -> None:
    made = co.solver(function, cost_shape=(5,))  # type: ignore[arg-type]
    with pytest.raises(SolverError, match=message):
        made(torch.rand(4, 5))
