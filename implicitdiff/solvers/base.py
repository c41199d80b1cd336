"""What a linear solver is: a reason to refuse, a predicted cost, a factorisation that is used many times.

Stage: the plan asks select.py for a solver and keeps the factorisation for all right-hand sides. In: an
operator. Out: ``Factorization`` with one status a sample. Next file: ``divide.py``, the
shortest example.
"""

import abc
from collections.abc import Callable
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
        operations: calls of torch that follow each other, a step of a factorisation that waits for the one before
            it counted as one.
    """

    flops: int
    bytes: int
    peak: int
    operations: int = 0

    @property
    def seconds(self) -> float:
        """The predicted time on one core, to compare solvers by: see the constants below."""
        return (
            self.flops / FLOPS_PER_SECOND
            + self.bytes / BYTES_PER_SECOND
            + self.operations * SECONDS_PER_OPERATION
        )

    def __add__(self, other: "Cost") -> "Cost":
        """Return the cost of doing both, keeping what both have made."""
        return Cost(
            self.flops + other.flops,
            self.bytes + other.bytes,
            self.peak + other.peak,
            self.operations + other.operations,
        )

    def __mul__(self, times: int) -> "Cost":
        """Return the cost of doing the same several times, one after the other in the same memory."""
        return Cost(self.flops * times, self.bytes * times, self.peak, self.operations * times)


# Measured with torch 2.13 on one core of an AVX-512 server processor, float32, medians of repeated calls. Only the
# order of two predictions means anything.
FLOPS_PER_SECOND = 1.2e11
"""Matrix products reach 1.4e11 from 300 x 300 on, factorisations 5e10; these have their panels counted too."""
BYTES_PER_SECOND = 2.5e10
"""A vector times a matrix of 4 MB: 2.8e10; of 1 MB, in the cache: 6e10."""
SECONDS_PER_OPERATION = 3.5e-6
"""An operation on a hundred numbers takes 1 to 2 microseconds in a loop, what Python does around it as long again, and
both more when other work has taken the caches."""
PANEL = 8
"""Columns that a factorisation of a small matrix works off in the time of one operation: Cholesky of 50, 100, 200
takes 10, 41, 75 microseconds."""


class Factorization(abc.ABC):
    """What is left of an operator once it is factored.

    Attributes:
        status: (B,) int8 values of ``Status``, B the batch of the operator (1 where it is shared). OK means
            that the answer can be trusted; SINGULAR and NONFINITE are known after the factorisation,
            NOT_CONVERGED (iterative solvers) after the last ``solve``. An indefinite matrix that was factored
            all the same is OK.
        definite: (B,) bool, True where the matrix was proved positive definite; None where the solver cannot
            tell.
        cancelled: where a subtraction in the factorisation lost digits, so that a refinement is worth its cost: (B,)
            bool, or one value for all samples.
    """

    status: Tensor
    definite: Tensor | None = None
    cancelled: Tensor | bool = False

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
        return self._by_columns(rhs, self.solve_columns)

    def _by_columns(self, rhs: Tensor, solving: Callable[[Tensor], Tensor]) -> Tensor:
        own = self.status.shape[0]
        batch = rhs.shape[-2] if own == 1 else own
        if rhs.shape[-2] != batch:
            rhs = rhs.expand(*rhs.shape[:-2], batch, rhs.shape[-1])
        solution = from_columns(solving(to_columns(rhs, own)), rhs.shape)
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


def to_rows(rhs: Tensor, batch: int) -> Tensor:
    """Return the right-hand sides (..., B, m) as rows (batch, R, m); for a shared matrix (batch 1) all of them.

    A row on the left of a matrix is up to twice as fast on a CPU as a column on its right.
    """
    if batch == 1:
        return rhs.reshape(1, rhs.numel() // max(1, rhs.shape[-1]), rhs.shape[-1])
    if rhs.dim() == 2:
        return rhs[:, None]
    return rhs.flatten(0, -3).movedim(0, 1)


def from_rows(rows: Tensor, shape: torch.Size) -> Tensor:
    """Undo ``to_rows`` for a right-hand side of ``shape``."""
    if rows.shape[0] == 1 or len(shape) == 2:
        return rows.reshape(shape)
    return rows.movedim(1, 0).reshape(shape)


def numbers(*values: Tensor) -> list[float] | None:
    """Return the numbers in tensors without axes, read at once; None where there are shapes only (meta tensors).

    Who asks takes None for the ordinary case, so that costs are counted from shapes.
    """
    if values[0].is_meta:
        return None
    found: list[float] = torch.stack(values).tolist() if len(values) > 1 else [float(values[0].item())]
    return found


def blank(solution: Tensor, rhs: Tensor, lost: Tensor) -> Tensor:
    """Return the solution with NaN in what is lost, but zero where the right-hand side is exactly zero.

    Args:
        solution: (..., B, m), or (..., B, nb, s) by blocks.
        rhs: the same shape.
        lost: (B,), or (B, nb) by blocks.
    """
    silent = (rhs == 0).all(-1, keepdim=True)
    filler = torch.where(silent, 0.0, torch.nan).to(solution.dtype)
    # In this order the result has the layout of the solution, on which the bits of later products may depend.
    return torch.where(~lost[..., None], solution, filler)


def relative_residual(operator: LinearOperator, solution: Tensor, rhs: Tensor) -> Tensor:
    """Return max|matrix @ solution - rhs| / max|rhs| for each right-hand side, (..., B); 0 where both are 0.

    A caller uses it to accept the minimum-norm answer of a matrix reported SINGULAR: small means that the
    right-hand side is consistent.
    """
    error = (operator.matvec(solution) - rhs).abs().amax(-1)
    size = rhs.abs().amax(-1)
    return torch.where(error == 0, error, error / size)
