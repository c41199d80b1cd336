"""The table of operators: for each row an operator and its dense twin, written down entry by entry in numpy.

The twin is built from the same drawn parameters, but never by the operator's own code, so it is an oracle for
both tests/test_operators.py and tests/test_solvers.py. Fixtures are asymmetric on purpose: a dropped transpose,
a swapped factor or a permuted axis must show.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from implicitdiff.operators import (
    Block,
    BlockDiagonal,
    Dense,
    Diagonal,
    LinearOperator,
    LowRankPlusDiagonal,
    MatrixFree,
    ScaledIdentity,
    Zero,
)

BATCHES = {
    "batch 0": (0, "own"),
    "batch 1": (1, "own"),
    "batch 3": (3, "own"),
    "all shared": (1, "own"),
    "first shared": (3, "first shared"),
    "others shared": (3, "others shared"),
}
"""Batch size of the operator, and which of its parameters have batch axis 1."""

Twin = tuple[LinearOperator, np.ndarray]


class Draw:
    """Random parameters with a batch axis, some of them shared by the batch."""

    def __init__(
        self, batch: int, sharing: str = "own", dtype: torch.dtype = torch.float64, seed: int = 0
    ) -> None:
        self.batch = batch
        self.dtype = dtype
        self._sharing = sharing
        self._drawn = 0
        self._generator = torch.Generator().manual_seed(seed)

    def _axis(self) -> int:
        self._drawn += 1
        shared = {"own": False, "first shared": self._drawn == 1, "others shared": self._drawn > 1}[
            self._sharing
        ]
        return 1 if shared else self.batch

    def normal(self, *shape: int) -> Tensor:
        """Normal entries, (B or 1, *shape)."""
        values = torch.randn(self._axis(), *shape, generator=self._generator, dtype=torch.float64)
        return values.to(self.dtype)

    def positive(self, *shape: int) -> Tensor:
        """Entries between 0.5 and 2."""
        values = torch.rand(self._axis(), *shape, generator=self._generator, dtype=torch.float64)
        return (0.5 + 1.5 * values).to(self.dtype)

    def signed(self, *shape: int) -> Tensor:
        """Entries of both signs, between 0.5 and 2 in size."""
        values = self.positive(*shape)
        flip = torch.rand(shape, generator=self._generator, dtype=torch.float64) < 0.5
        flip.view(-1)[:1] = True
        return torch.where(flip, -values, values)

    def definite(self, *shape: int) -> Tensor:
        """Positive definite matrices, shape (..., s): (B or 1, ..., s, s), eigenvalues of 0.5 and above."""
        size = shape[-1]
        root = self.normal(*shape, size + 2)
        return root @ root.mT / size + 0.5 * torch.eye(size, dtype=self.dtype)


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        name: what is special about it.
        build: draws the parameters, returns the operator and its twin (B, m, m).
        singular: whether the matrices are singular, with a kernel that the operator states or that a solver
            has to find; solvers are then compared with the pseudo-inverse.
    """

    name: str
    build: Callable[[Draw], Twin]
    singular: bool = False


def array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().to(torch.float64).numpy()


def batched(*arrays: np.ndarray) -> list[np.ndarray]:
    """Repeat shared arrays (axis 0 of size 1) to the common batch."""
    batch = next((a.shape[0] for a in arrays if a.shape[0] != 1), 1)
    return [np.broadcast_to(a, (batch, *a.shape[1:])) for a in arrays]


def zero(draw: Draw) -> Twin:
    return Zero(4, draw.batch, draw.dtype, torch.device("cpu")), np.zeros((draw.batch, 4, 4))


def scaled_identity(draw: Draw) -> Twin:
    scale = draw.signed()
    return ScaledIdentity(scale, 3), np.stack([s * np.eye(3) for s in array(scale)] or [np.zeros((3, 3))])[
        : len(scale)
    ]


def diagonal(draw: Draw) -> Twin:
    entries = draw.signed(5)
    twin = np.zeros((len(entries), 5, 5))
    for b, row in enumerate(array(entries)):
        twin[b] = np.diag(row)
    return Diagonal(entries), twin


def block_diagonal(
    shape: tuple[int, ...], axes: tuple[int, ...], *, definite: bool = True, symmetric: bool = True
):
    """Blocks numbered by ``axes`` of ``shape``; the twin couples two entries when their axes' indices agree."""

    def build(draw: Draw) -> Twin:
        inside = [axis for axis in range(len(shape)) if axis not in axes]
        number = int(np.prod([shape[a] for a in axes], dtype=int))
        size = int(np.prod([shape[a] for a in inside], dtype=int))
        blocks = draw.definite(number, size) if definite else draw.normal(number, size, size)
        if symmetric and not definite:
            blocks = blocks + blocks.mT
        twin = np.zeros((len(blocks), number * size, number * size))
        values = array(blocks)
        for row in np.ndindex(*shape):
            for column in np.ndindex(*shape):
                if all(row[a] == column[a] for a in axes):
                    which = (
                        np.ravel_multi_index([row[a] for a in axes], [shape[a] for a in axes]) if axes else 0
                    )
                    i = (
                        np.ravel_multi_index([row[a] for a in inside], [shape[a] for a in inside])
                        if inside
                        else 0
                    )
                    j = (
                        np.ravel_multi_index([column[a] for a in inside], [shape[a] for a in inside])
                        if inside
                        else 0
                    )
                    place = np.ravel_multi_index(row, shape), np.ravel_multi_index(column, shape)
                    twin[:, place[0], place[1]] = values[:, which, i, j]
        return BlockDiagonal(blocks, shape, axes, symmetric=symmetric), twin

    return build


def low_rank(
    size: int, rank: int, weights: str, *, scalar: bool = False, right: bool = False, zeros: int = 0
):
    """weights: "positive", "mixed", "small negative" (still definite) or "some zero"; zeros: entries 0 in D."""

    def build(draw: Draw) -> Twin:
        d = draw.positive(1 if scalar else size)
        left = draw.normal(size, rank)
        c = draw.signed(rank) if weights in ("mixed", "some zero") else draw.positive(rank)
        if weights == "some zero":
            c[:, ::2] = 0
        if weights == "small negative":
            c = -0.02 * c
        if zeros:
            d[:, :zeros] = 0
        other = draw.normal(size, rank) if right else None
        v = left if other is None else other
        arrays = batched(array(d), array(left), array(c), array(v))
        twin = np.zeros((len(arrays[0]), size, size))
        for b, (diag, factor, weight, second) in enumerate(zip(*arrays, strict=True)):
            twin[b] = np.diag(np.broadcast_to(diag, (size,)))
            for k in range(rank):
                twin[b] += weight[k] * np.outer(factor[:, k], second[:, k])
        return LowRankPlusDiagonal(d, left, c, other), twin

    return build


def assemble(parts: list[list[np.ndarray | None]], sizes: tuple[int, ...]) -> np.ndarray:
    """Write a grid of batched blocks into one array (B, m, m)."""
    batch = next((p.shape[0] for row in parts for p in row if p is not None and p.shape[0] != 1), 1)
    twin = np.zeros((batch, sum(sizes), sum(sizes)))
    starts = np.concatenate([[0], np.cumsum(sizes)])
    for i, row in enumerate(parts):
        for j, part in enumerate(row):
            if part is not None:
                twin[:, starts[i] : starts[i + 1], starts[j] : starts[j + 1]] = part
    return twin


def diagonals(values: Tensor) -> np.ndarray:
    return array(values)[:, :, None] * np.eye(values.shape[-1])


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
    """Three diagonal corners, the middle one coupled to both others: two remain coupled through it, or one stays."""
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


def dense(size: int, kind: str):
    """kind: "definite", "indefinite", "unsymmetric" or "singular" (rank m - 1, nothing stated)."""

    def build(draw: Draw) -> Twin:
        matrix = draw.normal(size, size)
        if kind == "definite":
            matrix = draw.definite(size)
        elif kind == "indefinite":
            matrix = matrix + matrix.mT
        elif kind == "singular":
            root = draw.normal(size, size - 1)
            matrix = root @ root.mT
        return Dense(matrix, symmetric=kind != "unsymmetric"), array(matrix)

    return build


def matrix_free(symmetric: bool):
    def build(draw: Draw) -> Twin:
        matrix = draw.definite(4) if symmetric else draw.normal(4, 4)

        def product(vector: Tensor) -> Tensor:
            return (matrix @ vector[..., None])[..., 0]

        def transposed(vector: Tensor) -> Tensor:
            return (matrix.mT @ vector[..., None])[..., 0]

        operator = MatrixFree(
            product, 4, len(matrix), draw.dtype, torch.device("cpu"), None if symmetric else transposed
        )
        return operator, array(matrix)

    return build


TABLE: tuple[Row, ...] = (
    Row("zero", zero, singular=True),
    Row("scaled identity", scaled_identity),
    Row("diagonal", diagonal),
    Row("rows of a matrix", block_diagonal((3, 4), (0,))),
    Row("columns of a matrix", block_diagonal((3, 4), (1,))),
    Row("two block axes, reversed", block_diagonal((2, 3, 2), (2, 0))),
    Row("blocks of size 1", block_diagonal((3,), (0,))),
    Row("a single block", block_diagonal((2, 2), ())),
    Row("indefinite blocks", block_diagonal((2, 3), (0,), definite=False)),
    Row("unsymmetric blocks", block_diagonal((3, 2), (1,), definite=False, symmetric=False)),
    Row("low rank", low_rank(6, 2, "positive")),
    Row("low rank, weights of both signs", low_rank(6, 3, "mixed")),
    Row("low rank, some weights zero", low_rank(6, 4, "some zero")),
    Row("low rank, negative weights, definite", low_rank(6, 4, "small negative", scalar=True)),
    Row("rank 1 on a multiple of the identity", low_rank(5, 1, "positive", scalar=True)),
    Row("rank 0", low_rank(4, 0, "positive")),
    Row("rank above the size", low_rank(4, 7, "mixed")),
    Row("different factors", low_rank(6, 2, "mixed", right=True)),
    Row("zeros on the diagonal", low_rank(6, 3, "mixed", zeros=2)),
    Row("size 1, rank 1", low_rank(1, 1, "positive")),
    Row("two corners, the first larger", two_corners(6, 3)),
    Row("two corners, the second larger", two_corners(3, 6)),
    Row("two corners of equal size", two_corners(4, 4)),
    Row("two corners of size 1", two_corners(1, 1)),
    Row("two corners, indefinite", two_corners(5, 3, sign=-1.0)),
    Row("an identity corner", two_corners(4, 3, identity=True)),
    Row("two uncoupled corners round a dense block", three_blocks),
    Row("a chain of corners", chain_of_corners),
    Row("a remainder of two kinds", coupled_remainder),
    Row("corners without coupling", only_corners),
    Row("unsymmetric grid", unsymmetric_grid),
    Row("KKT matrix", kkt),
    Row("transport 5 x 3", transport(5, 3), singular=True),
    Row("transport 3 x 5", transport(3, 5), singular=True),
    Row("transport 4 x 4", transport(4, 4), singular=True),
    Row("transport 1 x 1", transport(1, 1), singular=True),
    Row("three marginals", three_marginals, singular=True),
    Row("dense", dense(5, "definite")),
    Row("dense of size 1", dense(1, "definite")),
    Row("dense, indefinite", dense(5, "indefinite")),
    Row("dense, unsymmetric", dense(5, "unsymmetric")),
    Row("dense, singular", dense(5, "singular"), singular=True),
    Row("matrix-free", matrix_free(True)),
    Row("matrix-free, unsymmetric", matrix_free(False)),
)
BY_NAME = {row.name: row for row in TABLE}
