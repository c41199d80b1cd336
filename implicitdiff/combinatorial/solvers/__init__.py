"""Solvers: declared objects that minimise a linear cost over a finite set, exactly.

In: costs (B, ...). Out: solutions of the same shape. Any estimator works with any solver. Start reading at
``enumerated.py``.
"""

from implicitdiff.combinatorial.solvers.assignment import Assignment
from implicitdiff.combinatorial.solvers.enumerated import EnumeratedSolver
from implicitdiff.combinatorial.solvers.flow import MinCostFlow, MinCut
from implicitdiff.combinatorial.solvers.grid import GridShortestPath
from implicitdiff.combinatorial.solvers.knapsack import Knapsack
from implicitdiff.combinatorial.solvers.matching import PerfectMatching
from implicitdiff.combinatorial.solvers.milp import MILP, SetCover
from implicitdiff.combinatorial.solvers.quadratic import QuadraticAssignment
from implicitdiff.combinatorial.solvers.ranking import Ranking
from implicitdiff.combinatorial.solvers.shortest_path import ShortestPath
from implicitdiff.combinatorial.solvers.spanning_tree import Arborescence, SpanningTree
from implicitdiff.combinatorial.solvers.top_k import TopK
from implicitdiff.combinatorial.solvers.tsp import TSP

__all__ = [
    "MILP",
    "TSP",
    "Arborescence",
    "Assignment",
    "EnumeratedSolver",
    "GridShortestPath",
    "Knapsack",
    "MinCostFlow",
    "MinCut",
    "PerfectMatching",
    "QuadraticAssignment",
    "Ranking",
    "SetCover",
    "ShortestPath",
    "SpanningTree",
    "TopK",
]
