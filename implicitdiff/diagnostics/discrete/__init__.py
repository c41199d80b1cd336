"""Diagnostics of discrete layers: `explain`, `check` and `compare` for a solver with an estimator.

In: what a user handed to one of the three. Out: the discrete layer it stands for, if it is one; the reports are in
``explain.py``, ``check.py`` and ``compare.py``, which are loaded when they are first used.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from implicitdiff.errors import InputError, OptionError

if TYPE_CHECKING:
    from torch import Tensor

    from implicitdiff.combinatorial import DiscreteLayer


def as_discrete(problem: object) -> DiscreteLayer | None:
    """The layer, or a solver with Identity and its own projection; None for everything else.

    Whoever holds such an object has loaded the discrete half already, so this loads nothing.
    """
    half = sys.modules.get("implicitdiff.combinatorial")
    if half is None:
        return None
    if isinstance(problem, half.DiscreteLayer):
        return problem
    return half.DiscreteLayer(problem, half.Identity()) if isinstance(problem, half.Solver) else None


def only_cost(layer: DiscreteLayer, inputs: tuple[Any, ...], in_dims: Any) -> tuple[Tensor, tuple[int, ...]]:
    """(costs (B, *shape), shape), from the one input that a discrete layer has.

    Raises:
        InputError: more or fewer inputs than one, or a wrong shape.
        OptionError: an in_dims that says what a discrete layer's does not: the batch axes come first, if there are any.
    """
    name = layer.solver.name
    if len(inputs) != 1:
        raise InputError(f"a discrete layer has one input, the costs of {name}; got {len(inputs)}")
    if in_dims not in (0, None, (0,), (None,)):
        raise OptionError(f"in_dims={in_dims!r}: the batch axes of costs of {name} come first; use 0 or None")
    batch = layer.solver.batch_shape(inputs[0])
    cost = inputs[0].detach()
    shape = tuple(cost.shape[len(batch) :])
    return cost.reshape(-1, *shape), shape


__all__ = ["as_discrete", "only_cost"]
