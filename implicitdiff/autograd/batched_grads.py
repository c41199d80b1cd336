"""Cotangents and tangents that come batched by torch's older vmap: taken through torch.func's, which knows our
functions.

In: a derivative as a function of cotangents. Out: its values, batched the same way. Next: `autograd/kkt.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from implicitdiff.errors import NotSupportedYetError
from implicitdiff.torch_private import (
    grad_batched_level,
    is_grad_batched,
    lower_grad_batched,
    raise_grad_batched,
)

Values = tuple[Tensor | None, ...]


def through_func(derivative: Callable[..., Values], given: Sequence[Tensor | None]) -> Values:
    """derivative(*given), where entries of `given` may be batched by `autograd.grad(is_grads_batched=True)`.

    Args:
        derivative: linear in its arguments, made of operations that torch.func.vmap knows; it may return None entries.
        given: cotangents or tangents, or None.

    Raises:
        NotSupportedYetError: several such batch axes are nested.
    """
    if not any(value is not None and is_grad_batched(value) for value in given):
        return derivative(*given)
    level = grad_batched_level()
    if level != 1:
        raise NotSupportedYetError(
            "nested vectorize=True or is_grads_batched=True: use torch.func.vmap, jacrev and jacfwd"
        )
    present = [index for index, value in enumerate(given) if value is not None]
    lowered = [_lowered(given[index], level) for index in present]
    dims = tuple(0 if batched else None for _, batched in lowered)
    shape: list[bool] = []

    def dense(*values: Tensor) -> tuple[Tensor, ...]:
        full: list[Any] = [None] * len(given)
        for index, value in zip(present, values, strict=True):
            full[index] = value
        result = derivative(*full)
        shape[:] = [value is not None for value in result]
        return tuple(value for value in result if value is not None)

    results = iter(torch.func.vmap(dense, in_dims=dims)(*(value for value, _ in lowered)))
    return tuple(raise_grad_batched(next(results), level) if there else None for there in shape)


def _lowered(value: Tensor | None, level: int) -> tuple[Tensor, bool]:
    if value is None:
        raise AssertionError("absent")
    return (lower_grad_batched(value, level), True) if is_grad_batched(value) else (value, False)
