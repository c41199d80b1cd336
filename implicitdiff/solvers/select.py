"""The one place that chooses a linear solver: what is possible, then what is predicted to be cheapest.

In: an operator (meta tensors will do) and the name the user asked for, or "auto". Out: ``Choice``. The
reading order of the package ends here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import singledispatch

from implicitdiff.errors import NotSupportedYetError, OptionError
from implicitdiff.operators import (
    Banded,
    Block,
    BlockDiagonal,
    Diagonal,
    GroupedLowRank,
    Kronecker,
    LinearOperator,
    LowRankPlusDiagonal,
    LowRankUpdate,
    MatrixFree,
    ScaledIdentity,
    Sparse,
    Sum,
    Zero,
)
from implicitdiff.solvers.banded_cholesky import BandedCholesky
from implicitdiff.solvers.base import Cost, LinearSolver
from implicitdiff.solvers.block_cholesky import BlockCholesky
from implicitdiff.solvers.cg import ConjugateGradients
from implicitdiff.solvers.cholesky import Cholesky
from implicitdiff.solvers.divide import Divide
from implicitdiff.solvers.gmres import GMRES
from implicitdiff.solvers.kronecker import KroneckerSolver
from implicitdiff.solvers.ldl import LDL
from implicitdiff.solvers.lu import LU
from implicitdiff.solvers.schur import Schur
from implicitdiff.solvers.schur_cg import SchurConjugateGradients
from implicitdiff.solvers.sparse_lu import SparseLU
from implicitdiff.solvers.tridiagonal import Tridiagonal
from implicitdiff.solvers.woodbury import Woodbury

SOLVERS: dict[str, LinearSolver] = {
    solver.name: solver
    for solver in (
        Divide(),
        BlockCholesky(),
        Tridiagonal(),
        BandedCholesky(),
        KroneckerSolver(),
        SparseLU(),
        Woodbury(),
        Cholesky(),
        LU(),
        LDL(),
        Schur(),
        SchurConjugateGradients(),
        ConjugateGradients(),
        GMRES(),
    )
}
"""The solvers by the name that ``linear_solver=`` takes."""

PLANNED: tuple[str, ...] = ("minres",)
"""Names of the contract that are not built yet."""


@dataclass(frozen=True)
class Choice:
    """A solver, what it is predicted to cost, and what else was considered.

    Attributes:
        solver: the solver chosen.
        cost: its predicted cost for this operator.
        rejected: the other candidates for this kind of matrix, each with the reason; empty if the user named
            one.
    """

    solver: LinearSolver
    cost: Cost
    rejected: tuple[tuple[str, str], ...]


@singledispatch
def candidates(operator: LinearOperator) -> tuple[str, ...]:
    """Return the names of the solvers that are considered for a kind of matrix, the preferred one first."""
    return ("cholesky", "lu")


@candidates.register(Zero)
@candidates.register(ScaledIdentity)
@candidates.register(Diagonal)
def _for_diagonal(operator: LinearOperator) -> tuple[str, ...]:
    return ("divide",)


@candidates.register
def _for_blocks(operator: BlockDiagonal) -> tuple[str, ...]:
    return ("block-cholesky",)


@candidates.register
def _for_products_of_factors(operator: Kronecker) -> tuple[str, ...]:
    return ("kronecker", "cholesky", "lu")


@candidates.register
def _for_bands(operator: Banded) -> tuple[str, ...]:
    return ("tridiagonal", "banded-cholesky", "cholesky", "lu")


@candidates.register
def _for_patterns(operator: Sparse) -> tuple[str, ...]:
    return ("sparse-lu", "cholesky", "lu")


@candidates.register
def _for_grouped(operator: GroupedLowRank) -> tuple[str, ...]:
    return ("woodbury", "block-cholesky")


@candidates.register
def _for_sums(operator: LowRankUpdate) -> tuple[str, ...]:
    return ("woodbury", "cholesky", "lu")


@candidates.register
def _for_low_rank(operator: LowRankPlusDiagonal) -> tuple[str, ...]:
    return ("woodbury", "cholesky", "cg", "lu")


@candidates.register
def _for_grid(operator: Block) -> tuple[str, ...]:
    return ("schur", "schur-cg", "cholesky", "lu")


@candidates.register
def _for_declared_sums(operator: Sum) -> tuple[str, ...]:
    if not any(isinstance(term, MatrixFree) for term in operator.terms):
        return ("cholesky", "lu")
    return ("cg",) if operator.symmetric else ("gmres",)


@candidates.register
def _for_products(operator: MatrixFree) -> tuple[str, ...]:
    return ("cg",) if operator.symmetric else ("gmres",)


def choose(
    operator: LinearOperator,
    requested: str = "auto",
    *,
    definite: bool | None = None,
    many: bool = False,
    ruled_out: Mapping[str, str] | None = None,
) -> Choice:
    """Choose the solver for an operator, from its kind and its shapes alone.

    Args:
        operator: the matrix; its values are not read.
        requested: "auto", or a name of the contract.
        definite: False where the matrix is known not to be positive definite (a KKT matrix), so that Cholesky
            and conjugate gradients are not considered. None or True: nothing is ruled out.
        many: whether there will be many right-hand sides, as when S = A H^-1 A' is formed: a factorisation serves
            all of them, so iterations are not considered.
        ruled_out: solvers that are not considered, each with the reason.

    Returns:
        The cheapest possible candidate, or the one requested.

    Raises:
        OptionError: the name is unknown, the named solver cannot take this matrix, or none can.
        NotSupportedYetError: the name belongs to the contract but is not built yet.
    """
    if requested != "auto":
        solver = solver_named(requested)
        reason = solver.reject(operator)
        if reason is not None:
            raise OptionError(
                f"linear_solver={requested!r} cannot take the {operator.kind} matrix of size "
                f"{operator.size}: {reason}. "
                f"Use 'auto', or one of {', '.join(map(repr, candidates(operator)))}."
            )
        return Choice(solver, solver.cost(operator), ())
    if isinstance(operator, Block) and any(isinstance(corner, Zero) for corner in operator.corners):
        definite = False  # a zero block on the diagonal, as in every KKT matrix
    possible: list[tuple[str, Cost]] = []
    rejected: list[tuple[str, str]] = []
    for name in candidates(operator):
        reason = (ruled_out or {}).get(name) or SOLVERS[name].reject(operator)
        if reason is None and definite is False and name in ("cholesky", "cg", "schur-cg"):
            reason = "the matrix is not positive definite"
        if reason is None and many and name in ("cg", "schur-cg") and len(candidates(operator)) > 1:
            reason = "there are many right-hand sides"
        if reason is None:
            possible.append((name, SOLVERS[name].cost(operator)))
        else:
            rejected.append((name, reason))
    if not possible:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in rejected)
        raise OptionError(f"no solver takes the {operator.kind} matrix of size {operator.size}: {reasons}.")
    # min() keeps the first of equals: the order of the candidates decides.
    best, cost = min(possible, key=lambda entry: entry[1].seconds)
    for name, other in possible:
        if name != best:
            ratio = other.seconds / max(cost.seconds, 1e-9)  # a batch of 0 costs nothing
            rejected.append((name, f"predicted to take {ratio:.1f} times as long as {best}"))
    order = candidates(operator)
    rejected.sort(key=lambda entry: order.index(entry[0]))
    return Choice(SOLVERS[best], cost, tuple(rejected))


def solver_named(name: str) -> LinearSolver:
    """Return the solver of that name.

    Raises:
        OptionError: no such name.
        NotSupportedYetError: a name of the contract that is not built yet.
    """
    if name in SOLVERS:
        return SOLVERS[name]
    valid = ", ".join(map(repr, SOLVERS))
    if name in PLANNED:
        raise NotSupportedYetError(f"linear_solver={name!r} is not built yet. Use 'auto' or one of {valid}.")
    raise OptionError(f"unknown linear_solver={name!r}. Use 'auto' or one of {valid}.")
