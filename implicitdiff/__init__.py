"""implicitdiff: exact, structured gradients through the solutions of optimisation problems, for PyTorch.

Comes in: a ``Problem`` (an objective, perhaps constraints, for one sample) and batches of inputs. Goes out:
its solution as a differentiable layer. Every public name is listed here; the way of the data starts in
``problem.py``.
"""

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
from implicitdiff.problem import FixedPoint, Problem, Root, Solution
from implicitdiff.status import Status

__all__ = [
    "CapturedTensorError",
    "ControlFlowError",
    "ConvergenceError",
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
]
