"""Division by the diagonal.

In: a diagonal matrix, or a multiple of the identity. Out: ``Divide``. Next file: ``condition.py``.
"""

import math
from functools import cached_property, singledispatch
from typing import ClassVar

import torch
from torch import Tensor

from implicitdiff.operators import Diagonal, LinearOperator, ScaledIdentity, Zero
from implicitdiff.solvers.base import Cost, Factorization, LinearSolver, numbers
from implicitdiff.status import Status, all_ok


@singledispatch
def diagonal_entries(operator: LinearOperator) -> Tensor | None:
    """Return the diagonal (B or 1, m or 1) of a matrix whose kind says that it is diagonal, else None."""
    return None


@diagonal_entries.register
def _of_zero(operator: Zero) -> Tensor:
    return torch.zeros(operator.batch, 1, dtype=operator.dtype, device=operator.device)


@diagonal_entries.register
def _of_scaled_identity(operator: ScaledIdentity) -> Tensor:
    return operator.scale[:, None]


@diagonal_entries.register
def _of_diagonal(operator: Diagonal) -> Tensor:
    return operator.diagonal


def unusable(diagonal: Tensor) -> Tensor:
    """Return where the entries cannot be divided by: zero, infinite or NaN."""
    return ~torch.isfinite(diagonal) | (diagonal == 0)


def all_positive(diagonal: Tensor) -> bool:
    """Return whether all entries of all samples are positive and finite: one pass, two numbers read."""
    if not diagonal.numel():
        return False
    read = numbers(*torch.aminmax(diagonal))
    return read is None or (read[0] > 0 and read[1] < math.inf)  # a NaN is in both


def examine(diagonal: Tensor) -> tuple[Tensor, Tensor]:
    """Return which samples have an unusable entry and which have positive entries only, both (B,) bool."""
    # One pass settles the normal case, in which all entries are positive.
    lowest, highest = torch.aminmax(diagonal, dim=-1)
    positive = (lowest > 0) & (highest < torch.inf)
    if bool(positive.all()):
        return torch.zeros_like(positive), positive
    return unusable(diagonal).any(-1), positive


class DiagonalFactorization(Factorization):
    """x_i = b_i / d_i.

    A sample with a zero, infinite or NaN entry is SINGULAR. Its answer is what the division gives, except
    that 0 / 0 is 0: for a consistent right-hand side that is the answer of least norm, else inf or NaN.
    """

    def __init__(self, diagonal: Tensor) -> None:
        """Keep the diagonal, (B, m) or (B, 1)."""
        self._diagonal = diagonal
        self._bad: Tensor | None = None
        self.status = all_ok(diagonal.shape[0], diagonal.device)
        self._positive: Tensor | None = None
        if all_positive(diagonal):
            return
        bad, self._positive = examine(diagonal)
        self._bad = bad[:, None] if bool(bad.any()) else None
        self.status = torch.where(bad, int(Status.SINGULAR), int(Status.OK)).to(torch.int8)

    @cached_property
    def definite(self) -> Tensor:  # type: ignore[override]
        """Whether all entries of a sample are positive and finite, (B,)."""
        return torch.ones_like(self.status, dtype=torch.bool) if self._positive is None else self._positive

    def solve(self, rhs: Tensor) -> Tensor:
        """Return rhs / d, (..., B, m)."""
        solution = rhs / self._diagonal
        return solution if self._bad is None else torch.where(self._bad & (rhs == 0), 0.0, solution)


class Divide(LinearSolver):
    """x_i = b_i / d_i: m divisions, no factorisation."""

    name: ClassVar[str] = "divide"

    def reject(self, operator: LinearOperator) -> str | None:
        """Refuse every kind that is not diagonal."""
        if isinstance(operator, Zero | ScaledIdentity | Diagonal):
            return None
        return f"the matrix is {operator.kind}, not diagonal"

    def cost(self, operator: LinearOperator) -> Cost:
        """M flops, three vectors of m moved, one made."""
        entries = operator.batch * operator.size
        return Cost(entries, 3 * entries * operator.dtype.itemsize, entries * operator.dtype.itemsize, 2)

    def _factor(self, operator: LinearOperator) -> DiagonalFactorization:
        diagonal = diagonal_entries(operator)
        assert diagonal is not None  # reject() lets diagonal kinds pass only
        return DiagonalFactorization(diagonal)
