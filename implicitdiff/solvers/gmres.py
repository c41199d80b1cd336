"""GMRES: a regular matrix that is not symmetric, known by its products alone.

In: any operator, or a product, and rows of right-hand sides. Out: ``GMRES``, ``gmres``. Every row is its own iteration;
a probe row tells singular matrices from regular ones. Next file: ``select.py``.
"""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from implicitdiff.operators import LinearOperator, Zero
from implicitdiff.solvers.base import Cost, Factorization, LinearSolver
from implicitdiff.solvers.iteration import probe_row
from implicitdiff.status import Status

RESTART = 60
"""Vectors of the Krylov space that are kept before it is begun anew from the true residual."""
LOOK = 4
"""Steps between two looks at how far the residual has fallen."""
PREDICTED_STEPS = 20

Product = Callable[[Tensor], Tensor]


def gmres(
    product: Product, rhs: Tensor, *, restart: int = RESTART, cycles: int = 10
) -> tuple[Tensor, Tensor]:
    """Solve A x = b for each row, by restarted GMRES (Saad and Schultz, 1986).

    One more row, a fixed vector without structure, goes along in every sample. Where it does not converge the matrix is
    singular, or too near to it for this method, and no row of the sample counts as converged: a singular system may be
    consistent, and its answer is then one of many.

    Args:
        product: A applied to each row of a (R, B, m) tensor.
        rhs: (R, B, m).
        restart: most vectors of the Krylov space, each (R + 1, B, m).
        cycles: most restarts.

    Returns:
        x (R, B, m), and (R, B) bool where |A x - b| <= eps^0.75 |b| by the true residual. A row of zeros converges at
        once, to exact zeros.
    """
    lead, batch, size = rhs.shape
    probe = probe_row(size, rhs.dtype, rhs.device).expand(1, batch, size)
    scale = rhs.abs().amax(-1, keepdim=True)
    rows = torch.cat([rhs / torch.where(scale > 0, scale, 1.0), probe])
    target = torch.linalg.vector_norm(rows, dim=-1) * torch.finfo(rhs.dtype).eps ** 0.75
    x, residual = torch.zeros_like(rows), rows
    for _ in range(cycles):
        going = torch.linalg.vector_norm(residual, dim=-1) > target
        if not bool(going.any()):
            break
        # a row that has arrived keeps its bits, whatever the others still need
        x = torch.where(going[..., None], x + _cycle(product, residual, 0.5 * target, min(restart, size)), x)
        residual = rows - product(x)
    converged = torch.linalg.vector_norm(residual, dim=-1) <= target
    return x[:lead] * scale, (converged[:lead] & converged[lead:]) | (rhs == 0).all(-1)


def _cycle(product: Product, rhs: Tensor, target: Tensor, most: int) -> Tensor:
    """The correction with the smallest residual in a Krylov space of at most `most` vectors.

    Arnoldi: A V_k = V_(k+1) H_k, V orthonormal, orthogonalised twice; then min |beta e_1 - H_k y| and x = V_k y.
    """
    beta = torch.linalg.vector_norm(rhs, dim=-1)
    basis = [rhs / torch.where(beta > 0, beta, 1.0)[..., None]]
    hessenberg = rhs.new_zeros(*rhs.shape[:2], most + 1, most)
    # A row that has arrived keeps its answer, so that its bits do not depend on how long the others take.
    x, done = torch.zeros_like(rhs), beta <= target
    for k in range(most):
        moved = product(basis[-1])
        size = torch.linalg.vector_norm(moved, dim=-1)
        space = torch.stack(basis, dim=-2)
        for _ in range(2):
            along = (space @ moved[..., None])[..., 0]
            moved = moved - (along[..., None, :] @ space)[..., 0, :]
            hessenberg[..., : k + 1, k] += along
        length = torch.linalg.vector_norm(moved, dim=-1)
        # What is left is rounding: the space is complete in this row, and further vectors are 0.
        ended = ~(length > 10 * torch.finfo(rhs.dtype).eps * size)
        hessenberg[..., k + 1, k] = torch.where(ended, 0.0, length)
        basis.append(torch.where(ended, 0.0, 1 / torch.where(ended, 1.0, length))[..., None] * moved)
        if k + 1 < most and (k + 1) % LOOK:
            continue
        y, left = _least_squares(hessenberg[..., : k + 2, : k + 1], beta)
        arrived = ~done & ((left <= target) | ended | torch.full_like(ended, k + 1 == most))
        if bool(arrived.any()):
            x = torch.where(arrived[..., None], (y[..., None, :] @ space)[..., 0, :], x)
        done = done | arrived
        if bool(done.all()):
            break
    return x


def _least_squares(hessenberg: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """y that minimises |beta e_1 - H y|, of least norm, and that minimum; NaN where H is."""
    finite = torch.isfinite(hessenberg).all(-1).all(-1) & torch.isfinite(beta)
    matrix = torch.where(finite[..., None, None], hessenberg, 0.0)
    y = beta[..., None] * torch.linalg.pinv(matrix, rtol=10 * torch.finfo(beta.dtype).eps)[..., 0]
    rest = (matrix @ y[..., None])[..., 0]
    rest[..., 0] -= beta
    return torch.where(finite[..., None], y, torch.nan), torch.linalg.vector_norm(rest, dim=-1)


class GMRESFactorization(Factorization):
    """Nothing is factored; ``status`` is what the last call of ``solve`` found."""

    def __init__(self, operator: LinearOperator) -> None:
        """Keep the operator."""
        self._operator = operator
        self.status = torch.zeros(operator.batch, dtype=torch.int8, device=operator.device)

    def solve(self, rhs: Tensor) -> Tensor:
        """Return the solution (..., B, m): see ``gmres``."""
        operator = self._operator
        batch = rhs.shape[-2] if operator.batch == 1 else operator.batch
        rhs = rhs.expand(*rhs.shape[:-2], batch, operator.size)
        if rhs.numel() == 0:
            return rhs.clone()
        solution, converged = gmres(operator.matvec, rhs.reshape(-1, batch, operator.size))
        status = torch.where(converged.all(0), Status.OK.value, Status.NOT_CONVERGED.value).to(torch.int8)
        finite = torch.isfinite(solution).all(2).all(0)
        self.status = torch.where(finite, status, Status.NONFINITE.value).to(torch.int8)
        if operator.batch == 1:
            self.status = self.status.amax(0, keepdim=True)
        return solution.reshape(rhs.shape)


class GMRES(LinearSolver):
    """A x = b by products with A alone, A regular; for Jacobians that are not symmetric."""

    name: ClassVar[str] = "gmres"

    def reject(self, operator: LinearOperator) -> str | None:
        """Refuse only what is known to be singular."""
        return "the matrix is zero" if isinstance(operator, Zero) else None

    def cost(self, operator: LinearOperator) -> Cost:
        """Per step one product, counted as dense, and two orthogonalisations; 20 steps are taken for granted."""
        size, batch, item = operator.size, operator.batch, operator.dtype.itemsize
        product = Cost(2 * batch * size * size, batch * size * size * item, 2 * batch * size * item, 2)
        vectors = Cost(8 * batch * size * PREDICTED_STEPS, 8 * batch * size * PREDICTED_STEPS * item, 0, 12)
        total = (product + vectors) * PREDICTED_STEPS
        return total + Cost(0, 0, PREDICTED_STEPS * batch * size * item)

    def _factor(self, operator: LinearOperator) -> Factorization:
        return GMRESFactorization(operator)
