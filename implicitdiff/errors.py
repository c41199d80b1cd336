"""Every error and warning the library raises, with one root.

Nothing comes in; the classes go out to all other modules. A message names the thing that is wrong, its shapes
or samples, and the remedy. Where a user would expect a builtin (a wrong value is a ValueError), the class
inherits from it as well, so that ordinary ``except ValueError`` clauses keep working. Next file to read:
``status.py``.
"""


class ImplicitDiffError(Exception):
    """The root of every error the library raises."""


class ProblemDefinitionError(ImplicitDiffError, TypeError):
    """The declaration itself is wrong.

    Not a Problem, neither ``init`` nor ``solve``, an objective that is not a scalar or does not depend on u,
    a hook that returns something other than tensors, an error raised inside a hook.
    """


class InputError(ImplicitDiffError, ValueError):
    """An input is wrong: rank, shape, dtype, device, NaN or inf, batch size, none, integer variable."""


class TraceError(ImplicitDiffError, RuntimeError):
    """The declared functions could not be turned into a graph."""


class ControlFlowError(TraceError):
    """A declared function reads the value of a tensor in Python: ``if``, ``float``, ``.item()``, a mask."""


class RandomnessError(TraceError):
    """A declared function draws random numbers, so it is not a function of u and the inputs."""


class CapturedTensorError(TraceError):
    """A tensor that requires grad is used, but is neither an input nor reachable from the Problem."""


class SolutionError(ImplicitDiffError, ValueError):
    """``solve`` (or a warm start) returned the wrong structure, shape, dtype or device."""


class NotOptimalError(ImplicitDiffError, RuntimeError):
    """A point that should solve the problem does not: its stationarity residual is above the tolerance."""


class InfeasibleError(ImplicitDiffError, RuntimeError):
    """The constraints are violated at the returned point, or contradict each other."""


class SingularError(ImplicitDiffError, RuntimeError):
    """The KKT matrix is singular, so the solution is not locally unique and has no derivative."""


class ConvergenceError(ImplicitDiffError, RuntimeError):
    """An iteration stopped before it reached its tolerance."""


class OptionError(ImplicitDiffError, ValueError):
    """An unknown name or value of an option: backward, linear_solver, on_failure, a penalty."""


class StructureError(ImplicitDiffError, ValueError):
    """A structure stated by the user is contradicted by the declared functions."""


class UnrollError(ImplicitDiffError, RuntimeError):
    """``backward="unrolled"`` is not possible for this problem."""


class NotSupportedYetError(ImplicitDiffError, NotImplementedError):
    """Part of the contract, but not built yet."""


class StaleGraphError(ImplicitDiffError, RuntimeError):
    """A compiled or exported graph outlived what it was made from: the layer is gone, or was changed since."""


class SolverError(ImplicitDiffError, RuntimeError):
    """A discrete solver gave no solution for a sample, or something that is none."""


class ProjectionError(ImplicitDiffError, ValueError):
    """A projection of the costs changes what a discrete solver returns, so its gradient would be wrong."""


class ImplicitDiffWarning(UserWarning):
    """The root of every warning the library gives."""


class OptimalityWarning(ImplicitDiffWarning):
    """Some samples did not reach an optimal point and ``on_failure`` does not raise."""


class StructureMismatchWarning(ImplicitDiffWarning):
    """A probe contradicted a derived structure; the dense formula is used in its place."""


class FallbackWarning(ImplicitDiffWarning):
    """Something slower but exact is used in place of the structured path."""


class LossGradientWarning(ImplicitDiffWarning):
    """The gradient of a loss does not vanish at its target, so training does not stop there."""
