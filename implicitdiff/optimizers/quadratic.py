"""The forward pass of a quadratic problem with affine constraints: one factorisation, no iteration.

In: a plan and the tensors of a call. Out: `Solved`, held against the optimality rule like any other solution, with the
factorisation that the derivatives use again; or None, and then an optimizer starts. Next: forward.py.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from implicitdiff.derivatives.factor import KKTFactor
from implicitdiff.optimality import check
from implicitdiff.plan import Plan
from implicitdiff.structured.plan import StructuredPlan
from implicitdiff.structured.quadratic import minimum

Leaves = tuple[Tensor, ...]

ROUNDING = 64
"""A ratio below this many eps is rounding: a refinement would not lower it."""


@dataclass(frozen=True)
class Solved:
    """A minimum, every sample OK: leaves (B, *shape), relative residual (B,), how many solves it took, K factored."""

    u: Leaves
    multipliers: Leaves
    residual: Tensor
    solves: int
    factor: KKTFactor


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
        None where nothing is proved, H is not positive definite, or a sample is not OK in the end. Cost: one
        factorisation of K, one solve, one product with K; for a refinement a solve and one pass for D_u L and h.
    """
    if not isinstance(plan, StructuredPlan):
        return None
    theta = tuple(theta)
    start = minimum(plan, theta, batch)
    if start is None:
        return None
    u, lam, residual = start.u, start.multipliers, start.ratio
    enough = min(tol / start.summands, ROUNDING * torch.finfo(u[0].dtype).eps)
    if float(residual.amax()) <= enough and _finite((*u, *lam)):
        return Solved(u, lam, residual, 1, start.factor)
    gradient, constraint = start.error
    w, s, _ = start.factor.solve(
        tuple(-leaf[None] for leaf in gradient), tuple(leaf[None] for leaf in constraint)
    )
    refined_u = tuple(a + b[0] for a, b in zip(u, w, strict=True))
    refined_lam = tuple(a + b[0] for a, b in zip(lam, s, strict=True))
    found = check(plan, refined_u, refined_lam, theta, tol)
    if not found.all_ok and bool(found.status.any()):
        return None
    return Solved(refined_u, refined_lam, found.residuals.relative, 2, start.factor)


def _finite(leaves: Leaves) -> bool:
    return math.isfinite(float(sum(leaf.sum() for leaf in leaves)))
