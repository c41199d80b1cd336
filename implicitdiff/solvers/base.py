"""What a linear solver is: a reason to refuse, a predicted cost, a factorisation that is used many times.

Stage: the plan asks select.py for a solver and keeps the factorisation for all right-hand sides. In: an
operator. Out: ``Factorization`` with one status a sample. Next file: ``divide.py``, the
shortest example.
"""

import abc
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from implicitdiff.errors import OptionError
from implicitdiff.operators import LinearOperator


@dataclass(frozen=True)
class Cost:
    """The predicted cost of one factorisation and one solve, for the whole batch, from shapes alone.

    Attributes:
        flops: multiplications plus additions.
        bytes: bytes read plus bytes written by all operations.
        peak: bytes alive at once beyond the operator and the right-hand side.
    """

    flops: int
    bytes: int
    peak: int

    @property
    def work(self) -> int:
        """One number to compare solvers by: flops + 5 bytes.

        On a CPU core a byte from memory takes about as long as five operations of a matrix product. Only the
        order of two values means anything.
        """
        return self.flops + 5 * self.bytes

    def __add__(self, other: "Cost") -> "Cost":
        """Return the cost of doing both, keeping what both have made."""
        return Cost(self.flops + other.flops, self.bytes + other.bytes, self.peak + other.peak)


class Factorization(abc.ABC):
    """What is left of an operator once it is factored.

    Attributes:
        status: (B,) int8 values of ``Status``, B the batch of the operator (1 where it is shared). OK means
            that the answer can be trusted; SINGULAR and NONFINITE are known after the factorisation,
            NOT_CONVERGED (iterative solvers) after the last ``solve``. An indefinite matrix that was factored
            all the same is OK.
        definite: (B,) bool, True where the matrix was proved positive definite; None where the solver cannot
            tell.
        cancelled: whether a subtraction in the factorisation lost digits, so that a refinement is worth its cost.
    """

    status: Tensor
    definite: Tensor | None = None
    cancelled: bool = False

    @abc.abstractmethod
    def solve(self, rhs: Tensor) -> Tensor:
        """Return the solution of matrix @ x = rhs.

        A sample whose right-hand side is exactly zero gets exactly zero, whatever its matrix is. A sample
        that has no answer gets NaN (and a status).

        Args:
            rhs: (..., B, m); a batch axis of 1 is broadcast, as is an operator of batch 1.

        Returns:
            (..., B, m)
        """


class ColumnFactorization(Factorization):
    """A factorisation that works on matrices of columns, as LAPACK does.

    Attributes:
        lost: (B,) bool, the samples without an answer; None where there are none.
    """

    lost: Tensor | None = None

    @abc.abstractmethod
    def solve_columns(self, columns: Tensor) -> Tensor:
        """Return the solutions (B, m, C) for the right-hand sides ``columns`` (B, m, C)."""

    def solve(self, rhs: Tensor) -> Tensor:
        """Return the solutions (..., B, m): see ``Factorization.solve``."""
        own = self.status.shape[0]
        batch = rhs.shape[-2] if own == 1 else own
        rhs = rhs.expand(*rhs.shape[:-2], batch, rhs.shape[-1])
        solution = from_columns(self.solve_columns(to_columns(rhs, own)), rhs.shape)
        return solution if self.lost is None else blank(solution, rhs, self.lost)


class LinearSolver(abc.ABC):
    """One way of inverting some kinds of matrix. Solvers have no state: factor() returns all there is."""

    name: ClassVar[str]

    @abc.abstractmethod
    def reject(self, operator: LinearOperator) -> str | None:
        """Return why this solver cannot take the operator, or None if it can. Reads types and shapes only."""

    @abc.abstractmethod
    def cost(self, operator: LinearOperator) -> Cost:
        """Return the predicted cost for an operator that is not rejected; works on meta tensors."""

    @abc.abstractmethod
    def _factor(self, operator: LinearOperator) -> Factorization:
        """Factor an operator that is not rejected."""

    def factor(self, operator: LinearOperator) -> Factorization:
        """Return the factorisation of the operator.

        Raises:
            OptionError: the operator is one that ``reject`` gives a reason for.
        """
        reason = self.reject(operator)
        if reason is not None:
            raise OptionError(
                f"solver {self.name!r} cannot take a {operator.kind} matrix of size {operator.size}: "
                f"{reason}. Use linear_solver='auto'."
            )
        return self._factor(operator)


def to_columns(rhs: Tensor, batch: int) -> Tensor:
    """Return the right-hand sides (..., B, m) as columns (batch, m, C).

    For a shared matrix (batch 1) the samples are columns too: one factorisation, one triangular solve for
    all.
    """
    size = rhs.shape[-1]
    if batch == 1:
        return rhs.reshape(rhs.numel() // max(1, size), size).mT[None]
    if rhs.dim() == 2:
        return rhs[:, :, None]
    return rhs.flatten(0, -3).permute(1, 2, 0)


def from_columns(columns: Tensor, shape: torch.Size) -> Tensor:
    """Undo ``to_columns`` for a right-hand side of ``shape``."""
    if columns.shape[0] == 1:
        return columns[0].mT.reshape(shape)
    if len(shape) == 2:
        return columns[:, :, 0]
    return columns.permute(2, 0, 1).reshape(shape)


def blank(solution: Tensor, rhs: Tensor, lost: Tensor) -> Tensor:
    """Return the solution with NaN in what is lost, but zero where the right-hand side is exactly zero.

    Args:
        solution: (..., B, m), or (..., B, nb, s) by blocks.
        rhs: the same shape.
        lost: (B,), or (B, nb) by blocks.
    """
    silent = (rhs == 0).all(-1, keepdim=True)
    filler = torch.where(silent, 0.0, torch.nan).to(solution.dtype)
    return torch.where(lost[..., None], filler, solution)


def relative_residual(operator: LinearOperator, solution: Tensor, rhs: Tensor) -> Tensor:
    """Return max|matrix @ solution - rhs| / max|rhs| for each right-hand side, (..., B); 0 where both are 0.

    A caller uses it to accept the minimum-norm answer of a matrix reported SINGULAR: small means that the
    right-hand side is consistent.
    """
    error = (operator.matvec(solution) - rhs).abs().amax(-1)
    size = rhs.abs().amax(-1)
    return torch.where(error == 0, error, error / size)
