"""Discrete solvers as layers: identity with projection, and everything it is compared with.

In: costs, a solver that minimises a linear cost over a finite set, and an estimator for its gradient. Out: solutions in
a differentiable program. Shares nothing with the implicit half of the package. Start reading at ``layer.py``.
"""

from implicitdiff.combinatorial.base import Solver
from implicitdiff.combinatorial.estimators import (
    IMLE,
    LPGD,
    AdaptiveIMLE,
    Blackbox,
    Estimator,
    FenchelYoungLoss,
    Identity,
    Perturbed,
    SPOPlusLoss,
    StraightThrough,
)
from implicitdiff.combinatorial.invariance import Invariance, check_invariance, project
from implicitdiff.combinatorial.layer import DiscreteLayer
from implicitdiff.combinatorial.noise import Gumbel, Noise, Normal, Rademacher, SumOfGamma, Uniform
from implicitdiff.combinatorial.projections import Affine, Mean, NoProjection, Norm, Plane, Projection
from implicitdiff.combinatorial.solvers import (
    MILP,
    TSP,
    Arborescence,
    Assignment,
    EnumeratedSolver,
    GridShortestPath,
    Knapsack,
    MinCostFlow,
    MinCut,
    PerfectMatching,
    QuadraticAssignment,
    Ranking,
    SetCover,
    ShortestPath,
    SpanningTree,
    TopK,
)
from implicitdiff.combinatorial.tally import Diagnostics
from implicitdiff.combinatorial.values import check_loss, informed_margin, optimal_value, regret
from implicitdiff.combinatorial.wrap import batched, solver

__all__ = [
    "IMLE",
    "LPGD",
    "MILP",
    "TSP",
    "AdaptiveIMLE",
    "Affine",
    "Arborescence",
    "Assignment",
    "Blackbox",
    "Diagnostics",
    "DiscreteLayer",
    "EnumeratedSolver",
    "Estimator",
    "FenchelYoungLoss",
    "GridShortestPath",
    "Gumbel",
    "Identity",
    "Invariance",
    "Knapsack",
    "Mean",
    "MinCostFlow",
    "MinCut",
    "NoProjection",
    "Noise",
    "Norm",
    "Normal",
    "PerfectMatching",
    "Perturbed",
    "Plane",
    "Projection",
    "QuadraticAssignment",
    "Rademacher",
    "Ranking",
    "SPOPlusLoss",
    "SetCover",
    "ShortestPath",
    "Solver",
    "SpanningTree",
    "StraightThrough",
    "SumOfGamma",
    "TopK",
    "Uniform",
    "batched",
    "check_invariance",
    "check_loss",
    "informed_margin",
    "optimal_value",
    "project",
    "regret",
    "solver",
]
