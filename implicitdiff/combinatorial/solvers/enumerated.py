"""Solutions given as a list: the oracle that every other solver is tested against.

In: Y, (K, *shape). Out: the row of Y with the smallest inner product. Next file to read: ``top_k.py``.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from implicitdiff.combinatorial.base import Sense, Shape, Solver
from implicitdiff.errors import InputError
from implicitdiff.torch_private import HOST


class EnumeratedSolver(Solver):
    """y(w) = argmin of <w, y> over the rows of Y, exactly, with ties to the first row.

    Cost O(K n) a sample, on any device. The equalities are all that hold on Y.

    Args:
        solutions: Y, (K, *shape), finite.
        sense: "min" or "max".
    """

    def __init__(self, solutions: Tensor | np.ndarray, *, sense: Sense = "min") -> None:
        listed = torch.as_tensor(solutions, device=HOST)
        if listed.dim() < 2 or len(listed) == 0:
            raise InputError(f"solutions have shape {tuple(listed.shape)}, expected (K, *shape) with K >= 1")
        self.solutions = listed.detach().to(torch.float64)
        if not torch.isfinite(self.solutions).all():
            raise InputError("solutions are not finite")
        super().__init__(tuple(listed.shape[1:]), sense=sense)

    def solve(self, costs: Tensor) -> Tensor:
        """One matrix product and an argmin."""
        listed = self.solutions.to(costs)
        best = (costs.flatten(1) @ listed.flatten(1).mT).argmin(1)
        return listed[best]

    def known_solutions(self) -> Tensor:
        """Y."""
        return self.solutions

    def equalities(self, shape: Shape) -> np.ndarray | None:
        """A basis of the normals of the affine hull of Y."""
        rows = self.solutions.flatten(1).numpy()
        _, sizes, directions = np.linalg.svd(rows - rows[0])
        rank = int((sizes > 1e-10 * max(1.0, sizes.max(initial=0.0))).sum())
        return directions[rank:]


__all__ = ["EnumeratedSolver"]
