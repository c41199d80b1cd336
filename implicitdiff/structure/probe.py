"""The one-time test of a claimed structure: one product with K against automatic differentiation.

In: the two products at one sample, for one vector without structure. Out: whether they agree. It catches a wrong term
of H or A (a rule with a bug), not a badly conditioned one. Next file: `structured.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def direction(like: Tensor, seed: float) -> Tensor:
    """A fixed vector without structure of the shape of `like`: the same in every process, no generator is touched."""
    steps = torch.arange(like.numel(), dtype=torch.float64, device=like.device)
    return torch.cos(seed + 3.7 * (steps + 1.0) ** 1.1).to(like.dtype).reshape(like.shape)


def agree(claimed: Sequence[Tensor], reference: Sequence[Tensor]) -> bool:
    """Whether the products agree up to rounding; a reference that is not finite proves nothing and counts as agreement.

    The tolerance, eps^(1/3) of the largest entry, is far above rounding and far below a wrong term.
    """
    largest = max((float(r.abs().max()) for r in reference if r.numel()), default=0.0)
    if not all(bool(torch.isfinite(r).all()) for r in reference):
        return True
    tolerance = torch.finfo(reference[0].dtype).eps ** (1.0 / 3.0)
    difference = max(
        (float((c - r).abs().max()) for c, r in zip(claimed, reference, strict=True) if r.numel()),
        default=0.0,
    )
    return difference <= tolerance * max(largest, torch.finfo(reference[0].dtype).tiny)
