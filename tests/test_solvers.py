"""Every solver on every operator it takes, against numpy on the dense twin; then samples that have no answer.

What one solver alone promises is in test_direct_solvers.py, test_schur.py and test_cg.py, the choice between
them in test_solver_choice.py.
"""

import numpy as np
import pytest
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
    select_samples,
)
from implicitdiff.solvers import (
    PLANNED,
    SOLVERS,
    PseudoInverse,
    relative_residual,
)
from implicitdiff.status import Status
from tests.operator_cases import BY_NAME, TABLE
from tests.operator_draws import BATCHES, Draw
from tests.solver_checks import (
    ALL,
    PAIRS,
    apply,
    close,
    oracle,
    right_hand_side,
    statuses,
)

UNSTATED = ("dense, singular", "differences along a chain", "the Laplacian of a ring")
"""Singular matrices whose kernel the operator does not state."""


def test_every_solver_has_a_row_and_every_row_a_solver() -> None:
    assert {solver for solver, _ in PAIRS} == set(ALL)
    assert {row for _, row in PAIRS} | {"matrix-free, unsymmetric"} == {row.name for row in TABLE}


def test_names_are_those_of_the_contract() -> None:
    assert set(SOLVERS) | set(PLANNED) == set(
        "divide block-cholesky woodbury cholesky lu ldl banded-cholesky tridiagonal kronecker schur cg "
        "schur-cg minres gmres sparse-lu".split()
    )
    assert all(solver.name == name for name, solver in ALL.items())


@pytest.mark.parametrize(("solver", "row"), PAIRS)
@pytest.mark.parametrize("batch", list(BATCHES))
def test_against_the_dense_twin(solver: str, row: str, batch: str) -> None:
    singular = BY_NAME[row].singular
    operator, twin = BY_NAME[row].build(Draw(*BATCHES[batch]))
    samples = 3 if batch == "all shared" else operator.batch
    before = operator.to_dense().clone()
    factorization = ALL[solver].factor(operator)
    for lead in ((), (2,), (2, 3)):
        rhs = right_hand_side(twin, samples, lead, singular)
        kept = rhs.clone()
        solution = factorization.solve(rhs)
        assert solution.shape == rhs.shape
        assert solution.dtype == rhs.dtype
        if row in UNSTATED and solver == "cg":
            # Nothing is stated about the kernel, so the answer is one of many.
            close(operator.matvec(solution), rhs.numpy(), 1e-9)
        else:
            close(solution, oracle(twin, rhs.numpy(), singular), 1e-9)
        assert torch.equal(rhs, kept), "the right-hand side was written to"
    assert factorization.status.shape == (operator.batch,)
    assert factorization.status.dtype == torch.int8
    # A stated kernel is handled; one that had to be found is reported, with the right answer all the same.
    unstated = row in ("zero", *UNSTATED) and solver != "cg"
    reported = singular and (unstated or solver == "eigh")
    assert set(statuses(factorization)) <= {Status.SINGULAR if reported else Status.OK}
    assert torch.equal(operator.to_dense(), before), "a parameter was written to"


@pytest.mark.parametrize(("solver", "row"), PAIRS)
def test_definite_says_what_the_eigenvalues_say(solver: str, row: str) -> None:
    operator, twin = BY_NAME[row].build(Draw(3))
    definite = ALL[solver].factor(operator).definite
    if definite is None:
        assert solver in ("lu", "cg", "schur-cg", "gmres") or not operator.symmetric
        return
    if not operator.symmetric:
        assert not definite.any()
        return
    eigenvalues = np.linalg.eigvalsh(twin)
    if isinstance(operator, Block) and solver != "eigh":
        eigenvalues = eigenvalues[:, len(operator.null_vectors) :]  # on the complement of the stated kernel
    assert definite.tolist() == (eigenvalues > 1e-10).all(1).tolist()


@pytest.mark.parametrize(("solver", "row"), PAIRS)
def test_float32(solver: str, row: str) -> None:
    singular = BY_NAME[row].singular
    operator, twin = BY_NAME[row].build(Draw(3, dtype=torch.float32))
    rhs = right_hand_side(twin, 3, (), singular).float()
    factorization = ALL[solver].factor(operator)
    solution = factorization.solve(rhs)
    assert solution.dtype == torch.float32
    if row not in UNSTATED:
        # The twin of a singular row is singular only up to the rounding of its float32 parameters.
        condition = 10 if singular else np.linalg.cond(twin).max()
        close(solution, oracle(twin, rhs.double().numpy(), singular, cut=1e-5), 1e-6 * max(10, condition))


@pytest.mark.parametrize(("solver", "row"), PAIRS)
@pytest.mark.parametrize("batch", ["batch 3", "all shared"])
def test_a_zero_right_hand_side_gives_exactly_zero(solver: str, row: str, batch: str) -> None:
    operator, twin = BY_NAME[row].build(Draw(*BATCHES[batch]))
    factorization = ALL[solver].factor(operator)
    rhs = right_hand_side(twin, 3, (2,), BY_NAME[row].singular)
    whole = factorization.solve(rhs)
    rhs[0, 1] = 0
    solution = factorization.solve(rhs)
    assert solution[0, 1].eq(0).all()
    close(solution[1], whole[1].numpy(), 1e-12)
    close(solution[0, 2], whole[0, 2].numpy(), 1e-12)


@pytest.mark.parametrize(("solver", "row"), PAIRS)
def test_one_right_hand_side_for_all_samples(solver: str, row: str) -> None:
    operator, twin = BY_NAME[row].build(Draw(3))
    rhs = right_hand_side(twin[:1], 1, (), singular=False)
    if BY_NAME[row].singular:
        rhs.zero_()
    solution = ALL[solver].factor(operator).solve(rhs)
    assert solution.shape == (3, operator.size)
    close(solution, oracle(twin, np.broadcast_to(rhs.numpy(), solution.shape), BY_NAME[row].singular), 1e-9)


def spoil(operator: LinearOperator, value: float) -> LinearOperator:
    """Return the operator with ``value`` in the first parameter of sample 1."""
    if isinstance(operator, Block):
        corner = operator.corners[0]
        grid = [list(row) for row in operator.blocks]
        grid[0][0] = spoil(corner, value)
        return Block(tuple(map(tuple, grid)), operator.sizes)
    if isinstance(operator, MatrixFree):
        product = operator.product

        def spoiled(vector: Tensor) -> Tensor:
            image = product(vector).clone()
            image[..., 1, :] *= value
            return image

        return MatrixFree(spoiled, operator.size, operator.batch, operator.dtype, operator.device)
    field = {ScaledIdentity: "scale", Diagonal: "diagonal", BlockDiagonal: "blocks", Dense: "matrix"}
    name = field.get(type(operator), "diagonal")
    tensor = getattr(operator, name).clone()
    tensor[1].view(-1)[0] = value
    return type(operator)(**{**operator.__dict__, name: tensor})


SPOILABLE = [
    (solver, row)
    for solver, row in PAIRS
    if row in ("scaled identity", "diagonal", "rows of a matrix", "low rank", "dense", "matrix-free")
    or (row == "two corners, the first larger" and solver != "eigh")
]


@pytest.mark.parametrize(("solver", "row"), SPOILABLE)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_stay_in_their_sample(solver: str, row: str, value: float) -> None:
    operator, twin = BY_NAME[row].build(Draw(3))
    if solver == "cg" and np.linalg.eigvalsh(twin).min() < 0:
        return
    factorization = ALL[solver].factor(spoil(operator, value))
    rhs = right_hand_side(twin, 3, (2,), singular=False)
    rhs[0, 1] = 0
    solution = factorization.solve(rhs)
    good = [0, 2]
    close(solution[:, good], oracle(twin[good], rhs[:, good].numpy(), False), 1e-9)
    assert solution[0, 1].eq(0).all()
    expected = {"divide": Status.SINGULAR, "cg": Status.NOT_CONVERGED}.get(solver, Status.NONFINITE)
    if solver == "cg" and isinstance(operator, LowRankPlusDiagonal):
        expected = Status.NONFINITE  # the verdict of the direct solver, which takes over
    assert statuses(factorization) == [Status.OK, expected, Status.OK]


def mixed_dense(size: int = 6, dtype: torch.dtype = torch.float64) -> tuple[Tensor, np.ndarray]:
    """Symmetric matrices: definite, indefinite, singular semidefinite, zero, definite but badly scaled."""
    generator = torch.Generator().manual_seed(3)
    normal = torch.randn(5, size, size, generator=generator, dtype=torch.float64)
    matrices = normal @ normal.mT + torch.eye(size)
    matrices[1] = normal[1] + normal[1].T
    root = normal[2, :, : size - 2]
    matrices[2] = root @ root.T
    matrices[3] = 0
    units = torch.logspace(-8, 8, size, dtype=torch.float64)
    matrices[4] = matrices[4] * units[:, None] * units
    return matrices.to(dtype), matrices.numpy()


@pytest.mark.parametrize("solver", ["cholesky", "lu", "ldl", "eigh"])
def test_each_sample_gets_its_own_verdict(solver: str) -> None:
    matrices, twin = mixed_dense()
    factorization = ALL[solver].factor(Dense(matrices))
    units = np.logspace(-8, 8, 6)
    drawn = np.random.default_rng(0).normal(size=(2, 5, 6))
    consistent = apply(twin, drawn)
    consistent[:, 4] = units * drawn[:, 4]
    solution = factorization.solve(torch.from_numpy(consistent))
    assert statuses(factorization) == [Status.OK, Status.OK, Status.SINGULAR, Status.SINGULAR, Status.OK]
    for sample in (0, 1, 2, 3):
        expected = apply(
            np.linalg.pinv(twin[sample : sample + 1], rcond=1e-10), consistent[:, sample : sample + 1]
        )
        close(solution[:, sample : sample + 1], expected, 1e-10)
    balanced = np.linalg.inv(twin[4] / units[:, None] / units) @ drawn[:, 4].T
    np.testing.assert_allclose(solution[:, 4].numpy() * units, balanced.T, rtol=1e-9)
    if factorization.definite is not None:
        assert factorization.definite.tolist() == [True, False, False, False, True]


def test_badly_scaled_is_not_singular_and_singular_is_not_missed() -> None:
    for dtype in (torch.float32, torch.float64):
        for size in (2, 7, 25):
            generator = torch.Generator().manual_seed(size)
            root = torch.randn(8, size, size - 1, generator=generator, dtype=dtype)
            regular = torch.randn(8, size, size, generator=generator, dtype=dtype)
            regular = regular @ regular.mT + torch.eye(size, dtype=dtype)
            units = torch.logspace(-6, 6, size, dtype=dtype)
            scaled = regular * units[:, None] * units
            kkt = regular.clone()
            kkt[:, -1, -1] = 0
            for solver in ("cholesky", "lu", "ldl"):
                singular = SOLVERS[solver].factor(Dense(root @ root.mT))
                assert set(statuses(singular)) == {Status.SINGULAR}, (solver, dtype, size)
                for matrix in (regular, scaled, kkt):
                    assert set(statuses(SOLVERS[solver].factor(Dense(matrix)))) == {Status.OK}, (
                        solver,
                        dtype,
                        size,
                    )


def test_unsymmetric_singular_has_no_answer() -> None:
    matrix = torch.tensor([[[1.0, 2.0], [2.0, 4.0]], [[1.0, 2.0], [3.0, 4.0]]])
    factorization = SOLVERS["lu"].factor(Dense(matrix, symmetric=False))
    solution = factorization.solve(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
    assert statuses(factorization) == [Status.SINGULAR, Status.OK]
    assert solution[0].isnan().all()
    close(solution[1], np.array([1.0, -0.5]), 1e-6)
    assert factorization.solve(torch.zeros(2, 2)).eq(0).all()


def test_relative_residual_tells_consistent_from_inconsistent() -> None:
    matrices, twin = mixed_dense()
    operator = select_samples(Dense(matrices), torch.tensor([2, 2, 3]))
    consistent = torch.from_numpy(apply(twin[[2, 2, 3]], np.ones((3, 6))))
    other = consistent.clone()
    other[1, 0] += 1
    solution = PseudoInverse().factor(operator).solve(other)
    residual = relative_residual(operator, solution, other)
    assert residual[0] < 1e-12
    assert residual[1] > 1e-3
    assert residual[2] == 0


def test_pseudo_inverse_of_inconsistent_and_badly_scaled() -> None:
    matrices, twin = mixed_dense()
    rhs = np.random.default_rng(5).normal(size=(5, 6))
    solution = PseudoInverse().factor(Dense(matrices)).solve(torch.from_numpy(rhs))
    close(solution[2:4], oracle(twin[2:4], rhs[2:4], True), 1e-10)
    # The kernel of a matrix whose variables have very different units: (1, -1e6, 0).
    vector = np.array([1.0, -1e6, 0.0])
    root = np.array([[1e6, 1.0, 0.0], [0.0, 0.0, 1e-6]])
    solution = (
        PseudoInverse()
        .factor(Dense(torch.from_numpy(root.T @ root)[None]))
        .solve(torch.from_numpy(root.T @ root @ np.array([[1.0, 0.0, 3.0]]).T).T)
    )
    expected = np.array([1.0, 0.0, 3.0]) - vector * (vector[0] / (vector @ vector))
    np.testing.assert_allclose(solution[0].numpy(), expected, rtol=1e-6, atol=1e-9)
