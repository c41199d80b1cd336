"""Which optimizer solves a problem where none was asked for, and why.

A problem and its plan come in; an optimizer and a reason go out. Next: forward.py, which runs it, and `explain`,
which prints the reason.
"""

import math

from implicitdiff.optimizers.anderson import Anderson
from implicitdiff.optimizers.combined import Chain
from implicitdiff.optimizers.interior import InteriorPoint
from implicitdiff.optimizers.iterate import Optimizer
from implicitdiff.optimizers.lbfgs import LBFGS
from implicitdiff.optimizers.limited import takes_matrices
from implicitdiff.optimizers.newton import Newton
from implicitdiff.plan import Plan
from implicitdiff.problem import Problem
from implicitdiff.structured.plan import StructuredPlan
from implicitdiff.structured.quadratic import proved

MANY_VARIABLES = 2000
"""Where L-BFGS and one Newton step begin to cost less than Newton's method alone: measured with one thread in float32
on logistic regression, a non-convex fit and a problem without structure; decision 18 has the times."""

_CUBIC = ("cholesky", "lu", "ldl", "minres")


def default_optimizer(problem: Problem, plan: Plan) -> tuple[Optimizer | None, str]:
    """The optimizer of a layer with optimizer=None; a statement about sizes and structure, not about values.

    Args:
        problem: The declaration.
        plan: Its plan.

    Returns:
        (optimizer, reason). None: the problem's own `solve` is called. Newton's method wherever its step is cheap:
        few variables, structure, or constraints, whose KKT system the plan can solve; beyond, L-BFGS, and Newton's
        method from where that stops, for the last digits and for what L-BFGS could not solve.
    """
    if problem.declares("solve"):
        return None, f"{type(problem).__name__} declares its own"
    if plan.trace.limited:
        return InteriorPoint(), limited_reason(plan)
    if plan.trace.square == "step":
        return Chain(
            (Anderson(), Newton())
        ), "steps are cheap; Newton's method where they do not contract, and at the end"
    if plan.trace.square:
        return Newton(), f"few steps, each by the solver of the backward pass ({plan.analysis.solver})"
    if isinstance(plan, StructuredPlan) and proved(plan) is not None:
        return (
            Newton(),
            "quadratic: one linear system, and Newton's method where its H is not positive definite",
        )
    m = sum(math.prod(variable.shape) for variable in plan.trace.variables)
    if m <= MANY_VARIABLES:
        size = "1 variable" if m == 1 else f"{m} variables"
        return Newton(), f"few steps, and a factorisation for {size} is cheap"
    if plan.trace.equality is not None:
        return Newton(), "few steps, each by the KKT solve of the backward pass"
    if plan.analysis.solver not in _CUBIC:
        return Newton(), f"few steps, and the structure of H makes them cheap ({plan.analysis.solver})"
    return (
        Chain((LBFGS(), Newton(extra=1))),
        f"without structure a factorisation for {m} variables costs more than many gradients",
    )


def limited_reason(plan: Plan) -> str:
    """Why an interior-point method, and by which factorisation: for problems with inequalities or bounds."""
    what = "inequalities" if plan.trace.inequality is not None else "bounds"
    if plan.trace.inequality is not None and plan.trace.bounds is not None:
        what = "inequalities and bounds"
    how = (
        "on constant matrices, since f is quadratic and the constraints are affine"
        if takes_matrices(plan)
        else f"each by the KKT solve of the backward pass ({plan.analysis.solver})"
    )
    return f"{what}: 8 to 20 steps whatever the active set, {how}"


def optimizer_name(optimizer: Optimizer | None) -> str:
    """As a report prints it: "solve", "Newton", "LBFGS, then Newton"."""
    if optimizer is None:
        return "solve"
    if isinstance(optimizer, Chain):
        return ", then ".join(optimizer_name(stage) for stage in optimizer.stages)
    return type(optimizer).__name__
