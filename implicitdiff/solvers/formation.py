"""What it costs to write an operator down as a dense matrix, and whether that is possible.

In: an operator. Out: the part of the cost that all dense solvers share. Next file: ``pseudo_inverse.py``.
"""

from functools import singledispatch

from implicitdiff.operators import Block, Dense, LinearOperator, LowRankPlusDiagonal, MatrixFree, Zero
from implicitdiff.solvers.base import Cost


def dense_rejection(operator: LinearOperator, *, symmetric: bool = True) -> str | None:
    """Return why no dense solver can take the operator, or None.

    Args:
        operator: the operator.
        symmetric: whether the solver needs a symmetric matrix.
    """
    if isinstance(operator, Zero):
        return "the matrix is zero"
    if isinstance(operator, MatrixFree):
        return "the matrix is known by its products only and is not written down"
    if symmetric and not operator.symmetric:
        return "the matrix is not symmetric"
    return None


@singledispatch
def formation_cost(operator: LinearOperator) -> Cost:
    """Return the cost of ``operator.to_dense()``: m^2 entries written, unless the kind needs more."""
    entries = operator.batch * operator.size**2
    return Cost(0, entries * operator.dtype.itemsize, entries * operator.dtype.itemsize, 3)


@formation_cost.register
def _dense_formation(operator: Dense) -> Cost:
    return Cost(0, 0, 0)  # the stored matrix is used as it is


@formation_cost.register
def _low_rank_formation(operator: LowRankPlusDiagonal) -> Cost:
    # U diag(c), then one product of an m x k and a k x m matrix.
    batch, size, rank, item = operator.batch, operator.size, operator.rank, operator.dtype.itemsize
    factor, entries = batch * size * rank, batch * size * size
    return Cost(factor * (2 * size + 1), (4 * factor + 2 * entries) * item, (factor + entries) * item, 5)


@formation_cost.register
def _block_formation(operator: Block) -> Cost:
    entries, item = operator.batch * operator.size**2, operator.dtype.itemsize
    corners = [formation_cost(corner) for corner in operator.corners]
    flops, moved = sum(cost.flops for cost in corners), sum(cost.bytes for cost in corners)
    return Cost(flops, moved + 2 * entries * item, entries * item + max(cost.peak for cost in corners), 28)
