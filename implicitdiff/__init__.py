"""implicitdiff: exact, structured gradients through the solutions of optimisation problems, for PyTorch.

Comes in: a ``Problem`` (an objective, perhaps constraints, for one sample) and batches of inputs. Goes out:
its solution as a differentiable layer. Every public name is listed here; the way of the data starts in
``problem.py``.
"""

import importlib
import typing

from implicitdiff import operators, optimizers
from implicitdiff.autograd import KKTOptions
from implicitdiff.diagnostics import check, compare, explain, walkthrough
from implicitdiff.equations import FixedPoint, Root
from implicitdiff.errors import (
    CapturedTensorError,
    ControlFlowError,
    ConvergenceError,
    FallbackWarning,
    ImplicitDiffError,
    ImplicitDiffWarning,
    InfeasibleError,
    InputError,
    LossGradientWarning,
    NotOptimalError,
    NotSupportedYetError,
    OptimalityWarning,
    OptionError,
    ProblemDefinitionError,
    ProjectionError,
    RandomnessError,
    SingularError,
    SolutionError,
    SolverError,
    StaleGraphError,
    StructureError,
    StructureMismatchWarning,
    TraceError,
    UnrollError,
)
from implicitdiff.layer import DeclarativeLayer, implicit, solve
from implicitdiff.memory import memory_limit, set_memory_limit
from implicitdiff.problem import Problem, Solution
from implicitdiff.records import record
from implicitdiff.status import Status
from implicitdiff.vjp import derivatives, jacobian

if typing.TYPE_CHECKING:
    from implicitdiff import combinatorial

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
    "KKTOptions",
    "LossGradientWarning",
    "NotOptimalError",
    "NotSupportedYetError",
    "OptimalityWarning",
    "OptionError",
    "Problem",
    "ProblemDefinitionError",
    "ProjectionError",
    "RandomnessError",
    "Root",
    "SingularError",
    "Solution",
    "SolutionError",
    "SolverError",
    "StaleGraphError",
    "Status",
    "StructureError",
    "StructureMismatchWarning",
    "TraceError",
    "UnrollError",
    "check",
    "combinatorial",
    "compare",
    "derivatives",
    "explain",
    "implicit",
    "jacobian",
    "memory_limit",
    "operators",
    "optimizers",
    "record",
    "set_memory_limit",
    "solve",
    "walkthrough",
]


def __getattr__(name: str) -> typing.Any:
    """The discrete half is loaded when it is first used: networkx and SciPy's optimisers take half a second."""
    if name == "combinatorial":
        return importlib.import_module("implicitdiff.combinatorial")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
