"""The verdict on one sample, as an integer that fits into an int8 tensor.

Nothing comes in; ``Status`` goes out to solvers, optimizers and the layer, which keep one int8 per sample.
0 means that all is well, so that ``status.any()`` asks whether anything went wrong. Next: ``problem.py``.
"""

import enum


class Status(enum.IntEnum):
    """What happened to one sample, forward or backward. The tensor form is int8, shape (batch,)."""

    OK = 0
    """Solved, and the point is optimal within the tolerance."""
    NOT_CONVERGED = 1
    """An iteration stopped at its limit before it reached its tolerance."""
    NOT_OPTIMAL = 2
    """The stationarity residual D_u L is above the tolerance."""
    INFEASIBLE = 3
    """A constraint is violated by more than the tolerance."""
    SINGULAR = 4
    """The KKT matrix is singular: the solution is not locally unique."""
    INDEFINITE = 5
    """The Hessian of the Lagrangian is indefinite on the tangent space: not a strict minimum."""
    NONFINITE = 6
    """A NaN or an infinity appeared."""
    WEAKLY_ACTIVE = 7
    """An active inequality has multiplier zero: only one-sided derivatives exist."""
    DAMPED = 8
    """The gradient was computed with a damped Hessian (``on_failure="damp"``)."""
    NOT_REGULAR = 9
    """The constraint gradients are dependent at the solution and the dependence is not structural."""
