"""All blocks of a block-diagonal matrix factored at once.

In: a block-diagonal operator. Out: ``BlockCholesky``. Next file: ``cyclic.py``.
"""

import math
from typing import ClassVar

from torch import Tensor

from implicitdiff.operators import BlockDiagonal, GroupedLowRank, LinearOperator
from implicitdiff.solvers.base import PANEL, ColumnFactorization, Cost, Factorization, LinearSolver, blank
from implicitdiff.solvers.cholesky import CholeskyFactorization
from implicitdiff.solvers.lu import LUFactorization


class BlockFactorization(Factorization):
    """Cholesky of each block, LU for the blocks that are not positive definite or not symmetric."""

    def __init__(self, operator: BlockDiagonal) -> None:
        """Factor the blocks (B, nb, s, s) as one batch of B * nb matrices."""
        self._operator = operator
        batch, number, inside, _ = operator.blocks.shape
        blocks = operator.blocks.reshape(batch * number, inside, inside)
        self._blocks: ColumnFactorization
        if operator.symmetric:
            self._blocks = CholeskyFactorization(blocks)
        else:
            self._blocks = LUFactorization(blocks, symmetric=False)
        # The status of a sample is the worst of its blocks; of two different failures the larger code.
        self.status = self._per_block(self._blocks.status).amax(1)
        if self._blocks.definite is not None:
            self.definite = self._per_block(self._blocks.definite).all(1)
        self._lost = None if self._blocks.lost is None else self._per_block(self._blocks.lost)

    def _per_block(self, flags: Tensor) -> Tensor:
        return flags.reshape(self._operator.blocks.shape[:2])

    def solve(self, rhs: Tensor) -> Tensor:
        """Return the solution (..., B, m); 2 m s flops a vector."""
        batch, number, inside, _ = self._operator.blocks.shape
        samples = rhs.shape[-2] if batch == 1 else batch
        rhs = rhs.expand(*rhs.shape[:-2], samples, rhs.shape[-1])
        parts = self._operator.split(rhs)
        # Shared blocks see all samples as columns, blocks of their own only the leading axes.
        columns = parts.movedim(-2, 0) if batch == 1 else parts.movedim((-3, -2), (0, 1))
        width = math.prod(parts.shape[:-2] if batch == 1 else parts.shape[:-3])
        solution = self._blocks.solve_columns(columns.reshape(batch * number, width, inside).mT).mT
        solution = solution.reshape(columns.shape)
        solution = solution.movedim(0, -2) if batch == 1 else solution.movedim((0, 1), (-3, -2))
        if self._lost is not None:
            solution = blank(solution, parts, self._lost)
        return self._operator.join(solution)


class BlockCholesky(LinearSolver):
    """Batched Cholesky over samples and blocks; the vector is permuted to (blocks, inside)."""

    name: ClassVar[str] = "block-cholesky"

    def reject(self, operator: LinearOperator) -> str | None:
        """Refuse every kind but block-diagonal."""
        return (
            None
            if isinstance(operator, BlockDiagonal | GroupedLowRank)
            else f"the matrix is {operator.kind}, not block-diagonal"
        )

    def cost(self, operator: LinearOperator) -> Cost:
        """1/3 s^3 flops a block to factor, 2 s^2 to solve; the factors beside the blocks."""
        extra = 0
        if isinstance(operator, GroupedLowRank):
            batch, (number, inside, rank) = operator.batch, operator.left.shape[1:]
            extra = 2 * batch * number * inside**2 * rank  # the blocks are written down first
        else:
            assert isinstance(operator, BlockDiagonal)
            batch, number, inside, _ = operator.blocks.shape
        entries, vectors, item = batch * number * inside**2, batch * operator.size, operator.dtype.itemsize
        return Cost(
            entries * (inside + 6) // 3 + extra,
            (4 * entries + 6 * vectors) * item,
            (entries + 3 * vectors) * item,
            14 + batch * number * inside // PANEL,
        )

    def _factor(self, operator: LinearOperator) -> BlockFactorization:
        if isinstance(operator, GroupedLowRank):
            operator = operator.written()
        assert isinstance(operator, BlockDiagonal)
        return BlockFactorization(operator)
