"""Bands of any width: random draws against dense LU, verdicts on singular chains, NaN that stays put, linear cost."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from implicitdiff.diagnostics.meter import measure
from implicitdiff.errors import NotSupportedYetError, OptionError
from implicitdiff.operators import Banded, Dense
from implicitdiff.solvers import SOLVERS, choose
from implicitdiff.solvers.band_lu import LARGEST_DENSE
from implicitdiff.solvers.cyclic import UNROLLED
from implicitdiff.status import Status
from tests.operator_bands import banded, outside, symmetrised, twin_of
from tests.operator_draws import Draw
from tests.solver_checks import LargestTensor, apply, close, oracle, statuses


def chains(values: Tensor, reach: int = 1, *, symmetric: bool = True) -> Banded:
    """The operator of bands (B, G, W, T, s, s) over a variable of shape (T, G, s)."""
    _, groups, _, length, inside, _ = values.shape
    values = symmetrised(values, reach) if symmetric else values
    return Banded(values, (length, groups, inside), 0, (1,), reach, reach, symmetric=symmetric)


def dominant(
    batch: int, groups: int, length: int, inside: int = 1, reach: int = 1, dtype: torch.dtype = torch.float64
) -> Banded:
    """Positive definite chains with couplings of both signs."""
    generator = torch.Generator().manual_seed(length)
    width = 2 * reach + 1
    values = torch.randn(
        batch, groups, width, length, inside, inside, generator=generator, dtype=torch.float64
    )
    values[:, :, reach] += 4 * (width * inside) ** 0.5 * torch.eye(inside)
    return chains(values.to(dtype), reach)


def differences(length: int, order: int, weight: float, ridge: float, dtype: torch.dtype) -> Banded:
    """weight D'D + ridge I with differences D of the given order: smoothing along one chain."""
    stencil = np.diff(np.eye(order + 1), n=order, axis=0)[0]
    matrix = np.zeros((length - order, length))
    for row in range(length - order):
        matrix[row, row : row + order + 1] = stencil
    matrix = weight * matrix.T @ matrix + ridge * np.eye(length)
    values = torch.zeros(1, 1, 2 * order + 1, length, 1, 1, dtype=torch.float64)
    for k in range(-order, order + 1):
        part = torch.from_numpy(np.diagonal(matrix, k).copy())
        values[0, 0, order + k, max(0, -k) : length - max(0, k), 0, 0] = part
    return chains(values.to(dtype), order)


def solver_for(operator: Banded) -> str:
    return "tridiagonal" if max(operator.lower, operator.upper) <= 1 else "banded-cholesky"


@st.composite
def draws(draw: st.DrawFn) -> tuple[Banded, int]:
    """An operator with values of any sign, and the number of samples it is used with."""
    inside = draw(st.sampled_from([1, 1, 2, 3, UNROLLED + 1]))
    length = draw(st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 16, 17]))
    sizes = [(length, "band"), *[(size, "group") for size in draw(st.lists(st.integers(1, 3), max_size=2))]]
    sizes += [(inside, "inside")] if inside > 1 or draw(st.booleans()) else []
    sizes = draw(st.permutations(sizes))
    names = [name for _, name in sizes]
    groups = draw(st.permutations([axis for axis, name in enumerate(names) if name == "group"]))
    symmetric = draw(st.booleans())
    lower = draw(st.integers(0, 3)) if symmetric else draw(st.integers(0, 1))
    upper = lower if symmetric else draw(st.integers(0, 1))
    samples = draw(st.integers(1, 3))
    shape = tuple(size for size, _ in sizes)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    chain_count = math.prod(shape[axis] for axis in groups)
    batch = draw(st.sampled_from([1, samples]))
    values = torch.randn(
        batch,
        chain_count,
        lower + 1 + upper,
        length,
        inside,
        inside,
        generator=generator,
        dtype=torch.float64,
    )
    if symmetric:
        values = symmetrised(values, lower)
    values[:, :, lower] += draw(st.sampled_from([0.0, 1.0, -3.0, 9.0])) * torch.eye(inside)
    values[:, :, outside(length, lower, upper)] = torch.nan
    return Banded(values, shape, names.index("band"), tuple(groups), lower, upper, symmetric), samples


@settings(max_examples=150, deadline=None, derandomize=True)
@given(draws())
def test_against_dense_lu(drawn: tuple[Banded, int]) -> None:
    operator, samples = drawn
    twin = twin_of(operator)
    factorization = SOLVERS[solver_for(operator)].factor(operator)
    condition = np.linalg.cond(twin)
    dense = SOLVERS["lu"].factor(Dense(torch.from_numpy(twin), symmetric=operator.symmetric))
    assert [c for c, k in zip(statuses(factorization), condition, strict=True) if k < 1e10] == [
        c for c, k in zip(statuses(dense), condition, strict=True) if k < 1e10
    ]
    eigenvalues = np.linalg.eigvalsh(twin).min(-1) if operator.symmetric else None
    if eigenvalues is not None:
        assert factorization.definite is not None
        assert factorization.definite.tolist() == (eigenvalues > 0).tolist()
    for lead in ((), (2,), (2, 3)):
        rhs = torch.randn(*lead, samples, operator.size, dtype=torch.float64)
        solution = factorization.solve(rhs)
        expected = dense.solve(rhs)
        for sample in range(samples):
            known = condition[sample if len(condition) > 1 else 0]
            if known < 1e10:
                close(
                    solution[..., sample, :], expected[..., sample, :].numpy(), 1e-15 * max(1e3, 10 * known)
                )


@pytest.mark.parametrize("inside", [1, 2, UNROLLED, UNROLLED + 1])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 31, 32, 33])
def test_definite_chains_need_no_pivoting(inside: int, length: int) -> None:
    operator = dominant(2, 3, length, inside)
    factorization = SOLVERS["tridiagonal"].factor(operator)
    assert factorization.definite is not None
    assert factorization.definite.all()
    assert factorization._others is None  # type: ignore[attr-defined]
    rhs = torch.randn(4, 2, operator.size, dtype=torch.float64)
    close(factorization.solve(rhs), oracle(twin_of(operator), rhs.numpy(), False), 1e-13)


def test_zeros_on_the_diagonal_need_pivoting() -> None:
    """The chain [[0, 1], [1, 0]] and the like: no elimination without exchanges gets past the first entry."""
    values = torch.zeros(3, 2, 3, 6, 1, 1, dtype=torch.float64)
    values[:, :, 2] = torch.tensor([1.0, 2.0, -1.0])[:, None, None, None, None]
    values[2, 1, 1] = 5.0
    operator = chains(values)
    factorization = SOLVERS["tridiagonal"].factor(operator)
    assert statuses(factorization) == [Status.OK] * 3
    assert factorization.definite is not None
    assert not factorization.definite.any()
    rhs = torch.randn(2, 3, 12, dtype=torch.float64)
    close(factorization.solve(rhs), oracle(twin_of(operator), rhs.numpy(), False), 1e-13)


@pytest.mark.parametrize("offset", [1e-1, 1e-4, 1e-8, 1e-12])
def test_small_indefinite_pivots_lose_no_digits(offset: float) -> None:
    """Without exchanges a pivot of this size would cost as many digits."""
    values = torch.zeros(1, 1, 3, 40, 1, 1, dtype=torch.float64)
    values[:, :, 1] = offset
    values[:, :, 2] = 1.0
    operator = chains(values)
    rhs = torch.randn(1, 40, dtype=torch.float64)
    twin = twin_of(operator)
    assert np.linalg.cond(twin) < 100
    close(SOLVERS["tridiagonal"].factor(operator).solve(rhs), oracle(twin, rhs.numpy(), False), 1e-13)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_singular_chains(order: int, dtype: torch.dtype) -> None:
    """Differences of an order have the polynomials below it as their kernel."""
    operator = differences(12, order, 1.0, 0.0, dtype)
    twin = twin_of(operator)
    factorization = SOLVERS[solver_for(operator)].factor(operator)
    assert statuses(factorization) == [Status.SINGULAR]
    assert factorization.definite is not None
    assert not factorization.definite.any()
    rhs = torch.from_numpy(apply(twin, np.random.default_rng(0).normal(size=(2, 1, 12)))).to(dtype)
    expected = oracle(twin, rhs.double().numpy(), True, cut=1e-6)
    close(factorization.solve(rhs), expected, 1e3 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("inside", [1, 3])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_singularity_is_seen_at_any_length(order: int, inside: int, dtype: torch.dtype) -> None:
    """D'W D with random definite blocks W: rounding makes the last pivots positive or negative, never sound."""
    stencil = np.diff(np.eye(order + 1), n=order, axis=0)[0]
    for length in (order + 1, 7, 40, 300):
        weights = Draw(8, seed=length).definite(length - order, inside)
        values = torch.zeros(8, 1, 2 * order + 1, length, inside, inside, dtype=torch.float64)
        for i in range(order + 1):
            for j in range(order + 1):
                values[:, 0, order + j - i, i : i + length - order] += stencil[i] * stencil[j] * weights
        operator = chains(values.to(dtype), order)
        factorization = SOLVERS[solver_for(operator)].factor(operator)
        assert set(statuses(factorization)) == {Status.SINGULAR}, length
        assert factorization.definite is not None
        assert not factorization.definite.any()


def test_a_long_singular_chain_is_lost_and_says_so() -> None:
    operator = differences(LARGEST_DENSE + 1, 1, 1.0, 0.0, torch.float64)
    regular = differences(LARGEST_DENSE + 1, 1, 1.0, 1.0, torch.float64)
    both = chains(torch.cat([operator.bands, regular.bands]))
    factorization = SOLVERS["tridiagonal"].factor(both)
    assert statuses(factorization) == [Status.SINGULAR, Status.OK]
    rhs = torch.randn(2, 2, both.size, dtype=torch.float64)
    rhs[1, 0] = 0
    solution = factorization.solve(rhs)
    assert solution[0, 0].isnan().all()
    assert solution[1, 0].eq(0).all()
    alone = SOLVERS["tridiagonal"].factor(regular).solve(rhs[:, 1:])
    close(solution[:, 1:], alone.numpy(), 1e-14)
    close(regular.matvec(alone), rhs[:, 1:].numpy(), 1e-14)


def test_verdicts_agree_with_the_dense_solver_as_a_matrix_becomes_singular() -> None:
    for dtype in (torch.float32, torch.float64):
        for order in (1, 2):
            for exponent in range(0, 20):
                operator = differences(30, order, 1.0, 10.0**-exponent, dtype)
                condition = np.linalg.cond(twin_of(operator)[0])
                level = 1 / (10 * torch.finfo(dtype).eps)
                found = statuses(SOLVERS[solver_for(operator)].factor(operator))
                # The estimate of the scaled 1-norm condition may be off by the size; nothing is said in between.
                if condition < level / 100:
                    assert found == [Status.OK], (dtype, order, exponent)
                if condition > level * 100:
                    assert found == [Status.SINGULAR], (dtype, order, exponent)


@pytest.mark.parametrize("inside", [1, 3])
@pytest.mark.parametrize("reach", [1, 2])
def test_bad_scaling_is_not_singularity(inside: int, reach: int) -> None:
    operator = dominant(2, 1, 20, inside, reach)
    units = torch.logspace(-8, 8, operator.size, dtype=torch.float64)
    scales = operator.split(units)
    values = operator.bands.clone()
    for k in range(values.shape[2]):
        columns = scales.roll(reach - k, 1)
        values[:, :, k] *= scales[..., :, None] * columns[..., None, :]
    scaled = chains(values, reach)
    factorization = SOLVERS[solver_for(operator)].factor(scaled)
    assert statuses(factorization) == [Status.OK] * 2
    assert factorization.definite is not None
    assert factorization.definite.all()
    rhs = torch.randn(2, operator.size, dtype=torch.float64)
    expected = oracle(twin_of(operator), rhs.numpy(), False)
    close(factorization.solve(rhs * units) * units, expected, 1e-13)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("kind", ["definite", "indefinite", "unsymmetric"])
@pytest.mark.parametrize("inside", [1, 3])
def test_nan_leaves_the_bits_of_other_samples_alone(value: float, kind: str, inside: int) -> None:
    operator, _ = banded((9, 2, inside), 0, (1,), 1, 1, kind)(Draw(3))
    assert isinstance(operator, Banded)
    whole = SOLVERS["tridiagonal"].factor(operator)
    rhs = torch.randn(2, 3, operator.size, dtype=torch.float64)
    expected = whole.solve(rhs)
    values = operator.bands.clone()
    values[1, 0, 1, 4, 0, 0] = value
    spoilt = Banded(values, operator.shape, 0, (1,), 1, 1, symmetric=operator.symmetric)
    factorization = SOLVERS["tridiagonal"].factor(spoilt)
    solution = factorization.solve(rhs)
    assert statuses(factorization) == [Status.OK, Status.NONFINITE, Status.OK]
    assert torch.equal(solution[:, [0, 2]], expected[:, [0, 2]])
    assert solution[:, 1].isnan().any()
    # Nor does a right-hand side that is NaN reach the others.
    rhs[0, 2] = math.nan
    again = whole.solve(rhs)
    assert torch.equal(again[1], expected[1])
    assert torch.equal(again[0, :2], expected[0, :2])
    assert again[0, 2].isnan().all()


@pytest.mark.parametrize(("order", "weight"), [(1, 1e2), (2, 1e2), (3, 1e1)])
def test_float32_error_is_that_of_a_dense_cholesky(order: int, weight: float) -> None:
    operator = differences(200, order, weight, 1.0, torch.float32)
    exact = twin_of(operator)
    rhs = torch.randn(3, 1, 200, generator=torch.Generator().manual_seed(0))
    expected = oracle(exact, rhs.double().numpy(), False)
    ours = SOLVERS[solver_for(operator)].factor(operator)
    assert statuses(ours) == [Status.OK]
    dense = SOLVERS["cholesky"].factor(Dense(operator.to_dense()))

    def error(solution: Tensor) -> float:
        return float(np.abs(solution.double().numpy() - expected).max() / np.abs(expected).max())

    assert error(ours.solve(rhs)) <= 2 * error(dense.solve(rhs)) + 1e-6


def test_no_derivative_is_lost_silently() -> None:
    operator, _ = banded((6,), 0, (), 1, 1, "unsymmetric")(Draw(1))
    rhs = torch.ones(1, 6, dtype=torch.float64, requires_grad=True)
    factorization = SOLVERS["tridiagonal"].factor(operator)
    with pytest.raises(NotSupportedYetError, match="no derivative"):
        factorization.solve(rhs)
    with torch.no_grad():
        assert factorization.solve(rhs).isfinite().all()


def counted(operator: Banded) -> tuple[int, int]:
    """(flops, operations) of one factorisation and one solve, all of them known to the meter."""
    rhs = torch.ones(operator.batch, operator.size, dtype=operator.dtype)
    _, measured = measure(lambda: SOLVERS[solver_for(operator)].factor(operator).solve(rhs))
    assert measured.unknown == ()
    return measured.flops, measured.operations


@pytest.mark.parametrize(("inside", "reach"), [(1, 1), (3, 1), (UNROLLED + 2, 1), (1, 2), (2, 3)])
def test_cost_is_linear_in_the_length(inside: int, reach: int) -> None:
    counts = [counted(dominant(1, 1, 240 * 2**k, inside, reach)) for k in range(5)]
    flops, operations = zip(*counts, strict=True)
    for shorter, longer in itertools.pairwise(np.diff(flops)):
        assert longer / shorter == pytest.approx(2, rel=1e-2)
    steps = np.diff(operations)
    assert (steps == steps[0]).all(), "the operations grow by a constant with each doubling"


@pytest.mark.parametrize(("inside", "reach"), [(1, 1), (2, 1), (UNROLLED, 1), (7, 1), (1, 2), (2, 4)])
def test_predicted_costs_are_the_measured_ones(inside: int, reach: int) -> None:
    operator = dominant(2, 2, 301, inside, reach, torch.float32)
    rhs = torch.ones(2, operator.size)
    solver = SOLVERS[solver_for(operator)]
    _, measured = measure(lambda: solver.factor(operator).solve(rhs))
    predicted = solver.cost(operator)
    assert predicted.flops == pytest.approx(measured.flops, rel=5e-3)
    assert predicted.bytes == pytest.approx(measured.bytes, rel=0.3)
    assert predicted.peak == pytest.approx(measured.peak, rel=0.5)
    meta = Banded(operator.bands.to("meta"), operator.shape, 0, (1,), reach, reach)
    assert solver.cost(meta) == predicted
    assert choose(meta).solver is solver


def test_nothing_quadratic_is_made() -> None:
    for operator in (dominant(1, 1, 3000), dominant(1, 1, 1000, 2, 2)):
        with LargestTensor() as seen:
            SOLVERS[solver_for(operator)].factor(operator).solve(
                torch.ones(1, operator.size, dtype=torch.float64)
            )
            operator.matvec(torch.ones(1, operator.size, dtype=torch.float64))
        assert seen.entries <= 2 * operator.bands.numel()


def test_many_right_hand_sides_share_one_factorisation() -> None:
    operator = dominant(1, 2, 100, 3)
    factorization = SOLVERS["tridiagonal"].factor(operator)
    one, many = torch.ones(1, operator.size, dtype=torch.float64), torch.ones(5, 1, operator.size).double()
    _, single = measure(lambda: factorization.solve(one))
    _, five = measure(lambda: factorization.solve(many))
    assert five.flops == 5 * single.flops
    assert five.operations == single.operations


def test_choice_and_reasons() -> None:
    long, wide = dominant(2, 1, 900), dominant(2, 1, 900, 1, 3)
    choice = choose(long)
    assert choice.solver.name == "tridiagonal"
    assert set(dict(choice.rejected)) == {"banded-cholesky", "cholesky", "lu"}
    assert "times as long as tridiagonal" in dict(choice.rejected)["cholesky"]
    choice = choose(wide)
    assert choice.solver.name == "banded-cholesky"
    assert dict(choice.rejected)["tridiagonal"] == "the band reaches 3 places, not 1"
    assert choose(wide, definite=False).solver.name == "banded-cholesky"
    for name in ("tridiagonal", "banded-cholesky", "cholesky", "lu", "ldl", "cg"):
        assert choose(long, name).solver.name == name
    unsymmetric, _ = banded((900,), 0, (), 1, 1, "unsymmetric")(Draw(1))
    choice = choose(unsymmetric)
    assert choice.solver.name == "tridiagonal"
    assert dict(choice.rejected)["banded-cholesky"] == "the matrix is not symmetric"
    skew, _ = banded((200,), 0, (), 2, 1, "unsymmetric")(Draw(1))
    assert choose(skew).solver.name == "lu"
    for name in ("tridiagonal", "banded-cholesky"):
        with pytest.raises(OptionError, match="the matrix is dense, not banded"):
            choose(Dense(torch.eye(3)[None]), name)
