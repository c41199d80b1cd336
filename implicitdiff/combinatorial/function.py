"""The solution as a function of the costs, for autograd and torch.func; the derivative is the estimator's.

In: a `Pass` and costs (B, *shape). Out: solutions, differentiable as the estimator says. Next file to read:
``layer.py``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from implicitdiff.combinatorial.estimator import Estimator, Pass
from implicitdiff.errors import NotSupportedYetError
from implicitdiff.torch_private import (
    grad_batched_level,
    is_grad_batched,
    is_wrapped,
    lower_grad_batched,
    nested_forward_mode,
    raise_grad_batched,
    tangent_free,
    without_autocast,
)


def fold(value: Tensor, dim: int | None, size: int) -> Tensor:
    """A vmapped axis of ``size`` V at ``dim`` moved into the batch: (V * B, ...)."""
    lifted = value.expand(size, *value.shape) if dim is None else value.movedim(dim, 0)
    return lifted.reshape(size * lifted.shape[1], *lifted.shape[2:])


def unfold(value: Tensor, size: int) -> Tensor:
    """The inverse of `fold`, with V in front."""
    return value.reshape(size, value.shape[0] // size if size else 0, *value.shape[1:])


class DiscreteFunction(torch.autograd.Function):
    """(y, *saved)(w); apply to (estimator, run, w). What is saved is not differentiable."""

    @staticmethod
    def forward(estimator: Estimator, run: Pass, w: Tensor) -> tuple[Tensor, ...]:
        """Solve; plain tensors, whatever transforms are active outside."""
        run.oracle.tally.costs(run.projection, w)
        if len(w) == 0:
            return (torch.zeros_like(w),)
        y, *saved = estimator.forward(run, w)
        return (y.clone() if y is w else y, *saved)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """All tensors go through save_for_backward, which notices changes made in place."""
        ctx.estimator, ctx.run, w = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(w, *output)
        ctx.save_for_forward(w, *output)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        """The estimator's dl/dw."""
        if g is None:
            return None, None, None
        return None, None, _differentiate(ctx.estimator, ctx.run, "vjp", g, *ctx.saved_tensors)

    @staticmethod
    def jvp(ctx: Any, _: None, __: None, t: Tensor | None) -> tuple[Tensor | None, ...]:
        """The estimator's directional derivative."""
        w, y, *saved = (tangent_free(value) for value in ctx.saved_tensors)
        moved = torch.zeros_like(y)
        if t is not None:
            with nested_forward_mode():
                moved = _differentiate(ctx.estimator, ctx.run, "jvp", t, w, y, *saved)
        return (moved, *(None,) * len(saved))

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], estimator: Estimator, run: Pass, w: Tensor
    ) -> tuple[Any, Any]:
        """Fold the vmapped axis into the batch and apply again, so that vmaps nest and noise is drawn per entry."""
        outputs = DiscreteFunction.apply(estimator, run, fold(w, in_dims[2], info.batch_size))
        return tuple(unfold(value, info.batch_size) for value in outputs), (0,) * len(outputs)


# torch asks for the signature of `forward` in every call, and inspect works it out anew unless it is an attribute.
setattr(DiscreteFunction.forward, "__signature__", inspect.signature(DiscreteFunction.forward))  # noqa: B010


def _differentiate(
    estimator: Estimator, run: Pass, rule: str, v: Tensor, w: Tensor, y: Tensor, *saved: Tensor
) -> Tensor:
    """One derivative rule of the estimator ("vjp" or "jvp") at a cotangent or tangent v."""
    if is_grad_batched(v):
        return _through_func(lambda one: _differentiate(estimator, run, rule, one, w, y, *saved), v)
    if len(w) == 0:
        return torch.zeros_like(v)
    if not estimator.smooth:
        found: Tensor = Surrogate.apply(estimator, run, rule, v, w, y, *saved)
        return found
    with without_autocast(w.device.type):
        moved: Tensor = getattr(estimator, rule)(run, w, y, saved, v)
        if rule == "vjp" and not is_wrapped(v) and not is_wrapped(moved):
            run.oracle.tally.gradients(v.detach(), moved.detach())
    return moved


def _through_func(derivative: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
    """derivative(v) for a v that torch's older vmap has batched (is_grads_batched, vectorize): by torch.func's vmap,
    which knows the rules of these functions.
    """
    level = grad_batched_level()
    if level != 1:
        raise NotSupportedYetError(
            "nested vectorize=True or is_grads_batched=True: use torch.func.vmap, jacrev and jacfwd"
        )
    return raise_grad_batched(torch.func.vmap(derivative)(lower_grad_batched(v, level)), level)


class Surrogate(torch.autograd.Function):
    """A derivative rule that looks at values, on plain tensors under every transform; its own derivative is an error.

    torch's once_differentiable would not do: torch.func ignores it and returns zeros for the second derivative.
    """

    @staticmethod
    def forward(
        estimator: Estimator, run: Pass, rule: str, v: Tensor, w: Tensor, y: Tensor, *saved: Tensor
    ) -> Tensor:
        """Call the rule."""
        if len(w) == 0:
            return torch.zeros_like(v)
        moved: Tensor = getattr(estimator, rule)(run, w, y, saved, v)
        if rule == "vjp":
            run.oracle.tally.gradients(v, moved)
        return moved

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Nothing is kept but the name for the message."""
        ctx.estimator = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> NoReturn:
        """Raise."""
        raise _no_second(ctx.estimator)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> NoReturn:
        """Raise."""
        raise _no_second(ctx.estimator)

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        estimator: Estimator,
        run: Pass,
        rule: str,
        *tensors: Tensor,
    ) -> tuple[Tensor, int]:
        """Fold everything."""
        size = info.batch_size
        folded = [fold(value, dim, size) for value, dim in zip(tensors, in_dims[3:], strict=True)]
        return unfold(Surrogate.apply(estimator, run, rule, *folded), size), 0


def _no_second(estimator: Estimator) -> NotSupportedYetError:
    return NotSupportedYetError(
        f"second derivatives of {estimator.name}: its gradient is made of solutions, which have none; use Identity or "
        "StraightThrough"
    )


class Constant(torch.autograd.Function):
    """Tensors that are computed from values and have no derivative; apply to (function, *tensors (B, ...)).

    The function sees plain tensors and returns a tuple of tensors with the batch axis first. For the losses, whose
    gradient is exact with the solutions held fixed.
    """

    @staticmethod
    def forward(function: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
        """Call it."""
        return function(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """No output has a derivative."""
        ctx.mark_non_differentiable(*output)
        ctx.count, ctx.outputs = len(inputs), len(output)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[None, ...]:
        """Nothing."""
        return (None,) * ctx.count

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> tuple[None, ...]:
        """Nothing."""
        return (None,) * ctx.outputs

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        function: Callable[..., tuple[Tensor, ...]],
        *tensors: Tensor,
    ) -> tuple[Any, Any]:
        """Fold everything."""
        size = info.batch_size
        folded = [fold(value, dim, size) for value, dim in zip(tensors, in_dims[1:], strict=True)]
        outputs = Constant.apply(function, *folded)
        return tuple(unfold(value, size) for value in outputs), (0,) * len(outputs)


__all__ = ["Constant", "DiscreteFunction"]
