"""Conjugate gradients on the Schur complement of what remains when a diagonal corner is eliminated; S is not formed.

In: a symmetric ``Block`` with diagonal corners: transport plans from about 200 x 200 on. Out:
``SchurConjugateGradients``. On the whole grid the same iteration takes twice the steps and more. Next file:
``select.py``.
"""

from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from implicitdiff.operators import Block, Diagonal, LinearOperator, select_samples
from implicitdiff.solvers.base import Cost, Factorization, LinearSolver
from implicitdiff.solvers.elimination import (
    Elimination,
    PairElimination,
    corner_entries,
    is_pair,
    joined,
    split_blocks,
)
from implicitdiff.solvers.iteration import (
    PREDICTED_STEPS,
    STEP_OPERATIONS,
    break_even,
    iterate,
    lost_samples,
    probe_row,
    step_tolerance,
)
from implicitdiff.solvers.mixed import spread
from implicitdiff.solvers.schur import Schur
from implicitdiff.status import all_ok


class SchurIteration(Factorization):
    """S = G - E' D^-1 E by products, preconditioned with the diagonal of G.

    For positive couplings whose rows sum to the corners (a transport plan) the eigenvalues of G^-1 S are 1 - sigma^2,
    sigma the singular values of D^-1/2 E G^-1/2; on the whole grid they are 1 +- sigma. The proved null vectors are
    projected out. Falls back, sample by sample, on the direct solver: see ``low_rank_cg.LowRankIteration``.
    """

    def __init__(self, operator: Block) -> None:
        """Look at the corners; what is not positive goes to the direct solver."""
        self._operator = operator
        self._elimination: PairElimination | Elimination
        if is_pair(operator):
            pair = self._elimination = PairElimination(operator)
            corner, inverses = pair.corner, [pair.inverse]
            self._limit = _pair_limit(operator.sizes, operator.batch, operator.dtype)
        else:
            split = split_blocks(operator)
            assert split is not None
            whole = self._elimination = Elimination(operator, split)
            entries = [(corner_entries(operator.corners[i]), operator.sizes[i]) for i in split.remaining]
            corner = joined([c.expand(operator.batch, n) for c, n in entries])
            inverses = list(whole.inverse.values())
            self._limit = break_even(Schur().cost(operator), step_cost(operator))
        self._inverse = corner.reciprocal()[:, None]
        # An entry that is zero, infinite or NaN has an inverse that is not positive, or NaN in the first product.
        lowest = [inverse.amin() for inverse in (*inverses, self._inverse) if inverse.numel()]
        self.steps = 0
        self.status = all_ok(operator.batch, operator.device)
        self._unfit: Tensor | None = None
        self._whole: Factorization | None = None
        if lowest and not bool((torch.stack(lowest) > 0).all()):
            unfit = [~(inverse > 0).flatten(1).all(1) for inverse in (*inverses, self._inverse)]
            self._unfit = torch.stack(torch.broadcast_tensors(*unfit)).any(0).expand(operator.batch)
            if bool(self._unfit.all()):
                self._take_whole()

    def solve(self, rhs: Tensor) -> Tensor:
        """Return the solution (..., B, m); 4 e r flops a step for each right-hand side and for the probe."""
        if self._whole is not None:
            return self._whole.solve(rhs)
        operator, elimination = self._operator, self._elimination
        batch = rhs.shape[-2] if operator.batch == 1 else operator.batch
        shape = torch.Size((*rhs.shape[:-2], batch, operator.size))
        if shape.numel() == 0:
            return rhs.expand(shape).clone()
        parts, left = elimination.reduce(rhs)
        kernel = elimination.own_kernel
        probe = probe_row(left.shape[-1], left.dtype, left.device)
        given = torch.cat([left, probe.expand(left.shape[0], 1, -1)], dim=1)
        if kernel is not None:
            given = kernel.project(given)
        if self._unfit is not None:
            given = torch.where(self._unfit[:, None, None], 0.0, given)
        found = iterate(
            elimination.product, given, self._inverse, step_tolerance(operator.dtype), self._limit
        )
        self.steps = found.steps
        solution = elimination.substitute(parts, found.solution[:, :-1], shape)
        if found.converged is None and self._unfit is None:
            return solution
        return self._solve_directly(rhs, solution, lost_samples(found, self._unfit))

    def _take_whole(self) -> None:
        self._whole = Schur().factor(self._operator)
        self.status, self.cancelled = self._whole.status, self._whole.cancelled

    def _solve_directly(self, rhs: Tensor, solution: Tensor, lost: Tensor) -> Tensor:
        """Solve the samples that did not converge by the direct solver, and keep its verdict."""
        if bool(lost.all()):
            self._take_whole()
            assert self._whole is not None
            return self._whole.solve(rhs)
        samples = lost.nonzero()[:, 0]
        some = Schur().factor(select_samples(self._operator, samples))
        self.cancelled = spread(some.cancelled, samples, self.status)
        self.status = self.status.index_copy(0, samples, some.status)
        return solution.index_copy(-2, samples, some.solve(rhs.expand(solution.shape)[..., samples, :]))


@lru_cache(maxsize=256)
def _pair_limit(sizes: tuple[int, ...], batch: int, dtype: torch.dtype) -> int:
    """Return the steps that take as long as the direct solver, for two diagonal corners."""
    coupling = torch.empty(batch, *sizes, dtype=dtype, device="meta")
    first, second = (Diagonal(torch.empty(batch, size, dtype=dtype, device="meta")) for size in sizes)
    operator = Block(((first, coupling), (coupling.mT, second)), sizes)
    return break_even(Schur().cost(operator), step_cost(operator))


def step_cost(operator: Block) -> Cost:
    """Return the cost of one step: two products with each coupling for the right-hand side and for the probe."""
    split = split_blocks(operator)
    assert split is not None
    batch, item = operator.batch, operator.dtype.itemsize
    side = sum(operator.sizes[i] for i in split.remaining)
    entries = sum(
        operator.sizes[i] * operator.sizes[j]
        for i, j, _ in operator.couplings
        if i in split.remaining and (j in split.eliminated or j > i)
    )
    vectors = 2 * batch * side
    operations = STEP_OPERATIONS + 2 + 2 * len(operator.couplings)
    moved = (2 * batch * entries + 26 * vectors) * item
    return Cost(
        8 * batch * entries + 14 * vectors,
        moved,
        (10 * vectors + 2 * batch * operator.size) * item,
        operations,
    )


class SchurConjugateGradients(LinearSolver):
    """The iteration on S; the direct Schur solver for samples that it does not suit."""

    name: ClassVar[str] = "schur-cg"

    def reject(self, operator: LinearOperator) -> str | None:
        """Refuse what the direct solver refuses, unsymmetric grids, remaining corners that are not diagonal."""
        reason = Schur().reject(operator)
        if reason is not None:
            return reason
        assert isinstance(operator, Block)
        if not operator.symmetric:
            return "the matrix is not symmetric"
        split = split_blocks(operator)
        if split is None or not split.remaining:
            return "nothing remains to iterate on"
        kinds = [operator.corners[i] for i in split.remaining if not is_diagonal_corner(operator.corners[i])]
        return f"a remaining corner is {kinds[0].kind}, not diagonal" if kinds else None

    def cost(self, operator: LinearOperator) -> Cost:
        """The predicted steps, and one product with each coupling before and after them."""
        assert isinstance(operator, Block)
        entries = sum(operator.batch * block.shape[1] * block.shape[2] for _, _, block in operator.couplings)
        around = Cost(2 * entries, entries * operator.dtype.itemsize, 0, 18)
        return step_cost(operator) * PREDICTED_STEPS + around

    def _factor(self, operator: LinearOperator) -> SchurIteration:
        assert isinstance(operator, Block)
        return SchurIteration(operator)


def is_diagonal_corner(corner: LinearOperator) -> bool:
    """Whether a corner is diagonal and may be regular."""
    return corner.kind in ("diagonal", "scaled-identity")
