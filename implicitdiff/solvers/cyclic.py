"""Block cyclic reduction: every other place of a chain is eliminated at once, log2(T) times.

In: symmetric block tridiagonal chains, expected to be positive definite. Out: ``CyclicReduction``, the Cholesky
factorisation in that order, and the size of its pivots. Next file: ``band_lu.py``, for chains that are not definite.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from implicitdiff.solvers.base import Cost

UNROLLED = 4
"""Blocks up to this size are multiplied and factored entry by entry over all places at once: 2 to 5 times faster than
a batch of small matrices for 10^4 places on a CPU, equal at 10^3."""

DENSE_ENTRIES = 1024
"""Chains are finished as dense blocks once these have no more entries in all: five levels less for a single chain."""


@dataclass(frozen=True)
class Level:
    """What is kept of one elimination: J = L^-1 with D = L L' at the odd places, and -J times their couplings.

    Attributes:
        root: J, (N, n, s, s)
        before: -J C' for the coupling C with the even place before, (N, n, s, s)
        after: -J C for the coupling with the even place after, (N, n or n - 1, s, s); the last may have none.
    """

    root: Tensor
    before: Tensor
    after: Tensor


class CyclicReduction:
    """A = L L' for N chains of T blocks, eliminated in the order odd places, odd places of what is left, and so on.

    Eliminating the odd place o between a and b leaves, with X = J C_ao' and Y = J C_ob, J = chol(D_o)^-1:
    D_a - X'X, D_b - Y'Y and the coupling C_ab = -X'Y, again block tridiagonal. As any Cholesky factorisation this is
    stable exactly where A is positive definite, which the pivots prove; elsewhere NaN or bad pivots come out. Chains
    never mix. About 12 s^3 flops a place to factor, 12 s^2 to solve, in O(log T) operations.
    Source: D. Heller, Some aspects of the cyclic reduction algorithm for block tridiagonal linear systems, 1976.

    Attributes:
        smallest: (N,), the smallest pivot over the diagonal entry it came from; not positive, or NaN, where A is not
            definite.
    """

    def __init__(self, diagonal: Tensor, coupling: Tensor) -> None:
        """Factor.

        Args:
            diagonal: (N, T, s, s), the blocks on the diagonal.
            coupling: (N, T - 1, s, s), the blocks in row t and column t + 1.
        """
        diagonal, coupling = places_last(diagonal, 2), places_last(coupling, 2)
        original = diagonal.diagonal(dim1=-2, dim2=-1).abs()
        # The couplings are kept negated: then -X'Y negated is a product of two negated factors, without a sign.
        coupling = -coupling
        ratios = []
        self._levels: list[Level] = []
        while not ends_dense(*diagonal.shape[:3]):
            root, pivots = inverse_root(diagonal[:, 1::2])
            ratios.append((pivots / original[:, 1::2]).amin((-2, -1)))
            before = times(root, coupling[:, 0::2].mT)
            after = times(root[:, : (diagonal.shape[1] - 1) // 2], coupling[:, 1::2])
            diagonal, original = diagonal[:, 0::2].clone(), original[:, 0::2]
            add_product(diagonal[:, : before.shape[1]], before.mT, before, sign=-1)
            add_product(diagonal[:, 1 : 1 + after.shape[1]], after.mT, after, sign=-1)
            coupling = times(before[:, : after.shape[1]].mT, after)
            self._levels.append(Level(root, before, after))
        # Each level takes some 20 operations whatever its length, so the last few places are one dense block.
        self._root, pivots = inverse_root(assembled(diagonal, coupling))
        ratios.append((pivots / original.flatten(1)).amin(-1))
        self.smallest = torch.stack(ratios).amin(0)

    def solve(self, rhs: Tensor) -> Tensor:
        """Return the solutions (R, N, T, s) for right-hand sides (R, N, T, s)."""
        # Small blocks: right-hand sides are one more axis in front; large ones: columns of a matrix product.
        small = rhs.shape[-1] <= UNROLLED
        rhs = places_last(rhs, 1)[..., None] if small else rhs.movedim(0, -1)
        kept = []
        for level in self._levels:
            half = times(level.root, rhs[..., 1::2, :, :])
            rhs = rhs[..., 0::2, :, :].clone()
            count = level.after.shape[1]
            add_product(rhs[..., : half.shape[-3], :, :], level.before.mT, half)
            add_product(rhs[..., 1 : 1 + count, :, :], level.after.mT, half[..., :count, :, :])
            kept.append(half)
        solution = self._solve_rest(rhs, small)
        for level, half in zip(reversed(self._levels), reversed(kept), strict=True):
            count = level.after.shape[1]
            add_product(half, level.before, solution[..., : half.shape[-3], :, :])
            add_product(half[..., :count, :, :], level.after, solution[..., 1 : 1 + count, :, :])
            solution = interleaved(solution, times(level.root.mT, half))
        return solution[..., 0] if small else solution.movedim(-1, 0)

    def _solve_rest(self, rhs: Tensor, small: bool) -> Tensor:
        """Solve for the places left: (R, N, t, s, 1) where the blocks are small, else (N, t, s, C)."""
        columns = rhs[..., 0].movedim(0, -1) if small else rhs
        solution = times(self._root.mT, times(self._root, columns.flatten(1, 2))).reshape(columns.shape)
        return solution.movedim(-1, 0)[..., None] if small else solution


def ends_dense(chains: int, length: int, size: int) -> bool:
    """Return whether so little is left of all chains together that each is finished as one dense block."""
    return length == 1 or chains * (length * size) ** 2 <= DENSE_ENTRIES


def assembled(diagonal: Tensor, coupling: Tensor) -> Tensor:
    """Return the dense matrices (N, T s, T s) of chains whose coupling is given with its sign changed."""
    number, length, size, _ = diagonal.shape
    if length == 1:
        return diagonal[:, 0]
    dense = diagonal.new_zeros(number, length, size, length, size)
    dense.diagonal(dim1=1, dim2=3).copy_(diagonal.movedim(1, -1))
    dense[:, :-1, :, 1:].diagonal(dim1=1, dim2=3).copy_(-coupling.movedim(1, -1))
    dense[:, 1:, :, :-1].diagonal(dim1=1, dim2=3).copy_(-coupling.mT.movedim(1, -1))
    return dense.reshape(number, length * size, length * size)


def places_last(tensor: Tensor, inside: int) -> Tensor:
    """Return the tensor with its last ``inside`` axes the slowest in memory, where the blocks are small."""
    if not 1 < tensor.shape[-1] <= UNROLLED:
        return tensor
    order = tuple(range(-inside, 0))
    front = tuple(range(inside))
    return tensor.movedim(order, front).contiguous().movedim(front, order)


def interleaved(even: Tensor, odd: Tensor) -> Tensor:
    """Return the places of ``even`` and ``odd``, (..., n, s, C), in turn, laid out in memory like them."""
    *lead, places, inside, width = even.shape
    places += odd.shape[-3]
    if inside <= UNROLLED:
        whole = even.new_empty(inside, width, *lead, places).movedim((0, 1), (-2, -1))
    else:
        whole = even.new_empty(*lead, places, inside, width)
    whole[..., 0::2, :, :] = even
    whole[..., 1::2, :, :] = odd
    return whole


def times(left: Tensor, right: Tensor) -> Tensor:
    """Return left @ right block by block; small blocks entry by entry, over all places at once."""
    size = left.shape[-1]
    if size == 1:
        return left * right
    if size > UNROLLED:
        return left @ right
    product = left[..., :1] * right[..., :1, :]
    for k in range(1, size):
        product.addcmul_(left[..., k, None], right[..., k, None, :])
    return product


def add_product(target: Tensor, left: Tensor, right: Tensor, sign: int = 1) -> None:
    """Add sign left @ right to the target in place, block by block."""
    size = left.shape[-1]
    if size == 1:
        target.addcmul_(left, right, value=sign)
        return
    if size > UNROLLED:
        target.add_(left @ right, alpha=sign)
        return
    for k in range(size):
        target.addcmul_(left[..., k, None], right[..., k, None, :], value=sign)


def inverse_root(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return J = L^-1 with D = L L', (..., s, s), and the pivots L_kk^2, (..., s); NaN where D is not definite."""
    size = blocks.shape[-1]
    if size == 1:
        return blocks.rsqrt(), blocks[..., 0]
    if size > UNROLLED:
        factor, info = torch.linalg.cholesky_ex(blocks)
        identity = torch.eye(size, dtype=blocks.dtype, device=blocks.device)
        root = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)
        pivots = factor.diagonal(dim1=-2, dim2=-1).square()
        return root, torch.where((info == 0)[..., None], pivots, torch.nan)
    # Gauss' elimination of [D | I], all places at once: what becomes of I is J. Rows (s, 2 s, ...) are contiguous.
    lead = blocks.dim() - 2
    work = blocks.new_zeros(size, 2 * size, *blocks.shape[:-2])
    work[:, :size] = blocks.permute(lead, lead + 1, *range(lead))
    work.diagonal(offset=size).fill_(1)
    pivots = torch.empty_like(work[0, :size])
    for k in range(size):
        row = work[k, k : k + size + 1]
        pivots[k] = row[0]
        row *= row[0].rsqrt()
        work[k + 1 :, k : k + size + 1] -= row[1 : size - k, None] * row
    return work[:, size:].permute(*range(2, 2 + lead), 0, 1), pivots.movedim(0, -1)


DENSE_OPERATIONS = 28
"""Around the dense block at the end, counted. Each halving takes 18 with single entries, 42 and 60 with blocks."""


def cyclic_cost(chains: int, length: int, size: int, item: int) -> Cost:
    """Return the cost of factoring chains and of one right-hand side for each.

    Args:
        chains: N.
        length: T.
        size: s.
        item: bytes of an entry.
    """
    block = size * size
    root, root_moved = _root_cost(size)
    matrix, vector = _product_cost(size, size), _product_cost(size, 1)
    flops, moved = (length - 1) * block + length * size, 2 * (length - 1) * block + 2 * length * size
    kept, places, operations = 0, length, DENSE_OPERATIONS
    while not ends_dense(chains, places, size):
        odd, after = places // 2, (places - 1) // 2
        # J; then X, Y and X'Y; then what is subtracted from the two neighbours.
        flops += odd * root + (odd + 2 * after) * matrix.flops + (odd + after) * matrix.added_flops
        moved += odd * root_moved + (odd + 2 * after) * matrix.moved + (odd + after) * matrix.added_moved
        # J b and J' x; the right-hand sides of two neighbours changed, and their solutions brought back.
        flops += 2 * odd * vector.flops + 2 * (odd + after) * vector.added_flops
        moved += 2 * odd * vector.moved + 2 * (odd + after) * vector.added_moved
        kept += (2 * odd + after) * block
        places -= odd
        operations += 6 + 18 * min(size, UNROLLED)
        moved += 2 * places * (block + size) + 2 * (places + odd) * size
    root, root_moved = _root_cost(places * size)
    rest = _product_cost(places * size, 1)
    flops, moved = flops + root + 2 * rest.flops, moved + root_moved + 2 * rest.moved
    if places > 1:
        flops, moved = flops + 2 * (places - 1) * block, moved + 3 * (places * size) ** 2
        kept += 2 * (places * size) ** 2
    alive = kept + 3 * length * size + (length * block if size > 1 else 0)
    return Cost(chains * flops, chains * moved * item, chains * alive * item, operations)


@dataclass(frozen=True)
class _ProductCost:
    """Of one product of a block and a block or a vector: flops and entries moved, alone and added to something."""

    flops: int
    moved: int
    added_flops: int
    added_moved: int


def _product_cost(size: int, columns: int) -> _ProductCost:
    result, operands = size * columns, size + columns
    if size > UNROLLED:
        flops, moved = 2 * size * result, size * size + 2 * result
        return _ProductCost(flops, moved, flops + result, moved + 3 * result)
    # One term at a time: a column of the left factor and a row of the right one, added to all of the result.
    term = operands + 2 * result
    return _ProductCost((2 * size - 1) * result, size * term - result, 2 * size * result, size * term)


def _root_cost(size: int) -> tuple[int, int]:
    """Flops and entries moved of ``inverse_root`` and the ratios of its pivots, for one block."""
    if size == 1:
        return 3, 6
    if size > UNROLLED:
        return round(size**3 / 3) + size**3 + 4 * size + 1, 4 * size * size + 8 * size
    flops, moved = 2 * size, 4 * size * size + 7 * size
    for k in range(size):
        below = (size - k - 1) * (size + 1)
        flops += 1 + (size + 1) + 2 * below
        moved += 4 + 3 * (size + 1) + (size - k - 1) + 4 * below
    return flops, moved
