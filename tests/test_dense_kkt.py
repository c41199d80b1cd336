"""The dense KKT solve and MINRES, against the pseudo-inverse by eigenvalues in NumPy."""

import numpy as np
import pytest
import torch
from torch import Tensor

from implicitdiff.derivatives.kkt import SymmetricKKT
from implicitdiff.derivatives.matrixfree import minres
from implicitdiff.status import Status


def kkt(m: int, rows: Tensor, seed: int, hessian: float = 1.0) -> Tensor:
    """[[H, -A'], [-A, 0]] with H indefinite of the given size and A = rows (p, m)."""
    generator = torch.Generator().manual_seed(seed)
    square = torch.randn(m, m, generator=generator, dtype=torch.float64)
    top = torch.cat([hessian * (square + square.T), -rows.T], 1)
    return torch.cat([top, torch.cat([-rows, rows.new_zeros(len(rows), len(rows))], 1)])


def solve_symmetric(matrix: Tensor, rhs: Tensor, variables: int) -> tuple[Tensor, Tensor]:
    """K^-1 rhs by the first solve of a factorisation; a later one, after other right-hand sides, must agree."""
    factored = SymmetricKKT(matrix, variables)
    factored.solve(torch.cos(torch.arange(rhs.numel(), dtype=rhs.dtype)).reshape(rhs.shape)[..., :1])
    later, again = factored.solve(rhs)
    first, status = SymmetricKKT(matrix, variables).solve(rhs)
    assert torch.equal(status, again)
    close = {torch.float32: 1e-4, torch.float64: 1e-9}[rhs.dtype]
    torch.testing.assert_close(later, first, rtol=close, atol=1e-13, equal_nan=True)
    return first, status


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pseudo(matrix: Tensor, rhs: Tensor, rank: int) -> Tensor:
    """K^+ rhs with the rank known beforehand, so that no tolerance enters."""
    values, vectors = np.linalg.eigh(matrix.numpy())
    kept = np.argsort(-np.abs(values))[:rank]
    basis = vectors[:, kept]
    return torch.from_numpy(basis @ ((basis.T @ rhs.numpy()) / values[kept, None]))


@pytest.mark.parametrize("hessian", [1e-20, 1.0, 1e20])
def test_regular_systems_of_any_scale(hessian: float) -> None:
    """Seen without scaling, H of size 1e-20 beside A of size 1 is zero."""
    rows = normal(2, 5, seed=2)
    matrix = torch.stack([kkt(5, rows, seed, hessian) for seed in (0, 1)])
    known = normal(2, 7, 3, seed=3)
    known[:, 5:] *= hessian  # otherwise H u drowns in the rounding of A'lam
    z, status = solve_symmetric(matrix, matrix @ known, 5)
    assert (status == Status.OK).all()
    torch.testing.assert_close(z[:, :5], known[:, :5], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(z[:, 5:] / hessian, known[:, 5:] / hessian, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("factor", [1.0, 1e6])
def test_dependent_constraints_give_the_representative_of_minimum_norm(factor: float) -> None:
    """Three rows of which the third is a combination, one of them on another scale; a regular sample beside it."""
    first = normal(2, 5, seed=4)
    rows = torch.cat([first, first[:1] * factor - first[1:]])
    dependent, regular = kkt(5, rows, 5), kkt(5, normal(3, 5, seed=6), 7)
    matrix = torch.stack([dependent, regular])
    rhs = torch.stack([dependent @ normal(8, 2, seed=8), normal(8, 2, seed=9)])
    z, status = solve_symmetric(matrix, rhs, 5)
    assert status.tolist() == [
        Status.NOT_REGULAR,
        Status.OK,
    ]  # a suspicion: this matrix alone cannot settle it
    expected = pseudo(dependent, rhs[0], 7)
    assert (z[0] - expected).norm() < 1e-7 * expected.norm()
    torch.testing.assert_close(matrix[1] @ z[1], rhs[1])
    # A right-hand side that no z reaches is projected: least squares, still of minimum norm.
    outside = normal(8, 1, seed=10)
    found, _ = solve_symmetric(dependent[None], outside[None], 5)
    expected = pseudo(dependent, outside, 7)
    assert (found[0] - expected).norm() < 1e-7 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_direction_in_which_u_is_free_is_singular(dtype: torch.dtype) -> None:
    matrix = kkt(4, normal(1, 4, seed=1), 2)
    matrix[0], matrix[:, 0] = 0, 0  # u_0 appears nowhere
    fine = kkt(4, normal(1, 4, seed=1), 3)
    rhs = normal(2, 5, 1, seed=4)
    rhs[1] = 0
    stacked = torch.stack([fine, matrix]).to(dtype)
    z, status = solve_symmetric(torch.cat([stacked, stacked[1:]]), torch.cat([rhs, rhs[:1]]).to(dtype), 4)
    assert status.tolist() == [Status.OK, Status.SINGULAR, Status.SINGULAR]
    assert (z[1] == 0).all(), "a right-hand side of zeros has the answer 0 whatever the matrix"
    torch.testing.assert_close(stacked[0] @ z[0], rhs[0].to(dtype), rtol=1e-4, atol=1e-4)


def test_a_matrix_with_nan_concerns_its_sample_alone() -> None:
    matrix = torch.stack([kkt(3, normal(1, 3, seed=1), seed) for seed in range(3)])
    matrix[1, 0, 0] = torch.nan
    rhs = normal(3, 4, 2, seed=2)
    rhs[1, :, 1] = 0
    z, status = solve_symmetric(matrix, rhs, 3)
    assert status.tolist() == [Status.OK, Status.NONFINITE, Status.OK]
    assert z[1, :, 0].isnan().all()
    assert (z[1, :, 1] == 0).all()
    torch.testing.assert_close(matrix[2] @ z[2], rhs[2])


def test_no_samples_and_no_unknowns() -> None:
    for shape in ((0, 3), (2, 0)):
        z, status = solve_symmetric(torch.zeros(*shape, shape[1]), torch.zeros(*shape, 2), shape[1])
        assert z.shape == (*shape, 2)
        assert status.shape == shape[:1]


@pytest.mark.parametrize("null", [0, 2])
def test_minres_is_the_pseudo_inverse_on_its_range(null: int) -> None:
    """Indefinite, different rows converging at different times, one of them zero."""
    basis = torch.linalg.qr(normal(3, 12, 12, seed=1))[0]
    values = torch.linspace(-3, 4, 12, dtype=torch.float64)
    values[:null] = 0
    matrix = basis @ (values[:, None] * basis.mT)
    known = normal(2, 3, 12, seed=2)
    known[0, 1] = 0
    known[1, 2] = basis[2, :, 5]  # an eigenvector: one step
    rhs = (matrix @ known[..., None])[..., 0]
    x, converged = minres(lambda z: (matrix @ z[..., None])[..., 0], rhs)
    assert converged.all()
    for row in range(2):
        for sample in range(3):
            expected = pseudo(matrix[sample], rhs[row, sample, :, None], 12 - null)[:, 0]
            torch.testing.assert_close(x[row, sample], expected, rtol=1e-9, atol=1e-10)
    assert (x[0, 1] == 0).all()


def test_minres_says_when_it_did_not_converge() -> None:
    matrix = torch.diag(torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64))
    rhs = torch.tensor([[[1.0, 1.0, 0.0]], [[1.0, 1.0, 1.0]]], dtype=torch.float64)
    _, converged = minres(lambda z: z @ matrix, rhs)
    assert converged[:, 0].tolist() == [True, False]
