"""Rows of the table of operators that are grids of blocks.

In: draws. Out: builders of ``Block`` operators and their twins. Next: tests/operator_cases.py, the table.
"""

import numpy as np
import torch

from implicitdiff.operators import (
    Block,
    BlockDiagonal,
    Dense,
    Diagonal,
    LowRankPlusDiagonal,
    ScaledIdentity,
    Zero,
)
from tests.operator_draws import Draw, Twin, array, assemble, batched, diagonals


def two_corners(rows: int, columns: int, *, sign: float = 1.0, identity: bool = False):
    """Two diagonal corners coupled by a full block; diagonally dominant, so definite for sign = 1."""

    def build(draw: Draw) -> Twin:
        first = draw.positive() if identity else draw.positive(rows)
        second, coupling = sign * draw.positive(columns), 0.5 / (rows + columns) * draw.normal(rows, columns)
        operator = Block(
            (
                (ScaledIdentity(first, rows) if identity else Diagonal(first), coupling),
                (coupling.mT, Diagonal(second)),
            ),
            (rows, columns),
        )
        corner = diagonals(first[:, None].expand(-1, rows) if identity else first)
        return operator, assemble(
            [[corner, array(coupling)], [array(coupling).swapaxes(1, 2), diagonals(second)]], (rows, columns)
        )

    return build


def three_blocks(draw: Draw) -> Twin:
    """Two uncoupled diagonal corners at both ends, a dense one between: the pair is eliminated together."""
    sizes = (3, 2, 4)
    first, last, middle = draw.positive(3), draw.positive(4), 4 * draw.definite(2)
    left, right = 0.3 * draw.normal(3, 2), 0.3 * draw.normal(2, 4)
    operator = Block(
        (
            (Diagonal(first), left, None),
            (left.mT, Dense(middle), right),
            (None, right.mT, Diagonal(last)),
        ),
        sizes,
    )
    twin = assemble(
        [
            [diagonals(first), array(left), None],
            [array(left).swapaxes(1, 2), array(middle), array(right)],
            [None, array(right).swapaxes(1, 2), diagonals(last)],
        ],
        sizes,
    )
    return operator, twin


def chain_of_corners(draw: Draw) -> Twin:
    """Three diagonal corners, the middle one coupled to both others."""
    sizes = (2, 5, 3)
    corners = [draw.positive(size) for size in sizes]
    a, b = 0.2 * draw.normal(2, 5), 0.2 * draw.normal(5, 3)
    operator = Block(
        (
            (Diagonal(corners[0]), a, None),
            (a.mT, Diagonal(corners[1]), b),
            (None, b.mT, Diagonal(corners[2])),
        ),
        sizes,
    )
    middle = [array(a).swapaxes(1, 2), diagonals(corners[1]), array(b)]
    twin = assemble(
        [
            [diagonals(corners[0]), array(a), None],
            middle,
            [None, array(b).swapaxes(1, 2), diagonals(corners[2])],
        ],
        sizes,
    )
    return operator, twin


def coupled_remainder(draw: Draw) -> Twin:
    """One diagonal corner; what remains is a low-rank and a block-diagonal corner, coupled to each other."""
    sizes = (5, 3, 4)
    d, blocks, left, weights = draw.positive(5), draw.definite(2, 2), draw.normal(3, 1), draw.positive(1)
    base, a, b, c = draw.positive(3), *(0.1 * draw.normal(*shape) for shape in ((5, 3), (5, 4), (3, 4)))
    operator = Block(
        (
            (Diagonal(d), a, b),
            (a.mT, LowRankPlusDiagonal(base, left, weights), c),
            (b.mT, c.mT, BlockDiagonal(blocks, (2, 2), (1,))),
        ),
        sizes,
    )
    arrays = batched(array(base), array(left), array(weights))
    low = np.stack(
        [np.diag(x) + w * np.outer(y, y) for x, y, w in zip(*arrays, strict=True)] or [np.zeros((3, 3))]
    )
    low = low[: len(arrays[0])]
    interleaved = np.zeros((len(blocks), 4, 4))
    for group in range(2):
        for i in range(2):
            for j in range(2):
                interleaved[:, 2 * i + group, 2 * j + group] = array(blocks)[:, group, i, j]
    grid = [
        [diagonals(d), array(a), array(b)],
        [array(a).swapaxes(1, 2), low, array(c)],
        [array(b).swapaxes(1, 2), array(c).swapaxes(1, 2), interleaved],
    ]
    return operator, assemble(grid, sizes)


def only_corners(draw: Draw) -> Twin:
    """No coupling at all: everything is eliminated and nothing remains."""
    first, second = draw.positive(3), draw.signed(2)
    operator = Block(((Diagonal(first), None), (None, Diagonal(second))), (3, 2))
    return operator, assemble([[diagonals(first), None], [None, diagonals(second)]], (3, 2))


def unsymmetric_grid(draw: Draw) -> Twin:
    first, middle = draw.signed(4), 3 * draw.definite(2)
    upper, lower = 0.3 * draw.normal(4, 2), 0.3 * draw.normal(2, 4)
    operator = Block(((Diagonal(first), upper), (lower, Dense(middle))), (4, 2), symmetric=False)
    return operator, assemble([[diagonals(first), array(upper)], [array(lower), array(middle)]], (4, 2))


def kkt(draw: Draw) -> Twin:
    """[[H, -A'], [-A, 0]] with H diagonal: indefinite by construction, regular."""
    hessian, jacobian = draw.positive(5), draw.normal(2, 5)
    zero_corner = Zero(2, 1, draw.dtype, torch.device("cpu"))
    operator = Block(((Diagonal(hessian), -jacobian.mT), (-jacobian, zero_corner)), (5, 2))
    parts = [[diagonals(hessian), -array(jacobian).swapaxes(1, 2)], [-array(jacobian), None]]
    return operator, assemble(parts, (5, 2))


def transport(rows: int, columns: int):
    """The Schur complement of both marginals of a transport plan: singular, the kernel (1, -1) is stated."""

    def build(draw: Draw) -> Twin:
        plan = draw.positive(rows, columns)
        vector = torch.cat([torch.ones(rows), -torch.ones(columns)])
        operator = Block(
            ((Diagonal(plan.sum(2)), plan), (plan.mT, Diagonal(plan.sum(1)))), (rows, columns), (vector,)
        )
        parts = [[diagonals(plan.sum(2)), array(plan)], [array(plan).swapaxes(1, 2), diagonals(plan.sum(1))]]
        return operator, assemble(parts, (rows, columns))

    return build


def single_block(draw: Draw) -> Twin:
    """A dense matrix whose kernel is stated: rows that sum to zero."""
    root = draw.normal(5, 6)
    root = root - root.mean(1, keepdim=True)
    matrix = root @ root.mT
    operator = Block(((Dense(matrix),),), (5,), (torch.ones(5),))
    return operator, array(matrix)


def three_marginals(draw: Draw) -> Twin:
    """Three marginals of a tensor: two null vectors, given as plain numbers."""
    sizes = (3, 2, 4)
    plan = draw.positive(*sizes)
    marginals = [plan.sum((2, 3)), plan.sum((1, 3)), plan.sum((1, 2))]
    pairs = {(0, 1): plan.sum(3), (0, 2): plan.sum(2), (1, 2): plan.sum(1)}
    grid = [[None] * 3 for _ in range(3)]
    parts: list[list[np.ndarray | None]] = [[None] * 3 for _ in range(3)]
    for i in range(3):
        grid[i][i], parts[i][i] = Diagonal(marginals[i]), diagonals(marginals[i])
    for (i, j), pair in pairs.items():
        grid[i][j], grid[j][i] = pair, pair.mT
        parts[i][j], parts[j][i] = array(pair), array(pair).swapaxes(1, 2)
    vectors = ([1.0] * 3 + [-1.0] * 2 + [0.0] * 4, [1.0] * 3 + [0.0] * 2 + [-1.0] * 4)
    return Block(tuple(map(tuple, grid)), sizes, vectors), assemble(parts, sizes)
