"""A solver as the estimators call it: always a minimisation, with the domain enforced and the calls counted.

In: plain costs (B, *shape), perturbed or not. Out: solutions, of which some rows may be known already. Next file to
read: ``estimator.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from torch import Tensor

from implicitdiff.combinatorial.base import Solver
from implicitdiff.combinatorial.checks import check_domain, check_finite
from implicitdiff.combinatorial.tally import Tally
from implicitdiff.errors import OptionError

Policy: TypeAlias = Literal["error", "clamp"]
POLICIES = ("error", "clamp")


@dataclass(frozen=True)
class Oracle:
    """y(w) = argmin <w, y>, whatever the solver's own sense: costs of a maximisation come with the other sign.

    Attributes:
        solver: what is called.
        domain: "error", or "clamp": costs below eps become eps, where the solver takes no negative ones. The gradient
            passes a clamped cost as if it were not clamped.
        eps: > 0, since zero costs make ties.
        tally: counts the calls.
    """

    solver: Solver
    domain: Policy = "error"
    eps: float = 1e-6
    tally: Tally = field(default_factory=Tally)

    def __post_init__(self) -> None:
        if self.domain not in POLICIES:
            raise OptionError(f"domain={self.domain!r}: one of {', '.join(POLICIES)}")
        if not (math.isfinite(self.eps) and self.eps > 0):
            raise OptionError(f"eps={self.eps}: expected a number > 0; costs of zero make ties")

    @property
    def sign(self) -> int:
        """w = sign * cost."""
        return 1 if self.solver.sense == "min" else -1

    @property
    def keeps_signs(self) -> bool:
        """Whether noise has to be multiplicative, because a change of sign may leave the domain."""
        return self.solver.domain != "any"

    def __call__(self, w: Tensor, what: str = "costs") -> Tensor:
        """The minimisers for plain costs (B, *shape) without history.

        Args:
            w: the costs.
            what: how a message calls them: "costs", or "perturbed costs".

        Raises:
            InputError: NaN, inf, or outside of the domain under domain="error".
            InfeasibleError, SolverError: the solver found no solution.
        """
        check_finite(w, self.solver.name, what)
        if self.solver.domain == "nonnegative":
            if self.domain == "clamp":
                low = w < self.eps
                self.tally.boundary(int(low.sum()), low.numel())
                w = w.clamp(min=self.eps)
            else:
                check_domain(w, self.solver.name, what)
        self.tally.calls(len(w))
        return self.solver.minimise(w)

    def many(self, w: Tensor) -> Tensor:
        """`self` for perturbed costs (B, S, *shape), S to a sample."""
        return self(w.flatten(0, 1), "perturbed costs").reshape(w.shape)

    def moved(self, w: Tensor, y: Tensor, direction: Tensor) -> Tensor:
        """y(w + direction), where y = y(w) is known: rows that do not move are not solved again.

        Args:
            w: (B, *shape).
            y: its solutions.
            direction: (B, *shape).
        """
        moves = direction.flatten(1).ne(0).any(1)
        if moves.all():
            return self(w + direction, "perturbed costs")
        found = y.clone()
        if moves.any():
            found[moves] = self((w + direction)[moves], "perturbed costs")
        return found


__all__ = ["Oracle", "Policy"]
