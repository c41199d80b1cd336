"""Numbers about solutions that need no estimator: the optimal value, the regret, margins, and a test of losses.

In: a solver and costs. Out: one number per sample, exact gradients where there are any. Next file to read:
``invariance.py``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from implicitdiff.combinatorial.base import Sense, Solver
from implicitdiff.combinatorial.checks import name_samples
from implicitdiff.combinatorial.function import Constant
from implicitdiff.combinatorial.oracle import Oracle
from implicitdiff.combinatorial.reduction import flattened, inner
from implicitdiff.errors import InputError, LossGradientWarning, OptionError


def optimal_value(solver: Solver, cost: Tensor) -> Tensor:
    """v(w) = min over y of <w, y> (or max), for each sample of costs (*batch, *cost_shape), with its exact gradient.

    The gradient is the solution y(w) itself (Danskin), a subgradient where several solutions tie. One solver call a
    sample, none in the backward.
    """
    oracle = Oracle(solver)
    w, _, batch = flattened(oracle, cost, cost)
    (y,) = Constant.apply(lambda costs: (oracle(costs),), w)
    return (oracle.sign * inner(w, y)).reshape(batch)


def regret(solver: Solver, cost: Tensor, true_cost: Tensor) -> Tensor:
    """<c, y(w)> - <c, y(c)> for each sample: what acting on the predicted cost w loses under the true cost c; >= 0.

    For a solver that maximises <c, y(c)> - <c, y(w)>. A measure, not a loss: it has no useful gradient and carries
    none; train with `SPOPlusLoss`, or with a `DiscreteLayer`.
    """
    y, best = solver(cost), solver(true_cost)
    if cost.shape != true_cost.shape:
        raise InputError(
            f"regret: predicted costs have shape {tuple(cost.shape)}, true costs {tuple(true_cost.shape)}"
        )
    lost = y - best if solver.sense == "min" else best - y
    axes = tuple(range(-len(solver.cost_shape), 0))
    return (true_cost.detach() * lost).sum(axes)


def informed_margin(cost: Tensor, target: Tensor, a: float, sense: Sense = "min") -> Tensor:
    """w + (a/2) y* - (a/2) (1 - y*): the true solution made dearer by a margin (Rolinek et al. 2020), in training only.

    For y* of zeros and ones. The generic replacement, which needs no labels, is `Rademacher(a)`.
    """
    if not math.isfinite(a) or a < 0:
        raise OptionError(f"a={a} of informed_margin: expected a finite number >= 0")
    shift = a * (target.to(cost.dtype) - 0.5)
    return cost + shift if sense == "min" else cost - shift


def check_loss(loss: Callable[[Tensor], Tensor], target: Tensor, tolerance: float = 1e-6) -> bool:
    """Whether the gradient of loss(y) vanishes at y = target; otherwise a LossGradientWarning.

    `Identity` passes g on whatever the solver says. A loss that is linear in y, such as y (1 - t) + (1 - y) t, has the
    same g at every y, also at the target: the costs then grow for ever, and the solver has no part in it. Squared and
    absolute differences vanish there.

    Args:
        loss: a function of solutions (B, ...) with a scalar or (B,) result.
        target: target solutions (B, ...).
        tolerance: the largest entry of g at the target that counts as zero.
    """
    y = target.detach().clone()
    if not y.is_floating_point():
        y = y.to(torch.get_default_dtype())
    y.requires_grad_()
    with torch.enable_grad():
        (g,) = torch.autograd.grad(loss(y).sum(), y)
    bad = (g.abs() > tolerance).reshape(len(g), -1).any(1)
    if not bad.any():
        return True
    warnings.warn(
        f"the gradient of the loss does not vanish at the target ({name_samples(bad)} of {len(g)}, largest entry "
        f"{float(g.abs().max()):.3g}): with Identity the costs never stop growing; use a squared or absolute "
        "difference",
        LossGradientWarning,
        stacklevel=2,
    )
    return False


__all__ = ["check_loss", "informed_margin", "optimal_value", "regret"]
