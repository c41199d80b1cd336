"""Symmetric bands of any width: as many places as the band reaches are taken together as one block.

In: a symmetric ``Banded`` operator. Out: ``BandedCholesky``. Next file: ``woodbury.py``.
"""

from typing import ClassVar

from implicitdiff.operators import Banded, LinearOperator
from implicitdiff.solvers.base import Cost, Factorization, LinearSolver
from implicitdiff.solvers.tridiagonal import ChainFactorization, chain_cost


class BandedCholesky(LinearSolver):
    """A band of half-width b with blocks of size s is block tridiagonal with blocks of size b s.

    That takes 12 b^2 s^3 flops a place where a sequential band Cholesky takes b^2 s^3, but O(log T) operations on all
    places, chains and samples at once.
    """

    name: ClassVar[str] = "banded-cholesky"

    def reject(self, operator: LinearOperator) -> str | None:
        """Refuse other kinds, and bands that are not symmetric."""
        if not isinstance(operator, Banded):
            return f"the matrix is {operator.kind}, not banded"
        return None if operator.symmetric else "the matrix is not symmetric"

    def cost(self, operator: LinearOperator) -> Cost:
        """12 b^2 s^3 flops a place to factor and 12 b s^2 to solve; the blocks are written down first."""
        assert isinstance(operator, Banded)
        return chain_cost(operator)

    def _factor(self, operator: LinearOperator) -> Factorization:
        assert isinstance(operator, Banded)
        return ChainFactorization(operator)
