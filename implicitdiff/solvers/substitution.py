"""A grid of blocks that is triangular in some order: equations that feed each other one way only.

In: a ``Block`` whose couplings have no cycle. Out: ``substitution_order``, ``SubstitutionFactorization``, which lu.py
uses in place of one LU of the whole. Next file: ``ldl.py``.
"""

import torch
from torch import Tensor

from implicitdiff.operators import Block, Diagonal, LinearOperator, ScaledIdentity
from implicitdiff.operators.products import batched_matvec
from implicitdiff.solvers.base import Factorization, blank
from implicitdiff.solvers.divide import Divide
from implicitdiff.status import Status


def substitution_order(operator: Block) -> tuple[int, ...] | None:
    """Return an order of the blocks in which each row is coupled with earlier ones only; None where there is none."""
    needs = {i: {j for row, j, _ in operator.couplings if row == i} for i in range(len(operator.sizes))}
    order: list[int] = []
    while len(order) < len(needs):
        ready = [i for i in needs if i not in order and needs[i] <= set(order)]
        if not ready:
            return None
        order += ready
    return tuple(order)


class SubstitutionFactorization(Factorization):
    """Each corner factored by itself, then one after the other: x_i = D_i^-1 (b_i - sum_j K_ij x_j).

    The grid is singular where one of its corners is, so the status of a sample is the worst of its corners.
    """

    def __init__(self, operator: Block, order: tuple[int, ...], factors: dict[int, Factorization]) -> None:
        """Keep the factors of the corners, by block."""
        self._operator, self._order, self._factors = operator, order, factors
        codes = [factor.status.expand(operator.batch) for factor in factors.values()]
        self.status = torch.stack(codes).amax(0)
        bad = self.status != int(Status.OK)
        self._lost = bad if bool(bad.any()) else None

    def solve(self, rhs: Tensor) -> Tensor:
        """Return the solution (..., B, m); a solve for each corner, a product for each coupling."""
        operator = self._operator
        batch = rhs.shape[-2] if operator.batch == 1 else operator.batch
        rhs = rhs.expand(*rhs.shape[:-2], batch, operator.size)
        left = [rhs[..., where] for where in operator.slices]
        found: dict[int, Tensor] = {}
        for i in self._order:
            for row, j, block in operator.couplings:
                if row == i:
                    left[i] = left[i] - batched_matvec(block, found[j])
            found[i] = self._factors[i].solve(left[i])
        solution = torch.cat([found[i].expand_as(left[i]) for i in range(len(left))], dim=-1)
        return solution if self._lost is None else blank(solution, rhs, self._lost)


def divides(corner: LinearOperator) -> bool:
    """Whether a corner is only divided by."""
    return isinstance(corner, Diagonal | ScaledIdentity)


def divided(corner: LinearOperator) -> Factorization:
    """The factorisation of such a corner."""
    return Divide().factor(corner)
