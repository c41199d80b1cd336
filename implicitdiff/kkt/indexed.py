"""What emitted code calls where index tensors are: gathers, scatters, one-hot matrices.

In: values and places. Out: tensors. A tensor has 0, 1 or 2 leading axes (`lead`): none, (batch), or
(right-hand sides, batch); index tensors have none or (batch), which is what `batched` says. Next file: `entries.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def counted_from_zero(index: Tensor, length: int) -> Tensor:
    """The entries of an index tensor with the negative ones counted from the end."""
    return torch.where(index < 0, index + length, index)


def places(index: Tensor, length: int, divisor: int, part: int, start: int, step: int) -> Tensor:
    """start + step ((i // divisor) mod part): where entries point along one of several merged axes, or in a slice."""
    index = counted_from_zero(index, length)
    return start + step * (index.div(divisor, rounding_mode="floor") % part)


def one_hot(places_: Tensor, size: int, like: Tensor) -> Tensor:
    """(..., size) with 1 at the place of each entry; an entry whose place is outside has none."""
    places_ = places_[..., None]
    return (places_ == torch.arange(size, device=like.device)).to(like.dtype)


def inside(places_: Tensor, size: int, like: Tensor) -> Tensor:
    """1 where a place is one of 0 to size - 1, else 0."""
    return ((places_ >= 0) & (places_ < size)).to(like.dtype)


def take(values: Tensor, lead: int, dims: Sequence[int], where: Sequence[Tensor], batched: int) -> Tensor:
    """values[..., where, ...]: the axes `dims` (counted after the leading ones) replaced by those of the places.

    Args:
        values: (*lead, ...).
        lead: how many leading axes it has.
        dims: the axes that are pointed into.
        where: for each of them the places, ((B,) *index) with all index axes, 1 where constant.
        batched: whether the places have the batch axis.

    Returns:
        (*lead, *index, ...): the index axes come first.
    """
    moved = values.movedim([lead + d for d in dims], list(range(lead, lead + len(dims))))
    if not batched:
        return moved[(slice(None),) * lead + tuple(where)]
    if lead == 0:
        return moved[tuple(where)]
    samples = torch.arange(moved.shape[lead - 1], device=values.device)
    samples = samples.reshape(-1, *(1,) * (where[0].dim() - 1))
    return moved[(slice(None),) * (lead - 1) + (samples, *where)]


def scatter(
    values: Tensor,
    lead: int,
    where: Sequence[Tensor],
    batched: int,
    index: Sequence[int],
    sizes: Sequence[int],
    rest: int,
) -> Tensor:
    """Values added up at their places: (*lead, *sizes, *rest); an entry whose place is outside is left out.

    Args:
        values: (*lead, *index, *rest), broadcast; an index axis may be 1.
        lead: how many leading axes it has.
        where: the places along each of the axes `sizes`, ((B,) *index), broadcast.
        batched: whether the places have the batch axis.
        index: the sizes of the index axes.
        sizes: the sizes of the axes pointed into.
        rest: how many axes follow the index axes.
    """
    values = _with_axes(values, lead, len(index), rest)
    shape = values.shape[len(values.shape) - rest :]
    values = values.expand(*values.shape[:lead], *index, *shape)
    count, total = math.prod(index), math.prod(sizes)
    slots = _slots(where, sizes, index, batched)
    values = values.reshape(*values.shape[:lead], count, *shape)
    if not batched:
        out = values.new_zeros(*values.shape[:lead], total + 1, *shape)
        out.index_add_(lead, slots, values)
    elif lead < 2:
        out = _scatter_each(values if lead else values[None], slots, total)
    else:
        # the right-hand sides are further trailing axes
        out = _scatter_each(values.movedim(0, -1), slots, total).movedim(-1, 0)
    lead = max(lead, batched)
    return out.narrow(lead, 0, total).unflatten(lead, tuple(sizes))


def _with_axes(values: Tensor, lead: int, index: int, rest: int) -> Tensor:
    """Missing index axes in front (a value without leading axes may lack them) as axes of size 1."""
    missing = lead + index + rest - values.dim()
    return values.reshape(*values.shape[:lead], *(1,) * missing, *values.shape[lead:])


def _slots(where: Sequence[Tensor], sizes: Sequence[int], index: Sequence[int], batched: int) -> Tensor:
    """The place of every entry in the joined axes, flat over the index axes; the last slot is outside."""
    flat: Tensor | int = 0
    good: Tensor | None = None
    for places_, size in zip(where, sizes, strict=True):
        flat = flat * size + places_
        on_axis = (places_ >= 0) & (places_ < size)
        good = on_axis if good is None else good & on_axis
    assert isinstance(flat, Tensor)
    assert good is not None
    flat = torch.where(good, flat, math.prod(sizes))
    lead = flat.shape[:batched]
    return flat.expand(*lead, *index).reshape(*lead, -1)


def _scatter_each(values: Tensor, slots: Tensor, total: int) -> Tensor:
    """(B, total + 1, ...) from values (B or 1, N, ...) and slots (B, N)."""
    batch = slots.shape[0]
    values = values.expand(batch, *values.shape[1:])
    out = values.new_zeros(batch * (total + 1), *values.shape[2:])
    offsets = torch.arange(batch, device=slots.device)[:, None] * (total + 1)
    out.index_add_(0, (slots + offsets).reshape(-1), values.flatten(0, 1))
    return out.unflatten(0, (batch, total + 1))
