"""implicitdiff: exact, structured gradients through the solutions of optimisation problems, for PyTorch.

Comes in: a ``Problem`` (an objective, perhaps constraints, for one sample) and batches of inputs. Goes out:
its solution as a differentiable layer. Every public name is listed here; the way of the data starts in
``problem.py``.
"""

from implicitdiff import operators, optimizers
from implicitdiff.diagnostics import check, compare, explain
from implicitdiff.errors import (
    CapturedTensorError,
    ControlFlowError,
    ConvergenceError,
    FallbackWarning,
    ImplicitDiffError,
    ImplicitDiffWarning,
    InfeasibleError,
    InputError,
    NotOptimalError,
    NotSupportedYetError,
    OptimalityWarning,
    OptionError,
    ProblemDefinitionError,
    RandomnessError,
    SingularError,
    SolutionError,
    StructureError,
    StructureMismatchWarning,
    TraceError,
    UnrollError,
)
from implicitdiff.layer import DeclarativeLayer, solve
from implicitdiff.problem import FixedPoint, Problem, Root, Solution
from implicitdiff.records import record
from implicitdiff.status import Status
from implicitdiff.vjp import derivatives, jacobian

__all__ = [
    "CapturedTensorError",
    "ControlFlowError",
    "ConvergenceError",
    "DeclarativeLayer",
    "FallbackWarning",
    "FixedPoint",
    "ImplicitDiffError",
    "ImplicitDiffWarning",
    "InfeasibleError",
    "InputError",
    "NotOptimalError",
    "NotSupportedYetError",
    "OptimalityWarning",
    "OptionError",
    "Problem",
    "ProblemDefinitionError",
    "RandomnessError",
    "Root",
    "SingularError",
    "Solution",
    "SolutionError",
    "Status",
    "StructureError",
    "StructureMismatchWarning",
    "TraceError",
    "UnrollError",
    "check",
    "compare",
    "derivatives",
    "explain",
    "jacobian",
    "operators",
    "optimizers",
    "record",
    "solve",
]
