"""Null vectors that were proved: removed from right-hand sides and answers, lifted out of a singular matrix.

In: the null vectors of a ``Block``. Out: ``Kernel``. Next file: ``schur.py``.
"""

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from implicitdiff.operators import Block, LinearOperator
from implicitdiff.operators.block import NullVectors
from implicitdiff.solvers.base import Factorization


class Kernel:
    """An orthonormal basis Q (m, q) of the kernel of a symmetric matrix, the same for all samples.

    The range is the complement of the kernel, so a projection off Q makes a right-hand side consistent and an
    answer one of least norm.
    """

    def __init__(self, basis: Tensor) -> None:
        """Orthonormalise the columns of ``basis`` (m, q)."""
        if basis.shape[1] == 1:
            # A vector of zeros, as a restriction may be, stays one.
            self._basis = basis / torch.linalg.vector_norm(basis).clamp(min=torch.finfo(basis.dtype).tiny)
        else:
            self._basis = torch.linalg.qr(basis)[0]
        self._only = self._basis[:, 0] if basis.shape[1] else self._basis
        self._restricted: dict[tuple[tuple[int, ...], tuple[int, ...]], Kernel] = {}

    @classmethod
    def of(cls, operator: LinearOperator) -> "Kernel | None":
        """Return the proved kernel of an operator, None where nothing was proved."""
        if not isinstance(operator, Block) or not operator.null_vectors:
            return None
        vectors = operator.null_vectors
        assert isinstance(vectors, NullVectors)  # Block makes them so
        known = vectors.derived.get("kernel")
        if not isinstance(known, Kernel):
            known = vectors.derived["kernel"] = cls(torch.stack(tuple(vectors), dim=-1))
        return known

    def restrict(self, operator: Block, blocks: tuple[int, ...]) -> "Kernel":
        """Return the space spanned by the entries of the null vectors in the given blocks of the grid alone."""
        key = (operator.sizes, blocks)
        if key not in self._restricted:
            slices = operator.slices
            self._restricted[key] = Kernel(torch.cat([self._basis[slices[i]] for i in blocks]))
        return self._restricted[key]

    @cached_property
    def level(self) -> float | None:
        """The square of the entries, where there is one vector and its entries are equal up to sign; else None."""
        if self._basis.shape[1] != 1 or not self._basis.shape[0]:
            return None
        vector = self._basis[:, 0]
        if vector.is_meta:
            return (
                1.0 / vector.shape[0]
            )  # without numbers: the ordinary case, sums of all rows of a constraint
        return float(vector[0]) ** 2 if bool((vector == vector[0]).all()) else None

    @property
    def outer(self) -> Tensor:
        """Q Q', (m, m)."""
        return self._basis @ self._basis.mT

    def project(self, vector: Tensor) -> Tensor:
        """Return the vector (..., m) without its part in the kernel; 4 m q flops."""
        if self._basis.shape[1] == 1:
            only = self._only
            return torch.addcmul(vector, (vector * only).sum(-1, keepdim=True), only, value=-1)
        return vector - (vector @ self._basis) @ self._basis.mT

    def deflate_(self, matrix: Tensor, lift: Tensor) -> None:
        """Add lift Q Q' to the matrix (B, m, m) in place, lift (B,): its eigenvalue 0 becomes lift.

        Deflating keeps all rows, where dropping one of the dependent rows would single out a variable;
        measured on transport problems it has about an eighth of the error.
        """
        for column in self._basis.unbind(1):
            matrix.addcmul_(lift[:, None, None] * column[:, None], column)


class ProjectedFactorization(Factorization):
    """A factorisation of A + lift Q Q', used as A^+: projections before and after it."""

    def __init__(self, inner: Factorization, kernel: Kernel) -> None:
        """Take over status and definiteness, which now speak of the complement of the kernel."""
        self._inner = inner
        self._kernel = kernel
        self.status = inner.status
        self.definite = inner.definite

    def solve(self, rhs: Tensor) -> Tensor:
        """Return the answer of least norm to the nearest consistent right-hand side, (..., B, m)."""
        return self._kernel.project(self._inner.solve(self._kernel.project(rhs)))


def factor_off_kernel(operator: LinearOperator, factor: Callable[[Tensor], Factorization]) -> Factorization:
    """Factor the dense twin of an operator, lifted along the null vectors that the operator states.

    Args:
        operator: the operator.
        factor: factors a matrix (B, m, m).
    """
    matrix = operator.to_dense()
    kernel = Kernel.of(operator)
    if kernel is None:
        return factor(matrix)
    lift = matrix.diagonal(dim1=-2, dim2=-1).abs().mean(-1)
    kernel.deflate_(matrix, torch.where(lift > 0, lift, 1.0))
    return ProjectedFactorization(factor(matrix), kernel)
