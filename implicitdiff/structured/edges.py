"""Entries of u that underflowed to the edge of the domain: u log u at 0.

In: what an emitted function gave there. Out: whether it has to run again, and the point to run it at. Next: `plan.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from implicitdiff.structured.arguments import Leaves
from implicitdiff.structured.writer import Written


def lost(function: Written, out: Sequence[Any], u: Leaves) -> bool:
    """Whether a small gradient is not finite: u log u at an entry of u that underflowed to 0, most likely.

    The large gradients are not read again: they have the pattern of w, which is 0 there.
    """
    for name, value in zip(function.emitted.results, out, strict=True):
        small = name in function.fragile and value.is_floating_point() and value.numel() < u[0].numel()
        # a sum that overflows costs a second run, nothing else
        if small and not math.isfinite(float(value.sum())):
            return True
    return False


def off_zero(u: Leaves) -> Leaves:
    """u with its zeros at the smallest normal number: such entries carry no gradient, and their logarithm is finite."""
    return tuple(torch.where(t == 0.0, torch.finfo(t.dtype).tiny, t) for t in u)
