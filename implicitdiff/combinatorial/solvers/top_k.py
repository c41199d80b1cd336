"""The k cheapest of n.

In: costs (B, n). Out: k ones a sample. Next file to read: ``ranking.py``.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from implicitdiff.combinatorial.base import Sense, Shape, Solver
from implicitdiff.errors import InputError, OptionError


class TopK(Solver):
    """y in {0, 1}^n with sum k, one at each of the k smallest costs (largest with sense="max").

    Exactly k ones also where costs tie, since it goes by torch.topk and not by a threshold. O(n log n) on any device.
    All sums are k, so "mean" is a valid projection.

    Args:
        k: the number of ones.
        sense: "min" or "max".
    """

    def __init__(self, k: int, *, sense: Sense = "min") -> None:
        if k < 1:
            raise OptionError(f"k={k} of TopK: expected a positive integer")
        super().__init__((None,), sense=sense)
        self.k = k

    def solve(self, costs: Tensor) -> Tensor:
        """topk and a scatter."""
        if costs.shape[1] < self.k:
            raise InputError(f"TopK({self.k}) needs at least {self.k} costs a sample, got {costs.shape[1]}")
        chosen = costs.topk(self.k, dim=1, largest=False, sorted=False).indices
        return torch.zeros_like(costs).scatter_(1, chosen, 1)

    def equalities(self, shape: Shape) -> np.ndarray | None:
        """<1, y> = k."""
        return np.ones((1, shape[0]))


__all__ = ["TopK"]
