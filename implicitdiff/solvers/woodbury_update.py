"""The matrix inversion lemma on any base that has a solver of its own: a band, blocks, a sparse matrix, a product.

In: base + U diag(c) V' with k < m. Out: ``UpdateFactorization``, which ``Woodbury`` hands out. Next: ``kernel.py``.
"""

from functools import cached_property

import torch
from torch import Tensor

from implicitdiff.operators import Dense, LowRankUpdate, select_samples
from implicitdiff.operators.products import batched_matvec
from implicitdiff.solvers.base import PANEL, Cost, Factorization, LinearSolver
from implicitdiff.solvers.cholesky import Cholesky
from implicitdiff.solvers.lu import LU, LUFactorization
from implicitdiff.status import Status

SOUND_ERROR = 1e3
"""The backward error of a probe, in eps, up to which the answer is taken as it is; above it is refined once."""


class UpdateFactorization(Factorization):
    """A^-1 b = y - X t with y = base^-1 b, X = base^-1 U and (I + C V'X) t = C V'y: k + 1 solves with the base.

    A base may be singular where the sum is not (differences and a sum over all), or so close to it that digits cancel.
    The backward error of a fixed probe tells: samples whose error stays large after one refinement are factored
    densely, and their status is that of the dense factorisation.
    """

    def __init__(self, operator: LowRankUpdate, base: Factorization) -> None:
        """Solve for U, form and factor the k x k matrix: 2 m k^2 + 2/3 k^3 flops a sample beside the solves."""
        self._operator, self._base = operator, base
        batch = operator.batch
        left = operator.left.expand(batch, -1, -1)
        self._solved = base.solve(left.permute(2, 0, 1)).permute(1, 2, 0)
        inner = operator.right_factor.mT @ self._solved * operator.weights[:, :, None]
        magnitude = inner.abs()
        for matrix in (inner, magnitude):
            matrix.diagonal(dim1=-2, dim2=-1).add_(1)
        sound = torch.isfinite(inner).all(-1).all(-1)
        identity = torch.eye(operator.rank, dtype=operator.dtype, device=operator.device)
        inner = torch.where(sound[:, None, None], inner, identity)
        self._capacity = LUFactorization(inner, symmetric=False, magnitude=magnitude)
        self.status = torch.zeros(batch, dtype=torch.int8, device=operator.device)
        self._refine: Tensor | None = None
        self._others: Tensor | None = None
        if batch == 0:
            return
        sound = sound & (base.status == int(Status.OK)) & (self._capacity.status == int(Status.OK))
        self._look(sound)

    def _look(self, sound: Tensor) -> None:
        """Refine where the probe's error asks for it, and factor the other samples densely."""
        operator = self._operator
        steps = torch.arange(operator.size, dtype=operator.dtype, device=operator.device)
        probe = torch.cos(2.0 + 3.7 * steps**1.1).expand(operator.batch, -1)
        eps = torch.finfo(operator.dtype).eps
        error = self._error(probe)
        coarse = error > SOUND_ERROR * eps
        if bool(coarse.any()):
            self._refine = coarse[:, None]
            error = self._error(probe)
        sound = sound & (error <= eps**0.5)
        if bool(sound.all()):
            return
        self._others = (~sound).nonzero()[:, 0]
        dense = select_samples(operator, self._others).to_dense().expand(len(self._others), -1, -1)
        solver = Cholesky() if operator.symmetric else LU()
        self._dense = solver.factor(Dense(dense, symmetric=operator.symmetric))
        self.status[self._others] = self._dense.status

    @cached_property
    def definite(self) -> Tensor | None:  # type: ignore[override]
        """Whether the sum is proved positive definite, (B,): by inertia (`WoodburyFactorization.definite`), or densely.

        A base that is not definite proves nothing: False.
        """
        operator, base = self._operator, self._base.definite
        if not operator.symmetric or base is None:
            return None
        root = operator.weights.abs().sqrt()
        signs = torch.where(operator.weights < 0, -1.0, 1.0).to(root.dtype)
        gram = operator.left.mT @ self._solved
        inner = root[:, :, None] * gram * root[:, None, :] + torch.diag_embed(signs)
        sound = (self.status == int(Status.OK)) & base
        inner = torch.where(sound[:, None, None], inner, 0.0)
        found = sound & ((torch.linalg.eigvalsh(inner) > 0).sum(-1) == (signs > 0).sum(-1))
        if self._others is not None and self._dense.definite is not None:
            found[self._others] = self._dense.definite
        return found

    def _error(self, probe: Tensor) -> Tensor:
        """|A x - p| over |A| |x|, the latter from below by |A x|, |p| and the terms of A x."""
        operator = self._operator
        answer = self._apply(probe)
        first = operator.base.matvec(answer)
        second = batched_matvec(
            operator.left, batched_matvec(operator.right_factor.mT, answer) * operator.weights
        )
        size = torch.maximum(first.abs().amax(-1), second.abs().amax(-1)) + 1.0
        error = (first + second - probe).abs().amax(-1) / size
        return torch.where(torch.isfinite(error), error, torch.inf)

    def _apply(self, rhs: Tensor) -> Tensor:
        solution = self._correct(self._base.solve(rhs))
        if self._refine is not None:
            left = rhs - self._operator.matvec(solution)
            refined = solution + self._correct(self._base.solve(left))
            solution = torch.where(self._refine, refined, solution)
        return solution

    def _correct(self, solved: Tensor) -> Tensor:
        operator = self._operator
        inner = batched_matvec(operator.right_factor.mT, solved) * operator.weights
        return solved - batched_matvec(self._solved, self._capacity.solve(inner))

    def solve(self, rhs: Tensor) -> Tensor:
        """Return the solution (..., B, m): one solve with the base, 4 m k + 2 k^2 flops a vector."""
        own = self._operator.batch
        batch = rhs.shape[-2] if own == 1 else own
        rhs = rhs.expand(*rhs.shape[:-2], batch, rhs.shape[-1])
        if self._others is not None and own == 1:
            return self._dense.solve(rhs)
        solution = self._apply(rhs)
        if self._others is not None:
            solution[..., self._others, :] = self._dense.solve(rhs[..., self._others, :])
        return torch.where((rhs == 0).all(-1, keepdim=True), 0.0, solution)


def base_solver(operator: LowRankUpdate) -> LinearSolver:
    """The solver of the base."""
    from implicitdiff.solvers.select import choose  # which knows this solver as well

    return choose(operator.base, many=True).solver


def update_cost(operator: LowRankUpdate, base: Cost) -> Cost:
    """Return the predicted cost: the base's factorisation, k + 1 solves taken as an eighth of it, a k x k LU."""
    batch, size, rank, item = operator.batch, operator.size, operator.rank, operator.dtype.itemsize
    solves = Cost(
        base.flops * (rank + 2) // 8,
        base.bytes // item * (rank + 2) // 8 * item,
        batch * size * rank * item,
        max(1, base.operations // 4),
    )
    small = Cost(
        batch * (2 * size * rank**2 + rank**3 + 8 * size * rank),
        batch * (6 * size * rank + 12 * rank**2) * item,
        batch * 4 * rank**2 * item,
        40 + batch * rank // PANEL,
    )
    return base + solves + small
