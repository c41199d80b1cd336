"""Linear assignment, square or rectangular.

In: cost matrices (B, n, m). Out: 0/1 matrices of the same shape. Next file to read: ``graphs.py``.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from implicitdiff.combinatorial.base import NumpySolver, Sense, Shape


class Assignment(NumpySolver):
    """min <W, Y> over 0/1 matrices with one 1 in every row and every column; of a rectangular matrix, with one in each
    line of the shorter side and at most one in each of the longer.

    By SciPy's linear_sum_assignment: O(n^3) a sample, 1 us at n = 5, 11 us at n = 30. The affine projection of square
    matrices is double centring, W - row means - column means + mean; of others the centring of the shorter side's
    lines.

    All costs are finite: where pairs are forbidden use `PerfectMatching` on the graph of those that are not.

    Args:
        sense: "min" or "max".
    """

    def __init__(self, *, sense: Sense = "min") -> None:
        super().__init__((None, None), sense=sense)

    def solve_numpy(self, costs: np.ndarray) -> np.ndarray:
        """One assignment after the other."""
        y = np.zeros(costs.shape)
        for matrix, chosen in zip(costs, y, strict=True):
            chosen[linear_sum_assignment(matrix)] = 1
        return y

    def equalities(self, shape: Shape) -> np.ndarray | None:
        """The sums of all lines that have a one for sure."""
        n, m = shape
        rows, columns = np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))
        if n == m:
            return np.concatenate((rows, columns))
        return rows if n < m else columns

    def without_normals(self, w: Tensor) -> Tensor:
        """Centring, which costs O(n m) instead of the general O(n m (n + m))."""
        n, m = w.shape[1:]
        centred = w - w.mean(2, keepdim=True) if n <= m else w
        return centred - centred.mean(1, keepdim=True) if n >= m else centred


__all__ = ["Assignment"]
