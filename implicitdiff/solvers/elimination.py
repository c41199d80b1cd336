"""Elimination of a diagonal corner of a symmetric grid, for rows of right-hand sides: what the direct and the iterative
Schur solvers share.

In: a ``Block`` and a ``Split``. Out: ``Elimination``. Next files: ``schur.py``, ``schur_cg.py``.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

import torch
from torch import Tensor

from implicitdiff.operators import Block, Diagonal, LinearOperator, ScaledIdentity
from implicitdiff.operators.products import rows_times
from implicitdiff.solvers.base import from_rows, to_rows
from implicitdiff.solvers.divide import diagonal_entries
from implicitdiff.solvers.kernel import Kernel


@dataclass(frozen=True)
class Split:
    """Which rows of the grid are eliminated and which remain.

    Attributes:
        eliminated: numbers of blocks that together form a diagonal matrix.
        remaining: the others.
    """

    eliminated: tuple[int, ...]
    remaining: tuple[int, ...]


def split_blocks(operator: Block) -> Split | None:
    """Return the split that eliminates the largest jointly diagonal side, None if no corner is diagonal.

    Several corners are jointly diagonal when each is and no two are coupled. Of equally large sets the first
    in the order of the grid is taken, so that the choice is a function of the operator alone.
    """
    candidates = tuple(i for i, c in enumerate(operator.corners) if isinstance(c, ScaledIdentity | Diagonal))
    return _largest_split(operator.sizes, candidates, tuple((i, j) for i, j, _ in operator.couplings))


@lru_cache(maxsize=256)
def _largest_split(
    sizes: tuple[int, ...], candidates: tuple[int, ...], couplings: tuple[tuple[int, int], ...]
) -> Split | None:
    coupled = {frozenset(pair) for pair in couplings}
    best: tuple[int, ...] = ()
    largest = 0
    # 2^n sets: a grid has as many rows as the problem has constraints, a handful. Beyond 12 only single
    # corners.
    most = len(candidates) if len(candidates) <= 12 else 1
    for count in range(1, most + 1):
        for chosen in combinations(candidates, count):
            size = sum(sizes[i] for i in chosen)
            if size > largest and not any(frozenset(pair) in coupled for pair in combinations(chosen, 2)):
                best, largest = chosen, size
    if not best:
        return None
    return Split(best, tuple(i for i in range(len(sizes)) if i not in best))


def corner_entries(corner: LinearOperator) -> Tensor:
    """Return the diagonal (B or 1, size or 1) of a corner that is known to be diagonal."""
    entries = diagonal_entries(corner)
    assert entries is not None
    return entries


class Elimination:
    """[[D, E], [E', G]] with D diagonal: S = G - E' D^-1 E is left for the remaining blocks.

    Nothing is checked: a zero or infinite entry of D shows in ``inverse``.

    Attributes:
        inverse: for each eliminated block the inverse of its diagonal, (B or 1, size or 1).
        couplings: remaining block, eliminated block, and the tensor (B or 1, ., .) between them.
        kernel: what was proved of the kernel of the whole matrix.
        own_kernel: its part in the remaining blocks, the kernel of S.
    """

    def __init__(self, operator: Block, split: Split) -> None:
        """Invert D."""
        self.operator, self.split, self.batch = operator, split, operator.batch
        self.inverse = {e: corner_entries(operator.corners[e]).reciprocal() for e in split.eliminated}
        self.couplings = [
            (i, j, block)
            for i, j, block in operator.couplings
            if i in split.remaining and j in split.eliminated
        ]
        self.kernel = Kernel.of(operator)
        self.own_kernel = None if self.kernel is None else self.kernel.restrict(operator, split.remaining)

    def reduce(self, rhs: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the consistent part of the right-hand sides by blocks, and what they leave for S: (B, R, .)."""
        operator, split = self.operator, self.split
        batch = rhs.shape[-2] if self.batch == 1 else self.batch
        rows = to_rows(rhs.expand(*rhs.shape[:-2], batch, operator.size), self.batch)
        if self.kernel is not None:
            rows = self.kernel.project(rows)
        parts = list(rows.split(operator.sizes, dim=-1))
        solved = {e: parts[e] * self.inverse[e][:, None] for e in split.eliminated}
        left = {i: parts[i] for i in split.remaining}
        for i, e, block in self.couplings:
            left[i] = minus_product(left[i], solved[e], block.mT)
        return parts, joined([left[i] for i in split.remaining])

    def product(self, rows: Tensor) -> Tensor:
        """Return S times rows (B, R, r), for remaining blocks that are diagonal."""
        operator, remaining = self.operator, self.split.remaining
        parts = dict(zip(remaining, rows.split([operator.sizes[i] for i in remaining], dim=-1), strict=True))
        images = {i: part * corner_entries(operator.corners[i])[:, None] for i, part in parts.items()}
        for i, j, block in operator.couplings:
            if i in images and j in images:
                images[i] = images[i] + rows_times(parts[j], block.mT)
        for e, inverse in self.inverse.items():
            around = [(i, block) for i, other, block in self.couplings if other == e]
            inner = [rows_times(parts[i], block) for i, block in around]
            if inner:
                spread = torch.stack(inner).sum(0) * inverse[:, None]
                for i, block in around:
                    images[i] = minus_product(images[i], spread, block.mT)
        return joined([images[i] for i in remaining])

    def substitute(self, parts: list[Tensor], answer: Tensor, shape: torch.Size) -> Tensor:
        """Return the whole solution, of ``shape``, from S^-1 of what was left."""
        operator, split = self.operator, self.split
        widths = [operator.sizes[i] for i in split.remaining]
        blocks = dict(zip(split.remaining, answer.split(widths, dim=-1), strict=True))
        for e in split.eliminated:
            own = parts[e]
            for i, other, block in self.couplings:
                if other == e:
                    own = minus_product(own, blocks[i], block)
            blocks[e] = own * self.inverse[e][:, None]
        solution = torch.cat([blocks[i] for i in range(len(operator.sizes))], dim=-1)
        return from_rows(solution if self.kernel is None else self.kernel.project(solution), shape)


class PairElimination:
    """The same for two diagonal corners and their coupling, with as little as possible around the products.

    Attributes:
        own, other: numbers of the remaining and of the eliminated block.
        corner: the diagonal of the remaining block, (B or 1, r or 1).
        coupling: (B, r, e), its rows those of the remaining block.
        inverse: the inverse of D, (B or 1, e or 1).
    """

    def __init__(self, operator: Block) -> None:
        """Eliminate the larger block; the first of two equals."""
        self.operator, self.batch = operator, operator.batch
        self.other = 0 if operator.sizes[0] >= operator.sizes[1] else 1
        self.own = 1 - self.other
        corners, blocks = operator.corners, operator.blocks
        self.corner, eliminated = corner_entries(corners[self.own]), corner_entries(corners[self.other])
        coupling = blocks[self.own][self.other]
        assert isinstance(coupling, Tensor)
        self.coupling, self.inverse = coupling, eliminated.reciprocal()
        self._spread = self.inverse[:, None]
        self.kernel = Kernel.of(operator)
        self.own_kernel = None if self.kernel is None else self.kernel.restrict(operator, (self.own,))

    def reduce(self, rhs: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the right-hand sides of the eliminated block, and what is left for S: (B, R, .)."""
        if self.batch != 1 and rhs.shape[-2] != self.batch:
            rhs = rhs.expand(*rhs.shape[:-2], self.batch, self.operator.size)
        rows = to_rows(rhs, self.batch)
        if self.kernel is not None:
            rows = self.kernel.project(rows)
        parts = torch.split_with_sizes(rows, self.operator.sizes, -1)
        other = parts[self.other]
        return [other], minus_product(parts[self.own], other * self._spread, self.coupling.mT)

    def substitute(self, parts: list[Tensor], answer: Tensor, shape: torch.Size) -> Tensor:
        """Return the whole solution, of ``shape``, from S^-1 of what was left."""
        eliminated = minus_product(parts[0], answer, self.coupling).mul_(self._spread)
        solution = torch.cat((eliminated, answer) if self.other == 0 else (answer, eliminated), -1)
        return from_rows(solution if self.kernel is None else self.kernel.project(solution), shape)

    def product(self, rows: Tensor) -> Tensor:
        """Return S times rows (B, R, r)."""
        inner = rows_times(rows, self.coupling).mul_(self._spread)
        return (rows * self.corner[:, None]).sub_(rows_times(inner, self.coupling.mT))


def is_pair(operator: Block) -> bool:
    """Whether the grid is one for ``PairElimination``: two diagonal corners and their coupling, symmetric, none empty.

    A coupling that is shared by samples whose corners are not would be scaled once for each of them.
    """
    blocks = operator.blocks
    if len(blocks) != 2 or not operator.symmetric or not operator.size or not operator.batch:
        return False
    coupling = blocks[0][1]
    diagonal = all(type(corner) is Diagonal for corner in operator.corners)
    return diagonal and isinstance(coupling, Tensor) and coupling.shape[0] == operator.batch


def joined(parts: list[Tensor]) -> Tensor:
    """Return the parts (B, R, .) side by side; a single one as it is."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def minus_product(rows: Tensor, factor: Tensor, matrix: Tensor) -> Tensor:
    """Return rows - factor @ matrix for rows (B, R, q), factor (B, R, p), matrix (B or 1, p, q)."""
    return rows - rows_times(factor, matrix)
