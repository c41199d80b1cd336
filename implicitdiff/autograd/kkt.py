"""z = K^-1 r as a differentiable function of r, u, lam and theta: the one linear solve behind all derivatives of a
layer.

In: right-hand sides (R, B, *shape) and a point. Out: (w, s), differentiable any number of times in reverse and forward
mode and under vmap, whatever the plan does inside (in-place buffers, iterations, LAPACK). Next: `autograd/implicit.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from implicitdiff.autograd.batched_grads import through_func
from implicitdiff.autograd.call import (
    Call,
    Leaves,
    floating,
    fold,
    own,
    undisturbed,
    unfold,
    without,
    zeros_for,
)
from implicitdiff.autograd.careful import careful_solve, damped
from implicitdiff.autograd.opaque import Flags, OpaqueStep
from implicitdiff.autograd.regularity import report_saddles, settled
from implicitdiff.errors import ConvergenceError, NotSupportedYetError, OptimalityWarning, SingularError
from implicitdiff.failures import name_samples
from implicitdiff.records import emit
from implicitdiff.status import Status
from implicitdiff.torch_private import nested_forward_mode, tangent_free


class KKTSolve(torch.autograd.Function):
    """(w, s) = K^-1 (rhs_u, rhs_h), K = [[H, -A'], [-A, 0]] at (u, lam, theta), symmetric.

    With z = K^-1 r and a cotangent c, q = K^-1 c: the gradient in r is q, that in the point is -D <q, K z>, q and z
    fixed. A tangent is z' = K^-1 (r' - K' z). Where constraints are dependent K^-1 is the pseudo-inverse; its
    formulas are the same as long as the dependence is structural (the null space of A' does not move).

    Apply to (call, *rhs_u, *rhs_h, *u, *lam, *theta); the result is (*w, *s).
    """

    @staticmethod
    def forward(call: Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The plan's solve, with the failure policy applied; its factorisation is kept for the derivatives."""
        return STEP(call, (), tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Save z, a differentiable output, and the point; the right-hand side is not needed again."""
        call, tensors = inputs[0], inputs[1:]
        _, point = _parts(call, tensors)
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output, *point)
        ctx.save_for_forward(*output, *point)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        """q = K^-1 c, and -D <q, K z>."""
        return through_func(lambda *given: _backward(ctx, *given), cotangents)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        """z' = K^-1 (r' - K' z)."""
        return through_func(lambda *given: _jvp(ctx, *given), tangents)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], call: Call, *tensors: Tensor) -> tuple[Any, Any]:
        """Only right-hand sides vmapped: more of them for one factorisation. Otherwise the axis goes into the batch."""
        size, count = info.batch_size, call.variables + call.multipliers
        rhs, point = _parts(call, tensors)
        rhs_dims, point_dims = in_dims[1 : 1 + count], in_dims[1 + count :]
        if all(dim is None for dim in point_dims):
            width = _size(rhs[0], rhs_dims[0], 0)
            merged = [fold(value, dim, size, 0) for value, dim in zip(rhs, rhs_dims, strict=True)]
            z = KKTSolve.apply(call, *merged, *point)
            return tuple(unfold(leaf, size, width, 0) for leaf in z), (0,) * count
        split = call.variables + call.multipliers
        here = [fold(value, dim, size) for value, dim in zip(point[:split], point_dims[:split], strict=True)]
        theta, inner = call.fold_theta(point[split:], point_dims[split:], size)
        merged = [fold(value, dim, size, 1) for value, dim in zip(rhs, rhs_dims, strict=True)]
        z = KKTSolve.apply(inner, *merged, *here, *theta)
        return tuple(unfold(leaf, size, call.batch, 1) for leaf in z), (1,) * count


def _solve(call: Call, _: Flags, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    rhs, point = _parts(call, tensors)
    with undisturbed(rhs[0]):
        z = solve(call, *call.split_point(point), *_pair(call, rhs), keep=True)
    held = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    return tuple(own(leaf, held) for leaf in (*z[0], *z[1]))


def _solved_shapes(call: Call, _: Flags, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return tuple(side.new_empty(side.shape) for side in _parts(call, tensors)[0])


STEP = OpaqueStep("kkt_solve", _solve, _solved_shapes)


def _backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    call: Call = ctx.call
    count = call.variables + call.multipliers
    z, point = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
    if all(cotangent is None for cotangent in cotangents):
        return (None,) * (1 + count + len(point))
    with undisturbed(z[0]):
        u, lam, theta = call.split_point(point)
        inside, lost = call.lagrangian.inside(u, lam, theta)
        c_u, c_h = _pair(call, zeros_for(cotangents, z))
        q = KKTSolve.apply(call, *without(c_u, lost), *c_h, *point)
        needs = ctx.needs_input_grad[1 + count :]
        active = [index for index, need in enumerate(needs) if need and floating(point[index])]
        if active:
            _refuse_second(call)
        found: dict[int, Tensor] = {}
        if active:
            start = (*inside, *lam, *theta)

            def form(*values: Tensor) -> Tensor:
                moved = list(start)
                for index, value in zip(active, values, strict=True):
                    moved[index] = value
                return call.lagrangian.kkt_form(*call.split_point(moved), _pair(call, q), _pair(call, z))

            grads = torch.func.grad(form, argnums=tuple(range(len(active))))(*[start[i] for i in active])
            found = {index: -grad for index, grad in zip(active, grads, strict=True)}
            found |= {i: without([found[i]], [lost[i]])[0] for i in active if i < len(lost)}
    return (None, *q, *(found.get(index) for index in range(len(point))))


def _jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
    call: Call = ctx.call
    count = call.variables + call.multipliers
    with nested_forward_mode():
        saved = [tangent_free(value) for value in ctx.saved_tensors]
        z, point = saved[:count], saved[count:]
        with undisturbed(z[0]):
            rhs = zeros_for(tangents[:count], z)
            moved = [t if floating(p) else None for t, p in zip(tangents[count:], point, strict=True)]
            u, lam, theta = call.split_point(point)
            inside, lost = call.lagrangian.inside(u, lam, theta)
            if any(tangent is not None for tangent in moved):
                _refuse_second(call)
                turned = call.lagrangian.kkt_tangent(inside, lam, theta, _pair(call, z), moved)
                rhs = tuple(r - t for r, t in zip(rhs, (*turned[0], *turned[1]), strict=True))
            rhs_u, rhs_h = _pair(call, rhs)
            result: tuple[Tensor, ...] = KKTSolve.apply(call, *without(rhs_u, lost), *rhs_h, *point)
            return result


def solve(
    call: Call,
    u: Leaves,
    lam: Leaves,
    theta: Leaves,
    rhs_u: Leaves,
    rhs_h: Leaves,
    *,
    keep: bool = False,
) -> tuple[Leaves, Leaves]:
    """K^-1 rhs by the plan, plain tensors in and out, with `on_failure` applied to the samples that have no answer.

    A sample whose right-hand sides are exactly 0 has the answer 0 on every solver and is never a failure. The
    factorisation that the call has of this very point is used; `keep` leaves one behind.

    Raises:
        SingularError: under "raise" (and under "damp" when no damping helps).
        ConvergenceError: likewise, when an iterative solver did not reach its tolerance.
    """
    if not call.kkt.plain:
        w, s, status = careful_solve(call, u, lam, theta, rhs_u, rhs_h)
    else:
        factor = (call.factors.at if keep else call.factors.find)(call.plan, u, lam, theta)
        if factor is None:
            w, s, status = call.plan.kkt_solve(u, lam, theta, rhs_u, rhs_h)
        else:
            w, s, status = factor.solve(rhs_u, rhs_h)
    idle = _idle((*rhs_u, *rhs_h))
    report_saddles(call, u, lam, theta, status)
    bad = unusable(status) & ~idle
    if bool(bad.any()):
        status = settled(call, status, u, theta)
        bad = unusable(status) & ~idle
        if call.on_failure == "damp":
            w, s, bad = damped(call, (u, lam, theta), (rhs_u, rhs_h), (w, s), bad)
        if bool(bad.any()):
            _report(call, status, bad)
            if call.on_failure in ("nan", "zero"):
                fill = torch.nan if call.on_failure == "nan" else 0.0
                w, s = _fill(w, bad, fill), _fill(s, bad, fill)
    return _fill(w, idle, 0.0), _fill(s, idle, 0.0)


def _refuse_second(call: Call) -> None:
    """K^+ of a K whose null space moves has a derivative of its own, which is not the one of K^-1."""
    if call.kkt.least_norm:
        raise NotSupportedYetError(
            f"second derivatives of {call.name} with KKTOptions(least_norm=True), which has first derivatives only: "
            "leave it out where the minimiser is unique"
        )


def unusable(status: Tensor) -> Tensor:
    """(B,) where a solve has no answer. At a saddle (INDEFINITE) K is regular and the derivative exists."""
    return (status != Status.OK) & (status != Status.INDEFINITE)


def _report(call: Call, status: Tensor, bad: Tensor) -> None:
    samples = torch.nonzero(bad)[:, 0].tolist()
    kind = Status(int(status[samples[0]]))
    what = {
        Status.SINGULAR: "the KKT matrix is singular: u is not locally unique, so it has no derivative",
        Status.NONFINITE: "a second derivative is NaN or infinite at the solution",
        Status.NOT_CONVERGED: "the iterative solver of the backward pass did not reach its tolerance",
        Status.NOT_REGULAR: "the gradients of the constraints are dependent at the solution and not beside it: u has a "
        "kink there, so it has one-sided derivatives only, which idf.check shows",
    }.get(kind, f"the backward pass ended with status {kind.name}")
    remedy = (
        "accept it with on_failure='warn', 'nan' or 'zero'"
        if kind == Status.NOT_REGULAR
        else "add a small quadratic term to the objective, accept it with on_failure='damp', 'nan' or 'zero', or "
        "take the derivative of least norm with kkt=idf.KKTOptions(least_norm=True)"
    )
    message = f"{call.name}: {name_samples(samples, call.batch)}: {what}; {remedy}"
    if call.square:
        message = message.replace("the KKT matrix is", "the Jacobian of the residual is").replace(
            "add a small quadratic term to the objective", "add a small multiple of u to the residual"
        )
    emit(kind.name, "backward", samples, message, call.records)
    if call.on_failure in ("raise", "damp"):
        raise ConvergenceError(message) if kind == Status.NOT_CONVERGED else SingularError(message)
    if call.on_failure == "warn":
        warnings.warn(message, OptimalityWarning, stacklevel=2)


def _idle(rhs: Leaves) -> Tensor:
    """(B,) where every right-hand side is exactly 0."""
    flags = [(leaf == 0).movedim(1, 0).reshape(leaf.shape[1], -1).all(1) for leaf in rhs]
    return torch.stack(flags).all(0)


def _fill(leaves: Leaves, mask: Tensor, value: float) -> Leaves:
    return tuple(torch.where(_along(mask, leaf), value, leaf) for leaf in leaves)


def _along(mask: Tensor, leaf: Tensor) -> Tensor:
    """(B,) as a mask of (R, B, *shape)."""
    return mask.reshape(1, -1, *(1,) * (leaf.dim() - 2))


def _parts(call: Call, tensors: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """(right-hand sides, point)."""
    count = call.variables + call.multipliers
    return tuple(tensors[:count]), tuple(tensors[count:])


def _pair(call: Call, leaves: Sequence[Tensor]) -> tuple[Leaves, Leaves]:
    return tuple(leaves[: call.variables]), tuple(leaves[call.variables :])


def _size(value: Tensor, dim: int | None, at: int) -> int:
    """The size of axis `at`, the vmapped axis not counted."""
    return value.shape[at] if dim is None or at < dim else value.shape[at + 1]
