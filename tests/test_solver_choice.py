"""Costs from shapes alone, reasons for refusing, and the choice of a solver."""

import dataclasses

import pytest
import torch
from torch import Tensor

from implicitdiff.diagnostics.meter import measure
from implicitdiff.errors import NotSupportedYetError, OptionError
from implicitdiff.operators import (
    Block,
    BlockDiagonal,
    Dense,
    Diagonal,
    LinearOperator,
    LowRankPlusDiagonal,
    MatrixFree,
    Zero,
)
from implicitdiff.solvers import (
    PLANNED,
    SOLVERS,
    choose,
    solver_named,
)
from tests.operator_cases import BY_NAME
from tests.operator_draws import Draw
from tests.solver_checks import ALL, CPU, PAIRS, plan_block


def on_meta(operator: LinearOperator) -> LinearOperator:
    """The same operator with tensors that have shapes only."""

    def move(value: object) -> object:
        if isinstance(value, Tensor):
            return value.to("meta")
        if isinstance(value, LinearOperator):
            return on_meta(value)
        if isinstance(value, tuple):
            return tuple(map(move, value))
        return torch.device("meta") if isinstance(value, torch.device) else value

    values = {field.name: getattr(operator, field.name) for field in dataclasses.fields(operator)}
    return type(operator)(**{name: move(value) for name, value in values.items()})


@pytest.mark.parametrize(("solver", "row"), PAIRS)
def test_costs_come_from_shapes_alone(solver: str, row: str) -> None:
    operator, _ = BY_NAME[row].build(Draw(3))
    cost = ALL[solver].cost(operator)
    assert min(cost.flops, cost.bytes, cost.peak) > 0
    assert all(isinstance(value, int) for value in (cost.flops, cost.bytes, cost.peak))
    assert ALL[solver].cost(on_meta(operator)) == cost
    assert choose(on_meta(operator)).solver.name == choose(operator).solver.name
    single, _ = BY_NAME[row].build(Draw(3, dtype=torch.float32))
    assert ALL[solver].cost(single).flops == cost.flops
    assert 2 * ALL[solver].cost(single).bytes == cost.bytes


def sized(solver: str) -> LinearOperator:
    """An operator large enough for the leading terms to count."""
    draw = Draw(2, dtype=torch.float32)
    if solver == "schur":
        coupling = draw.positive(150, 60)
        corners = [Diagonal(1000 * draw.positive(size)) for size in (150, 60)]
        return Block(((corners[0], coupling), (coupling.mT, corners[1])), (150, 60))
    if solver == "woodbury":
        return LowRankPlusDiagonal(draw.positive(300), draw.normal(300, 60), draw.positive(60))
    if solver == "block-cholesky":
        return BlockDiagonal(draw.definite(3, 80), (3, 80), (0,))
    return Dense(draw.definite(150))


@pytest.mark.parametrize("solver", ["schur", "woodbury", "block-cholesky", "cholesky", "lu", "ldl"])
def test_predicted_costs_are_the_measured_ones(solver: str) -> None:
    operator = sized(solver)
    rhs = torch.ones(2, operator.size)
    _, measured = measure(lambda: SOLVERS[solver].factor(operator).solve(rhs))
    predicted = SOLVERS[solver].cost(operator)
    assert predicted.flops == pytest.approx(measured.flops, rel=0.25)
    assert predicted.bytes == pytest.approx(measured.bytes, rel=0.5)
    assert predicted.peak == pytest.approx(measured.peak, rel=0.5)


def meta_low_rank(batch: int, size: int, rank: int) -> LowRankPlusDiagonal:
    shapes = ((batch, 1), (batch, size, rank), (batch, rank))
    return LowRankPlusDiagonal(*(torch.empty(shape, device="meta") for shape in shapes))


@pytest.mark.parametrize(
    ("batch", "rank", "expected", "reason"),
    [
        (1, 16, "woodbury", "cholesky"),
        (8, 16, "woodbury", "cg"),
        (1, 64, "woodbury", "cg"),
        (8, 64, "cg", "woodbury"),
        (1, 160, "cholesky", "k = 160 >= m = 128"),
        (1, 1024, "cg", "k = 1024 >= m = 128"),
        (8, 1024, "cg", "k = 1024 >= m = 128"),
    ],
)
def test_pooling_sizes(batch: int, rank: int, expected: str, reason: str) -> None:
    choice = choose(meta_low_rank(batch, 128, rank))
    assert choice.solver.name == expected
    assert choice.cost == choice.solver.cost(meta_low_rank(batch, 128, rank))
    assert reason in str(choice.rejected)
    assert choice.solver.name not in dict(choice.rejected)
    assert "lu" in dict(choice.rejected)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((20, 25), "schur"), ((100, 100), "schur"), ((200, 200), "schur-cg"), ((1000, 50), "schur")],
)
def test_transport_sizes(shape: tuple[int, int], expected: str) -> None:
    choice = choose(plan_block(torch.empty(1, *shape, device="meta")))
    assert choice.solver.name == expected
    assert {"schur", "schur-cg"} - {expected} <= set(dict(choice.rejected))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("zero", "divide"),
        ("scaled identity", "divide"),
        ("diagonal", "divide"),
        ("rows of a matrix", "block-cholesky"),
        ("a factor and an identity", "kronecker"),
        ("tridiagonal down the columns", "cholesky"),
        ("tridiagonal, unsymmetric", "lu"),
        ("low rank", "woodbury"),
        ("rank above the size", "cholesky"),
        ("different factors", "woodbury"),
        ("transport 5 x 3", "schur"),
        ("two uncoupled corners round a dense block", "schur"),
        ("unsymmetric grid", "schur"),
        ("dense", "cholesky"),
        ("dense, unsymmetric", "lu"),
        ("matrix-free", "cg"),
    ],
)
def test_automatic_choice(row: str, expected: str) -> None:
    operator, _ = BY_NAME[row].build(Draw(2))
    assert choose(operator).solver is SOLVERS[expected]


def test_choice_for_indefinite_matrices() -> None:
    choice = choose(Dense(torch.empty(1, 4, 4)), definite=False)
    assert choice.solver.name == "lu"
    assert dict(choice.rejected)["cholesky"] == "the matrix is not positive definite"
    free_corner = Block(((Dense(torch.eye(3)[None]), None), (None, Zero(2, 1, torch.float32, CPU))), (3, 2))
    assert choose(free_corner).solver.name == "lu"
    with pytest.raises(OptionError, match="no solver takes the matrix-free matrix"):
        choose(MatrixFree(lambda v: v, 3, 1, torch.float32, CPU), definite=False)


def test_large_corners_make_schur_worth_it_only_if_they_are_diagonal() -> None:
    two_dense = Block(((Dense(torch.eye(3)[None]), None), (None, Dense(torch.eye(2)[None]))), (3, 2))
    choice = choose(two_dense)
    assert choice.solver.name == "cholesky"
    assert (
        dict(choice.rejected)["schur"]
        == "no block on the diagonal of the grid is itself diagonal (dense, dense)"
    )


@pytest.mark.parametrize(
    ("solver", "row", "reason"),
    [
        ("divide", "dense", "the matrix is dense, not diagonal"),
        ("block-cholesky", "low rank", "the matrix is low-rank-plus-diagonal, not block-diagonal"),
        ("tridiagonal", "half-width 2", "the band reaches 2 places, not 1"),
        ("tridiagonal", "diagonal", "the matrix is diagonal, not banded"),
        ("banded-cholesky", "low rank", "the matrix is low-rank-plus-diagonal, not banded"),
        ("banded-cholesky", "tridiagonal, unsymmetric", "the matrix is not symmetric"),
        ("woodbury", "dense", "the matrix is dense, not low-rank-plus-diagonal"),
        ("woodbury", "rank above the size", "k = 7 >= m = 4"),
        ("cholesky", "dense, unsymmetric", "the matrix is not symmetric"),
        ("cholesky", "zero", "the matrix is zero"),
        ("lu", "matrix-free", "the matrix is known by its products only and is not written down"),
        ("ldl", "different factors", "the matrix is not symmetric"),
        ("schur", "dense", "the matrix is dense, not a grid of blocks"),
        ("cg", "matrix-free, unsymmetric", "the matrix is not symmetric"),
        ("cg", "zero", "the matrix is zero"),
    ],
)
def test_reasons_for_refusing(solver: str, row: str, reason: str) -> None:
    operator, _ = BY_NAME[row].build(Draw(1))
    assert SOLVERS[solver].reject(operator) == reason
    with pytest.raises(OptionError) as caught:
        choose(operator, solver)
    assert reason in str(caught.value)
    assert solver in str(caught.value)


def test_schur_refuses_single_blocks_and_products() -> None:
    free = MatrixFree(lambda v: v, 2, 1, torch.float32, CPU)
    assert (
        SOLVERS["schur"].reject(Block(((Diagonal(torch.ones(1, 2)),),), (2,)))
        == "the grid has one block only"
    )
    grid = Block(((Diagonal(torch.ones(1, 3)), None), (None, free)), (3, 2))
    assert "products only" in str(SOLVERS["schur"].reject(grid))


def test_requested_names() -> None:
    operator, _ = BY_NAME["dense"].build(Draw(1))
    for name in ("cholesky", "lu", "ldl", "cg"):
        choice = choose(operator, name)
        assert choice.solver.name == name
        assert choice.rejected == ()
    with pytest.raises(OptionError, match=r"'QR'.*'divide'.*'cg'"):
        choose(operator, "QR")
    for name in PLANNED:
        with pytest.raises(NotSupportedYetError, match=name):
            solver_named(name)
