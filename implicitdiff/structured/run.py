"""An emitted backward pass with the places of its arguments and results, so that a call looks nothing up by name.

In: an emitted function. Out: `Run`. Next file: `plan.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from implicitdiff.structured.arguments import Leaves
from implicitdiff.structured.writer import Written


@dataclass(frozen=True)
class Run:
    """An emitted backward pass, ready to be called.

    Attributes:
        function: the emitted function.
        sources: where each of its arguments is found: a group (u, lam, theta, v_u, v_lam, factorisations) and a place
            in it.
        places: for each theta its place among the results; -1 where the gradient is zero, None where not wanted.
    """

    function: Written
    sources: tuple[tuple[int, int], ...]
    places: tuple[int | None, ...]

    def call(self, given: tuple[tuple[Any, ...], ...]) -> tuple[Any, ...]:
        """The results for the leaves of a call."""
        out: tuple[Any, ...] = self.function.emitted.call(*[given[g][k] for g, k in self.sources])
        return out

    def gradients(self, out: Sequence[Any], theta: Leaves) -> tuple[Tensor | None, ...]:
        """One gradient per theta that wants one."""
        return tuple(
            None if place is None else _fitted(out[place], t) if place >= 0 else torch.zeros_like(t)
            for place, t in zip(self.places, theta, strict=True)
        )


def _fitted(gradient: Tensor, like: Tensor) -> Tensor:
    """A gradient in the shape and dtype of its tensor."""
    if gradient.shape != like.shape:
        gradient = gradient.reshape(like.shape)
    return gradient if gradient.dtype == like.dtype else gradient.to(like.dtype)
