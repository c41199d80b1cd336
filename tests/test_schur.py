"""Elimination on grids of blocks: which side, what memory, stated and unstated kernels, transport plans."""

import numpy as np
import pytest
import torch

from implicitdiff.operators import (
    Block,
    Diagonal,
)
from implicitdiff.solvers import (
    SOLVERS,
    relative_residual,
)
from implicitdiff.solvers.schur import split_blocks
from implicitdiff.status import Status
from tests.operator_cases import BY_NAME
from tests.operator_draws import Draw
from tests.solver_checks import (
    LargestTensor,
    apply,
    close,
    oracle,
    plan_block,
    statuses,
)


@pytest.mark.parametrize(
    ("row", "eliminated"),
    [
        ("two corners, the first larger", (0,)),
        ("two corners, the second larger", (1,)),
        ("two corners of equal size", (0,)),
        ("two uncoupled corners round a dense block", (0, 2)),
        (
            "a chain of corners",
            (0, 2),
        ),  # 2 + 3 entries, and equally many in the middle: the pair is no larger
        ("a remainder of two kinds", (0,)),
        ("corners without coupling", (0, 1)),
        ("three marginals", (2,)),
        ("KKT matrix", (0,)),
    ],
)
def test_the_largest_jointly_diagonal_side_is_eliminated(row: str, eliminated: tuple[int, ...]) -> None:
    operator, _ = BY_NAME[row].build(Draw(2))
    assert isinstance(operator, Block)
    split = split_blocks(operator)
    assert split is not None
    size = sum(operator.sizes[i] for i in split.eliminated)
    assert size == sum(operator.sizes[i] for i in eliminated)
    if row != "a chain of corners":
        assert split.eliminated == eliminated
    assert sorted(split.eliminated + split.remaining) == list(range(len(operator.sizes)))


def test_schur_costs_the_same_from_both_sides() -> None:
    wide, tall = (plan_block(torch.empty(1, *shape, device="meta")) for shape in ((1000, 50), (50, 1000)))
    assert SOLVERS["schur"].cost(wide) == SOLVERS["schur"].cost(tall)
    assert SOLVERS["schur"].cost(wide).flops < 2 * 2 * 1000 * 50 * 50


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("shape", [(60, 7), (7, 60)])
def test_schur_makes_nothing_larger_than_the_coupling(shape: tuple[int, int], shared: bool) -> None:
    batch = 6
    coupling = 0.01 * torch.rand(1 if shared else batch, *shape)
    corners = [Diagonal(1 + torch.rand(batch, size)) for size in shape]
    operator = Block(((corners[0], coupling), (coupling.mT, corners[1])), shape)
    rhs = torch.randn(batch, sum(shape))
    with LargestTensor() as seen:
        SOLVERS["schur"].factor(operator).solve(rhs)
    assert seen.entries <= max(coupling.numel(), batch * 7 * 7, batch * sum(shape))


def test_unusable_corners_are_solved_densely() -> None:
    """A zero on an eliminated corner: regular, or singular with the answer of least norm."""
    first = torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0], [1.0, 1.0, 2.0]], dtype=torch.float64)
    coupling = torch.tensor(
        [[[1.0], [0.5], [0.3]], [[0.0], [0.5], [0.3]], [[0.2], [0.5], [0.3]]], dtype=torch.float64
    )
    operator = Block(
        ((Diagonal(first), coupling), (coupling.mT, Diagonal(torch.ones(3, 1, dtype=torch.float64)))), (3, 1)
    )
    twin = operator.to_dense().numpy()
    factorization = SOLVERS["schur"].factor(operator)
    assert statuses(factorization) == [Status.OK, Status.SINGULAR, Status.OK]
    rhs = apply(twin, np.random.default_rng(0).normal(size=(2, 3, 4)))
    close(factorization.solve(torch.from_numpy(rhs)), oracle(twin, rhs, True), 1e-10)
    assert factorization.definite is not None
    assert factorization.definite.tolist() == [False, False, True]


def test_a_dependence_that_nobody_stated_is_reported() -> None:
    plan = torch.rand(3, 5, 4, dtype=torch.float64) + 0.1
    stated = plan_block(plan)
    silent = Block(stated.blocks, stated.sizes)
    rhs = silent.matvec(torch.randn(3, 9, dtype=torch.float64))
    factorization = SOLVERS["schur"].factor(silent)
    assert set(statuses(factorization)) == {Status.SINGULAR}
    assert relative_residual(silent, factorization.solve(rhs), rhs).max() < 1e-12
    assert set(statuses(SOLVERS["schur"].factor(stated))) == {Status.OK}


def test_a_stated_kernel_inside_the_eliminated_corner() -> None:
    """The first variable appears nowhere: its corner entry is zero and e_1 is stated to be the kernel."""
    first = torch.tensor([[0.0, 2.0, 3.0], [0.0, 1.0, 5.0]], dtype=torch.float64)
    coupling = torch.tensor([[[0.0], [0.5], [0.3]]], dtype=torch.float64)
    second = Diagonal(torch.ones(2, 1, dtype=torch.float64))
    operator = Block(((Diagonal(first), coupling), (coupling.mT, second)), (3, 1), ([1, 0, 0, 0],))
    rhs = np.random.default_rng(0).normal(size=(3, 2, 4))
    factorization = SOLVERS["schur"].factor(operator)
    expected = oracle(operator.to_dense().numpy(), rhs, True)
    close(factorization.solve(torch.from_numpy(rhs)), expected, 1e-12)
    assert set(statuses(factorization)) == {Status.OK}


def test_a_complement_that_is_nothing_but_rounding_is_singular() -> None:
    """S = d - sum p^2 / r is 0 up to rounding, of either sign: its size against d tells, not S itself."""
    first, coupling = Draw(50).positive(5), Draw(50, seed=1).positive(5, 1)
    second = (coupling[:, :, 0].square() / first).sum(1, keepdim=True)
    operator = Block(((Diagonal(first), coupling), (coupling.mT, Diagonal(second))), (5, 1))
    assert set(statuses(SOLVERS["schur"].factor(operator))) == {Status.SINGULAR}


@pytest.mark.parametrize("solver", ["schur", "cholesky", "lu", "ldl", "cg"])
def test_stated_kernel_gives_least_norm_also_for_inconsistent_sides(solver: str) -> None:
    operator, twin = BY_NAME["three marginals"].build(Draw(3))
    rhs = np.random.default_rng(2).normal(size=(2, 3, 9))
    factorization = SOLVERS[solver].factor(operator)
    close(factorization.solve(torch.from_numpy(rhs)), oracle(twin, rhs, True), 1e-9)
    assert set(statuses(factorization)) == {Status.OK}


def sinkhorn(rows: int, columns: int, gamma: float) -> np.ndarray:
    """An entropic transport plan of random costs, in float64, by scalings of the log kernel."""
    cost = np.random.default_rng(0).uniform(size=(rows, columns))
    f, g = np.zeros((rows, 1)), np.zeros((1, columns))
    for _ in range(3000):
        f = -np.log(rows) - np.log(np.exp(g - gamma * cost).sum(1, keepdims=True))
        g = -np.log(columns) - np.log(np.exp(f - gamma * cost).sum(0, keepdims=True))
    return np.exp(f + g - gamma * cost)


@pytest.mark.parametrize("gamma", [1.0, 30.0, 300.0])
def test_transport_in_float32_at_any_regularisation(gamma: float) -> None:
    plan = torch.from_numpy(sinkhorn(60, 40, gamma)).float()[None]
    exact = plan.double()
    twin = plan_block(exact).to_dense().numpy()
    rhs = apply(twin, np.random.default_rng(1).normal(size=(1, 100)))
    factorization = SOLVERS["schur"].factor(plan_block(plan))
    assert statuses(factorization) == [Status.OK]
    solution = factorization.solve(torch.from_numpy(rhs).float())
    expected = oracle(twin, rhs, True)
    assert float(np.abs(solution.double().numpy() - expected).max()) < 1e-3 * float(np.abs(expected).max())


def test_plan_without_any_mass_off_its_diagonal() -> None:
    """Underflow at large gamma: every row is its own component, finite answers, reported."""
    plan = torch.diag_embed(torch.full((1, 4), 0.25))
    factorization = SOLVERS["schur"].factor(plan_block(plan))
    rhs = torch.randn(1, 4, generator=torch.Generator().manual_seed(0))
    solution = factorization.solve(torch.cat([rhs, rhs], dim=1))
    assert solution.isfinite().all()
    assert statuses(factorization) == [Status.SINGULAR]
