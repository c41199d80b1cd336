"""Woodbury for each group: blocks of low rank plus diagonal, all of them as one batch.

In: a ``GroupedLowRank`` operator and the factorisation of its blocks. Out: ``GroupedFactorization``, which ``Woodbury``
hands out. Next file: ``woodbury_update.py``.
"""

from torch import Tensor

from implicitdiff.operators import GroupedLowRank
from implicitdiff.solvers.base import Factorization


class GroupedFactorization(Factorization):
    """The factorisations of all blocks. The status of a sample is the worst of its blocks', the larger code."""

    def __init__(self, operator: GroupedLowRank, blocks: Factorization) -> None:
        """Read the verdicts; ``blocks`` is the factorisation of ``operator.blocks``."""
        self._operator, self._blocks = operator, blocks
        number = operator.left.shape[1]
        codes = blocks.status.expand(operator.batch * number)
        self.status = (
            codes.reshape(operator.batch, number).amax(1) if number else codes.new_zeros(operator.batch)
        )

    @property
    def definite(self) -> Tensor | None:  # type: ignore[override]
        """Whether all blocks of a sample are definite, (B,)."""
        found = self._blocks.definite
        if found is None:
            return None
        batch, number = self._operator.batch, self._operator.left.shape[1]
        return found.expand(batch * number).reshape(batch, number).all(1)

    def solve(self, rhs: Tensor) -> Tensor:
        """Return the solution (..., B, m); 4 m k flops a vector."""
        operator = self._operator
        own = operator.batch
        if own == 1:
            # samples of a shared matrix are further right-hand sides
            return operator.join(self._blocks.solve(operator.split(rhs[..., None, :])))[..., 0, :]
        rhs = rhs.expand(*rhs.shape[:-2], own, rhs.shape[-1])
        return operator.join(self._blocks.solve(operator.split(rhs)))
