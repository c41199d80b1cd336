"""Every operator against its dense twin: products, transposes, batches, shared parameters, bad shapes."""

import inspect

import numpy as np
import pytest
import torch

from implicitdiff import operators
from implicitdiff.errors import StructureError
from implicitdiff.operators import (
    Banded,
    Block,
    BlockDiagonal,
    Dense,
    Diagonal,
    LinearOperator,
    LowRankPlusDiagonal,
    MatrixFree,
    ScaledIdentity,
    Zero,
    select_samples,
)
from implicitdiff.operators.products import batched_matvec, weighted_product
from tests.operator_cases import BY_NAME, TABLE
from tests.operator_draws import BATCHES, Draw, Row

ROWS = pytest.mark.parametrize("row", TABLE, ids=[row.name for row in TABLE])
BATCH = pytest.mark.parametrize("batch", list(BATCHES))


def drawn(row: Row, batch: str, dtype: torch.dtype = torch.float64) -> tuple[LinearOperator, np.ndarray]:
    return row.build(Draw(*BATCHES[batch], dtype=dtype))


def vectors(operator: LinearOperator, batch: str, lead: tuple[int, ...] = ()) -> torch.Tensor:
    """Vectors for the operator; three samples where the operator is shared by them."""
    samples = 3 if batch == "all shared" else operator.batch
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*lead, samples, operator.size, generator=generator, dtype=torch.float64).to(
        operator.dtype
    )


def test_every_exported_operator_has_a_row() -> None:
    exported = {
        value
        for name in operators.__all__
        if inspect.isclass(value := getattr(operators, name)) and not inspect.isabstract(value)
    }
    # sums with terms by automatic differentiation live at one point of one problem: tests/test_hybrid.py
    hybrid = {operators.Autodiff, operators.Sum}
    assert {type(row.build(Draw(1))[0]) for row in TABLE} == exported - hybrid


def test_kinds_are_the_words_of_the_contract() -> None:
    kinds = {type(row.build(Draw(1))[0]).kind for row in TABLE}
    assert kinds == set(
        "zero scaled-identity diagonal kronecker block-diagonal banded low-rank-plus-diagonal block sparse sum dense "
        "matrix-free".split()
    )


@ROWS
@BATCH
def test_dense_twin(row: Row, batch: str) -> None:
    operator, twin = drawn(row, batch)
    dense = operator.to_dense()
    assert dense.shape == (operator.batch, operator.size, operator.size)
    assert dense.shape == twin.shape
    np.testing.assert_allclose(dense.numpy(), twin, rtol=1e-13, atol=1e-13)


@ROWS
@BATCH
def test_products(row: Row, batch: str) -> None:
    operator, twin = drawn(row, batch)
    for lead in ((), (2,), (2, 3)):
        x = vectors(operator, batch, lead)
        matrices = np.broadcast_to(twin, (x.shape[-2], *twin.shape[1:]))
        for matrix, formula in ((operator, "bij,...bj->...bi"), (operator.transpose(), "bji,...bj->...bi")):
            product = matrix.matvec(x)
            assert product.shape == x.shape
            np.testing.assert_allclose(
                product.numpy(), np.einsum(formula, matrices, x.numpy()), rtol=1e-12, atol=1e-12
            )


@ROWS
def test_one_vector_for_all_samples_is_broadcast(row: Row) -> None:
    operator, twin = drawn(row, "batch 3")
    x = vectors(operator, "batch 1")[:1]
    np.testing.assert_allclose(operator.matvec(x).numpy(), twin @ x[0].numpy(), rtol=1e-12, atol=1e-12)


@ROWS
def test_transpose_twice_and_symmetry(row: Row) -> None:
    operator, twin = drawn(row, "batch 3")
    assert operator.symmetric == bool(np.allclose(twin, twin.swapaxes(1, 2)))
    assert (operator.transpose() is operator) == operator.symmetric
    np.testing.assert_array_equal(
        operator.transpose().transpose().to_dense().numpy(), operator.to_dense().numpy()
    )


@ROWS
def test_float32_and_parameters_are_not_changed(row: Row) -> None:
    operator, twin = drawn(row, "batch 3", torch.float32)
    before = operator.to_dense().clone()
    x = vectors(operator, "batch 3")
    assert operator.dtype == before.dtype == operator.matvec(x).dtype == torch.float32
    assert operator.device == torch.device("cpu")
    np.testing.assert_allclose(
        operator.matvec(x).double().numpy(), np.einsum("bij,bj->bi", twin, x.numpy()), atol=1e-4
    )
    assert torch.equal(operator.to_dense(), before)


@ROWS
@BATCH
def test_select_samples(row: Row, batch: str) -> None:
    operator, twin = drawn(row, batch)
    chosen = torch.tensor([2, 0]) if operator.batch == 3 else torch.arange(operator.batch)
    some = select_samples(operator, chosen)
    assert type(some) is type(operator)
    assert some.batch == (operator.batch if operator.batch == 1 else len(chosen))
    np.testing.assert_allclose(some.to_dense().numpy(), twin[chosen.numpy()], rtol=1e-13, atol=1e-13)


def test_weighted_product_works_off_a_shared_factor_in_pieces() -> None:
    # 40 samples share a factor of 3 x 500: a scaled copy for all would be 40 times the factor.
    draw = Draw(1)
    factor, other = draw.normal(3, 500), draw.normal(4, 500)
    weights = torch.randn(40, 500, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = np.einsum("pk,bk,qk->bpq", factor[0].numpy(), weights.numpy(), other[0].numpy())
    np.testing.assert_allclose(
        weighted_product(factor, weights, other).numpy(), expected, rtol=1e-11, atol=1e-11
    )
    swapped = weighted_product(other, weights, factor)
    np.testing.assert_allclose(swapped.numpy(), expected.swapaxes(1, 2), rtol=1e-11, atol=1e-11)
    base = torch.ones(40, 6, 9, dtype=torch.float64)
    weighted_product(factor, weights, other, out=base[:, 2:5, 1:5], alpha=-2.0)
    np.testing.assert_allclose(base[:, 2:5, 1:5].numpy(), 1 - 2 * expected, rtol=1e-11, atol=1e-11)
    assert float(base.sum()) == pytest.approx(40 * 54 - 2 * expected.sum())


def test_single_weight_and_empty_contraction() -> None:
    draw = Draw(2)
    left, right, weight = draw.normal(3, 4), draw.normal(2, 4), draw.normal(1)
    expected = np.einsum("bpk,b,bqk->bpq", left.numpy(), weight[:, 0].numpy(), right.numpy())
    np.testing.assert_allclose(weighted_product(left, weight, right).numpy(), expected, rtol=1e-13)
    assert torch.equal(
        weighted_product(left[:, :, :0], draw.normal(0), right[:, :, :0]),
        torch.zeros(2, 3, 2, dtype=torch.float64),
    )


def test_a_shared_matrix_is_not_copied_for_each_sample() -> None:
    matrix = torch.randn(1, 50, 40)
    assert batched_matvec(matrix, torch.randn(7, 2, 3, 40)).shape == (7, 2, 3, 50)
    assert batched_matvec(matrix.expand(3, -1, -1), torch.randn(7, 1, 40)).shape == (7, 3, 50)


D3, D2 = Diagonal(torch.ones(2, 3)), Diagonal(torch.ones(2, 2))


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: ScaledIdentity(torch.ones(2, 1), 3), ["scaled-identity", "scale", "(2, 1)"]),
        (lambda: Diagonal(torch.ones(3)), ["diagonal", "(3,)", "batch"]),
        (
            lambda: BlockDiagonal(torch.ones(1, 2, 3, 3), (2, 2), (0,)),
            ["block-diagonal", "(1, 2, 3, 3)", "2, 2, 2"],
        ),
        (lambda: BlockDiagonal(torch.ones(1, 2, 2, 2), (2, 2), (2,)), ["block_axes", "(2,)"]),
        (lambda: BlockDiagonal(torch.ones(1, 4, 1, 1), (2, 2), (0, 0)), ["block_axes", "(0, 0)"]),
        (lambda: Banded(torch.ones(1, 2, 3, 4, 1, 1), (4, 3), 0, (1,), 1, 1), ["banded", "3, 3, 4, 1, 1"]),
        (lambda: Banded(torch.ones(1, 1, 3, 4, 3, 3), (4, 3), 2, (), 1, 1), ["band_axis 2", "(4, 3)"]),
        (
            lambda: Banded(torch.ones(1, 4, 3, 4, 3, 3), (4, 3), 0, (0,), 1, 1),
            ["group_axes (0,)", "different"],
        ),
        (
            lambda: Banded(torch.ones(1, 3, 2, 4, 1, 1), (4, 3), 0, (1,), 1, 0),
            ["lower 1", "upper 0", "symmetric"],
        ),
        (lambda: Banded(torch.ones(1, 3, 1, 4, 1, 1), (4, 3), 0, (1,), -1, 1, False), ["lower -1"]),
        (
            lambda: LowRankPlusDiagonal(torch.ones(2, 4), torch.ones(2, 3, 1), torch.ones(2, 1)),
            ["diagonal", "(2, 4)", "3"],
        ),
        (
            lambda: LowRankPlusDiagonal(torch.ones(2, 3), torch.ones(3, 1), torch.ones(2, 1)),
            ["left", "(3, 1)"],
        ),
        (
            lambda: LowRankPlusDiagonal(torch.ones(2, 3), torch.ones(2, 3, 1), torch.ones(3, 1)),
            ["batch axes differ"],
        ),
        (
            lambda: LowRankPlusDiagonal(torch.ones(2, 3), torch.ones(2, 3, 1).double(), torch.ones(2, 1)),
            ["different dtypes", "float32", "float64"],
        ),
        (lambda: Dense(torch.ones(2, 3, 4)), ["dense", "(2, 3, 4)"]),
        (lambda: Block(((D3, None),), (3, 2)), ["block", "2 sizes"]),
        (lambda: Block((), ()), ["block", "0 sizes"]),
        (lambda: Block(((D3, None), (None, D3)), (3, 2)), ["blocks[1][1]", "size 2", "size 3"]),
        (
            lambda: Block(((D3, torch.ones(2, 2, 3)), (None, D2)), (3, 2)),
            ["blocks[0][1]", "(2, 2, 3)", "3, 2"],
        ),
        (lambda: Block(((D3, None), (None, Diagonal(torch.ones(4, 2)))), (3, 2)), ["batch sizes", "2, 4"]),
        (lambda: Block(((D3, None), (None, torch.ones(2, 2, 2))), (3, 2)), ["blocks[1][1]", "Tensor"]),
        (lambda: Block(((D3, None), (None, D2)), (3, 2), ([1.0, 2.0],)), ["null vector", "(2,)", "5"]),
        (
            lambda: Block(((D3, None), (None, D2)), (3, 2), ([1.0] * 5,), symmetric=False),
            ["null_vectors", "symmetric"],
        ),
    ],
)
def test_bad_parameters_are_named(build, words: list[str]) -> None:
    with pytest.raises(StructureError) as caught:
        build()
    for word in words:
        assert word in str(caught.value)


def test_null_vectors_are_null_vectors() -> None:
    for name in ("transport 5 x 3", "three marginals"):
        operator, twin = drawn(BY_NAME[name], "batch 3")
        assert isinstance(operator, Block)
        assert len(operator.null_vectors) == twin.shape[-1] - np.linalg.matrix_rank(twin[0])
        for vector in operator.null_vectors:
            np.testing.assert_allclose(operator.matvec(vector[None].expand(3, -1)).numpy(), 0, atol=1e-12)


def test_shared_zero_and_matrix_free_follow_the_vector() -> None:
    x = torch.randn(2, 3, 4)
    assert Zero(4, 1, torch.float32, torch.device("cpu")).matvec(x).shape == (2, 3, 4)
    doubled = MatrixFree(lambda v: 2 * v, 4, 1, torch.float32, torch.device("cpu"))
    assert torch.equal(doubled.matvec(x), 2 * x)
