"""Several ways to the same answer, each sample keeping that of the first way that was good enough for it.

In: the results of two ways, and which samples the second was tried for. Out: one result; a sample that needed no second
way keeps its bits, whatever became of the others. Next file: `plan.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from implicitdiff.derivatives.declared import Declared
from implicitdiff.operators import LinearOperator
from implicitdiff.solvers.divide import diagonal_entries
from implicitdiff.status import Status
from implicitdiff.structured.writer import Written

SMALL = 1000
"""K is formed to find out why a solution is not finite up to this many unknowns."""
Gradients = tuple[Tensor | None, ...]
A = TypeVar("A")


@dataclass(frozen=True)
class Attempt(Generic[A]):
    """What one way gave.

    Attributes:
        answer: for the whole batch.
        status: (B,) int8.
        function: the emitted function.
        out: its results.
    """

    answer: A
    status: Tensor
    function: Written
    out: tuple[Any, ...]


def merged_leaves(
    redo: Tensor, new: Sequence[Tensor], old: Sequence[Tensor], axis: int
) -> tuple[Tensor, ...]:
    """`new` in the samples `redo` (B,), `old` in the others, for leaves whose batch axis is `axis`."""
    return tuple(
        torch.where(redo.reshape(*(1,) * axis, -1, *(1,) * (a.dim() - axis - 1)), a, b)
        for a, b in zip(new, old, strict=True)
    )


def merged_gradients(redo: Tensor, new: Gradients, old: Gradients, batched: Sequence[bool]) -> Gradients:
    """The same for gradients; that of a shared tensor is a sum over the batch, so that it comes from one way alone."""
    return tuple(
        merged_leaves(redo, [a], [b], 0)[0] if own and a is not None and b is not None else a
        for a, b, own in zip(new, old, batched, strict=True)
    )


def absolved(status: Tensor, said: Tensor, hessian: Callable[[], LinearOperator], linear: bool) -> Tensor:
    """The status (B,) without SINGULAR where S = A W A' is singular and W = H^-1 is diagonal and positive.

    Then s'S s = 0 means A's = 0: the constraints depend on each other, w is the same for every solution s, and there is
    one, because A W a lies in the range of S. So the answer of least norm is right; whether it is that of a kink
    (NOT_REGULAR, to be settled) is out of question where A does not depend on u.

    Args:
        status: (B,) int8.
        said: (B,) int8, what the way by S said.
        hessian: gives H, whose diagonal may be infinite (an entry of u at the edge of its domain does not move).
        linear: whether A does not depend on u.
    """
    suspects = (status == Status.SINGULAR) & (said == Status.SINGULAR)
    entries = diagonal_entries(hessian()) if bool(suspects.any()) else None
    if entries is None:
        return status
    better = int(Status.OK if linear else Status.NOT_REGULAR)
    return status.masked_fill(suspects & (entries > 0).all(1), better)


def unsolved(status: Tensor, declared: Declared) -> Tensor | None:
    """Which samples (B,) K as one matrix may still serve; None where none.

    Those whose H or S is singular; where K is small also those without a finite answer: a zero on a diagonal H makes
    S infinite, though K may be regular.
    """
    found = status == Status.SINGULAR
    unknowns = declared.space.size + declared.constraint_space.size
    if unknowns <= SMALL:
        found = found | (status == Status.NONFINITE)
    return found if bool(found.any()) else None


def flagged(flag: Tensor | bool, batch: int, like: Tensor) -> Tensor | None:
    """A flag of a factorisation, one for all samples or (B,), as (B,) bool; None where it is set nowhere."""
    if flag is False:
        return None
    if isinstance(flag, Tensor):
        return flag.expand(batch) if bool(flag.any()) else None
    return torch.ones_like(like, dtype=torch.bool)
