"""The first-order conditions at a point, with the magnitudes they are measured against.

In: a point of a plan. Out: one frozen record that the optimality check and the optimizers read. Next: `plan.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Stationarity:
    """D_u L and h of every sample.

    Attributes:
        gradient: leaves (B, *shape) of D_u L.
        gradient_scale: (B,), the largest of the terms that cancel in D_u L.
        constraint: leaves (B, *shape) of h.
        constraint_scale: (B,), the largest of the terms that cancel in h (0 without constraints).
    """

    gradient: tuple[Tensor, ...]
    gradient_scale: Tensor
    constraint: tuple[Tensor, ...]
    constraint_scale: Tensor
