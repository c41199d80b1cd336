"""Conjugate gradients: when they give up, and that right-hand sides do not touch each other."""

import numpy as np
import pytest
import torch

from implicitdiff.operators import (
    Dense,
    MatrixFree,
    Zero,
    select_samples,
)
from implicitdiff.solvers import (
    SOLVERS,
    ConjugateGradients,
    relative_residual,
)
from implicitdiff.status import Status
from tests.operator_cases import BY_NAME, TABLE
from tests.operator_draws import Draw
from tests.solver_checks import (
    CPU,
    close,
    right_hand_side,
    statuses,
)


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


def test_cg_stops_at_negative_curvature() -> None:
    factorization = SOLVERS["cg"].factor(
        Dense(torch.diag_embed(torch.tensor([[1.0, -1.0, 3.0], [1.0, 2.0, 3.0]])))
    )
    factorization.solve(torch.tensor([[1.0, 2.0, 0.1], [0.0, 0.0, 0.0]]))
    assert factorization.steps == 1
    assert statuses(factorization) == [Status.NOT_CONVERGED, Status.OK]


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
