"""Every solver on every operator it takes, against numpy on the dense twin; then what goes wrong, sample by sample."""

import numpy as np
import pytest
import torch
from torch import Tensor

from implicitdiff.errors import NotSupportedYetError, OptionError
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
    select_samples,
)
from implicitdiff.solvers import (
    PLANNED,
    SOLVERS,
    ConjugateGradients,
    Factorization,
    LinearSolver,
    PseudoInverse,
    choose,
    relative_residual,
    solver_named,
)
from implicitdiff.solvers.schur import split_blocks
from implicitdiff.status import Status
from tests.operator_cases import BATCHES, BY_NAME, TABLE, Draw

ALL: dict[str, LinearSolver] = {**SOLVERS, "eigh": PseudoInverse()}
CPU = torch.device("cpu")


def pairs() -> list[tuple[str, str]]:
    """(solver, row) wherever the solver takes the row's operator."""
    taken = []
    for name, solver in ALL.items():
        for row in TABLE:
            operator, twin = row.build(Draw(3))
            if solver.reject(operator) is not None:
                continue
            # Conjugate gradients promise nothing for an indefinite matrix; test_cg_gives_up covers those.
            if name == "cg" and np.linalg.eigvalsh(twin).min() < -1e-12:
                continue
            taken.append((name, row.name))
    return taken


PAIRS = pairs()


def right_hand_side(twin: np.ndarray, samples: int, lead: tuple[int, ...], singular: bool) -> Tensor:
    """Random right-hand sides; in the range of a singular matrix."""
    rhs = np.random.default_rng(1).normal(size=(*lead, samples, twin.shape[-1]))
    return torch.from_numpy(apply(twin, rhs) if singular else rhs)


def apply(matrices: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    matrices = np.broadcast_to(matrices, (vectors.shape[-2], *matrices.shape[1:]))
    return np.einsum("bij,...bj->...bi", matrices, vectors)


def oracle(twin: np.ndarray, rhs: np.ndarray, singular: bool, cut: float = 1e-10) -> np.ndarray:
    return apply(np.linalg.pinv(twin, rcond=cut) if singular else np.linalg.inv(twin), rhs)


def close(actual: Tensor, expected: np.ndarray, tolerance: float) -> None:
    scale = max(1.0, float(np.abs(expected).max(initial=0)))
    np.testing.assert_allclose(actual.double().numpy() / scale, expected / scale, rtol=0, atol=tolerance)


def statuses(factorization: Factorization) -> list[Status]:
    return [Status(code) for code in factorization.status.tolist()]


# ---- the table -----------------------------------------------------------------------------------------------


def test_every_solver_has_a_row_and_every_row_a_solver() -> None:
    assert {solver for solver, _ in PAIRS} == set(ALL)
    assert {row for _, row in PAIRS} | {"matrix-free, unsymmetric"} == {row.name for row in TABLE}


def test_names_are_those_of_the_contract() -> None:
    assert set(SOLVERS) | set(PLANNED) == set(
        "divide block-cholesky woodbury cholesky lu ldl banded-cholesky tridiagonal kronecker schur cg schur-cg "
        "minres gmres sparse-lu".split()
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
        if row == "dense, singular" and solver == "cg":
            # Nothing is stated about the kernel, so the answer is one of many.
            close(operator.matvec(solution), rhs.numpy(), 1e-9)
        else:
            close(solution, oracle(twin, rhs.numpy(), singular), 1e-9)
        assert torch.equal(rhs, kept), "the right-hand side was written to"
    assert factorization.status.shape == (operator.batch,)
    assert factorization.status.dtype == torch.int8
    # A stated kernel is handled; one that had to be found is reported, with the right answer all the same.
    unstated = row in ("zero", "dense, singular") and solver != "cg"
    reported = singular and (unstated or solver == "eigh")
    assert set(statuses(factorization)) <= {Status.SINGULAR if reported else Status.OK}
    assert torch.equal(operator.to_dense(), before), "a parameter was written to"


@pytest.mark.parametrize(("solver", "row"), PAIRS)
def test_definite_says_what_the_eigenvalues_say(solver: str, row: str) -> None:
    operator, twin = BY_NAME[row].build(Draw(3))
    definite = ALL[solver].factor(operator).definite
    if definite is None:
        assert solver in ("lu", "cg") or not operator.symmetric
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
    if row != "dense, singular":
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


# ---- one bad sample never takes the batch with it --------------------------------------------------------------


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
    assert statuses(factorization) == [Status.OK, expected, Status.OK]


def mixed_dense(size: int = 6, dtype: torch.dtype = torch.float64) -> tuple[Tensor, np.ndarray]:
    """Five symmetric matrices: definite, indefinite, singular semidefinite, zero, definite but badly scaled."""
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


# ---- divide ------------------------------------------------------------------------------------------------------


def test_divide_by_zero() -> None:
    factorization = SOLVERS["divide"].factor(Diagonal(torch.tensor([[1.0, 0.0], [2.0, 4.0], [-1.0, 1.0]])))
    assert statuses(factorization) == [Status.SINGULAR, Status.OK, Status.OK]
    assert factorization.definite is not None
    assert factorization.definite.tolist() == [False, True, False]
    solution = factorization.solve(torch.tensor([[3.0, 0.0], [1.0, 1.0], [0.0, 0.0]]))
    assert solution.tolist() == [[3.0, 0.0], [0.5, 0.25], [0.0, 0.0]]
    assert torch.isinf(factorization.solve(torch.tensor([[3.0, 1.0], [1.0, 1.0], [1.0, 1.0]]))[0, 1])


# ---- woodbury ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
def test_woodbury_inertia_and_uneven_diagonals(seed: int) -> None:
    rng = np.random.default_rng(seed)
    size, rank = int(rng.integers(2, 9)), 1
    rank = int(rng.integers(1, size))
    diagonal = rng.choice([-1.0, 1.0], (4, size), p=[0.2, 0.8]) * 10.0 ** rng.uniform(-5, 2, (4, size))
    left, weights = (
        rng.normal(size=(4, size, rank)),
        rng.normal(size=(4, rank)) * rng.integers(0, 2, (4, rank)),
    )
    diagonal[3, :rank] = 0
    twin = np.einsum("bmk,bk,bnk->bmn", left, weights, left)
    for sample in range(4):
        twin[sample] += np.diag(diagonal[sample])
    operator = LowRankPlusDiagonal(*(torch.from_numpy(a) for a in (diagonal, left, weights)))
    factorization = SOLVERS["woodbury"].factor(operator)
    regular = [s for s in range(4) if np.linalg.cond(twin[s]) < 1e8]
    rhs = rng.normal(size=(4, size))
    solution = factorization.solve(torch.from_numpy(rhs))
    for s in regular:
        assert factorization.status[s] == int(Status.OK)
        close(solution[s], np.linalg.inv(twin[s]) @ rhs[s], 1e-7)
        assert bool(factorization.definite[s]) == bool(np.linalg.eigvalsh(twin[s]).min() > 0)
    assert len(regular) >= 2


def test_woodbury_singular_by_cancellation_and_by_zeros() -> None:
    left = torch.tensor([[[1.0], [2.0], [2.0]]], dtype=torch.float64) / 3
    weights = torch.tensor([[-1.0], [-0.5], [2.0], [1.0]], dtype=torch.float64)
    diagonal = torch.ones(4, 3, dtype=torch.float64)
    diagonal[2, 0] = 0
    diagonal[3, :2] = 0
    operator = LowRankPlusDiagonal(diagonal, left, weights)
    factorization = SOLVERS["woodbury"].factor(operator)
    # I - u u' with |u| = 1 loses its only pivot to cancellation; two zeros in D cannot be made up for by rank 1.
    assert statuses(factorization) == [Status.SINGULAR, Status.OK, Status.OK, Status.SINGULAR]
    rhs = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64).expand(4, -1)
    solution = factorization.solve(rhs)
    assert solution[0].isnan().all()
    assert solution[3].isnan().all()
    dense = operator.to_dense().numpy()
    close(solution[1:3], np.linalg.inv(dense[1:3]) @ np.array([1.0, 2.0, 3.0]), 1e-12)
    assert factorization.definite is not None
    assert factorization.definite.tolist() == [False, True, True, False]


def test_woodbury_refuses_large_ranks() -> None:
    operator = LowRankPlusDiagonal(torch.ones(1, 1), torch.ones(1, 128, 1024), torch.ones(1, 1024))
    assert SOLVERS["woodbury"].reject(operator) == "k = 1024 >= m = 128"
    with pytest.raises(OptionError, match="k = 1024 >= m = 128"):
        SOLVERS["woodbury"].factor(operator)


# ---- schur -------------------------------------------------------------------------------------------------------


def plan_block(plan: Tensor) -> Block:
    rows, columns = plan.shape[1:]
    kernel = torch.cat([torch.ones(rows), -torch.ones(columns)])
    return Block(
        ((Diagonal(plan.sum(2)), plan), (plan.mT, Diagonal(plan.sum(1)))), (rows, columns), (kernel,)
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


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Records the largest number of entries of any tensor made while it is active (views aside)."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and tensor._base is None:
                self.entries = max(self.entries, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


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


def test_woodbury_makes_nothing_larger_than_a_shared_factor() -> None:
    left, batch = torch.randn(1, 300, 5), 8
    operator = LowRankPlusDiagonal(1 + torch.rand(batch, 300), left, torch.rand(batch, 5))
    with LargestTensor() as seen:
        SOLVERS["woodbury"].factor(operator).solve(torch.randn(batch, 300))
    assert seen.entries <= max(left.numel(), batch * 300)


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


# ---- conjugate gradients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [row.name for row in TABLE])
def test_cg_gives_up_on_what_is_not_definite(row: str) -> None:
    operator, twin = BY_NAME[row].build(Draw(3))
    if SOLVERS["cg"].reject(operator) is not None:
        assert isinstance(operator, Zero) or not operator.symmetric
        return
    factorization = SOLVERS["cg"].factor(operator)
    rhs = right_hand_side(twin, 3, (), BY_NAME[row].singular)
    solution = factorization.solve(rhs)
    accurate = relative_residual(operator, solution, rhs) < 1e-8
    assert [status == Status.OK for status in statuses(factorization)] == accurate.tolist()
    positive = np.linalg.eigvalsh(twin).min(1) > -1e-12
    assert accurate[torch.from_numpy(positive)].all()


def test_cg_limit_and_tolerance() -> None:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(2, 30, 30, generator=generator, dtype=torch.float64)
    matrix = root @ root.mT + torch.eye(30)
    matrix[0] = torch.eye(30)
    rhs = torch.randn(3, 2, 30, generator=generator, dtype=torch.float64)
    short = ConjugateGradients(limit=2).factor(Dense(matrix))
    solution = short.solve(rhs)
    assert statuses(short) == [Status.OK, Status.NOT_CONVERGED]
    close(solution[:, 0], rhs[:, 0].numpy(), 1e-12)
    loose = ConjugateGradients(tolerance=1e-2).factor(Dense(matrix))
    loose.solve(rhs)
    tight = SOLVERS["cg"].factor(Dense(matrix))
    tight.solve(rhs)
    assert 1 < loose.steps < tight.steps
    # The status belongs to the last call.
    short.solve(torch.zeros_like(rhs))
    assert statuses(short) == [Status.OK, Status.OK]


def test_cg_right_hand_sides_are_independent_and_may_be_tiny() -> None:
    operator, _ = BY_NAME["low rank"].build(Draw(3, dtype=torch.float32))
    rhs = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))
    factorization = SOLVERS["cg"].factor(operator)
    whole = factorization.solve(rhs)
    # The squares of these entries underflow in float32.
    scaled = factorization.solve(rhs * torch.tensor([1e-30, 1.0, 1e20])[:, None])
    assert set(statuses(factorization)) == {Status.OK}
    close(scaled / torch.tensor([1e-30, 1.0, 1e20])[:, None], whole.double().numpy(), 1e-6)
    alone = SOLVERS["cg"].factor(select_samples(operator, torch.tensor([1]))).solve(rhs[:, 1:2])
    close(alone, whole[:, 1:2].double().numpy(), 1e-6)


def test_cg_catches_a_product_that_is_not_linear() -> None:
    bent = MatrixFree(lambda v: v + 0.1 * v**3, 3, 1, torch.float64, CPU)
    factorization = SOLVERS["cg"].factor(bent)
    factorization.solve(torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64))
    assert statuses(factorization) == [Status.NOT_CONVERGED]


# ---- costs and the choice --------------------------------------------------------------------------------------


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

    return type(operator)(**{name: move(value) for name, value in operator.__dict__.items()})


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


def meta_low_rank(batch: int, size: int, rank: int) -> LowRankPlusDiagonal:
    shapes = ((batch, 1), (batch, size, rank), (batch, rank))
    return LowRankPlusDiagonal(*(torch.empty(shape, device="meta") for shape in shapes))


@pytest.mark.parametrize(
    ("rank", "expected", "reason"),
    [(16, "woodbury", "cholesky"), (64, "woodbury", "cholesky"), (1024, "cholesky", "k = 1024 >= m = 128")],
)
def test_pooling_sizes(rank: int, expected: str, reason: str) -> None:
    for batch in (1, 8):
        choice = choose(meta_low_rank(batch, 128, rank))
        assert choice.solver.name == expected
        assert choice.cost == choice.solver.cost(meta_low_rank(batch, 128, rank))
        assert reason in str(choice.rejected)
        assert choice.solver.name not in dict(choice.rejected)
        assert "lu" in dict(choice.rejected)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("zero", "divide"),
        ("scaled identity", "divide"),
        ("diagonal", "divide"),
        ("rows of a matrix", "block-cholesky"),
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
