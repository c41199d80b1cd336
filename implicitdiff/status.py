"""The verdict on one sample, as an integer that fits into an int8 tensor.

Nothing comes in; ``Status`` goes out to solvers, optimizers and the layer, which keep one int8 per sample.
0 means that all is well, so that ``status.any()`` asks whether anything went wrong. Next: ``problem.py``.
"""

import enum
import functools

import torch

from implicitdiff.torch_private import clean_context


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


@functools.lru_cache(maxsize=256)
def all_ok(batch: int, device: torch.device) -> torch.Tensor:
    """OK for each of ``batch`` samples, int8: the same tensor at each call, which nobody may write to.

    Who gets this very tensor knows without an operation that nothing went wrong, see ``is_all_ok``.
    """
    with clean_context():  # it outlives whatever is being recorded or transformed here
        return torch.zeros(batch, dtype=torch.int8, device=device)


def is_all_ok(status: torch.Tensor) -> bool:
    """Whether the status is the tensor of ``all_ok``; any other one has to be read, even if it is all 0."""
    return status is all_ok(status.shape[0], status.device)
