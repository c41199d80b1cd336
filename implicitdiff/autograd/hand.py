"""The hand-written gradient of a problem, as a function that says so when it is differentiated again.

In: u, its cotangent and theta. Out: one gradient per theta, by the problem's own `vjp`. Next: `autograd/implicit.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from implicitdiff.autograd.call import Call, fold, unfold
from implicitdiff.autograd.opaque import Flags, OpaqueStep
from implicitdiff.errors import NotSupportedYetError, ProblemDefinitionError


class HandVjp(torch.autograd.Function):
    """The problem's `vjp` hook on plain batched tensors, under every transform; its own derivatives raise a named
    error.

    torch's once_differentiable would not do: torch.func ignores it and returns zeros for the second derivative.
    Apply to (call, needs, *u, *v, *theta); the result is one tensor per theta (zeros where the hook gives none).
    """

    @staticmethod
    def forward(call: Call, needs: tuple[bool, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        """Call the hook; a gradient that it does not give and that is needed is an error, not a zero."""
        return STEP(call, needs, tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Nothing is saved but the name for the message."""
        ctx.call = inputs[0]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> NoReturn:
        """Raise."""
        raise _no_second(ctx.call)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> NoReturn:
        """Raise."""
        raise _no_second(ctx.call)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], call: Call, needs: tuple[bool, ...], *tensors: Tensor
    ) -> tuple[Any, Any]:
        """Fold the vmapped axis into the batch: gradients of tensors that are shared inside become one per vmapped
        entry.
        """
        size, count = info.batch_size, 2 * call.variables
        leaves = [
            fold(value, dim, size) for value, dim in zip(tensors[:count], in_dims[2 : 2 + count], strict=True)
        ]
        # Inputs are lifted, so that the gradient of a shared one is not summed over the vmapped axis. Tensors of the
        # problem stay shared where they are: the hook gives no gradient for them.
        inputs = len(call.plan.trace.inputs)
        lifted: list[Tensor] = []
        dims: list[int | None] = []
        for index, (value, dim) in enumerate(zip(tensors[count:], in_dims[2 + count :], strict=True)):
            stays = dim is None and index >= inputs
            dims.append(None if stays else 0)
            whole = value.unsqueeze(0).expand(size, *value.shape) if dim is None else value.movedim(dim, 0)
            lifted.append(value if stays else whole)
        theta, inner = call.fold_theta(lifted, dims, size)
        grads = HandVjp.apply(inner, needs, *leaves, *theta)
        parts = zip(grads, dims, call.batched, strict=True)
        return tuple(_per_entry(grad, dim, flag, size, call.batch) for grad, dim, flag in parts), tuple(dims)


def _per_entry(grad: Tensor, dim: int | None, batched: bool, size: int, batch: int) -> Tensor:
    """The gradient with the vmapped axis in front again; that of a shared tensor summed over the batch."""
    if dim is None:
        return grad
    unfolded = unfold(grad, size, batch)
    return unfolded if batched else unfolded.sum(1)


def _no_second(call: Call) -> NotSupportedYetError:
    return NotSupportedYetError(
        f"the hand-written vjp of {call.name} has no derivative of its own, so backward='hand' has no second "
        "derivatives; use backward='auto'"
    )


def _run(call: Call, needs: Flags, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    count = call.variables
    u, v, theta = tuple(tensors[:count]), tuple(tensors[count : 2 * count]), tuple(tensors[2 * count :])
    if call.vjp is None:
        raise AssertionError("no hand-written vjp in this call")
    grads = call.vjp(call, u, v, theta)
    trace = call.plan.trace
    names = [placeholder.name for placeholder in (*trace.inputs, *trace.tensors)]
    missing = [n for n, grad, need in zip(names, grads, needs, strict=True) if need and grad is None]
    if missing:
        raise ProblemDefinitionError(
            f"vjp of {call.name} gives no gradient for {', '.join(missing)}, which requires one, and a zero "
            "would be wrong: use backward='auto', or detach it"
        )
    return tuple(
        torch.zeros_like(value) if grad is None else grad for grad, value in zip(grads, theta, strict=True)
    )


def _shapes(call: Call, _: Flags, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return tuple(value.new_empty(value.shape) for value in tensors[2 * call.variables :])


STEP = OpaqueStep("hand_vjp", _run, _shapes)
