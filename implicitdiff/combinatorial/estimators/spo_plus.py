"""SPO+: a convex bound on the regret of a predicted cost, where the true costs are known.

In: predicted and true costs. Out: one number per batch or per sample. Next file to read: ``../values.py``.
"""

from __future__ import annotations

from torch import Tensor, nn

from implicitdiff.combinatorial.base import Solver
from implicitdiff.combinatorial.function import Constant
from implicitdiff.combinatorial.oracle import Oracle, Policy
from implicitdiff.combinatorial.reduction import Reduction, check_reduction, flattened, inner, reduced


class SPOPlusLoss(nn.Module):
    """L(w, c) = -min over y of <2w - c, y> + 2 <w, y*(c)> - <c, y*(c)> (Elmachtoub and Grigas 2022).

    It is convex in w, at least the regret <c, y(w) - y*(c)>, and 0 at w = c. Its subgradient 2 (y*(c) - y(2w - c)) is
    exact, and so is the gradient for c. One solver call a sample, one more where y*(c) is not given. For a solver that
    maximises, the same with the signs of w and c changed.

    Where the solver takes no negative costs, 2w - c may leave its domain: see `domain`.

    Args:
        solver: the solver.
        reduction: "mean", "sum" or "none" over samples.
        domain, eps: as for `DiscreteLayer`; clamped costs make the gradient approximate.
    """

    def __init__(
        self, solver: Solver, *, reduction: Reduction = "mean", domain: Policy = "error", eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.oracle = Oracle(solver, domain, eps)
        self.reduction = check_reduction(reduction)

    def forward(self, cost: Tensor, true_cost: Tensor, true_solution: Tensor | None = None) -> Tensor:
        """The loss of predicted costs (*batch, *cost_shape); true costs and solutions have the same shape."""
        w, c, batch = flattened(self.oracle, cost, self.oracle.sign * true_cost)
        if true_solution is None:
            (best,) = Constant.apply(lambda costs: (self.oracle(costs, "true costs"),), c)
        else:
            _, best, _ = flattened(self.oracle, cost, true_solution)
        spread = 2 * w - c
        (found,) = Constant.apply(lambda costs: (self.oracle(costs, "costs 2w - c"),), spread)
        return reduced(2 * inner(w, best) - inner(c, best) - inner(spread, found), batch, self.reduction)


__all__ = ["SPOPlusLoss"]
