"""Ranks.

In: scores (B, n). Out: the rank of each, 1 for the largest. Next file to read: ``assignment.py``.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from implicitdiff.combinatorial.base import Sense, Shape, Solver


class Ranking(Solver):
    """y = argmin of <w, pi> over the permutations pi of 1..n: rank 1 for the largest w (for the smallest with
    sense="max").

    Ties are broken by position. O(n log n) on any device. All sums are n (n + 1) / 2, so "mean" is a valid projection.

    Args:
        sense: "min" or "max".
    """

    def __init__(self, *, sense: Sense = "min") -> None:
        super().__init__((None,), sense=sense)

    def solve(self, costs: Tensor) -> Tensor:
        """One sort; the ranks are written where the sorted entries came from."""
        order = costs.argsort(dim=1, descending=True, stable=True)
        ranks = torch.arange(1, costs.shape[1] + 1, dtype=costs.dtype, device=costs.device)
        return torch.empty_like(costs).scatter_(1, order, ranks.expand_as(costs))

    def equalities(self, shape: Shape) -> np.ndarray | None:
        """<1, y> = n (n + 1) / 2."""
        return np.ones((1, shape[0]))


__all__ = ["Ranking"]
