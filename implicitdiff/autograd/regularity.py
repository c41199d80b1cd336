"""What kind of point a solution is, asked for suspects or for a record only: kinks of the constraints, and saddles.

In: the point of a call, and the samples in which the constraints depend on each other at the solution. Out: which of
them are regular all the same; events that name saddles. Next: `autograd/kkt.py`, which asks.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from implicitdiff.autograd.call import Call, Leaves
from implicitdiff.derivatives import flat
from implicitdiff.failures import name_samples
from implicitdiff.operators import MatrixFree
from implicitdiff.records import emit, open_records
from implicitdiff.status import Status

LARGEST = 1000
"""Reduced Hessians are formed up to this many variables and constraints."""


def settled(call: Call, status: Tensor, u: Leaves, theta: Leaves) -> Tensor:
    """The status (B,) with NOT_REGULAR only where the constraints depend on each other at u and not around it.

    A plan says NOT_REGULAR where the rows of A are dependent by their values. Where their rank is the same all along
    the feasible set (a constraint stated twice), multipliers of least norm serve as well as any and the derivative
    exists (Janin, 1984). Where the rank rises beside u (two circles that touch, the centre of a sphere), u is at a kink
    of the feasible set and only one-sided derivatives exist.

    Cost: nothing where no sample is suspect; else three singular value decompositions of A for each that is.
    """
    suspects = torch.nonzero(status == Status.NOT_REGULAR)[:, 0]
    if not len(suspects):
        return status
    some = call.folded(call.batched, len(suspects))
    here = tuple(leaf[suspects] for leaf in u)
    given = tuple(t[suspects] if own else t for t, own in zip(theta, call.batched, strict=True))
    regular = _has_constant_rank(some, here, given)
    return status.index_copy(
        0, suspects, torch.where(regular, Status.OK.value, Status.NOT_REGULAR.value).to(status.dtype)
    )


def _has_constant_rank(call: Call, u: Leaves, theta: Leaves) -> Tensor:
    """Where A has the rank at a feasible point beside u that it has at u, (B,) bool."""
    shapes = [tuple(leaf.shape[1:]) for leaf in u]
    point = flat.join(u, 1)
    jacobian = call.plan.constraint_jacobian(u, theta)
    eps = torch.finfo(point.dtype).eps
    scale = _row_norms(jacobian)
    left, values, right = torch.linalg.svd(jacobian / scale, full_matrices=False)
    counts = values > 10 * sum(jacobian.shape[1:]) ** 0.5 * eps * values.amax(1, keepdim=True)
    counts &= torch.arange(values.shape[1], device=values.device) < jacobian.shape[1] - 1
    rank = counts.sum(1)
    right = right * counts[:, :, None]

    # A step along the feasible set, far enough for a rank that rises to show, and back onto the set.
    pattern = torch.cos(
        2.0 + 3.7 * torch.arange(point.shape[1], dtype=point.dtype, device=point.device) ** 1.1
    )
    tangent = pattern - ((pattern @ right.mT)[:, None, :] @ right)[:, 0]
    # where the constraints fix u altogether there is no way to go, and what is left of the pattern is rounding
    tangent = torch.where(rank[:, None] == point.shape[1], 0.0, tangent)
    length = eps ** (1 / 6) * (1 + point.abs().amax(1, keepdim=True))
    beside = point + length * tangent
    h = flat.join(call.lagrangian.constraints(flat.split(beside, shapes), theta), 1)
    inverse = torch.where(counts, 1 / torch.where(counts, values, 1.0), 0.0)
    back = (inverse * ((h / scale[:, :, 0])[:, None, :] @ left)[:, 0])[:, None, :] @ right
    beside = flat.split(beside - back[:, 0], shapes)

    moved = call.plan.constraint_jacobian(beside, theta)
    found = torch.linalg.svdvals(moved / torch.maximum(scale, _row_norms(moved)))
    further = torch.arange(found.shape[1], device=found.device) >= rank[:, None]
    rest = torch.where(further, found, 0.0).amax(1)
    return rest <= eps**0.5 * found[:, 0]


def _row_norms(jacobian: Tensor) -> Tensor:
    """(B, p, 1); 1 for rows of zeros."""
    size = torch.linalg.vector_norm(jacobian, dim=2, keepdim=True)
    return torch.where(size > 0, size, 1.0)


def report_saddles(call: Call, u: Leaves, lam: Leaves, theta: Leaves, status: Tensor) -> None:
    """Where a record is open: an event INDEFINITE for the samples with negative curvature along the constraints.

    The derivative of a saddle is exact, so that nothing is refused; but it is not that of a minimum. Cost: H and A
    dense and two decompositions a sample; nothing without a record.
    """
    if not (call.records or open_records()):
        return
    size = sum(leaf[0].numel() for leaf in (*u, *lam))
    if size > LARGEST or not bool((status == Status.OK).any()):
        return
    operator = call.plan.hessian(u, lam, theta)
    if isinstance(operator, MatrixFree):
        return
    hessian = operator.to_dense().expand(u[0].shape[0], -1, -1)
    jacobian = call.plan.constraint_jacobian(u, theta)
    good = (
        (status == Status.OK) & hessian.isfinite().flatten(1).all(1) & jacobian.isfinite().flatten(1).all(1)
    )
    hessian, jacobian = hessian[good], jacobian[good]
    _, values, right = torch.linalg.svd(jacobian, full_matrices=True)
    rows = torch.zeros_like(right[:, :, 0])
    cut = 10 * size**0.5 * torch.finfo(values.dtype).eps
    rows[:, : values.shape[1]] = (values > cut * values.amax(1, keepdim=True)).to(rows.dtype) if lam else 0.0
    tangent = right.mT * (1 - rows)[:, None, :]
    inner = tangent.mT @ hessian @ tangent
    curvature, vectors = torch.linalg.eigh((inner + inner.mT) / 2)
    lowest, largest = curvature[:, 0], curvature.abs().amax(1)
    saddle = lowest < -(torch.finfo(lowest.dtype).eps ** 0.5) * largest
    samples = good.nonzero()[:, 0][saddle].tolist()
    if not samples:
        return
    direction = (tangent @ vectors[:, :, :1])[saddle][0, :, 0]
    message = (
        f"{call.name}: {name_samples(samples, call.batch)}: not a strict minimum: H has curvature "
        f"{float(lowest[saddle][0]):.2g} (largest {float(largest[saddle][0]):.2g}) along the constraints, mostly in "
        f"{entry_name(call, int(direction.abs().argmax()))}; the derivative is that of a saddle"
    )
    emit(Status.INDEFINITE.name, "backward", samples, message, call.records)


def entry_name(call: Call, place: int) -> str:
    """`u[3]`, or `u0[1, 2]` with several variables: the entry at a place of the joined variables."""
    for placeholder in call.plan.trace.variables:
        shape = torch.Size(placeholder.shape)
        if place < shape.numel():
            index = [int(k) for k in np.unravel_index(place, shape)] if shape else []
            return f"{placeholder.name}{index}" if index else placeholder.name
        place -= shape.numel()
    return f"multiplier {place}"
