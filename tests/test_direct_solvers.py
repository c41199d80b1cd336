"""Division by the diagonal and the matrix inversion lemma: zeros, signs, cancellation."""

import numpy as np
import pytest
import torch

from implicitdiff.errors import OptionError
from implicitdiff.operators import (
    Diagonal,
    LowRankPlusDiagonal,
)
from implicitdiff.solvers import (
    SOLVERS,
)
from implicitdiff.status import Status
from tests.operator_draws import Draw
from tests.solver_checks import (
    LargestTensor,
    close,
    statuses,
)


def test_divide_by_zero() -> None:
    factorization = SOLVERS["divide"].factor(Diagonal(torch.tensor([[1.0, 0.0], [2.0, 4.0], [-1.0, 1.0]])))
    assert statuses(factorization) == [Status.SINGULAR, Status.OK, Status.OK]
    assert factorization.definite is not None
    assert factorization.definite.tolist() == [False, True, False]
    solution = factorization.solve(torch.tensor([[3.0, 0.0], [1.0, 1.0], [0.0, 0.0]]))
    assert solution.tolist() == [[3.0, 0.0], [0.5, 0.25], [0.0, 0.0]]
    assert torch.isinf(factorization.solve(torch.tensor([[3.0, 1.0], [1.0, 1.0], [1.0, 1.0]]))[0, 1])


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
    # I - u u' with |u| = 1 loses its only pivot to cancellation; rank 1 cannot make up for two zeros in D.
    assert statuses(factorization) == [Status.SINGULAR, Status.OK, Status.OK, Status.SINGULAR]
    rhs = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64).expand(4, -1)
    solution = factorization.solve(rhs)
    assert solution[0].isnan().all()
    assert solution[3].isnan().all()
    dense = operator.to_dense().numpy()
    close(solution[1:3], np.linalg.inv(dense[1:3]) @ np.array([1.0, 2.0, 3.0]), 1e-12)
    assert factorization.definite is not None
    assert factorization.definite.tolist() == [False, True, True, False]


def test_woodbury_sees_cancellation_that_leaves_rounding() -> None:
    """I + C V' D^-1 U is 0 up to rounding in its last row: its size against its terms tells, not itself."""
    draw = Draw(50)
    left = torch.linalg.qr(draw.normal(6, 2))[0]
    weights = torch.stack([torch.full((50,), 0.7), torch.full((50,), -1.0)], dim=1).double()
    operator = LowRankPlusDiagonal(torch.ones(50, 1).double(), left, weights)
    assert set(statuses(SOLVERS["woodbury"].factor(operator))) == {Status.SINGULAR}


def test_woodbury_is_refined_where_the_diagonal_is_uneven() -> None:
    """The lemma alone loses nine digits here: D_11 = 1e-9 while the matrix has entries of order 1."""
    diagonal = torch.tensor([[1e-9, 1.0, 2.0, 3.0]], dtype=torch.float64)
    left = torch.tensor([[[1.0], [0.3], [-0.2], [0.5]]], dtype=torch.float64)
    operator = LowRankPlusDiagonal(diagonal, left, torch.ones(1, 1, dtype=torch.float64))
    rhs = torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=torch.float64)
    rhs = operator.matvec(rhs)
    close(SOLVERS["woodbury"].factor(operator).solve(rhs), np.array([[1.0, 2.0, 3.0, 4.0]]), 1e-13)


def test_woodbury_refuses_large_ranks() -> None:
    operator = LowRankPlusDiagonal(torch.ones(1, 1), torch.ones(1, 128, 1024), torch.ones(1, 1024))
    assert SOLVERS["woodbury"].reject(operator) == "k = 1024 >= m = 128"
    with pytest.raises(OptionError, match="k = 1024 >= m = 128"):
        SOLVERS["woodbury"].factor(operator)


def test_woodbury_makes_nothing_larger_than_a_shared_factor() -> None:
    left, batch = torch.randn(1, 300, 5), 8
    operator = LowRankPlusDiagonal(1 + torch.rand(batch, 300), left, torch.rand(batch, 5))
    with LargestTensor() as seen:
        SOLVERS["woodbury"].factor(operator).solve(torch.randn(batch, 300))
    assert seen.entries <= max(left.numel(), batch * 300)
