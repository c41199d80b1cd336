"""The forward pass of a quadratic problem with affine constraints: one factorisation, no iteration.

In: a plan and the tensors of a call. Out: `Solved`, held against the optimality rule like any other solution, with the
factorisation that the derivatives use again; or None, and then an optimizer starts. Next: forward.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from implicitdiff.derivatives.factor import KKTFactor
from implicitdiff.optimality import check
from implicitdiff.plan import Plan
from implicitdiff.status import Status
from implicitdiff.structured.plan import StructuredPlan
from implicitdiff.structured.quadratic import minimum

Leaves = tuple[Tensor, ...]

ROUNDING = 64
"""A ratio below this many eps is rounding: a refinement would not lower it."""


@dataclass(frozen=True)
class Solved:
    """A minimum: leaves (B, *shape), relative residual and number of solves (B,), K factored.

    `good` are the samples (B,) that are OK; None where all are.
    """

    u: Leaves
    multipliers: Leaves
    residual: Tensor
    solves: Tensor
    factor: KKTFactor
    good: Tensor | None


def solve_quadratic(plan: Plan, theta: Sequence[Tensor], batch: int, tol: float) -> Solved | None:
    """The minimum of every sample, where the plan proves that the problem is quadratic.

    The rule compares |D_u L| with the largest single term, as Q_ij u_j; here it is compared with the largest entry of
    H u, A'lam and g, which costs no array of terms. An entry of k terms is at most k times the largest: a ratio of at
    most tol / k holds the point to the rule. Where it is larger, the system is solved once more for what is left, with
    the same factorisation, and then the rule itself decides.

    Args:
        plan: The plan.
        theta: Inputs and tensors.
        batch: B > 0.
        tol: The tolerance of the rule.

    Returns:
        None where nothing is proved, or no H is positive definite. Every sample goes its own way. Cost: one
        factorisation of K, one solve, one product with K; for a refinement a solve and one pass for D_u L and h.
    """
    if not isinstance(plan, StructuredPlan):
        return None
    theta = tuple(theta)
    start = minimum(plan, theta, batch)
    if start is None:
        return None
    u, lam, residual, good = start.u, start.multipliers, start.ratio, start.good
    enough = min(tol / start.summands, ROUNDING * torch.finfo(u[0].dtype).eps)
    solves = torch.ones_like(residual, dtype=torch.int64)
    redo = ~(residual <= enough)
    if not bool(redo.any()):
        return Solved(u, lam, residual, solves, start.factor, good)
    gradient, constraint = start.error
    w, s, _ = start.factor.solve(
        tuple(-leaf[None] for leaf in gradient), tuple(leaf[None] for leaf in constraint)
    )
    u, lam = (
        tuple(torch.where(_along(redo, a), a + b[0], a) for a, b in zip(old, step, strict=True))
        for old, step in ((u, w), (lam, s))
    )
    found = check(plan, u, lam, theta, tol)
    residual = torch.where(redo, found.residuals.relative, residual)
    if not found.all_ok:
        passed = ~redo | (found.status == Status.OK)
        good = passed if good is None else good & passed
        if bool(good.all()):
            good = None
    return Solved(u, lam, residual, torch.where(redo, 2, solves), start.factor, good)


def _along(mask: Tensor, leaf: Tensor) -> Tensor:
    return mask.reshape(-1, *(1,) * (leaf.dim() - 1))
