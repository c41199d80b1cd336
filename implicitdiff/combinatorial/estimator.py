"""What an estimator is: a forward rule and a replacement for the derivative of a discrete solver, which is zero.

In: plain costs w (B, *shape) of a minimisation and an `Oracle`. Out: the solution with what its gradient needs, and
the gradient for a cotangent. One file per estimator. Next file to read: ``function.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from implicitdiff.combinatorial.base import Solver
from implicitdiff.combinatorial.oracle import Oracle
from implicitdiff.combinatorial.projections import NoProjection, Projection
from implicitdiff.errors import NotSupportedYetError

Saved = tuple[Tensor, ...]


@dataclass(frozen=True)
class Pass:
    """One forward pass with its backward: everything that is not a tensor.

    Attributes:
        oracle: the solver.
        projection: the estimator's projection, for this solver.
        training: whether the layer was in training mode; in evaluation every estimator returns y(w).
        generator: of all random numbers; None for torch's own state.
    """

    oracle: Oracle
    projection: Projection
    training: bool
    generator: torch.Generator | None


class Estimator(ABC):
    """The forward and backward of a discrete layer, in the convention y(w) = argmin <w, y>, g = dl/dy.

    Class attributes:
        smooth: True if `vjp` and `jvp` consist of torch operations on w and g alone; they are then differentiated for
            second derivatives. False if they look at values or call the solver; second derivatives are then an error.
    """

    smooth: bool = False

    @property
    def name(self) -> str:
        """The class, for messages."""
        return type(self).__name__

    @property
    def formula(self) -> str:
        """dl/dw in one line, for reports."""
        return "see its docstring"

    @property
    def calls(self) -> tuple[int, int] | None:
        """Instances solved for one sample in training: (forward, backward) where g is not 0; None: not declared."""
        return None

    def bind(self, solver: Solver) -> Projection:
        """The projection for one solver."""
        return NoProjection()

    def forward(self, run: Pass, w: Tensor) -> tuple[Tensor, ...]:
        """(y, *saved) for plain costs w (B, *shape), B >= 1; saved are tensors with the batch axis first."""
        return (run.oracle(w),)

    @abstractmethod
    def vjp(self, run: Pass, w: Tensor, y: Tensor, saved: Saved, g: Tensor) -> Tensor:
        """dl/dw for g = dl/dy."""

    def jvp(self, run: Pass, w: Tensor, y: Tensor, saved: Saved, t: Tensor) -> Tensor:
        """The directional derivative that belongs to `vjp`, if that is linear in g.

        Raises:
            NotSupportedYetError: it is not.
        """
        raise NotSupportedYetError(
            f"forward-mode derivatives of {self.name}: its gradient is not linear in the cotangent, so there is no "
            "Jacobian to multiply with; use reverse mode (grad, jacrev), or the estimators Identity, Perturbed or "
            "StraightThrough"
        )


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """(B,) reshaped so that it multiplies (B, ...)."""
    return values.reshape(-1, *(1,) * (like.dim() - 1))


__all__ = ["Estimator", "Pass", "Saved", "per_sample"]
