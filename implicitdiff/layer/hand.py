"""The problem's hand-written `vjp`, called on plain batched tensors, its answer checked.

In: a problem, the structure of its inputs. Out: a function of (call, u, v, theta) for `autograd/hand.py`. Next:
`layer/prepare.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from implicitdiff.autograd import Call
from implicitdiff.errors import ProblemDefinitionError
from implicitdiff.graph.skeleton import skeleton
from implicitdiff.graph.trace import Trace
from implicitdiff.inputs import Bound
from implicitdiff.problem import Problem
from implicitdiff.pytrees import flatten, flatten_like, unflatten
from implicitdiff.torch_private import is_wrapped

Leaves = tuple[Tensor, ...]
HandVjp = Callable[[Call, Leaves, Leaves, Leaves], tuple[Tensor | None, ...]]


def hand_vjp(problem: Problem, bound: Bound, trace: Trace) -> HandVjp:
    """The hook as a function of leaves.

    The result takes (call, u, v, theta) with leaves of the call's flags, and returns one gradient per theta, shared
    inputs summed over the batch, None for the tensors of the problem and for what is not floating.
    """
    name = f"vjp of {type(problem).__name__}"

    def function(call: Call, u: Leaves, v: Leaves, theta: Leaves) -> tuple[Tensor | None, ...]:
        count, last = len(bound.names), len(bound.names) + len(bound.tensors)
        flags = call.batched[:count]
        if any(call.batched[count:]):
            raise ProblemDefinitionError(
                f"{name}: tensors of the problem differ between samples; use backward='auto'"
            )
        plain = problem
        if any(is_wrapped(tensor) for tensor in bound.tensors):
            plain = skeleton(
                problem, {id(a): b for a, b in zip(bound.tensors, theta[count:last], strict=True)}
            )
        inputs = replace(bound, leaves=theta[:count], batched=flags, batch=call.batch).expanded()
        with torch.no_grad():
            answer = plain.vjp(unflatten(u, trace.variable_spec), unflatten(v, trace.variable_spec), *inputs)
        leaves = _leaves(name, answer, inputs)
        positions = {position for position, _ in bound.constants}
        grads = [leaf for index, leaf in enumerate(leaves) if index not in positions]
        checked = [
            _checked(name, bound.names[i], grad, value, flag, call.batch)
            for i, (grad, value, flag) in enumerate(zip(grads, theta[:count], flags, strict=True))
        ]
        return (*checked, *(None,) * (len(theta) - count))

    return function


def _leaves(name: str, answer: object, inputs: tuple[object, ...]) -> list[object]:
    """One gradient per leaf of the inputs, constants included."""
    grads = (answer,) if len(inputs) == 1 and not _is_single(answer) else answer
    if not isinstance(grads, tuple | list) or len(grads) != len(inputs):
        raise ProblemDefinitionError(
            f"{name} returned {type(answer).__name__}; expected one gradient per input"
        )
    found: list[object] = []
    for grad, value in zip(grads, inputs, strict=True):
        leaves, spec = flatten(value)
        if grad is None:
            found += [None] * len(leaves)
        else:
            found += flatten_like(grad, spec, name, ProblemDefinitionError)
    return found


def _is_single(answer: object) -> bool:
    """Whether an answer for one input is already a tuple with one gradient in it."""
    return isinstance(answer, tuple | list) and len(answer) == 1


def _checked(name: str, label: str, grad: object, value: Tensor, batched: bool, batch: int) -> Tensor | None:
    """The gradient like `value`; a shared input's is summed over the batch."""
    if grad is None or not value.is_floating_point():
        return None
    expected = tuple(value.shape) if batched else (batch, *value.shape)
    if not isinstance(grad, Tensor) or tuple(grad.shape) != expected:
        shown = tuple(grad.shape) if isinstance(grad, Tensor) else type(grad).__name__
        raise ProblemDefinitionError(
            f"{name}: the gradient for {label} is {shown}, expected shape {expected}"
        )
    grad = grad.to(value.dtype)
    return grad if batched else grad.sum(0)
