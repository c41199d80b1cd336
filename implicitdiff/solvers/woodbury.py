"""The matrix inversion lemma for low rank plus diagonal: a k x k factorisation in place of an m x m one.

In: D + U diag(c) V' with k < m, weights of any sign or zero. Out: ``Woodbury``. Next file: ``kernel.py``.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from implicitdiff.operators import GroupedLowRank, LinearOperator, LowRankPlusDiagonal, LowRankUpdate
from implicitdiff.operators.products import batched_matvec, rows_times, weighted_product
from implicitdiff.solvers.base import (
    PANEL,
    Cost,
    Factorization,
    LinearSolver,
    blank,
    from_rows,
    numbers,
    to_rows,
)
from implicitdiff.solvers.condition import suspicion_level
from implicitdiff.solvers.grouped import GroupedFactorization
from implicitdiff.solvers.lu import LUFactorization
from implicitdiff.solvers.mixed import PlainFactorization, plain_first
from implicitdiff.solvers.woodbury_update import UpdateFactorization, base_solver, update_cost
from implicitdiff.status import Status, all_ok

# Where the entries of D differ by more than this factor, the lemma cancels digits and the answer is refined.
_UNEVEN = 1e3


class PlainWoodbury(PlainFactorization):
    """The lemma as if all were well: D even, nothing small beside the rest.

    (E + U'D^-1 U E C) t = U'D^-1 b with E = I, or E = d I where D = d I, has the solution t = U'x (E = I) of A x = b.
    Nothing is scaled, lifted or refined. ``sound`` says where that was right: pivots and the entries of E are held
    against the largest entry of the matrix and of E, the size of the terms that may have cancelled.
    """

    def __init__(self, operator: LowRankPlusDiagonal) -> None:
        """Form and factor the k x k matrix: 2 m k^2 + 2/3 k^3 flops a sample."""
        self._operator = operator
        diagonal = operator.diagonal
        uneven = diagonal.shape[1] > 1
        if uneven:
            self._inverse = diagonal.reciprocal()
            gram = weighted_product(operator.right_factor.mT, self._inverse, operator.left.mT)
        else:
            gram = rows_times(operator.right_factor.mT, operator.left)
        matrix = gram * operator.weights[:, None]
        matrix.diagonal(dim1=-2, dim2=-1).add_(1.0 if uneven else diagonal)
        factor, order, info = torch.linalg.lu_factor_ex(matrix)
        self._factor = factor, order
        pivots = factor.diagonal(dim1=-2, dim2=-1)
        self.status = all_ok(len(matrix), matrix.device)  # a pivot that is 0 is small beside the rest
        # Over the whole batch first: where that is not enough, each sample against its own largest entry.
        whole = torch.linalg.vector_norm(pivots, -torch.inf), torch.linalg.vector_norm(matrix, torch.inf)
        read = numbers(*whole, *torch.aminmax(diagonal if uneven else diagonal.abs()))
        if read is None or _is_sound(read, uneven, suspicion_level(operator.dtype)):
            return
        smallest = torch.linalg.vector_norm(pivots, -torch.inf, -1, keepdim=True)
        largest = matrix.abs().amax((-2, -1))[:, None]
        if uneven:
            lowest, highest = torch.aminmax(diagonal, dim=-1, keepdim=True)
            fine = (smallest > suspicion_level(operator.dtype) * largest.clamp_(min=1)) & (lowest > 0)
            fine = fine & (highest < _UNEVEN * lowest)
        else:
            size = diagonal.abs()
            bound = suspicion_level(operator.dtype) * torch.maximum(largest, size)
            fine = torch.minimum(smallest, size) > bound
        if not bool(fine.all()):
            self.status, self.sound = info.to(torch.int8), fine[:, 0]  # 0 where it is sound

    @cached_property
    def definite(self) -> Tensor | None:  # type: ignore[override]
        """Whether A is positive definite, (B,); computed when first asked for."""
        return _is_definite(self._operator, self.status == int(Status.OK))

    def solve(self, rhs: Tensor) -> Tensor:
        """Return the solution (..., B, m); 4 m k + 2 k^2 flops a vector."""
        operator, own = self._operator, self.status.shape[0]
        batch = rhs.shape[-2] if own == 1 else own
        if rhs.shape[-2] != batch:
            rhs = rhs.expand(*rhs.shape[:-2], batch, rhs.shape[-1])
        rows = to_rows(rhs, own)
        uneven = operator.diagonal.shape[1] > 1
        scaled = rows * self._inverse[:, None] if uneven else rows
        inner = torch.linalg.lu_solve(*self._factor, rows_times(scaled, operator.right_factor).mT).mT
        back = rows_times(inner * operator.weights[:, None], operator.left.mT)
        if uneven:
            return from_rows(scaled.addcmul_(back, self._inverse[:, None], value=-1), rhs.shape)
        return from_rows((rows - back).div_(operator.diagonal[:, None]), rhs.shape)


class WoodburyFactorization(Factorization):
    """A^-1 b = y - D^-1 U t with y = D^-1 b and (I + C V' D^-1 U) t = C V' y, C = diag(c).

    C is never inverted, so zero weights need no care, and nothing is assumed about signs. Entries of D that
    are exactly zero are lifted to tau and the lift is taken back by as many further columns, e_i (-tau) e_i',
    in U. One step of iterative refinement follows in the samples where the entries of D are very uneven.
    """

    def __init__(self, operator: LowRankPlusDiagonal) -> None:
        """Form and factor the k x k matrix: 2 m k^2 + 2/3 k^3 flops a sample."""
        self._operator = operator
        hopeless = torch.zeros_like(operator.diagonal[:, 0], dtype=torch.bool)
        lifted = torch.zeros_like(hopeless)
        if bool((operator.diagonal == 0).any()):
            lifted = (operator.diagonal == 0).any(-1)
            operator, hopeless = _lift_zeros(operator)
        self._lifted = operator
        self._inverse = operator.diagonal.reciprocal()
        weights = operator.weights[:, :, None]
        capacity = weights * weighted_product(operator.right_factor.mT, self._inverse, operator.left.mT)
        magnitude = capacity.abs()
        for matrix in (capacity, magnitude):
            matrix.diagonal(dim1=-2, dim2=-1).add_(1)
        self._capacity = LUFactorization(capacity, symmetric=False, magnitude=magnitude)
        finite = torch.isfinite(operator.diagonal).all(-1)
        self.status = self._capacity.status.expand(operator.batch).clone()
        self.status[hopeless.expand(operator.batch)] = int(Status.SINGULAR)
        self.status[(~finite).expand(operator.batch)] = int(Status.NONFINITE)
        bad = self.status != int(Status.OK)
        self._lost = bad if bool(bad.any()) else None
        sizes = operator.diagonal.abs()
        refined = (sizes.amax(-1) > _UNEVEN * sizes.amin(-1)) | lifted
        self._refined = refined if bool(refined.any()) else None

    @cached_property
    def definite(self) -> Tensor | None:  # type: ignore[override]
        """Whether A is positive definite, (B,); computed when first asked for."""
        return _is_definite(self._lifted, self.status == int(Status.OK))

    def solve(self, rhs: Tensor) -> Tensor:
        """Return the solution (..., B, m); 4 m k + 2 k^2 flops a vector, and as much again for a refinement."""
        own = self.status.shape[0]
        batch = rhs.shape[-2] if own == 1 else own
        rhs = rhs.expand(*rhs.shape[:-2], batch, rhs.shape[-1])
        solution = self._apply(rhs)
        if self._refined is not None:
            again = self._apply(rhs - self._operator.matvec(solution))
            solution = torch.where(self._refined[:, None], solution + again, solution)
        return solution if self._lost is None else blank(solution, rhs, self._lost)

    def _apply(self, rhs: Tensor) -> Tensor:
        operator = self._lifted
        scaled = rhs * self._inverse
        inner = self._capacity.solve(batched_matvec(operator.right_factor.mT, scaled) * operator.weights)
        return scaled - batched_matvec(operator.left, inner) * self._inverse


def _is_sound(read: Sequence[float], uneven: bool, level: float) -> bool:
    """Whether the smallest pivot is not suspicious beside the largest entry of the matrix, nor D; NaN makes it False.

    Args:
        read: the smallest pivot, the largest entry of the matrix, the lowest and the highest entry of D (of |D| where
            it is even).
        uneven: whether the matrix was formed with I in the place of D.
        level: a part below which a pivot is suspicious.
    """
    smallest, largest, lowest, highest = read
    if uneven:
        return smallest > level * largest and smallest > level and lowest > 0 and highest < _UNEVEN * lowest
    least = min(smallest, lowest)
    return smallest > 0 and lowest > 0 and least > level * largest and least > level * highest


def _is_definite(operator: LowRankPlusDiagonal, sound: Tensor) -> Tensor | None:
    """Return whether A is positive definite, (B,), from a k x k matrix; None where it is not symmetric.

    Haynsworth's inertia formula on [[D, U], [U', -C^-1]], scaled by |C|^1/2 so that zero weights stay: A has
    neg(D) + pos(J + |C|^1/2 U' D^-1 U |C|^1/2) - pos(J) negative eigenvalues, J = diag(sign c) with +1 as the sign of
    0.
    """
    if not operator.symmetric:
        return None
    root = operator.weights.abs().sqrt()
    signs = torch.where(operator.weights < 0, -1.0, 1.0).to(root.dtype)
    gram = weighted_product(operator.left.mT, operator.diagonal.reciprocal(), operator.left.mT)
    inner = root[:, :, None] * gram * root[:, None, :] + torch.diag_embed(signs)
    inner = torch.where(sound[:, None, None], inner, 0.0)
    positive = (torch.linalg.eigvalsh(inner) > 0).sum(-1)
    below = (operator.diagonal < 0).sum(-1) * (operator.size // operator.diagonal.shape[-1])
    return sound & (below + positive == (signs > 0).sum(-1))


def _lift_zeros(operator: LowRankPlusDiagonal) -> tuple[LowRankPlusDiagonal, Tensor]:
    """Return the same matrix with no zero in D, and the samples (B,) that are singular for certain.

    With z zeros on the diagonal the rank is at most m - z + k: more than k zeros make the matrix singular.
    """
    zero = operator.diagonal == 0
    count = zero.sum(-1) * (operator.size // zero.shape[-1])
    hopeless = count > operator.rank
    lift = torch.where(hopeless, 1.0, operator.diagonal.abs().amax(-1)).to(operator.dtype)
    diagonal = torch.where(zero, lift[:, None], operator.diagonal)
    repair = zero & ~hopeless[:, None]
    # As many columns as there can be zeros: the number must not depend on the samples, or their bits would.
    columns = min(operator.rank, zero.shape[-1])
    if not bool(repair.any()):
        return LowRankPlusDiagonal(diagonal, operator.left, operator.weights, operator.right), hopeless
    # The places of the zeros first, padded by arbitrary places whose weight is 0.
    chosen, places = repair.to(torch.int8).topk(columns, dim=-1)
    unit = torch.zeros(len(zero), operator.size, columns, dtype=operator.dtype, device=operator.device)
    unit.scatter_(1, places[:, None, :], 1.0)
    batch = operator.batch

    def joined(factor: Tensor) -> Tensor:
        return torch.cat([factor.expand(batch, -1, -1), unit.expand(batch, -1, -1)], dim=-1)

    weights = torch.cat(
        [operator.weights.expand(batch, -1), (-lift[:, None] * chosen).expand(batch, -1)], dim=-1
    )
    right = None if operator.right is None else joined(operator.right)
    return LowRankPlusDiagonal(diagonal, joined(operator.left), weights, right), hopeless


class Woodbury(LinearSolver):
    """A k x k LU factorisation; only for k < m, above that the m x m Cholesky is smaller."""

    name: ClassVar[str] = "woodbury"

    def reject(self, operator: LinearOperator) -> str | None:
        """Refuse other kinds, and ranks that are not smaller than the size."""
        if not isinstance(operator, LowRankPlusDiagonal | LowRankUpdate | GroupedLowRank):
            return f"the matrix is {operator.kind}, not low-rank-plus-diagonal"
        size = operator.left.shape[-2]
        if operator.rank >= size:
            return f"k = {operator.rank} >= m = {size}"
        return None

    def cost(self, operator: LinearOperator) -> Cost:
        """2 m k^2 + 2/3 k^3 flops to factor, 4 m k + 2 k^2 to solve; four k x k matrices, D^-1 V before."""
        if isinstance(operator, LowRankUpdate):
            return update_cost(operator, base_solver(operator).cost(operator.base))
        if isinstance(operator, GroupedLowRank):
            operator = operator.blocks
        assert isinstance(operator, LowRankPlusDiagonal)
        batch, size, rank, item = operator.batch, operator.size, operator.rank, operator.dtype.itemsize
        factor, small, vector = batch * size * rank, batch * rank * rank, batch * size
        scaled = factor if operator.diagonal.shape[1] > 1 else 0
        flops = factor * (2 * rank + 4) + scaled + small * (2 * rank + 9) // 3 + 4 * vector
        moved = 4 * factor + 2 * scaled + 12 * small + 8 * vector
        peak = (max(scaled + small, 4 * small) + 3 * vector) * item
        return Cost(flops, moved * item, peak, 25 + batch * rank // PANEL)

    def _factor(self, operator: LinearOperator) -> Factorization:
        if isinstance(operator, LowRankUpdate):
            return UpdateFactorization(operator, base_solver(operator).factor(operator.base))
        if isinstance(operator, GroupedLowRank):
            return GroupedFactorization(operator, self._factor(operator.blocks))
        assert isinstance(operator, LowRankPlusDiagonal)
        diagonal = operator.diagonal
        inner = [*operator.parameters()[1:], *([diagonal] if diagonal.shape[1] > 1 else [])]
        # A k x k matrix that samples with diagonals of their own share would have to be repeated for them.
        own = max(tensor.shape[0] for tensor in inner) == operator.batch
        if own and operator.rank and diagonal.numel():
            return plain_first(PlainWoodbury(operator), operator, _carefully)
        return WoodburyFactorization(operator)


def _carefully(operator: LinearOperator) -> Factorization:
    assert isinstance(operator, LowRankPlusDiagonal)
    return WoodburyFactorization(operator)
