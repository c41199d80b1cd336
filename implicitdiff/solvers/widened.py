"""A factorisation in float64 for float32 users, where a subtraction has cancelled most digits.

In: a ``Block`` whose Schur complement lost digits. Out: the same grid in float64, and a factorisation that converts
right-hand sides and answers. Next file: ``schur.py``.
"""

import torch
from torch import Tensor

from implicitdiff.operators import Block, Dense, Diagonal, LinearOperator, ScaledIdentity
from implicitdiff.solvers.base import Factorization

CANCELLED = 0.25
"""A diagonal entry of S below this share of what it was: the solution may be a small difference."""
LOST = 2.0**-6
"""Below this share six bits or more are gone, and S is formed again in float64."""


class WidenedFactorization(Factorization):
    """A float64 factorisation used with vectors of another dtype."""

    cancelled = True

    def __init__(self, inner: Factorization) -> None:
        """Take over status and definiteness."""
        self._inner = inner
        self.status, self.definite = inner.status, inner.definite

    def solve(self, rhs: Tensor) -> Tensor:
        """Return the solution (..., B, m), rounded to the dtype of ``rhs`` at the end."""
        return self._inner.solve(rhs.double()).to(rhs.dtype)


def widened(operator: Block) -> Block:
    """Return the grid in float64.

    Where every corner is diagonal and one null vector z without zeros is proved, the corners follow from the
    couplings: row i of the grid times z is 0, so D_i z_i = -sum_j K_ij z_j. Taking them from there makes the float64
    matrix singular to its own precision, where corners that were summed in float32 would not be.
    """
    couplings = {(i, j): block.double() for i, j, block in operator.couplings}
    corners: list[LinearOperator] = [_wide(corner) for corner in operator.corners]
    null = [torch.as_tensor(vector, device=operator.device).double() for vector in operator.null_vectors]
    diagonal = all(isinstance(corner, Diagonal | ScaledIdentity) for corner in corners)
    if diagonal and len(null) == 1 and bool((null[0] != 0).all()):
        parts = [null[0][where] for where in operator.slices]
        for i, part in enumerate(parts):
            sums = [block @ parts[j] for (row, j), block in couplings.items() if row == i]
            corners[i] = Diagonal(-torch.stack(torch.broadcast_tensors(*sums)).sum(0) / part)
    number = range(len(corners))
    grid = tuple(tuple(corners[i] if i == j else couplings.get((i, j)) for j in number) for i in number)
    return Block(grid, operator.sizes, tuple(null), operator.symmetric)


def _wide(corner: LinearOperator) -> LinearOperator:
    if isinstance(corner, Diagonal):
        return Diagonal(corner.diagonal.double())
    if isinstance(corner, ScaledIdentity):
        return ScaledIdentity(corner.scale.double(), corner.size)
    return Dense(corner.to_dense().double(), symmetric=corner.symmetric)
