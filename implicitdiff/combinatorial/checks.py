"""What costs and solutions must be, and the errors that say which sample is wrong.

In: batches (B, ...) of costs or solutions. Out: nothing, or a named error. Next file to read: ``base.py``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from implicitdiff.errors import InputError, NotSupportedYetError, SolverError
from implicitdiff.torch_private import is_traced

SHOWN = 8


def name_samples(bad: Tensor) -> str:
    """The indices where a mask (B,) is set, for a message: ``sample 3``, ``samples 1, 4, 7``; long lists are cut."""
    indices = bad.nonzero().flatten().tolist()
    shown = ", ".join(str(index) for index in indices[:SHOWN])
    rest = f" and {len(indices) - SHOWN} more" if len(indices) > SHOWN else ""
    return f"sample{'s' if len(indices) > 1 else ''} {shown}{rest}"


def require_values(costs: Tensor, name: str) -> None:
    """Raise NotSupportedYetError while a graph is being recorded: it would hold the solution of one cost for ever."""
    if is_traced((costs,)):
        raise NotSupportedYetError(
            f"{name} looks at values, which make_fx, torch.export, fake and meta tensors do not have; torch.compile "
            "leaves a DiscreteLayer between two graphs"
        )


def check_finite(costs: Tensor, name: str, what: str = "costs") -> None:
    """Raise InputError where a cost is NaN or inf: a solver would return some path, silently.

    The sum is tested first, since it is finite only if every entry is and takes one pass without a temporary.
    """
    require_values(costs, name)
    if math.isfinite(float(costs.sum())):
        return
    bad = ~torch.isfinite(costs.flatten(1)).all(1)
    if bad.any():  # a sum of finite numbers can overflow
        raise InputError(f"{what} of {name} are not finite in {name_samples(bad)} of {len(costs)}")


def check_domain(costs: Tensor, name: str, what: str = "costs") -> None:
    """Raise InputError where a cost is negative."""
    if costs.numel() and float(costs.amin()) < 0:
        bad = (costs.flatten(1) < 0).any(1)
        raise InputError(
            f"{what} of {name} are negative in {name_samples(bad)} of {len(costs)}, where the solver's answer would be "
            "wrong: make them positive (softplus), or use DiscreteLayer(..., domain='clamp')"
        )


def check_solution(y: Tensor, costs: Tensor, name: str) -> None:
    """Raise SolverError where what a solver returned cannot be a solution."""
    if not isinstance(y, Tensor):
        raise SolverError(f"{name} returned {type(y).__name__} instead of a tensor")
    if y.shape != costs.shape:
        raise SolverError(
            f"{name} returned shape {tuple(y.shape)} for costs {tuple(costs.shape)}: they must be equal"
        )
    if not math.isfinite(float(y.sum())):
        bad = ~torch.isfinite(y.flatten(1)).all(1)
        if bad.any():
            raise SolverError(f"{name} returned NaN or inf for {name_samples(bad)} of {len(y)}")
