"""Leaves side by side as one vector, and back: the only place that knows the layout of joined variables and
constraints.

In: tuples of leaves (..., *shape). Out: tensors (..., total), and the way back. Next: `derivatives/autodiff.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Shapes = Sequence[tuple[int, ...]]


def sizes(shapes: Shapes) -> list[int]:
    """The number of entries of each leaf of one sample."""
    return [math.prod(shape) for shape in shapes]


def join(leaves: Sequence[Tensor], lead: int) -> Tensor:
    """Leaves with `lead` leading axes in common, (*lead, *shape), as one tensor (*lead, total)."""
    parts = [leaf.reshape(*leaf.shape[:lead], math.prod(leaf.shape[lead:])) for leaf in leaves]
    return torch.cat(parts, dim=lead) if len(parts) > 1 else parts[0]


def split(flat: Tensor, shapes: Shapes) -> tuple[Tensor, ...]:
    """The inverse of `join`: (*lead, total) as leaves (*lead, *shape)."""
    parts = torch.split(flat, sizes(shapes), dim=-1) if len(shapes) else ()
    return tuple(part.reshape(*flat.shape[:-1], *shape) for part, shape in zip(parts, shapes, strict=True))


def basis(shapes: Shapes, start: int, stop: int, batch: int, like: Tensor) -> tuple[Tensor, ...]:
    """The unit vectors start..stop of the joined space as leaves (stop - start, B, *shape), for all samples."""
    unit = torch.zeros(stop - start, sum(sizes(shapes)), dtype=like.dtype, device=like.device)
    unit.diagonal(start).fill_(1.0)
    return split(unit[:, None, :].expand(-1, batch, -1), shapes)
