"""Solve the dense symmetric KKT system of a batch, telling dependent constraints from a solution that is not unique.

In: K (B, N, N) and right-hand sides. Out: the solution of smallest norm and one status per sample. LU with a condition
estimate does the regular samples; only the suspicious ones pay for an eigendecomposition. Next:
`derivatives/autodiff.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from implicitdiff.status import Status


def solve_symmetric(matrix: Tensor, rhs: Tensor, variables: int) -> tuple[Tensor, Tensor]:
    """K z = rhs for symmetric, possibly singular K, sample by sample.

    K is scaled to DKD first, so that a regular K whose blocks differ by many orders of magnitude is not taken
    for a singular one. A null vector of K that lives in the multipliers alone (A'n = 0) means dependent
    constraints: the answer is the pseudo-inverse K^+ rhs, the representative of minimum norm. Any other null vector
    leaves a direction in which u is not determined: SINGULAR.

    Args:
        matrix: K, (B, N, N).
        rhs: (B, N, R).
        variables: m; the first m rows and columns belong to u.

    Returns:
        z (B, N, R) and the status (B,) int8: OK, SINGULAR (z is then K^+ rhs) or NONFINITE (z is NaN). A right-hand
        side that is exactly 0 gives exactly 0 whatever the matrix.

    Cost: 2/3 N^3 a sample; about 10 N^3 more for each sample that looks singular.
    """
    batch, size = matrix.shape[:2]
    status = torch.zeros(batch, dtype=torch.int8, device=matrix.device)
    if batch == 0 or size == 0:
        return torch.zeros_like(rhs), status
    finite = torch.isfinite(matrix).all(-1).all(-1)
    identity = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
    matrix = torch.where(finite[:, None, None], matrix, identity)
    scale = _by_rows(matrix)
    scaled = _scaled(matrix, scale)

    # |K^-1 p| for a fixed p without structure tells how close to singular K is: pivots alone can miss it.
    probe = torch.cos(2.0 + 3.7 * torch.arange(size, dtype=matrix.dtype, device=matrix.device) ** 1.1)
    columns = torch.cat([scale[:, :, None] * rhs, probe[None, :, None].expand(batch, -1, 1)], dim=2)
    factor, pivots, info = torch.linalg.lu_factor_ex(scaled)
    solved = torch.linalg.lu_solve(factor, pivots, columns)
    z = scale[:, :, None] * solved[:, :, :-1]
    growth = solved[:, :, -1].abs().amax(1)
    regular = (info == 0) & (growth < 1 / _rank_tolerance(matrix))
    suspicious = torch.nonzero(~regular)[:, 0]
    if len(suspicious):
        least, singular = _pseudo_solve(scaled[suspicious], scale[suspicious], rhs[suspicious], variables)
        if bool(singular.any()):
            left = suspicious[singular]
            other = _by_blocks(matrix[left], variables)
            again, still = _pseudo_solve(_scaled(matrix[left], other), other, rhs[left], variables)
            least[singular] = torch.where(still[:, None, None], least[singular], again)
            singular[singular.clone()] = still
        z = z.index_copy(0, suspicious, least)
        status[suspicious] = torch.where(singular, Status.SINGULAR.value, Status.OK.value).to(torch.int8)
    z = torch.where(finite[:, None, None], z, torch.nan)
    status = torch.where(finite, status, Status.NONFINITE.value).to(torch.int8)
    return torch.where((rhs == 0).all(1, keepdim=True), 0.0, z), status


def _rank_tolerance(matrix: Tensor) -> float:
    """Eigenvalues below this share of the largest one count as zero.

    A matrix that is singular in exact arithmetic has, after rounding of its entries, eigenvalues of a few eps sqrt(N).
    """
    return 10 * matrix.shape[-1] ** 0.5 * torch.finfo(matrix.dtype).eps


def _by_rows(matrix: Tensor) -> Tensor:
    """d (B, N) such that diag(d) K diag(d) has rows of maximum about 1: three sweeps of Ruiz' scaling."""
    scale = torch.ones(matrix.shape[:2], dtype=matrix.dtype, device=matrix.device)
    magnitude = matrix.abs()
    for _ in range(3):
        rows = (scale[:, :, None] * magnitude * scale[:, None, :]).amax(2)
        scale = scale * torch.where(rows > 0, rows, 1.0).rsqrt()
    return _powers_of_two(scale)


def _by_blocks(matrix: Tensor, variables: int) -> Tensor:
    """d (B, N) with the variables scaled by H alone, the multipliers by the rows of A that this leaves.

    A small H beside a large A is perfectly regular, but rows of size 1 do not show it.
    """
    magnitude, scale = matrix.abs(), torch.ones(matrix.shape[:2], dtype=matrix.dtype, device=matrix.device)
    rows = magnitude[:, :variables, :variables].amax(2)
    largest = rows.amax(1, keepdim=True)
    rows = torch.where(rows > 0, rows, torch.where(largest > 0, largest, 1.0))
    scale[:, :variables] = rows.rsqrt()
    below = (magnitude[:, variables:, :variables] * scale[:, None, :variables]).amax(2)
    scale[:, variables:] = 1 / torch.where(below > 0, below, 1.0)
    return _powers_of_two(scale)


def _powers_of_two(scale: Tensor) -> Tensor:
    """Rounded to powers of two, so that scaling commits no rounding error."""
    return torch.exp2(torch.round(torch.log2(scale)))


def _scaled(matrix: Tensor, scale: Tensor) -> Tensor:
    return scale[:, :, None] * matrix * scale[:, None, :]


def _pseudo_solve(scaled: Tensor, scale: Tensor, rhs: Tensor, variables: int) -> tuple[Tensor, Tensor]:
    """K^+ rhs from the eigendecomposition of DKD, and whether a null vector of K reaches u.

    With N an orthonormal basis of null(K) = D null(DKD) and P = I - NN', K^+ = P D (DKD)^+ D P.
    """
    tolerance = _rank_tolerance(scaled)
    values, vectors = torch.linalg.eigh(scaled)
    zero = values.abs() <= tolerance * values.abs().amax(1, keepdim=True).clamp(
        min=torch.finfo(values.dtype).tiny
    )
    inverse = torch.where(zero, 0.0, 1 / torch.where(zero, 1.0, values))
    # The null vectors, each in its own column, the others zeroed: QR then keeps them and fills up with
    # columns to be masked.
    count = int(zero.sum(1).max())
    order = torch.argsort(zero.to(torch.int8), dim=1, descending=True, stable=True)[:, :count]
    member = torch.gather(zero, 1, order)
    null = torch.gather(vectors, 2, order[:, None, :].expand(-1, vectors.shape[1], -1))
    reaches = (
        (null[:, :variables] * member[:, None, :]).abs().amax(1)
        if variables
        else null.new_zeros(member.shape)
    )
    singular = (reaches > tolerance**0.5).any(1)
    basis = _orthonormal(scale[:, :, None] * null * member[:, None, :], member)
    rhs = rhs - basis @ (basis.mT @ rhs)
    z = scale[:, :, None] * (vectors @ (inverse[:, :, None] * (vectors.mT @ (scale[:, :, None] * rhs))))
    return z - basis @ (basis.mT @ z), singular


def _orthonormal(columns: Tensor, member: Tensor) -> Tensor:
    """An orthonormal basis of the span of the member columns; zero columns stay zero (Householder QR puts members
    first).
    """
    if columns.shape[2] == 0:
        return columns
    q, _ = torch.linalg.qr(columns)
    return q * member[:, None, :]
