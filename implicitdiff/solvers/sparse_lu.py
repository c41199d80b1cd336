"""Sparse LU: SuperLU on the pattern that all samples share, or banded Cholesky where a reordering leaves a narrow band.

In: a ``Sparse`` operator. Out: ``SparseLU``. The pattern is sorted and reordered once and kept with it; the numbers of
each sample are factored by SciPy in float64, in host memory. Next file: ``woodbury.py``.
"""

import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import scipy.sparse
import torch
from scipy.sparse.csgraph import reverse_cuthill_mckee
from scipy.sparse.linalg import splu
from torch import Tensor

from implicitdiff.errors import NotSupportedYetError
from implicitdiff.operators import Banded, LinearOperator, Sparse, select_samples
from implicitdiff.operators.sparse import Pattern
from implicitdiff.solvers.base import ColumnFactorization, Cost, Factorization, LinearSolver
from implicitdiff.solvers.condition import inverse_norm, power_of_two, singular_level
from implicitdiff.solvers.pseudo_inverse import EigenFactorization
from implicitdiff.solvers.tridiagonal import ChainFactorization, chain_cost
from implicitdiff.status import Status
from implicitdiff.torch_private import HOST

LARGEST_DENSE = 1024
"""The largest singular matrix whose minimum-norm answer is computed, by dense eigenvalues; larger ones are lost."""
SOUND_ERROR = 1e-10
"""The backward error of a probe up to which pivots on the diagonal are accepted; else rows are exchanged."""
GROWTH = 1e6
"""A solution this much larger than its right-hand side makes the condition number be looked at."""


class _Sample:
    """One matrix, scaled and factored: with pivots on the diagonal, with exchanges of rows where that is unsound.

    Taking the diagonal keeps the fill of a Cholesky factorisation, and is stable for definite matrices. The backward
    error of one solution says whether it was for this one.
    """

    def __init__(self, matrix: Any, level: float) -> None:
        self.matrix = matrix
        self.singular = True
        self._lu: Any = None
        answer = np.zeros(0)
        self.definite_pivots = False
        probe = np.cos(2.0 + 3.7 * np.arange(matrix.shape[0]) ** 1.1)
        tries: tuple[tuple[str, float, dict[str, bool]], ...] = (
            ("MMD_AT_PLUS_A", 0.0, {"SymmetricMode": True}),
            ("COLAMD", 1.0, {}),
        )
        on_diagonal = bool((matrix.diagonal() != 0).all())
        for order, threshold, options in tries if on_diagonal else tries[1:]:
            if not self._factor(order, threshold, options):
                continue
            answer = self.solve(probe)
            if self._backward_error(answer, probe) <= SOUND_ERROR:
                self.definite_pivots = threshold == 0.0
                break
        if self._lu is not None:
            self.singular = not np.isfinite(answer).all() or (
                np.abs(answer).max() > GROWTH and not self._is_regular(level)
            )

    def _factor(self, order: str, threshold: float, options: dict[str, bool]) -> bool:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._lu = splu(self.matrix, permc_spec=order, diag_pivot_thresh=threshold, options=options)
        except RuntimeError:  # a pivot is exactly zero
            self._lu = None
        return self._lu is not None

    def _backward_error(self, answer: np.ndarray, probe: np.ndarray) -> float:
        if not np.isfinite(answer).all():
            return np.inf
        residual = np.abs(self.matrix @ answer - probe).max()
        return float(residual / (np.abs(self.matrix).sum(1).max() * np.abs(answer).max() + 1.0))

    def _is_regular(self, level: float) -> bool:
        size = self.matrix.shape[0]

        def by(transposed: str) -> Callable[[Tensor], Tensor]:
            return lambda x: torch.from_numpy(self._lu.solve(x[0].numpy(), trans=transposed))[None]

        inverse = float(
            inverse_norm(by("N"), by("T"), torch.zeros(1, size, dtype=torch.float64, device=HOST))
        )
        norm = max(1.0, float(np.abs(self.matrix).sum(0).max()))
        return 1 / (norm * inverse) > level

    def solve(self, columns: np.ndarray) -> np.ndarray:
        """The solutions (m, C)."""
        found: np.ndarray = self._lu.solve(np.ascontiguousarray(columns))
        return found

    @property
    def definite(self) -> bool:
        """Whether all pivots are on the diagonal and positive: then the matrix is positive definite."""
        plain = (
            self.definite_pivots and not self.singular and bool((self._lu.perm_r == self._lu.perm_c).all())
        )
        return plain and bool((self._lu.U.diagonal() > 0).all())


class SparseLUFactorization(ColumnFactorization):
    """D A D = L U for each sample, D a scaling by powers of two.

    A sample is SINGULAR when a pivot is zero or the estimated condition number of the scaled matrix exceeds
    1 / (10 eps) of the operator's dtype; its answer is then the one of least norm if it is symmetric and small, else it
    is lost. A sample with NaN or inf is NONFINITE and lost.
    """

    def __init__(self, operator: Sparse) -> None:
        """Factor every sample."""
        if operator.values.requires_grad and torch.is_grad_enabled():
            raise NotSupportedYetError(
                "the sparse LU has no derivative; call it inside a Function with a rule of its own, or use the 'lu' "
                "solver."
            )
        self._operator = operator
        batch = operator.batch
        self.status = torch.zeros(batch, dtype=torch.int8, device=operator.device)
        values = operator.values.detach().to(device=HOST, dtype=torch.float64)
        values = values.expand(batch, -1)
        self._samples: list[_Sample | None] = []
        self._scales: list[np.ndarray] = []
        level = singular_level(operator.dtype)
        for b in range(batch):
            pattern = operator.patterns[b if len(operator.patterns) > 1 else 0]
            own = values[b, : len(pattern)]
            if not bool(torch.isfinite(own).all()):
                self._samples.append(None)
                self._scales.append(np.ones(pattern.size))
                self.status[b] = int(Status.NONFINITE)
                continue
            matrix, scale = _scaled_matrix(pattern, own)
            sample = _Sample(matrix, level)
            self._samples.append(sample)
            self._scales.append(scale)
            if sample.singular:
                self.status[b] = int(Status.SINGULAR)
        self._rescue()

    def _rescue(self) -> None:
        lost = self.status != int(Status.OK)
        self._rescued: Tensor | None = None
        singular = self.status == int(Status.SINGULAR)
        if self._operator.symmetric and self._operator.size <= LARGEST_DENSE and bool(singular.any()):
            self._rescued = singular.nonzero()[:, 0]
            dense = (
                select_samples(self._operator, self._rescued).to_dense().expand(len(self._rescued), -1, -1)
            )
            self._pseudo = EigenFactorization(dense)
            self.status[self._rescued] = self._pseudo.status
            lost = self.status == int(Status.NONFINITE)
        self.lost = lost if bool(lost.any()) else None

    @property
    def definite(self) -> Tensor:  # type: ignore[override]
        """Whether each sample is proved positive definite, (B,); the pivots are read when this is first asked for."""
        found = [sample is not None and sample.definite for sample in self._samples]
        return torch.tensor(found, device=self._operator.device)

    def solve_columns(self, columns: Tensor) -> Tensor:
        """Return the solutions (B, m, C)."""
        host = columns.detach().to(device=HOST, dtype=torch.float64).numpy()
        out = np.full(host.shape, np.nan)
        for b, (sample, scale) in enumerate(zip(self._samples, self._scales, strict=True)):
            if sample is not None and not sample.singular:
                out[b] = scale[:, None] * sample.solve(scale[:, None] * host[b])
        solution = torch.from_numpy(out).to(columns)
        if self._rescued is not None:
            solution[self._rescued] = self._pseudo.solve_columns(columns[self._rescued])
        return torch.where((columns == 0).all(1, keepdim=True), 0.0, solution)


def _scaled_matrix(pattern: Pattern, values: Tensor) -> tuple[Any, np.ndarray]:
    """D A D as SciPy stores it, and the diagonal of D: Ruiz' iteration, as in ``condition.symmetric_scaling``."""
    rows, columns = pattern.rows.to(HOST), pattern.columns.to(HOST)
    scale = values.new_ones(pattern.size)
    for _ in range(4):
        scaled = values.abs() * scale[rows] * scale[columns]
        largest = torch.zeros_like(scale)
        largest.scatter_reduce_(0, rows, scaled, "amax").scatter_reduce_(0, columns, scaled, "amax")
        scale = scale / torch.where(largest > 0, largest, 1.0).sqrt()
    scale = power_of_two(scale.reciprocal())
    data = (values * scale[rows] * scale[columns]).numpy()
    indices, ends = _compressed(pattern)
    shape = (pattern.size, pattern.size)
    return scipy.sparse.csc_matrix((data, indices, ends), shape=shape), scale.numpy()


def _compressed(pattern: Pattern) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers and column ends of SciPy's storage, once for a pattern."""
    known = pattern.derived.get("compressed")
    if known is None:
        counts = np.bincount(pattern.columns.numpy(force=True), minlength=pattern.size)
        ends = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        known = pattern.derived["compressed"] = pattern.rows.numpy(force=True).astype(np.int32), ends
    return known


# -------------------------------------------------------------------- narrow bands


class ReorderedBand(Factorization):
    """P A P' as a band, P the reverse Cuthill-McKee ordering: all samples at once, on their own device."""

    def __init__(self, operator: Sparse, order: Tensor, reach: int) -> None:
        """Permute and factor."""
        self._order = order
        self._inner = ChainFactorization(_as_band(operator, order, reach))
        self.status, self.definite = self._inner.status, getattr(self._inner, "definite", None)

    def solve(self, rhs: Tensor) -> Tensor:
        """Return the solution (..., B, m)."""
        found = self._inner.solve(rhs[..., self._order])
        return torch.empty_like(found).index_copy_(-1, self._order, found)


def _as_band(operator: Sparse, order: Tensor, reach: int) -> Banded:
    pattern, size = operator.patterns[0], operator.size
    place = torch.empty_like(order)
    place[order] = torch.arange(size, device=order.device)
    rows, columns = place[pattern.rows], place[pattern.columns]
    bands = operator.values.new_zeros(operator.values.shape[0], 1, 2 * reach + 1, size, 1, 1)
    bands[:, 0, columns - rows + reach, rows, 0, 0] = operator.values
    return Banded(bands, (size,), 0, (), reach, reach)


def _narrow(operator: Sparse) -> tuple[Tensor, int] | None:
    """The reordering and the reach of the band, where the banded solver is predicted to be faster."""
    if len(operator.patterns) != 1 or not operator.symmetric or operator.size == 0:
        return None
    pattern = operator.patterns[0]
    known = pattern.derived.get("band")
    if known is None:
        indices, ends = _compressed(pattern)
        ones = np.ones(len(indices), dtype=np.int8)
        graph = scipy.sparse.csc_matrix((ones, indices, ends), shape=(pattern.size, pattern.size)).tocsr()
        order = torch.from_numpy(reverse_cuthill_mckee(graph, symmetric_mode=True).astype(np.int64))
        order = order.to(operator.device)
        place = torch.empty_like(order)
        place[order] = torch.arange(pattern.size, device=order.device)
        spread = (place[pattern.rows] - place[pattern.columns]).abs()
        known = pattern.derived["band"] = order, int(spread.max()) if len(spread) else 0
    order, reach = known
    shape = (operator.values.shape[0], 1, 2 * reach + 1, operator.size, 1, 1)
    if 12 * reach * reach > 1e5:  # the blocks of the band would be large: not worth asking
        return None
    band = Banded(
        torch.empty(shape, dtype=operator.dtype, device="meta"), (operator.size,), 0, (), reach, reach
    )
    lu = factor_cost(operator.batch, operator.size, len(pattern), operator.dtype.itemsize)
    return (order, max(reach, 0)) if chain_cost(band).seconds < lu.seconds else None


def factor_cost(batch: int, size: int, entries: int, item: int) -> Cost:
    """Return the predicted cost of one sparse LU and one solve a sample.

    The fill is not known without the ordering: that of nested dissection on a plane grid is taken, 8 m log2 m entries
    and 10 m^1.5 flops, scaled by the entries in a row. SuperLU works off a row in about 3 microseconds (10^4 and 4 10^4
    unknowns of a plane grid: 32 and 126 ms), which counts as an operation.
    """
    width = max(1.0, entries / max(1, size) / 5)
    fill = 8 * size * max(1, size.bit_length()) * width
    flops = 10 * size**1.5 * width**2 * 4
    return Cost(
        round(batch * (flops + 4 * fill)),
        round(batch * (12 * fill + 12 * entries)) * item,
        round(batch * 4 * fill) * item,
        round(batch * (100 + 0.9 * size * width)),
    )


class SparseLU(LinearSolver):
    """SuperLU on the pattern; a banded Cholesky factorisation where the reordered band is narrow."""

    name: ClassVar[str] = "sparse-lu"

    def reject(self, operator: LinearOperator) -> str | None:
        """Refuse other kinds."""
        return None if isinstance(operator, Sparse) else f"the matrix is {operator.kind}, not sparse"

    def cost(self, operator: LinearOperator) -> Cost:
        """That of ``factor_cost``."""
        assert isinstance(operator, Sparse)
        return factor_cost(operator.batch, operator.size, operator.values.shape[1], operator.dtype.itemsize)

    def _factor(self, operator: LinearOperator) -> Factorization:
        assert isinstance(operator, Sparse)
        band = _narrow(operator)
        return SparseLUFactorization(operator) if band is None else ReorderedBand(operator, *band)
