"""The table of operators: for each row an operator and its dense twin, written down entry by entry in numpy.

The twin is built from the same drawn parameters, but never by the operator's own code, so it is an oracle
for the tests of the operators and of the solvers. Fixtures are asymmetric on purpose: a dropped transpose, a
swapped factor or a permuted axis must show. Next: tests/test_operators.py.
"""

import numpy as np
import torch
from torch import Tensor

from implicitdiff.operators import (
    BlockDiagonal,
    Dense,
    Diagonal,
    LowRankPlusDiagonal,
    MatrixFree,
    ScaledIdentity,
    Zero,
)
from tests.operator_bands import banded
from tests.operator_draws import Draw, Row, Twin, array, batched
from tests.operator_grids import (
    chain_of_corners,
    coupled_remainder,
    kkt,
    only_corners,
    single_block,
    three_blocks,
    three_marginals,
    transport,
    two_corners,
    unsymmetric_grid,
)
from tests.operator_products import kronecker
from tests.operator_sparse import RING, STAR, TREE, grouped, sparse, updated


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
    """Blocks numbered by ``axes`` of ``shape``; the twin couples entries that agree in those axes."""

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
    """weights: "positive", "mixed", "small negative" (still definite), "some zero"; zeros: how many in D."""

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
    Row("a factor and an identity", kronecker((3, 4), ((0,),))),
    Row("two factors, axes crossed", kronecker((2, 3, 2), ((2, 0), (1,)))),
    Row("skew factors", kronecker((2, 3, 2), ((0,), (2,)), kind="skew")),
    Row("unsymmetric factors", kronecker((3, 2), ((1,), (0,)), kind="unsymmetric")),
    Row("tridiagonal", banded((7,), 0, (), 1, 1)),
    Row("tridiagonal down the columns", banded((5, 3), 0, (1,), 1, 1)),
    Row("tridiagonal, two chain axes, reversed", banded((2, 4, 3), 1, (2, 0), 1, 1)),
    Row("tridiagonal, indefinite", banded((4, 2), 0, (1,), 1, 1, "indefinite")),
    Row("tridiagonal, unsymmetric", banded((2, 5), 1, (0,), 1, 1, "unsymmetric")),
    Row("block tridiagonal", banded((5, 2), 0, (), 1, 1)),
    Row("block tridiagonal, chains in front", banded((2, 3, 2), 2, (0,), 1, 1)),
    Row("block tridiagonal, unsymmetric", banded((2, 4), 1, (), 1, 1, "unsymmetric")),
    Row("a chain of one place", banded((1, 3), 0, (), 1, 1)),
    Row("a band of width 0", banded((3, 2), 0, (), 0, 0)),
    Row("half-width 2", banded((7,), 0, (), 2, 2)),
    Row("half-width 2 down the columns", banded((6, 2), 0, (1,), 2, 2)),
    Row("half-width 3 of blocks", banded((2, 5), 1, (), 3, 3)),
    Row("half-width beyond the chain", banded((2, 3), 1, (0,), 4, 4)),
    Row("half-width 2, indefinite", banded((6,), 0, (), 2, 2, "indefinite")),
    Row("a wider band below, unsymmetric", banded((5, 2), 0, (1,), 2, 1, "unsymmetric")),
    Row("differences along a chain", banded((5, 2), 0, (1,), 1, 1, "singular"), singular=True),
    Row("a ring", sparse(6, RING)),
    Row("a star, indefinite", sparse(5, STAR, "indefinite")),
    Row("a tree, unsymmetric", sparse(7, TREE, "unsymmetric")),
    Row("a graph for each sample", sparse(7, TREE, own=True)),
    Row("the Laplacian of a ring", sparse(6, RING, "singular"), singular=True),
    Row("rows of rank 2 plus diagonal", grouped((3, 5), (0,), 2)),
    Row("two group axes, reversed, rank 1", grouped((2, 4, 3), (2, 0), 1, scalar=True)),
    Row("columns of different factors", grouped((4, 2), (1,), 2, right=True)),
    Row("neighbours and rank 2", updated(banded((7,), 0, (), 1, 1), 2)),
    Row("a tree and rank 3, mixed", updated(sparse(7, TREE), 3)),
    Row(
        "unsymmetric blocks and rank 1", updated(block_diagonal((3, 2), (1,), symmetric=False), 1, right=True)
    ),
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
    Row("one dense block with a stated kernel", single_block, singular=True),
    Row("dense", dense(5, "definite")),
    Row("dense of size 1", dense(1, "definite")),
    Row("dense, indefinite", dense(5, "indefinite")),
    Row("dense, unsymmetric", dense(5, "unsymmetric")),
    Row("dense, singular", dense(5, "singular"), singular=True),
    Row("matrix-free", matrix_free(True)),
    Row("matrix-free, unsymmetric", matrix_free(False)),
)
BY_NAME = {row.name: row for row in TABLE}
