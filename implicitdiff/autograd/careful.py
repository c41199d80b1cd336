"""The KKT solve with what `KKTOptions` asks for, and what damping and null spaces look like in words.

In: a call, a point, right-hand sides. Out: (w, s, status) and events. Next: `autograd/kkt.py`, which has the policy.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from implicitdiff.autograd.call import Call, Leaves
from implicitdiff.autograd.regularity import LARGEST, entry_name, settled
from implicitdiff.derivatives import flat
from implicitdiff.derivatives.kkt import SymmetricKKT
from implicitdiff.errors import OptimalityWarning
from implicitdiff.failures import name_samples
from implicitdiff.operators import MatrixFree
from implicitdiff.records import emit
from implicitdiff.status import Status

Answer = tuple[Leaves, Leaves, Tensor]
NAMED = 4
"""The entries of u that a direction is named by."""


def careful_solve(call: Call, u: Leaves, lam: Leaves, theta: Leaves, rhs_u: Leaves, rhs_h: Leaves) -> Answer:
    """K^-1 rhs as the options of the call ask for it: (w, s, status) for right-hand sides (R, B, *shape)."""
    options = call.kkt
    shift = None
    if options.trust_region:
        shift = torch.full_like(u[0].reshape(len(u[0]), -1)[:, 0], options.trust_region)
        everyone = range(call.batch)
        message = f"{call.name}: H + {options.trust_region:.2g} I in place of H (trust_region)"
        emit(Status.DAMPED.name, "backward", everyone, message, call.records)
    matrix = None
    if options.accumulate is not None and u[0].dtype != options.accumulate:
        matrix = _dense(call, u, lam, theta, shift)
    if matrix is None:
        w, s, status = call.plan.kkt_solve(u, lam, theta, rhs_u, rhs_h, shift=shift)
    else:
        w, s, status = _by_matrix(matrix.double(), rhs_u, rhs_h)
    for _ in range(options.refinements):
        w, s, poor = _refined(call, u, lam, theta, (rhs_u, rhs_h), (w, s), shift)
        if not poor:
            break
    if options.least_norm:
        w, s, status = _least_norm(call, (u, lam, theta), (rhs_u, rhs_h), (w, s, status))
    return w, s, status


def _dense(call: Call, u: Leaves, lam: Leaves, theta: Leaves, shift: Tensor | None = None) -> Tensor | None:
    """K (B, N, N), None where it is too large or known by its products only."""
    if sum(leaf[0].numel() for leaf in (*u, *lam)) > LARGEST:
        return None
    operator = call.plan.hessian(u, lam, theta)
    if isinstance(operator, MatrixFree):
        return None
    hessian = operator.to_dense().expand(len(u[0]), -1, -1)
    if shift is not None:
        hessian = hessian + torch.diag_embed(shift[:, None].expand(-1, hessian.shape[-1]))
    jacobian = call.plan.constraint_jacobian(u, theta)
    diagonal = call.lagrangian.corner(theta, u[0])  # that of inequalities which are not active
    corner = hessian.new_zeros(len(hessian), jacobian.shape[1], jacobian.shape[1])
    if diagonal is not None:
        corner = torch.diag_embed(-flat.join(diagonal, 1)).expand_as(corner)
    return torch.cat([torch.cat([hessian, -jacobian.mT], 2), torch.cat([-jacobian, corner], 2)], 1)


def _by_matrix(matrix: Tensor, rhs_u: Leaves, rhs_h: Leaves) -> Answer:
    """K^+ rhs in the dtype of K, rounded to that of the right-hand sides."""
    shapes = [tuple(leaf.shape[2:]) for leaf in (*rhs_u, *rhs_h)]
    columns = flat.join((*rhs_u, *rhs_h), 2).permute(1, 2, 0).to(matrix.dtype)
    variables = sum(flat.sizes(shapes[: len(rhs_u)]))
    z, status = SymmetricKKT(matrix, variables).solve(columns)
    leaves = flat.split(z.permute(2, 0, 1).to(rhs_u[0].dtype), shapes)
    return leaves[: len(rhs_u)], leaves[len(rhs_u) :], status


def _refined(
    call: Call,
    u: Leaves,
    lam: Leaves,
    theta: Leaves,
    rhs: tuple[Leaves, Leaves],
    z: tuple[Leaves, Leaves],
    shift: Tensor | None,
) -> tuple[Leaves, Leaves, bool]:
    """(w, s) after one refinement of the samples with a poor residual, and whether there were any."""
    left, size = _residual(call, u, lam, theta, rhs, z, shift)
    poor = _largest((*left[0], *left[1])) > torch.finfo(u[0].dtype).eps ** 0.5 * size
    if not bool(poor.any()):
        return *z, False
    step_w, step_s, _ = call.plan.kkt_solve(u, lam, theta, *left, shift=shift)
    tried = (
        tuple(a + b for a, b in zip(z[0], step_w, strict=True)),
        tuple(a + b for a, b in zip(z[1], step_s, strict=True)),
    )
    again, _ = _residual(call, u, lam, theta, rhs, tried, shift)
    better = poor & (_largest((*again[0], *again[1])) < _largest((*left[0], *left[1])))
    picked = tuple(
        tuple(torch.where(_along(better, a), a, b) for a, b in zip(new, old, strict=True))
        for new, old in zip(tried, z, strict=True)
    )
    return picked[0], picked[1], bool(better.any())


def _residual(
    call: Call,
    u: Leaves,
    lam: Leaves,
    theta: Leaves,
    rhs: tuple[Leaves, Leaves],
    z: tuple[Leaves, Leaves],
    shift: Tensor | None,
) -> tuple[tuple[Leaves, Leaves], Tensor]:
    """rhs - K z, K by automatic differentiation, and the size of rhs (R, B)."""
    on_u, on_h = torch.func.vmap(lambda w, s: call.lagrangian.kkt_product(u, lam, theta, w, s))(*z)
    if shift is not None:
        on_u = tuple(a + _along(shift, w) * w for a, w in zip(on_u, z[0], strict=True))
    left = (
        tuple(r - a for r, a in zip(rhs[0], on_u, strict=True)),
        tuple(r - a for r, a in zip(rhs[1], on_h, strict=True)),
    )
    return left, _largest((*rhs[0], *rhs[1]))


def _least_norm(
    call: Call, point: tuple[Leaves, Leaves, Leaves], rhs: tuple[Leaves, Leaves], found: Answer
) -> Answer:
    """K^+ rhs in the samples whose K is singular; an event names the directions in which u is free."""
    w, s, status = found
    samples = torch.nonzero(status == Status.SINGULAR)[:, 0]
    if not len(samples):
        return found
    some, (here, multipliers, given) = _selected(call, point, samples)
    matrix = _dense(some, here, multipliers, given)
    if matrix is None:
        return found
    chosen = tuple(tuple(leaf[:, samples] for leaf in leaves) for leaves in rhs)
    own_w, own_s, _ = _by_matrix(matrix, *chosen)
    named = name_samples(samples.tolist(), call.batch)
    said = f"u is not unique; the derivative is the one of least norm; {spectrum(some, matrix)}"
    message = f"{call.name}: {named}: {said}"
    emit(Status.SINGULAR.name, "backward", samples.tolist(), message, call.records)
    return (
        tuple(a.index_copy(1, samples, b) for a, b in zip(w, own_w, strict=True)),
        tuple(a.index_copy(1, samples, b) for a, b in zip(s, own_s, strict=True)),
        status.index_fill(0, samples, int(Status.OK)),
    )


def _selected(
    call: Call, point: tuple[Leaves, Leaves, Leaves], samples: Tensor
) -> tuple[Call, tuple[Leaves, Leaves, Leaves]]:
    u, lam, theta = point
    some = call.folded(call.batched, len(samples))
    pairs = zip(theta, call.batched, strict=True)
    return some, (
        tuple(leaf[samples] for leaf in u),
        tuple(leaf[samples] for leaf in lam),
        tuple(t[samples] if own else t for t, own in pairs),
    )


def spectrum(call: Call, matrix: Tensor) -> str:
    """The condition number of the first K (n, N, N), and the entries of u in its flattest directions, in words."""
    first = matrix[:1].double()
    if not bool(first.isfinite().all()):
        return "K is not finite"
    values, vectors = torch.linalg.eigh(first)
    sizes = values[0].abs()
    largest, least = float(sizes.max()), float(sizes.min())
    zero = sizes <= 1e3 * torch.finfo(matrix.dtype).eps * largest
    count = int(zero.sum())
    order = sizes.argsort()[: max(1, count)]
    variables = sum(torch.Size(p.shape).numel() for p in call.plan.trace.variables)
    weight = vectors[0][:variables, order].abs().amax(1)
    places = weight.argsort(descending=True)[:NAMED].tolist()
    names = ", ".join(
        entry_name(call, p) for p in sorted(places) if float(weight[p]) > 0.1 * float(weight.max())
    )
    condition = f"{largest / least:.1e}" if least > 0 else "infinite"
    return f"condition number {condition}, {count} null direction{'s' if count != 1 else ''}, flattest in {names}"


def damped(
    call: Call,
    point: tuple[Leaves, Leaves, Leaves],
    rhs: tuple[Leaves, Leaves],
    z: tuple[Leaves, Leaves],
    bad: Tensor,
) -> tuple[Leaves, Leaves, Tensor]:
    """H + shift I in the bad samples, the shift growing until K is regular there; one warning and one event for all.

    Returns:
        w, s and the samples (B,) that no damping helped.
    """
    (u, lam, theta), (w, s) = point, z
    ones = tuple(torch.ones_like(leaf) for leaf in u)
    product, pushed = call.lagrangian.kkt_product(
        u, lam, theta, ones, tuple(torch.zeros_like(leaf) for leaf in lam)
    )
    product = pushed if call.square else product
    size = torch.stack([leaf.abs().reshape(len(bad), -1).amax(1) for leaf in product]).amax(0)
    size = torch.where(torch.isfinite(size) & (size > 0), size, 1.0)
    used = torch.zeros_like(size)
    for share in call.kkt.damping:
        share = max(share, torch.finfo(size.dtype).eps ** 0.5)
        shift = torch.where(bad, share * size, 0.0)
        again_w, again_s, status = call.plan.kkt_solve(u, lam, theta, *rhs, shift=shift)
        cured = bad & (settled(call, status, u, theta) == Status.OK)
        w = tuple(torch.where(_along(cured, a), a, b) for a, b in zip(again_w, w, strict=True))
        s = tuple(torch.where(_along(cured, a), a, b) for a, b in zip(again_s, s, strict=True))
        bad, used = bad & ~cured, torch.where(cured, share, used)
        if not bool(bad.any()):
            break
    samples = torch.nonzero(used)[:, 0]
    if len(samples):
        some, selected = _selected(call, point, samples)
        matrix = _dense(some, *selected)
        named = name_samples(samples.tolist(), call.batch)
        shares = used[samples]
        amount = f"{float(shares.min()):.0e}"
        if float(shares.max()) > float(shares.min()):
            amount += f" to {float(shares.max()):.0e}"
        what = (
            "Jacobian of the residual is singular and"
            if call.square
            else "KKT matrix is singular, its Hessian"
        )
        message = f"{call.name}: {named}: the {what} was damped by {amount} of its size"
        if matrix is not None:
            message += f"; {spectrum(some, matrix)}" + (
                f" (sample {int(samples[0])})" if len(samples) > 1 else ""
            )
        emit(Status.DAMPED.name, "backward", samples.tolist(), message, call.records)
        warnings.warn(message, OptimalityWarning, stacklevel=2)
    return w, s, bad


def _largest(leaves: Leaves) -> Tensor:
    """max |entry| of each right-hand side and sample, (R, B)."""
    return torch.stack([leaf.abs().reshape(*leaf.shape[:2], -1).amax(2) for leaf in leaves]).amax(0)


def _along(mask: Tensor, leaf: Tensor) -> Tensor:
    """(B,) or (R, B) as a mask of (R, B, *shape)."""
    lead = mask if mask.dim() == 2 else mask[None]
    return lead.reshape(*lead.shape, *(1,) * (leaf.dim() - 2))
