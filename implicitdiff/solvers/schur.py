"""Elimination of the diagonal corner of a grid of blocks: a dense factorisation of the smaller side only.

In: a ``Block`` with at least one diagonal corner. Out: ``Schur``. The corner is found from the kinds of the
blocks, never from knowing the problem. Next file: ``cg.py``.
"""

from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from implicitdiff.operators import (
    Block,
    Diagonal,
    LinearOperator,
    MatrixFree,
    ScaledIdentity,
    Zero,
    select_samples,
)
from implicitdiff.operators.products import batched_matvec, weighted_product
from implicitdiff.solvers.base import (
    PANEL,
    ColumnFactorization,
    Cost,
    Factorization,
    LinearSolver,
    blank,
    numbers,
)
from implicitdiff.solvers.cholesky import CholeskyFactorization
from implicitdiff.solvers.condition import suspicion_level
from implicitdiff.solvers.divide import diagonal_entries, examine, unusable
from implicitdiff.solvers.elimination import PairElimination, Split, corner_entries, is_pair, split_blocks
from implicitdiff.solvers.formation import formation_cost
from implicitdiff.solvers.kernel import Kernel
from implicitdiff.solvers.lu import LUFactorization
from implicitdiff.solvers.mixed import Mixed, PlainFactorization, plain_first
from implicitdiff.solvers.widened import CANCELLED, LOST, WidenedFactorization, widened
from implicitdiff.status import all_ok


class PlainSchurFactorization(PlainFactorization):
    """The same for two diagonal corners, as if all were well: one product, one Cholesky factorisation, one look.

    S is lifted along the proved null vector by the mean of its own corner, which is known before S is. ``sound`` says
    where all was well indeed: D positive, no entry of the corner cancelled by more than three quarters, no pivot
    small.
    """

    def __init__(self, operator: Block) -> None:
        """Form S, (B, r, r), and factor it: 2 r^2 e + r^3 / 3 flops a sample."""
        pair = self._pair = PairElimination(operator)
        corner, coupling, kernel = pair.corner, pair.coupling, pair.own_kernel
        if kernel is None:
            lifted = coupling.new_zeros(1, 1, 1)
        else:
            # Where all entries of the null vector are equal, its outer product need not be written down.
            share = (kernel.outer if kernel.level is None else kernel.level) / operator.sizes[pair.own]
            lifted = corner.sum(-1, keepdim=True)[:, None] * share
        complement = torch.baddbmm(lifted, coupling * pair.inverse[:, None], coupling.mT, alpha=-1)
        complement.diagonal(dim1=-2, dim2=-1).add_(corner)
        self._factor, info = torch.linalg.cholesky_ex(complement)
        self.sound = self._find_sound(complement, lifted, corner, pair.inverse, info)
        self.status = all_ok(operator.batch, operator.device) if self.sound is None else info.to(torch.int8)

    def _find_sound(
        self, complement: Tensor, lifted: Tensor, corner: Tensor, inverse: Tensor, info: Tensor
    ) -> Tensor | None:
        # An entry of D that is zero, infinite or NaN has an inverse that is not positive, or makes S NaN.
        pivots = self._factor.diagonal(dim1=-2, dim2=-1)
        lift = lifted[:, :, 0] if lifted.shape[-1] == 1 else lifted.diagonal(dim1=-2, dim2=-1)
        failed = bool(info.any())
        if not failed:
            # A pivot is at most its diagonal entry, so large pivots tell of little cancellation as well.
            margin = torch.addcmul(torch.add(lift, corner, alpha=CANCELLED), pivots, pivots, value=-1.0)
            read = numbers(margin.amax(), inverse.amin())
            if read is None or (read[0] < 0 < read[1]):
                return None
        squares = pivots.square()
        good = (inverse > 0).all(-1)
        kept = complement.diagonal(dim1=-2, dim2=-1) - lift > CANCELLED * corner
        regular = squares > suspicion_level(corner.dtype) * corner
        sound = good & kept.all(-1) & regular.all(-1) & (info == 0)
        return None if bool(sound.all()) else sound

    @cached_property
    def definite(self) -> Tensor:  # type: ignore[override]
        """True for all samples that are sound; the others are not looked at."""
        return torch.ones_like(self.status, dtype=torch.bool)

    def solve(self, rhs: Tensor) -> Tensor:
        """Return the solution (..., B, m); 4 e r + 2 r^2 flops a vector."""
        own = self._pair.batch
        batch = rhs.shape[-2] if own == 1 else own
        parts, left = self._pair.reduce(rhs)
        half = torch.linalg.solve_triangular(self._factor, left.mT, upper=False)
        answer = torch.linalg.solve_triangular(self._factor.mT, half, upper=True).mT
        return self._pair.substitute(parts, answer, torch.Size((*rhs.shape[:-2], batch, rhs.shape[-1])))


class SchurFactorization(Factorization):
    """[[D, E], [F, G]] with D diagonal: S = G - F D^-1 E is factored, the rest is two products.

    s = S^-1 (g - F D^-1 d) and D^-1 (d - E s) solve it for the right-hand side (d, g). S is lifted by
    tau Q Q' along the proved null vectors, tau = mean diagonal of S; the right-hand side is projected onto
    the range and the answer off the kernel, so a consistent singular system gets its answer of least norm.
    Samples with a zero or non-finite entry in D are handed to a dense factorisation of the whole matrix.
    """

    def __init__(self, operator: Block, split: Split) -> None:
        """Form S, (B, r, r), and factor it by Cholesky, or by LU where it is not definite."""
        self._operator = operator
        self._split = split
        self._kernel = Kernel.of(operator)
        self.status = torch.zeros(operator.batch, dtype=torch.int8, device=operator.device)
        corners = {e: corner_entries(operator.corners[e]) for e in split.eliminated}
        bad = torch.zeros_like(self.status, dtype=torch.bool)
        positive = torch.ones_like(bad)
        for diagonal in corners.values():
            unusable_here, positive_here = examine(diagonal)
            bad, positive = bad | unusable_here, positive & positive_here
        any_bad = bool(bad.any())
        self._inverse = {
            e: torch.where(unusable(d), 1.0, d).reciprocal() if any_bad else d.reciprocal()
            for e, d in corners.items()
        }
        self._lost: Tensor | None = None
        definite = positive
        self._complement: ColumnFactorization | None = None
        self.lost_digits: Tensor | None = None
        if split.remaining:
            definite = self._factor_complement() & positive
        self._whole: ColumnFactorization | None = None
        if any_bad:
            definite = self._factor_whole(bad) & definite
        self.definite = definite

    def _factor_complement(self) -> Tensor:
        """Factor S; return (B,) bool, where it is proved definite."""
        operator, split = self._operator, self._split
        complement, original = schur_complement(operator, split, self._inverse)
        left_over = complement.diagonal(dim1=-2, dim2=-1)
        # All of it is left where nothing was subtracted; a transport plan close to a vertex leaves nearly nothing.
        cancelled = ~(left_over.abs() >= CANCELLED * original).all(-1)
        if bool(cancelled.any()):
            self.cancelled = cancelled.expand(operator.batch)
            lost = ~(left_over.abs() >= LOST * original).all(-1)
            self.lost_digits = lost.expand(operator.batch) if bool(lost.any()) else None
        mean = left_over.mean(-1)
        # A KKT matrix leaves -A H^-1 A' here: negative definite, so its negative goes to Cholesky.
        small = suspicion_level(operator.dtype) * original.mean(-1)
        negative = mean < -small
        self._sign = torch.where(negative, -1.0, 1.0).to(mean.dtype)[:, None]
        if bool(negative.any()):
            complement *= self._sign[:, :, None]
        if self._kernel is not None:
            remaining = self._kernel.restrict(operator, split.remaining)
            # Where the stated kernel is all there is, S is nothing but rounding and so is its mean.
            lift = torch.maximum(mean.abs(), small)
            remaining.deflate_(complement, lift)
        if operator.symmetric:
            factored: ColumnFactorization = CholeskyFactorization(complement, original)
        else:
            magnitude = complement.abs()
            magnitude.diagonal(dim1=-2, dim2=-1).copy_(original)
            factored = LUFactorization(complement, symmetric=False, magnitude=magnitude)
        self._complement = factored
        self.status |= factored.status
        self._lost = factored.lost
        if factored.definite is None:
            return torch.zeros_like(mean, dtype=torch.bool)
        return factored.definite & (self._sign[:, 0] > 0)

    def _factor_whole(self, bad: Tensor) -> Tensor:
        """Factor the samples without a usable corner densely; return (B,) bool, False for them."""
        self._samples = bad.nonzero()[:, 0]
        dense = select_samples(self._operator, self._samples).to_dense()
        if self._kernel is not None:
            self._kernel.deflate_(dense, dense.diagonal(dim1=-2, dim2=-1).abs().mean(-1))
        self._whole = LUFactorization(dense, symmetric=self._operator.symmetric)
        self.status[self._samples] = self._whole.status
        lost = torch.zeros_like(bad) if self._lost is None else self._lost & ~bad
        if self._whole.lost is not None:
            lost[self._samples] = self._whole.lost
        self._lost = lost if bool(lost.any()) else None
        return ~bad

    def solve(self, rhs: Tensor) -> Tensor:
        """Return the solution (..., B, m); 4 e r + 2 r^2 flops a vector, e eliminated and r remaining."""
        operator, split = self._operator, self._split
        batch = rhs.shape[-2] if operator.batch == 1 else operator.batch
        rhs = rhs.expand(*rhs.shape[:-2], batch, operator.size)
        consistent = rhs if self._kernel is None else self._kernel.project(rhs)
        parts = [consistent[..., where] for where in operator.slices]
        solved = {e: parts[e] * self._inverse[e] for e in split.eliminated}
        reduced = {i: parts[i] for i in split.remaining}
        for i, j, block in operator.couplings:
            if i in reduced and j in solved:
                reduced[i] = reduced[i] - batched_matvec(block, solved[j])
        if self._complement is not None:
            joined = torch.cat([reduced[i] for i in split.remaining], dim=-1)
            answer = self._complement.solve(joined) * self._sign
            widths = [operator.sizes[i] for i in split.remaining]
            reduced = dict(zip(split.remaining, answer.split(widths, dim=-1), strict=True))
        for i, j, block in operator.couplings:
            if i in solved and j in reduced:
                solved[i] = solved[i] - batched_matvec(block, reduced[j]) * self._inverse[i]
        solution = torch.cat([({**solved, **reduced})[i] for i in range(len(operator.sizes))], dim=-1)
        if self._whole is not None:
            solution = self._solve_whole(solution, consistent)
        if self._kernel is not None:
            solution = self._kernel.project(solution)
        return solution if self._lost is None else blank(solution, rhs, self._lost)

    def _solve_whole(self, solution: Tensor, rhs: Tensor) -> Tensor:
        """Put the answers of the densely factored samples into the solution."""
        assert self._whole is not None
        if self._operator.batch == 1:
            return self._whole.solve(rhs)
        solution[..., self._samples, :] = self._whole.solve(rhs[..., self._samples, :])
        return solution


def schur_complement(operator: Block, split: Split, inverse: dict[int, Tensor]) -> tuple[Tensor, Tensor]:
    """Return S = G - F D^-1 E, (B, r, r), and the size (B, r) of its diagonal before the subtraction.

    One product of 2 r^2 e flops. Beside S itself only a scaled copy of one coupling is alive at a time. Of a
    symmetric matrix the couplings remaining x eliminated are read, never their transposes.

    Args:
        operator: the grid.
        split: what is eliminated.
        inverse: for each eliminated block the inverse of its diagonal, (B or 1, size or 1).
    """
    ends, total = {}, 0
    for i in split.remaining:
        ends[i] = slice(total, total + operator.sizes[i])
        total += operator.sizes[i]
    coupling = {(i, j): block for i, j, block in operator.couplings}
    result = torch.zeros(operator.batch, total, total, dtype=operator.dtype, device=operator.device)
    for i in split.remaining:
        _add_corner(operator.corners[i], result[:, ends[i], ends[i]])
    original = result.diagonal(dim1=-2, dim2=-1).abs()
    for i in split.remaining:
        for j in split.remaining:
            if operator.symmetric and j > i:
                continue
            piece = result[:, ends[i], ends[j]]
            if (i, j) in coupling:
                piece += coupling[i, j]
            for e in split.eliminated:
                if (i, e) in coupling and (e, j) in coupling:
                    right = coupling[j, e] if operator.symmetric else coupling[e, j].mT
                    weighted_product(coupling[i, e], inverse[e], right, out=piece, alpha=-1.0)
            if operator.symmetric and j < i:
                result[:, ends[j], ends[i]] = piece.mT
    return result, torch.maximum(original, result.diagonal(dim1=-2, dim2=-1).abs())


def _add_corner(corner: LinearOperator, piece: Tensor) -> None:
    entries = diagonal_entries(corner)
    if entries is None:
        piece += corner.to_dense()
    elif not isinstance(corner, Zero):
        piece.diagonal(dim1=-2, dim2=-1).add_(entries)


class Schur(LinearSolver):
    """The Schur complement on what is left when the largest jointly diagonal set of blocks is eliminated."""

    name: ClassVar[str] = "schur"

    def reject(self, operator: LinearOperator) -> str | None:
        """Refuse other kinds, single blocks, no diagonal corner, a remaining corner that is matrix-free."""
        if not isinstance(operator, Block):
            return f"the matrix is {operator.kind}, not a grid of blocks"
        if len(operator.sizes) < 2:
            return "the grid has one block only"
        split = split_blocks(operator)
        if split is None:
            kinds = ", ".join(corner.kind for corner in operator.corners)
            return f"no block on the diagonal of the grid is itself diagonal ({kinds})"
        if any(isinstance(operator.corners[i], MatrixFree) for i in split.remaining):
            return "a remaining block is known by its products only and is not written down"
        return None

    def factor(self, operator: LinearOperator) -> Factorization:
        """Return the factorisation: the plain one where it is sound."""
        if type(operator) is Block and is_pair(operator):
            return plain_first(PlainSchurFactorization(operator), operator, super().factor)
        return super().factor(operator)

    def cost(self, operator: LinearOperator) -> Cost:
        """2 r^2 e flops for S, once for each pair of blocks; 1/3 r^3 to factor, 4 e r + 2 r^2 to solve."""
        assert isinstance(operator, Block)
        split = split_blocks(operator)
        assert split is not None
        batch, item = operator.batch, operator.dtype.itemsize
        present = {(i, j) for i, j, _ in operator.couplings}
        side = sum(operator.sizes[i] for i in split.remaining)
        flops, moved, copy = 0, 0, 0
        for i in split.remaining:
            for j in split.remaining:
                if operator.symmetric and j > i:
                    continue
                for e in split.eliminated:
                    if (i, e) in present and (e, j) in present:
                        rows, columns, inner = operator.sizes[i], operator.sizes[j], operator.sizes[e]
                        flops += 2 * rows * columns * inner
                        moved += (3 * rows + columns) * inner + 2 * rows * columns
                        copy = max(copy, min(rows, columns) * inner)
            for e in split.eliminated:
                if (i, e) in present:
                    flops += 4 * operator.sizes[i] * operator.sizes[e]
                    moved += 2 * operator.sizes[i] * operator.sizes[e]
        factor = (1 if operator.symmetric else 2) * side**2 * (side + 6) // 3
        formed = [formation_cost(operator.corners[i]) for i in split.remaining]
        own = Cost(
            batch * (flops + factor + 2 * operator.size),
            batch * (moved + 6 * side**2 + 6 * operator.size) * item,
            batch * (side**2 + max(copy, side**2) + 3 * operator.size) * item,
            38 + batch * side // PANEL,
        )
        dense = [
            cost
            for i, cost in zip(split.remaining, formed, strict=True)
            if not _is_diagonal(operator.corners[i])
        ]
        return Cost(
            own.flops + sum(cost.flops for cost in dense),
            own.bytes + sum(cost.bytes for cost in dense),
            own.peak + max((cost.peak for cost in dense), default=0),
            own.operations,
        )

    def _factor(self, operator: LinearOperator) -> Factorization:
        assert isinstance(operator, Block)
        split = split_blocks(operator)
        assert split is not None
        factored = SchurFactorization(operator, split)
        if factored.lost_digits is None or operator.dtype == torch.float64:
            return factored
        samples = factored.lost_digits.nonzero()[:, 0]
        if len(samples) == operator.batch:
            return WidenedFactorization(SchurFactorization(widened(operator), split))
        some = select_samples(operator, samples)
        assert isinstance(some, Block)
        return Mixed(factored, WidenedFactorization(SchurFactorization(widened(some), split)), samples)


def _is_diagonal(corner: LinearOperator) -> bool:
    return isinstance(corner, Zero | ScaledIdentity | Diagonal)
