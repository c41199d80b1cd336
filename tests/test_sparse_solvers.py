"""The sparse LU and Woodbury on a base, on matrices: what becomes of samples without an answer, and which way is taken.

tests/operator_sparse.py has the rows on which every solver is compared with a dense twin.
"""

import pytest
import torch
from torch import Tensor

from implicitdiff.errors import StructureError
from implicitdiff.operators import Banded, Dense, LowRankUpdate, Sparse
from implicitdiff.operators.sparse import Pattern
from implicitdiff.solvers import SparseLU, Woodbury
from implicitdiff.solvers.sparse_lu import ReorderedBand, SparseLUFactorization
from implicitdiff.status import Status


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ring(size: int, shift: float, batch: int = 1) -> Sparse:
    """The Laplacian of a ring plus a multiple of the identity."""
    i = torch.arange(size)
    rows, columns = torch.cat([i, i, (i + 1) % size]), torch.cat([i, (i + 1) % size, i])
    pattern, slots = Pattern.of(size, rows, columns)
    values = torch.cat([torch.full((size,), 2.0 + shift), -torch.ones(2 * size)]).double()
    return Sparse(torch.zeros(batch, len(pattern), dtype=torch.float64).index_add_(1, slots, values.expand(batch, -1)),
                  (pattern,))  # fmt: skip


def test_statuses_of_samples() -> None:
    """A singular sample and one with NaN among regular ones; beyond the dense size a singular sample has no answer."""
    for size in (30, 1500):
        operator = ring(size, 0.3, batch=3)
        operator.values[1] = ring(size, 0.0).values[0]
        operator.values[2, 4] = torch.nan
        factor = SparseLUFactorization(operator)
        assert factor.status.tolist() == [Status.OK, Status.SINGULAR, Status.NONFINITE]
        assert factor.definite is not None
        assert factor.definite.tolist() == [True, False, False]
        rhs = normal(3, size)
        rhs -= rhs.mean(1, keepdim=True)
        found = factor.solve(rhs)
        alone = SparseLUFactorization(ring(size, 0.3)).solve(rhs[:1])
        assert torch.equal(found[:1], alone)
        assert bool(found[2].isnan().all())
        if size == 30:
            torch.testing.assert_close(found[1], torch.linalg.pinv(ring(size, 0.0).to_dense()[0]) @ rhs[1])
        else:
            assert bool(found[1].isnan().all())
        silent = factor.solve(torch.zeros(3, size, dtype=torch.float64))
        assert bool((silent == 0).all())


def test_rows_are_exchanged_where_the_diagonal_is_no_pivot() -> None:
    """Indefinite with tiny diagonal entries: pivots on the diagonal would lose all digits."""
    matrix = 1e-14 * torch.eye(4, dtype=torch.float64)
    for (k, l), entry in {(0, 1): 1.0, (1, 2): 0.5, (2, 3): 2.0}.items():
        matrix[k, l] = matrix[l, k] = entry
    i, j = matrix.nonzero().unbind(1)
    pattern, slots = Pattern.of(4, i, j)
    values = torch.zeros(1, len(pattern), dtype=torch.float64).index_add_(1, slots, matrix[i, j][None])
    factor = SparseLUFactorization(Sparse(values, (pattern,)))
    b = normal(1, 4)
    torch.testing.assert_close(matrix @ factor.solve(b)[0], b[0])


def test_a_narrow_band_is_taken_after_reordering() -> None:
    """A chain whose nodes are numbered at random; a random graph has no narrow band."""
    order = torch.randperm(400, generator=torch.Generator().manual_seed(1))
    i = torch.arange(399)
    rows = torch.cat([order, order[i], order[i + 1]])
    columns = torch.cat([order, order[i + 1], order[i]])
    pattern, slots = Pattern.of(400, rows, columns)
    entries = torch.cat([torch.full((400,), 2.5), -torch.ones(798)]).double()
    values = torch.zeros(2, len(pattern), dtype=torch.float64).index_add_(1, slots, entries.expand(2, -1))
    operator = Sparse(values, (pattern,))
    factor = SparseLU().factor(operator)
    assert isinstance(factor, ReorderedBand)
    b = normal(3, 2, 400)
    torch.testing.assert_close(operator.matvec(factor.solve(b)), b)


def test_a_base_that_is_singular_where_the_sum_is_not() -> None:
    """Differences and a sum: the lemma cannot be used, the status is that of the whole."""
    bands = torch.tensor([-1.0, 2.0, -1.0], dtype=torch.float64)[:, None].repeat(1, 7)
    bands[1, 0] = bands[1, -1] = 1.0
    base = Banded(bands[None, None, :, :, None, None], (7,), 0, (), 1, 1)
    left = torch.ones(1, 7, 1, dtype=torch.float64)
    operator = LowRankUpdate(base, left, torch.tensor([[0.5], [0.0]], dtype=torch.float64))
    factor = Woodbury().factor(operator)
    assert factor.status.tolist() == [Status.OK, Status.SINGULAR]
    b = normal(2, 7)
    torch.testing.assert_close(factor.solve(b)[0], torch.linalg.inv(operator.to_dense()[0]) @ b[0])


def test_sums_check_their_batches() -> None:
    with pytest.raises(StructureError, match="batch"):
        LowRankUpdate(Dense(torch.eye(3)[None].repeat(2, 1, 1)), torch.ones(3, 3, 1), torch.ones(1, 1))
