"""Conjugate gradients with the diagonal as preconditioner: only products with the matrix are needed.

In: any symmetric operator, expected to be positive (semi)definite. Out: ``ConjugateGradients``. It says per
sample whether it converged; the caller falls back on a direct solver. Next file: ``select.py``.
"""

import functools
from dataclasses import dataclass
from functools import singledispatch
from typing import ClassVar

import torch
from torch import Tensor

from implicitdiff.operators import (
    Banded,
    Block,
    BlockDiagonal,
    Dense,
    Diagonal,
    LinearOperator,
    LowRankPlusDiagonal,
    ScaledIdentity,
    Sum,
    Zero,
)
from implicitdiff.operators.products import batched_matvec
from implicitdiff.solvers.base import Cost, Factorization, LinearSolver
from implicitdiff.solvers.iteration import STEP_OPERATIONS, step_tolerance
from implicitdiff.solvers.kernel import Kernel
from implicitdiff.solvers.low_rank_cg import low_rank_cost, low_rank_iteration
from implicitdiff.status import Status, all_ok


@singledispatch
def matrix_diagonal(operator: LinearOperator) -> Tensor | None:
    """Return the diagonal (B or 1, m or 1) where it can be read off, None where it cannot."""
    return None


@matrix_diagonal.register
def _of_scaled_identity(operator: ScaledIdentity) -> Tensor:
    return operator.scale[:, None]


@matrix_diagonal.register
def _of_diagonal(operator: Diagonal) -> Tensor:
    return operator.diagonal


@matrix_diagonal.register
def _of_blocks(operator: BlockDiagonal) -> Tensor:
    return operator.join(operator.blocks.diagonal(dim1=-2, dim2=-1))


@matrix_diagonal.register
def _of_bands(operator: Banded) -> Tensor:
    return operator.join(operator.bands[:, :, operator.lower].diagonal(dim1=-2, dim2=-1))


@matrix_diagonal.register
def _of_low_rank(operator: LowRankPlusDiagonal) -> Tensor:
    return batched_matvec(operator.left * operator.right_factor, operator.weights) + operator.diagonal


@matrix_diagonal.register
def _of_dense(operator: Dense) -> Tensor:
    return operator.matrix.diagonal(dim1=-2, dim2=-1)


@matrix_diagonal.register
def _of_grid(operator: Block) -> Tensor | None:
    parts = []
    for corner in operator.corners:
        part = matrix_diagonal(corner)
        if part is None:
            return None
        parts.append(part.expand(operator.batch, corner.size))
    return torch.cat(parts, dim=-1)


@matrix_diagonal.register
def _of_sum(operator: Sum) -> Tensor | None:
    # A preconditioner need not be exact: terms known by their products alone are left out.
    known = [part for term in operator.terms if (part := matrix_diagonal(term)) is not None]
    return functools.reduce(torch.add, known) if known else None


class ConjugateGradientsFactorization(Factorization):
    """Nothing is factored: the operator, its preconditioner and the limits are kept for ``solve``.

    ``status`` is what the last call of ``solve`` found: NOT_CONVERGED where the iteration ended at its limit,
    met a direction of negative curvature, or left a residual that rounding does not explain.
    """

    def __init__(self, operator: LinearOperator, tolerance: float, limit: int) -> None:
        """Keep the operator and invert its diagonal where it is positive.

        Args:
            operator: symmetric.
            tolerance: |residual| <= tolerance |rhs| ends the iteration of a right-hand side.
            limit: the largest number of steps.
        """
        self._operator = operator
        self._tolerance = tolerance
        self._limit = limit
        self._kernel = Kernel.of(operator)
        self.status = all_ok(operator.batch, operator.device)
        self.steps = 0
        diagonal = matrix_diagonal(operator)
        self._preconditioner: Tensor | float = 1.0
        if diagonal is not None:
            usable = torch.isfinite(diagonal) & (diagonal > 0)
            self._preconditioner = torch.where(usable, diagonal, 1.0).reciprocal()

    def solve(self, rhs: Tensor) -> Tensor:
        """Return the solution (..., B, m); one product with the matrix a step, and one to check the result.

        Each right-hand side of each sample has its own step lengths and stops on its own; its numbers do not
        depend on the others. ``steps`` holds the steps of the slowest one.
        """
        operator = self._operator
        batch = rhs.shape[-2] if operator.batch == 1 else operator.batch
        rhs = rhs.expand(*rhs.shape[:-2], batch, operator.size)
        if rhs.numel() == 0:
            self.status = self.status.new_zeros(operator.batch)
            return rhs.clone()
        # Scaled to a largest entry of 1: squares of tiny cotangents would underflow in float32.
        size = rhs.abs().amax(-1, keepdim=True)
        size = torch.where(size > 0, size, 1.0)
        target = rhs / size if self._kernel is None else self._kernel.project(rhs / size)
        solution, growth = self._iterate(target)
        if self._kernel is not None:
            solution = self._kernel.project(solution)
        error = torch.linalg.vector_norm(target - operator.matvec(solution), dim=-1)
        # The residual that rounding leaves grows with |A| |x|; growth is a lower bound of |A|.
        allowed = torch.linalg.vector_norm(target, dim=-1) + growth * torch.linalg.vector_norm(
            solution, dim=-1
        )
        converged = error <= 10 * self._tolerance * allowed
        silent = (rhs == 0).all(-1)
        verdict = torch.where(converged | silent, int(Status.OK), int(Status.NOT_CONVERGED)).to(torch.int8)
        verdict = verdict.reshape(-1, batch).amax(0)
        self.status = verdict.amax(0, keepdim=True) if operator.batch == 1 else verdict
        return torch.where(silent[..., None], 0.0, solution * size)

    def _iterate(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return the approximate solution, and the largest |A p| / |p| seen, for each right-hand side."""
        solution = torch.zeros_like(target)
        residual = target.clone()
        direction = residual * self._preconditioner
        product = (residual * direction).sum(-1)
        stop = self._tolerance * torch.linalg.vector_norm(target, dim=-1)
        growth = torch.zeros_like(stop)
        active = torch.linalg.vector_norm(residual, dim=-1) > stop
        self.steps = 0
        while self.steps < self._limit and bool(active.any()):
            image = self._operator.matvec(direction)
            curvature = (direction * image).sum(-1)
            # Negative curvature, or NaN: this right-hand side is given up, its check will fail.
            active = active & (curvature > 0)
            ratio = torch.linalg.vector_norm(image, dim=-1) / torch.linalg.vector_norm(direction, dim=-1)
            growth = torch.where(active, torch.maximum(growth, ratio), growth)
            length = torch.where(active, product / curvature, 0.0)[..., None]
            solution += length * direction
            residual -= length * image
            active = active & (torch.linalg.vector_norm(residual, dim=-1) > stop)
            scaled = residual * self._preconditioner
            new = (residual * scaled).sum(-1)
            turn = torch.where(active, new / product, 0.0)[..., None]
            # A finished right-hand side goes nowhere, even if its image contained NaN.
            direction = torch.where(active[..., None], scaled + turn * direction, 0.0)
            product = new
            self.steps += 1
        return solution, growth


@dataclass(frozen=True)
class ConjugateGradients(LinearSolver):
    """Preconditioned conjugate gradients; for low rank plus diagonal with a direct solver to fall back on.

    Attributes:
        tolerance: of the residual, relative to the right-hand side; None: eps^(7/8) of the dtype (9e-7 in
            float32, 2e-14 in float64).
        limit: the largest number of steps; None: 2 m, at least 20 and at most 500.
    """

    tolerance: float | None = None
    limit: int | None = None
    name: ClassVar[str] = "cg"

    def reject(self, operator: LinearOperator) -> str | None:
        """Refuse the zero matrix and matrices that are not symmetric."""
        if isinstance(operator, Zero):
            return "the matrix is zero"
        return None if operator.symmetric else "the matrix is not symmetric"

    def cost(self, operator: LinearOperator) -> Cost:
        """The predicted steps (20 where nothing is known), each one product and 12 passes over vectors of m."""
        if isinstance(operator, LowRankPlusDiagonal) and operator.symmetric:
            return low_rank_cost(operator)
        product = product_cost(operator)
        entries, item = operator.batch * operator.size, operator.dtype.itemsize
        step = Cost(
            product.flops + 12 * entries,
            product.bytes + 24 * entries * item,
            product.peak + 6 * entries * item,
            STEP_OPERATIONS + 12,
        )
        return step * 20

    def _factor(self, operator: LinearOperator) -> Factorization:
        if self.limit is None:
            lean = low_rank_iteration(operator, self.tolerance)
            if lean is not None:
                return lean
        tolerance = step_tolerance(operator.dtype) if self.tolerance is None else self.tolerance
        limit = min(max(20, 2 * operator.size), 500) if self.limit is None else self.limit
        return ConjugateGradientsFactorization(operator, tolerance, limit)


@singledispatch
def product_cost(operator: LinearOperator) -> Cost:
    """Return the cost of one ``matvec``; a kind that is not registered counts as a dense matrix."""
    entries = operator.batch * operator.size**2
    return Cost(2 * entries, entries * operator.dtype.itemsize, 0)


@product_cost.register(ScaledIdentity)
@product_cost.register(Diagonal)
def _diagonal_product(operator: LinearOperator) -> Cost:
    entries = operator.batch * operator.size
    return Cost(entries, 3 * entries * operator.dtype.itemsize, 0)


@product_cost.register
def _block_diagonal_product(operator: BlockDiagonal) -> Cost:
    entries = operator.blocks.numel()
    return Cost(2 * entries, entries * operator.dtype.itemsize, 0)


@product_cost.register
def _banded_product(operator: Banded) -> Cost:
    entries = operator.bands.numel()
    return Cost(2 * entries, entries * operator.dtype.itemsize, 0)


@product_cost.register
def _low_rank_product(operator: LowRankPlusDiagonal) -> Cost:
    entries = operator.batch * operator.size * operator.rank
    return Cost(4 * entries, 2 * entries * operator.dtype.itemsize, 0)


@product_cost.register
def _grid_product(operator: Block) -> Cost:
    corners = [product_cost(corner) for corner in operator.corners]
    entries = sum(operator.batch * tensor.shape[1] * tensor.shape[2] for _, _, tensor in operator.couplings)
    return Cost(
        2 * entries + sum(cost.flops for cost in corners),
        entries * operator.dtype.itemsize + sum(cost.bytes for cost in corners),
        max(cost.peak for cost in corners),
    )
