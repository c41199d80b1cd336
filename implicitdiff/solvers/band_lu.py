"""Pivoted LU of banded chains: for those that are not positive definite, or not symmetric.

In: chains in LAPACK's band storage. Out: ``BandLU``, with a verdict for each chain. Pivoting is sequential, so LAPACK
does it, one chain at a time, in host memory; the cost is linear in the length. Next file: ``tridiagonal.py``.
"""

from functools import partial

import numpy as np
import torch
from scipy.linalg.lapack import get_lapack_funcs
from torch import Tensor

from implicitdiff.errors import NotSupportedYetError
from implicitdiff.solvers.condition import inverse_norm, power_of_two, singular_level, suspicion_level
from implicitdiff.solvers.pseudo_inverse import EigenFactorization
from implicitdiff.status import Status

LARGEST_DENSE = 1024
"""The longest singular chain whose minimum-norm answer is computed, by dense eigenvalues; longer ones are lost."""


class BandLU:
    """P R A C = L U for n chains of M entries, with scalings by powers of two, as ``ScaledFactorization`` does.

    A chain is SINGULAR when the estimated condition number of the scaled matrix exceeds 1 / (10 eps). If it is
    symmetric and short, its answer is then the one of least norm; else it is lost. A chain with NaN or inf is
    NONFINITE and lost. Solutions are NaN where a chain is lost. Work: 2 M l (l + u) flops to factor, l and u the
    entries below and above the diagonal.

    Attributes:
        status: (n,) int8.
        lost: (n,) bool.
    """

    def __init__(self, band: Tensor, lower: int, upper: int, *, symmetric: bool) -> None:
        """Factor.

        Args:
            band: (n, lower + 1 + upper, M) with A_ij at [upper + i - j, j]; what lies outside the matrix is zero.
            lower: entries below the diagonal.
            upper: entries above it.
            symmetric: whether the chains are symmetric.
        """
        self._lower, self._upper = lower, upper
        number, _, size = band.shape
        finite = torch.isfinite(band).all(-1).all(-1)
        band = torch.where(finite[:, None, None], band, 0.0)
        rows = torch.arange(lower + 1 + upper, device=band.device)[:, None] - upper
        rows = (rows + torch.arange(size, device=band.device)).clamp(0, size - 1)
        largest = band.new_zeros(number, size)
        largest.scatter_reduce_(
            1, rows.flatten().expand(number, -1), band.abs().flatten(1), "amax", include_self=True
        )
        self._rows = power_of_two(largest)
        scaled = band * self._rows[:, rows]
        self._columns = power_of_two(scaled.abs().amax(1))
        scaled *= self._columns[:, None]
        self._factors: list[tuple[np.ndarray, np.ndarray]] = []
        singular = self._factor(scaled, finite)
        self.status = torch.where(singular, int(Status.SINGULAR), int(Status.OK)).to(torch.int8)
        self.status[~finite] = int(Status.NONFINITE)
        self.lost = singular | ~finite
        self._rescued: Tensor | None = None
        if symmetric and size <= LARGEST_DENSE and bool(singular.any()):
            self._rescued = singular.nonzero()[:, 0]
            self._rescue = EigenFactorization(_dense(band[self._rescued], lower, upper))
            self.status[self._rescued] = self._rescue.status
            self.lost = ~finite

    def _factor(self, scaled: Tensor, finite: Tensor) -> Tensor:
        """Factor each chain that is finite; return which are singular, (n,)."""
        arrays = np.pad(_on_host(scaled), ((0, 0), (self._lower, 0), (0, 0)))
        factor, self._substitute = get_lapack_funcs(("gbtrf", "gbtrs"), dtype=arrays.dtype)
        singular = torch.zeros_like(finite)
        suspects = []
        for chain, array in enumerate(arrays):
            lu, pivots, info = factor(array, self._lower, self._upper, overwrite_ab=True)
            self._factors.append((lu, pivots))
            sizes = np.abs(lu[self._lower + self._upper])
            if info > 0:
                singular[chain] = True
            elif sizes.min() <= suspicion_level(scaled.dtype) * max(1.0, sizes.max()):
                suspects.append(chain)
        singular &= finite
        if suspects:
            which = torch.tensor(suspects, device=scaled.device)
            inverse = inverse_norm(
                partial(self._solve_scaled, chains=suspects),
                partial(self._solve_scaled, chains=suspects, transposed=True),
                self._rows[which],
            )
            # As reciprocal_condition does: |A|_1 counts as at least 1, for it was scaled to about 1.
            norm = scaled[which].abs().sum(1).amax(-1).clamp(min=1)
            singular[which] |= ~(1 / (norm * inverse) > singular_level(scaled.dtype))
        return singular

    def _solve_scaled(self, columns: Tensor, chains: list[int], transposed: bool = False) -> Tensor:
        """Return the scaled matrices' inverses, or transposed inverses, times columns (k, M, C)."""
        arrays = _on_host(columns)
        solutions = [
            self._substitute(
                self._factors[chain][0],
                self._lower,
                self._upper,
                array,
                self._factors[chain][1],
                int(transposed),
            )[0]
            for chain, array in zip(chains, arrays, strict=True)
        ]
        stacked = np.stack(solutions) if solutions else arrays
        return torch.from_numpy(stacked).to(columns.device)

    def solve(self, columns: Tensor) -> Tensor:
        """Return the solutions (n, M, C)."""
        scaled = columns * self._rows[:, :, None]
        solution = self._solve_scaled(scaled, list(range(len(columns)))) * self._columns[:, :, None]
        if self._rescued is not None:
            solution[self._rescued] = self._rescue.solve_columns(columns[self._rescued])
        return solution


def _on_host(tensor: Tensor) -> np.ndarray:
    """Return the values as LAPACK wants them; the derivative would be lost, so none may be asked for."""
    if tensor.requires_grad and torch.is_grad_enabled():
        raise NotSupportedYetError(
            "the pivoted LU of a band has no derivative; call it inside a Function with a rule of its own, or use the "
            "'lu' solver."
        )
    return tensor.numpy(force=True)


def _dense(band: Tensor, lower: int, upper: int) -> Tensor:
    """Return the matrices (n, M, M)."""
    size = band.shape[-1]
    dense = band.new_zeros(band.shape[0], size, size)
    for offset in range(-min(lower, size - 1), min(upper, size - 1) + 1):
        part = band[:, upper - offset, max(0, offset) : size + min(0, offset)]
        dense.diagonal(offset=offset, dim1=1, dim2=2).copy_(part)
    return dense
