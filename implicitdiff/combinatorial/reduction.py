"""What the losses and values share: costs of any batch shape in the convention of a minimisation, and reductions.

In: tensors of the user. Out: flattened tensors, inner products, reduced losses. Next file to read: ``values.py``.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

from torch import Tensor

from implicitdiff.combinatorial.oracle import Oracle
from implicitdiff.errors import InputError, OptionError

Reduction: TypeAlias = Literal["mean", "sum", "none"]
REDUCTIONS = ("mean", "sum", "none")


def check_reduction(reduction: Reduction) -> Reduction:
    """Raise OptionError for an unknown one."""
    if reduction not in REDUCTIONS:
        raise OptionError(f"reduction={reduction!r}: one of {', '.join(REDUCTIONS)}")
    return reduction


def flattened(oracle: Oracle, cost: Tensor, other: Tensor) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """(w, other, batch): costs of a minimisation and a tensor like them, each (B, *shape).

    Raises:
        InputError: the shapes differ, or are not those of the solver.
    """
    batch = oracle.solver.batch_shape(cost)
    if other.shape != cost.shape:
        raise InputError(
            f"{oracle.solver.name}: costs have shape {tuple(cost.shape)}, the true costs or solutions "
            f"{tuple(other.shape)}; they must be equal"
        )
    shape = cost.shape[len(batch) :]
    return oracle.sign * cost.reshape(-1, *shape), other.reshape(-1, *shape).to(cost.dtype), batch


def inner(a: Tensor, b: Tensor) -> Tensor:
    """<a, b> for each sample."""
    return (a * b).flatten(1).sum(1)


def reduced(values: Tensor, batch: tuple[int, ...], reduction: Reduction) -> Tensor:
    """The mean, the sum, or the values in the batch shape."""
    if reduction == "mean":
        return values.mean()
    return values.sum() if reduction == "sum" else values.reshape(batch)


__all__ = ["Reduction", "check_reduction", "flattened", "inner", "reduced"]
