"""Chains of blocks, each coupled with its neighbours: all chains and samples eliminated together.

In: a ``Banded`` operator of half-width 1. Out: ``Tridiagonal``, ``ChainFactorization``, which banded_cholesky.py uses
for wider bands. Next file: ``banded_cholesky.py``.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor

from implicitdiff.operators import Banded, LinearOperator
from implicitdiff.solvers.band_lu import BandLU
from implicitdiff.solvers.base import Cost, Factorization, LinearSolver, blank
from implicitdiff.solvers.condition import inverse_norm, singular_level, suspicion_level
from implicitdiff.solvers.cyclic import CyclicReduction, cyclic_cost


class ChainFactorization(Factorization):
    """Cyclic reduction of each chain, pivoted LU for the chains that are not positive definite or not symmetric.

    A success of the first proves little (it succeeds on most singular matrices), so chains with small pivots are
    looked into, as Cholesky does: one is definite only if its condition number is below 1 / (10 eps) after scaling to
    a unit diagonal. Chains do not see each other, so neither do samples.
    """

    def __init__(self, operator: Banded) -> None:
        """Factor the chains; places are taken together until a chain is block tridiagonal."""
        self._operator = operator
        self._together = places_together(operator)
        batch, number = operator.batch, operator.batch * operator.groups
        self.status = torch.zeros(batch, dtype=torch.int8, device=operator.device)
        self._others: Tensor | None = None
        self._lost: Tensor | None = None
        self._reduction: CyclicReduction | None = None
        if operator.symmetric:
            diagonal, coupling = block_tridiagonal(operator, self._together)
            self._reduction = CyclicReduction(diagonal, coupling)
            sound = self._find_sound(diagonal, coupling)
            self.definite = sound.reshape(batch, operator.groups).all(1)
        else:
            sound = torch.zeros(number, dtype=torch.bool, device=operator.device)
        if bool(sound.all()):
            return
        self._others = (~sound).nonzero()[:, 0]
        self._fallback = BandLU(*_band_storage(operator, self._others), symmetric=operator.symmetric)
        codes = torch.zeros(number, dtype=torch.int8, device=operator.device)
        codes[self._others] = self._fallback.status
        # The status of a sample is the worst of its chains; of two different failures the larger code.
        self.status = codes.reshape(batch, operator.groups).amax(1)
        if bool(self._fallback.lost.any()):
            self._lost = torch.zeros_like(sound)
            self._lost[self._others] = self._fallback.lost

    def _find_sound(self, diagonal: Tensor, coupling: Tensor) -> Tensor:
        """Return which chains (N,) are proved positive definite."""
        assert self._reduction is not None
        smallest = self._reduction.smallest
        sound = smallest > suspicion_level(diagonal.dtype)
        if bool(sound.all()):
            return sound
        suspects = ((smallest > 0) & ~sound).nonzero()[:, 0]
        if len(suspects):
            sound[suspects] = _is_regular(diagonal[suspects], coupling[suspects])
        return sound

    def solve(self, rhs: Tensor) -> Tensor:
        """Return the solution (..., B, m); about 12 m s flops a vector."""
        operator = self._operator
        samples = rhs.shape[-2] if operator.batch == 1 else operator.batch
        rhs = rhs.expand(*rhs.shape[:-2], samples, rhs.shape[-1])
        parts = operator.split(rhs)
        chains = operator.batch * operator.groups
        length, inside = parts.shape[-2:]
        # Samples of a shared matrix are further right-hand sides: (R, chains, T, s).
        stacked = parts.reshape(rhs.numel() // max(1, chains * length * inside), chains, length, inside)
        solution = self._solve_chains(stacked).reshape(parts.shape)
        return operator.join(solution)

    def _solve_chains(self, rhs: Tensor) -> Tensor:
        number, chains, length, inside = rhs.shape
        flat = rhs.reshape(number, chains, length * inside)
        if self._reduction is None:
            solution = torch.empty_like(flat)
        else:
            places = math.ceil(length / self._together)
            missing = places * self._together * inside - flat.shape[-1]
            padded = torch.nn.functional.pad(flat, (0, missing)) if missing else flat
            blocks = padded.reshape(number, chains, places, self._together * inside)
            solution = self._reduction.solve(blocks).reshape(padded.shape)[..., : flat.shape[-1]]
        if self._others is not None:
            solution = solution.contiguous()
            columns = flat[:, self._others].permute(1, 2, 0)
            solution[:, self._others] = self._fallback.solve(columns).permute(2, 0, 1)
        return solution if self._lost is None else blank(solution, flat, self._lost)


def places_together(operator: Banded) -> int:
    """Return b, the places that form a block: as many as the band reaches, so that only neighbours are coupled."""
    return max(1, min(max(operator.lower, operator.upper), operator.length - 1))


def block_tridiagonal(operator: Banded, together: int) -> tuple[Tensor, Tensor]:
    """Return the chains of a symmetric band as block tridiagonal ones, ``together`` places to a block.

    Args:
        operator: of half-width at most ``together``.
        together: b, how many places form a block; the last block is filled up by an identity.

    Returns:
        The diagonal (N, T', b s, b s) and the coupling with the next block (N, T' - 1, b s, b s), N = B G, T' = T / b
        rounded up.
    """
    batch, groups, _, length, inside, _ = operator.bands.shape
    number = batch * groups
    if together == 1:
        diagonal = operator.bands[:, :, operator.lower].reshape(number, length, inside, inside)
        if operator.upper == 0:
            return diagonal, diagonal.new_zeros(number, length - 1, inside, inside)
        coupling = operator.bands[:, :, operator.lower + 1, : length - 1]
        return diagonal, coupling.reshape(number, length - 1, inside, inside)
    blocks = math.ceil(length / together)
    shape = (number, blocks, together, together, inside, inside)
    diagonal, coupling = operator.bands.new_zeros(shape), operator.bands.new_zeros(shape)
    for values, rows, columns in operator.diagonals():
        offset = columns.start - rows.start
        values = values.reshape(number, values.shape[2], inside, inside)
        for place in range(together):
            # Rows place, place + b, ...: their column is in the same block or in the next one.
            first = place if place >= rows.start else place + together
            taken = values[:, first - rows.start :: together]
            target = diagonal if place + offset < together else coupling
            if place + offset >= 0:
                start = first // together
                target[:, start : start + taken.shape[1], place, (place + offset) % together] = taken
    for place in range(length - (blocks - 1) * together, together):
        diagonal[:, -1, place, place].diagonal(dim1=-2, dim2=-1).fill_(1)
    merged = (number, blocks, together * inside, together * inside)
    return diagonal.transpose(3, 4).reshape(merged), coupling.transpose(3, 4).reshape(merged)[:, :-1]


def _is_regular(diagonal: Tensor, coupling: Tensor) -> Tensor:
    """Return which chains are regular, (n,), by the condition number of the matrix scaled to a unit diagonal."""
    number, length, inside, _ = diagonal.shape
    scale = diagonal.diagonal(dim1=-2, dim2=-1).rsqrt()
    diagonal = diagonal * scale[..., :, None] * scale[..., None, :]
    coupling = coupling * scale[:, :-1, :, None] * scale[:, 1:, None, :]
    reduction = CyclicReduction(diagonal, coupling)

    def solve(columns: Tensor) -> Tensor:
        parts = columns[..., 0].reshape(1, number, length, inside)
        return reduction.solve(parts).reshape(columns.shape)

    sums = diagonal.abs().sum(-1)
    sums[:, :-1] += coupling.abs().sum(-1)
    sums[:, 1:] += coupling.abs().sum(-2)
    inverse = inverse_norm(solve, solve, scale.flatten(1))
    return 1 / (sums.amax((-2, -1)) * inverse) > singular_level(diagonal.dtype)


def _band_storage(operator: Banded, chains: Tensor) -> tuple[Tensor, int, int]:
    """Return the chains numbered by ``chains`` in LAPACK's storage (n, W', T s), entries below, entries above."""
    length, inside = operator.bands.shape[3:5]
    reach = min(operator.lower, length - 1), min(operator.upper, length - 1)
    lower, upper = (places * inside + inside - 1 for places in reach)
    bands = operator.bands.flatten(0, 1)[chains]
    band = bands.new_zeros(len(chains), lower + 1 + upper, length * inside)
    entries = torch.arange(inside, device=bands.device)
    places = torch.arange(length, device=bands.device)
    for _, rows, columns in operator.diagonals():
        offset = columns.start - rows.start
        row = places[rows, None, None] * inside + entries[:, None]
        column = places[columns, None, None] * inside + entries
        band[:, upper + row - column, column.expand(-1, inside, -1)] = bands[:, operator.lower + offset, rows]
    return band, lower, upper


def chain_cost(operator: Banded) -> Cost:
    """Return the cost of a ``ChainFactorization`` that finds every symmetric chain definite, and of one solve."""
    together = places_together(operator)
    inside, item = operator.bands.shape[-1] * together, operator.dtype.itemsize
    chains = operator.batch * operator.groups
    blocks = math.ceil(operator.length / together)
    if operator.symmetric:
        own = cyclic_cost(chains, blocks, inside, item)
        # Places taken together are written down twice, once zero and once sorted by block.
        formed = 0 if together == 1 else chains * blocks * inside**2 * item
        return own + Cost(0, 6 * formed, 4 * formed)
    # LAPACK: 2 l (l + u) operations a row, with l entries below the diagonal and u above, and 4 l + 2 u to solve.
    block = operator.bands.shape[-1]
    below, above = (
        min(reach, operator.length - 1) * block + block - 1 for reach in (operator.lower, operator.upper)
    )
    rows, stored = chains * operator.length * block, 2 * below + above + 1
    flops = rows * (2 * below * (below + above) + 4 * below + 2 * above + 1)
    # one call of LAPACK to factor a chain, one to solve, and what Python does around them
    return Cost(flops, 12 * rows * stored * item, 4 * rows * stored * item, 30 * chains)


class Tridiagonal(LinearSolver):
    """Block cyclic reduction: O(log T) operations on all chains of all samples, linear in the number of places."""

    name: ClassVar[str] = "tridiagonal"

    def reject(self, operator: LinearOperator) -> str | None:
        """Refuse other kinds, and bands that reach further than one place."""
        if not isinstance(operator, Banded):
            return f"the matrix is {operator.kind}, not banded"
        if max(operator.lower, operator.upper) > 1:
            return f"the band reaches {max(operator.lower, operator.upper)} places, not 1"
        return None

    def cost(self, operator: LinearOperator) -> Cost:
        """12 s^3 flops a place to factor and 12 s^2 to solve; LAPACK's pivoted LU where the matrix is not symmetric."""
        assert isinstance(operator, Banded)
        return chain_cost(operator)

    def _factor(self, operator: LinearOperator) -> Factorization:
        assert isinstance(operator, Banded)
        return ChainFactorization(operator)
