"""Solve the dense symmetric KKT system of a batch, telling dependent constraints from a solution that is not unique.

In: K (B, N, N) and right-hand sides. Out: the solution of smallest norm and one status per sample. LU with a condition
estimate does the regular samples; only the suspicious ones pay for an eigendecomposition. The factors are kept for
further right-hand sides. Next: `derivatives/autodiff.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from implicitdiff.status import Status


class SymmetricKKT:
    """A symmetric, possibly singular K, factored at the first solve and used for any number of them.

    K is scaled to DKD first, so that a regular K whose blocks differ by many orders of magnitude is not taken
    for a singular one. A null vector of K that lives in the multipliers alone (A'n = 0) means dependent
    constraints: the answer is the pseudo-inverse K^+ rhs, the representative of minimum norm. Any other null vector
    leaves a direction in which u is not determined: SINGULAR.

    Cost: 2/3 N^3 a sample; about 10 N^3 more for each sample that looks singular. A later solve takes 2 N^2 a
    right-hand side. K itself is let go at the first solve.
    """

    def __init__(self, matrix: Tensor, variables: int) -> None:
        """Keep K (B, N, N); its first `variables` rows and columns belong to u."""
        self._variables = variables
        # Whoever reads K before the factors sees one of them in every thread: see `solve`.
        self._matrix: Tensor | None = matrix
        self._factors: _Factors | None = None

    def solve(self, rhs: Tensor) -> tuple[Tensor, Tensor]:
        """K^-1 rhs for rhs (B, N, R).

        Returns:
            z (B, N, R) and the status (B,) int8: OK, SINGULAR (z is then K^+ rhs), NOT_REGULAR (likewise; constraints
            depend on each other here, and whoever knows them beside this point can tell whether that is no harm) or
            NONFINITE (z is NaN). A right-hand side that is exactly 0 gives exactly 0 whatever the matrix.
        """
        batch, size = rhs.shape[:2]
        if batch == 0 or size == 0:
            return torch.zeros_like(rhs), torch.zeros(batch, dtype=torch.int8, device=rhs.device)
        matrix, factors = self._matrix, self._factors
        if factors is None:
            assert matrix is not None
            factors, solved = _factored(matrix, rhs, self._variables)
            self._factors, self._matrix = factors, None
        else:
            solved = torch.linalg.lu_solve(factors.lu, factors.pivots, factors.scale[:, :, None] * rhs)
        z = factors.scale[:, :, None] * solved
        if factors.rescue is not None:
            z = z.index_copy(0, factors.suspicious, factors.rescue.solve(rhs[factors.suspicious]))
        z = torch.where(factors.finite[:, None, None], z, torch.nan)
        return torch.where((rhs == 0).all(1, keepdim=True), 0.0, z), factors.status


@dataclass(frozen=True)
class _Factors:
    """P DKD = LU of the regular samples, with D = diag(scale), and what takes its place in the others.

    Attributes:
        lu, pivots: the factorisation.
        scale: (B, N).
        finite: (B,), where K is finite.
        status: (B,) int8.
        suspicious: the samples in which K looks singular.
        rescue: their pseudo-inverse; None where there are none.
    """

    lu: Tensor
    pivots: Tensor
    scale: Tensor
    finite: Tensor
    status: Tensor
    suspicious: Tensor
    rescue: _Rescue | None


def _factored(matrix: Tensor, rhs: Tensor, variables: int) -> tuple[_Factors, Tensor]:
    """The factors of K, and the scaled solution for `rhs`: the probe goes along as one more column."""
    batch, size = matrix.shape[:2]
    finite = torch.isfinite(matrix).all(-1).all(-1)
    identity = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
    matrix = torch.where(finite[:, None, None], matrix, identity)
    scale = _by_rows(matrix)
    scaled = _scaled(matrix, scale)

    # |K^-1 p| for a fixed p without structure tells how close to singular K is: pivots alone can miss it.
    probe = torch.cos(2.0 + 3.7 * torch.arange(size, dtype=matrix.dtype, device=matrix.device) ** 1.1)
    columns = torch.cat([scale[:, :, None] * rhs, probe[None, :, None].expand(batch, -1, 1)], dim=2)
    lu, pivots, info = torch.linalg.lu_factor_ex(scaled)
    solved = torch.linalg.lu_solve(lu, pivots, columns)
    growth = solved[:, :, -1].abs().amax(1)
    regular = (info == 0) & (growth < 1 / _rank_tolerance(matrix))
    suspicious = torch.nonzero(~regular)[:, 0]
    status = torch.zeros(batch, dtype=torch.int8, device=matrix.device)
    rescue = None
    if len(suspicious):
        rescue = _Rescue.of(matrix[suspicious], scaled[suspicious], scale[suspicious], variables)
        status[suspicious] = rescue.status
    status = torch.where(finite, status, Status.NONFINITE.value).to(torch.int8)
    return _Factors(lu, pivots, scale, finite, status, suspicious, rescue), solved[:, :, :-1]


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


@dataclass(frozen=True)
class _PseudoInverse:
    """K^+ by the eigendecomposition of DKD.

    With N an orthonormal basis of null(K) = D null(DKD) and P = I - NN', K^+ = P D (DKD)^+ D P.

    Attributes:
        scale: the diagonal of D, (B, N).
        inverse: the eigenvalues of (DKD)^+, (B, N).
        vectors: the eigenvectors, (B, N, N).
        basis: N, (B, N, N), filled up with zeros.
        singular: (B,), whether a null vector of K reaches u.
        deficient: (B,), whether K has any null vector.
    """

    scale: Tensor
    inverse: Tensor
    vectors: Tensor
    basis: Tensor
    singular: Tensor
    deficient: Tensor

    @staticmethod
    def of(scaled: Tensor, scale: Tensor, variables: int) -> _PseudoInverse:
        """That of K, from DKD (B, N, N) and the diagonal of D."""
        tolerance = _rank_tolerance(scaled)
        values, vectors = torch.linalg.eigh(scaled)
        zero = values.abs() <= tolerance * values.abs().amax(1, keepdim=True).clamp(
            min=torch.finfo(values.dtype).tiny
        )
        inverse = torch.where(zero, 0.0, 1 / torch.where(zero, 1.0, values))
        # The null vectors first, the others zeroed: QR then keeps them and fills up with columns to be masked. All N
        # columns, since the bits of a product may depend on their number, and one sample's must not on another's.
        order = torch.argsort(zero.to(torch.int8), dim=1, descending=True, stable=True)
        member = torch.gather(zero, 1, order)
        null = torch.gather(vectors, 2, order[:, None, :].expand(-1, vectors.shape[1], -1))
        reaches = (
            (null[:, :variables] * member[:, None, :]).abs().amax(1)
            if variables
            else null.new_zeros(member.shape)
        )
        singular = (reaches > tolerance**0.5).any(1)
        basis = _orthonormal(scale[:, :, None] * null * member[:, None, :], member)
        return _PseudoInverse(scale, inverse, vectors, basis, singular, zero.any(1))

    def solve(self, rhs: Tensor) -> Tensor:
        """K^+ rhs for rhs (B, N, R)."""
        scale, basis = self.scale[:, :, None], self.basis
        rhs = rhs - basis @ (basis.mT @ rhs)
        z = scale * (self.vectors @ (self.inverse[:, :, None] * (self.vectors.mT @ (scale * rhs))))
        return z - basis @ (basis.mT @ z)


@dataclass(frozen=True)
class _Rescue:
    """The pseudo-inverses of samples that look singular.

    Attributes:
        first: by the scaling of rows.
        second: by that of blocks, for the samples `left` which the first finds singular; None where there are none.
        left: (B,) bool.
        still: whether the second finds them singular too; the first one's answer then stands.
        status: (B,) int8, the verdict.
    """

    first: _PseudoInverse
    second: _PseudoInverse | None
    left: Tensor
    still: Tensor
    status: Tensor

    @staticmethod
    def of(matrix: Tensor, scaled: Tensor, scale: Tensor, variables: int) -> _Rescue:
        """That of K (B, N, N), given also as DKD with the diagonal of D."""
        first = _PseudoInverse.of(scaled, scale, variables)
        left = first.singular
        if not bool(left.any()):
            return _Rescue(first, None, left, left, _verdict(left, first.deficient))
        other = _by_blocks(matrix[left], variables)
        second = _PseudoInverse.of(_scaled(matrix[left], other), other, variables)
        singular, deficient = left.clone(), first.deficient.clone()
        singular[left], deficient[left] = second.singular, second.deficient
        return _Rescue(first, second, left, second.singular, _verdict(singular, deficient))

    def solve(self, rhs: Tensor) -> Tensor:
        """K^+ rhs for rhs (B, N, R)."""
        least = self.first.solve(rhs)
        if self.second is not None:
            again = self.second.solve(rhs[self.left])
            least[self.left] = torch.where(self.still[:, None, None], least[self.left], again)
        return least


def _verdict(singular: Tensor, deficient: Tensor) -> Tensor:
    """The status (B,) int8 of samples whose K has null vectors that reach u, or any at all."""
    dependent = torch.where(deficient, Status.NOT_REGULAR.value, Status.OK.value)
    return torch.where(singular, Status.SINGULAR.value, dependent).to(torch.int8)


def _orthonormal(columns: Tensor, member: Tensor) -> Tensor:
    """An orthonormal basis of the span of the member columns; zero columns stay zero (Householder QR puts members
    first).
    """
    if columns.shape[2] == 0:
        return columns
    q, _ = torch.linalg.qr(columns)
    return q * member[:, None, :]
