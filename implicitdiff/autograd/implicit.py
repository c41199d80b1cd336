"""The solution as a function of theta, for autograd: forward by any solver, derivatives by the implicit function
theorem.

In: a `Call` and the tensors theta. Out: (u, lam, status, iterations, residual), of which u and lam are differentiable
to any order, in reverse and forward mode, under vmap. Next: `layer/prepare.py`, which makes the call.
"""

from __future__ import annotations

import inspect
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
from implicitdiff.autograd.hand import HandVjp
from implicitdiff.autograd.kkt import KKTSolve, unusable
from implicitdiff.autograd.kkt import solve as kkt_solve
from implicitdiff.autograd.masks import Masks, kept
from implicitdiff.autograd.opaque import CALLS, LIBRARY, Flags, OpaqueStep
from implicitdiff.autograd.regularity import report_saddles, settled
from implicitdiff.autograd.usual import usual_gradients
from implicitdiff.errors import NotSupportedYetError
from implicitdiff.torch_private import (
    below_autograd,
    has_tangent,
    is_recorded,
    is_wrapped,
    nested_forward_mode,
    tangent_free,
    transforms_active,
)

EXTRAS = 3  # status, iterations, residual


class ImplicitFunction(torch.autograd.Function):
    """(u, lam)(theta), defined by F(u, lam, theta) = (D_u L, -h) = 0.

    Reverse: K (w, s) = -(v_u, v_lam), then the gradient in theta of <D_u L, w> - <h, s>. Forward: K (u', lam') =
    -F_theta theta'. u and lam are saved as this function's own outputs, so a derivative of the derivative sees them
    move.

    Apply to (call, *theta, *start): `start` are leaves (B, *shape) of a warm start, or nothing. The result is
    (*u, *lam, status, iterations, residual), each with the batch axis first.
    """

    @staticmethod
    def forward(call: Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run the solver; it sees plain tensors whatever transforms are active outside."""
        return SOLVE(call, (), tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Everything a derivative needs goes through save_for_backward, which checks for changes made in place."""
        call: Call = inputs[0]
        ctx.call = call
        ctx.starts = len(inputs) - 1 - len(call.batched)
        ctx.set_materialize_grads(False)
        # The multipliers of a system of equations are 0 wherever the inputs move.
        ctx.mark_non_differentiable(*output[call.variables if call.square else -EXTRAS :])
        saved = (*output[: 1 - EXTRAS], *inputs[1 : 1 + len(call.batched)])  # u, lam, status, theta
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients in theta."""
        call, theta = ctx.call, len(ctx.call.batched)
        saved = ctx.saved_tensors  # read once: checkpointing recomputes them, and refuses to do so twice
        found = usual_gradients(call, saved, cotangents, ctx.needs_input_grad[1 : 1 + theta])
        if found is not None:
            return (None, *found, *(None,) * ctx.starts)
        return through_func(lambda *given: _backward(ctx, saved, *given), cotangents)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        """K (u', lam') = -F_theta theta'."""
        return through_func(lambda *given: _jvp(ctx, *given), tangents)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], call: Call, *tensors: Tensor) -> tuple[Any, Any]:
        """Fold the vmapped axis into the batch and apply again, so that vmaps nest."""
        size, count = info.batch_size, len(call.batched)
        theta, inner = call.fold_theta(tensors[:count], in_dims[1 : 1 + count], size)
        start = [
            fold(value, dim, size) for value, dim in zip(tensors[count:], in_dims[1 + count :], strict=True)
        ]
        outputs = ImplicitFunction.apply(inner, *theta, *start)
        return tuple(unfold(output, size, call.batch) for output in outputs), (0,) * len(outputs)


# torch asks for the signature of `forward` at every call.
ImplicitFunction.forward.__signature__ = inspect.signature(ImplicitFunction.forward)  # type: ignore[attr-defined]


def _solve(call: Call, _: Flags, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    theta, start = tuple(tensors[: len(call.batched)]), tuple(tensors[len(call.batched) :])
    with undisturbed(theta[0]):
        solved = call.solve(call, theta, start or None)
        lam = solved.multipliers
        if lam is None:
            lam = call.plan.multipliers(solved.u, theta)
    # An output that shares memory with an input would be taken for a view of it.
    held = {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()}
    outputs = (*solved.u, *lam, solved.status, solved.iterations, solved.residual)
    owned = tuple(own(output, held) for output in outputs)
    if solved.factor is not None:
        call.factors.keep(call.plan, *call.split_point((*owned[:-EXTRAS], *theta)), solved.factor)
    return owned


def _solved_shapes(call: Call, _: Flags, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    like, trace = tensors[0], call.plan.trace
    dtype = trace.variables[0].dtype
    shapes = () if trace.equality is None else trace.equality.output_shapes
    return (
        *(like.new_empty((call.batch, *leaf.shape), dtype=leaf.dtype) for leaf in trace.variables),
        *(like.new_empty((call.batch, *shape), dtype=dtype) for shape in shapes),
        *(like.new_empty(call.batch, dtype=kind) for kind in (torch.int8, torch.int64, dtype)),
    )


SOLVE = OpaqueStep("solve", _solve, _solved_shapes)


def _differentiable_solve(
    handle: int, batch: int, flags: Flags, needs: Flags, tensors: Sequence[Tensor]
) -> list[Tensor]:
    """The operator in a graph that was exported without its derivatives: they are those of the function."""
    recording = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if not recording and not any(has_tangent(tensor) for tensor in tensors):
        with below_autograd():
            found: list[Tensor] = torch.ops.implicitdiff.solve(handle, batch, flags, needs, tensors)
            return found
    if transforms_active():
        raise NotSupportedYetError(
            "an exported layer has the derivatives of plain autograd, not those of torch.func: apply grad, jacrev, jvp "
            "and the like to the model and export the result"
        )
    return list(ImplicitFunction.apply(CALLS.value(handle).folded(tuple(flags), batch), *tensors))


LIBRARY.impl(SOLVE.name, _differentiable_solve, "Autograd")


def _backward(ctx: Any, saved: Sequence[Tensor], *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    call: Call = ctx.call
    u, lam, status, theta = _saved(call, saved)
    needs = ctx.needs_input_grad[1 : 1 + len(theta)]
    nothing = (None,) * ctx.starts
    v = cotangents[: len(u) + len(lam)]
    if all(cotangent is None for cotangent in v) or not any(needs):
        return (None, *(None,) * len(theta), *nothing)
    if call.batch == 0:
        zeros = (torch.zeros_like(t) if need else None for t, need in zip(theta, needs, strict=True))
        return (None, *zeros, *nothing)
    with undisturbed(u[0]):
        grads = pull_back(call, u, lam, status, theta, v, needs)
    return (None, *grads, *nothing)


def _jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
    call: Call = ctx.call
    if call.vjp is not None:
        raise NotSupportedYetError(
            f"forward-mode derivatives of {call.name} with backward='hand': its vjp gives reverse mode only; "
            "use backward='auto'"
        )
    with nested_forward_mode():
        u, lam, status, theta = _saved(call, [tangent_free(value) for value in ctx.saved_tensors])
        moved = [t if floating(x) else None for t, x in zip(tangents, theta, strict=False)]
        if call.batch == 0 or all(tangent is None for tangent in moved):
            still = () if call.square else lam
            return (
                *(torch.zeros_like(leaf) for leaf in (*u, *still)),
                *(None,) * (len(lam) - len(still) + EXTRAS),
            )
        with undisturbed(u[0]):
            masks = Masks.of(call, status)
            u, lam, theta = masks.sound(u, lam, theta)
            inside, lost = call.lagrangian.inside(u, lam, theta)
            towards_u, towards_h = call.lagrangian.input_tangent(inside, lam, theta, moved)
            rhs = [-leaf[None] for leaf in masks.silence((*without(towards_u, lost), *towards_h))]
            z = KKTSolve.apply(call, *rhs, *u, *lam, *theta)
        marked = masks.mark([leaf[0] for leaf in z])
        moving = len(u) if call.square else len(z)
        return (*marked[:moving], *(None,) * (len(z) - moving + EXTRAS))


def pull_back(
    call: Call,
    u: Leaves,
    lam: Leaves,
    status: Tensor,
    theta: Leaves,
    cotangents: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The gradients in theta for cotangents of (u, lam), None where not needed.

    Where nothing will be differentiated again the plan's own pass does it, which may be emitted code that works in
    place. Otherwise the same formula is composed of differentiable parts: one `KKTSolve` and one pullback.
    """
    present = [cotangent for cotangent in cotangents if cotangent is not None]
    lean = not torch.is_grad_enabled() and not any(
        is_wrapped(tensor) or has_tangent(tensor) for tensor in (*u, *lam, *theta, *present)
    )
    if lean and is_recorded(u):
        given = (cotangent is not None for cotangent in cotangents)
        pulled = iter(PULL_BACK(call, (*needs, *given), (*u, *lam, status, *theta, *present)))
        return tuple(
            next(pulled) if need and floating(t) else None for need, t in zip(needs, theta, strict=True)
        )
    v = zeros_for(cotangents, (*u, *lam))
    if call.vjp is not None:
        if any(cotangent is not None for cotangent in cotangents[len(u) :]):
            raise NotSupportedYetError(
                f"the multipliers of {call.name} have no gradient with backward='hand'; use backward='auto'"
            )
        grads = HandVjp.apply(call, tuple(needs), *u, *v[: len(u)], *theta)
        return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))
    masks = Masks.of(call, status)
    if lean and masks.all_failed():
        return masks.nothing(theta, v, needs)
    found = None
    if lean and call.kkt.plain:
        silent = masks.any_failed()
        if silent:
            u, lam, theta = masks.sound(u, lam, theta)
        loud = masks.silence(v) if silent else v
        v_lam = None if all(c is None for c in cotangents[len(u) :]) else loud[len(u) :]
        factor = call.factors.find(call.plan, u, lam, theta)  # of a derivative of this one, if there was any
        found, quality = call.plan.vjp(u, lam, theta, loud[: len(u)], v_lam, needs, factor)
        bad = unusable(quality)
        if bool(bad.any()):
            bad = unusable(settled(call, quality, u, theta))
        if not bool(bad.any()):
            report_saddles(call, u, lam, theta, quality)
            return masks.spoil(found, v) if silent else found
    else:
        u, lam, theta = masks.sound(u, lam, theta)
    inside, lost = call.lagrangian.inside(u, lam, theta)
    rhs = [-leaf[None] for leaf in masks.silence((*without(v[: len(u)], lost), *v[len(u) :]))]
    if lean:
        w, s = kkt_solve(call, u, lam, theta, tuple(rhs[: len(u)]), tuple(rhs[len(u) :]))
        z = (*w, *s)
    else:
        z = KKTSolve.apply(call, *rhs, *u, *lam, *theta)
    z = tuple(leaf[0] for leaf in z)
    grads = call.lagrangian.pull_inputs(inside, lam, theta, z[: len(u)], z[len(u) :], needs)
    if found is not None:
        grads = kept(bad, grads, found, call.batched)
    return masks.spoil(grads, v)


def _pull_back(call: Call, flags: Flags, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """`pull_back` of tensors joined as its operator takes them; flags are those of theta, then of the cotangents."""
    u, lam, status, rest = _saved(call, tensors)
    count = len(call.batched)
    theta, cotangents = rest[:count], iter(rest[count:])
    v = [next(cotangents) if given else None for given in flags[count:]]
    with undisturbed(u[0]):
        grads = pull_back(call, u, lam, status, theta, v, flags[:count])
    wanted = (
        torch.zeros_like(t) if grad is None else grad
        for grad, t, need in zip(grads, theta, flags, strict=False)
        if need and floating(t)
    )
    return tuple(wanted)


def _pulled_shapes(call: Call, flags: Flags, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    *_, rest = _saved(call, tensors)
    pairs = zip(rest, flags[: len(call.batched)], strict=False)
    return tuple(t.new_empty(t.shape) for t, need in pairs if need and floating(t))


PULL_BACK = OpaqueStep("pull_back", _pull_back, _pulled_shapes)


def _saved(call: Call, saved: Sequence[Tensor]) -> tuple[Leaves, Leaves, Tensor, Leaves]:
    first, second = call.variables, call.variables + call.multipliers
    return tuple(saved[:first]), tuple(saved[first:second]), saved[second], tuple(saved[second + 1 :])
