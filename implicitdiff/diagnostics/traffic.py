"""Diagnostics, the memory traffic of one aten operation: which bytes it reads and which it writes.

In: an aten overload and its arguments (shapes, strides and storages only; no data is read). Out: byte counts.
Next file: `meter.py`, which calls this for every operation of a running program.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from implicitdiff.diagnostics.flops import argument, base_name
from implicitdiff.torch_private import has_storage, pytree, schema_of, sparse_parts, storage_key


def storage_bytes(tensor: torch.Tensor) -> int:
    """Bytes of the distinct entries that a tensor addresses.

    An expanded (stride-0) axis counts as one entry, overlapping windows at most as their span.
    """
    total = 0
    for part in parts(tensor):
        if part.numel() == 0:
            continue
        entries = span = 1
        for size, stride in zip(part.shape, part.stride(), strict=True):
            entries *= int(size) if stride != 0 else 1
            span += (int(size) - 1) * abs(int(stride))
        total += min(entries, span) * part.element_size()
    return total


def parts(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The strided tensors that hold the data: the tensor itself, or the members of a sparse one."""
    if tensor.layout == torch.strided:
        return (tensor,) if stored(tensor) else ()
    if tensor.layout == torch.sparse_coo:
        return sparse_parts(tensor)
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return (tensor.crow_indices(), tensor.col_indices(), tensor.values())
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return (tensor.ccol_indices(), tensor.row_indices(), tensor.values())
    return ()


def stored(tensor: torch.Tensor) -> bool:
    return tensor.layout == torch.strided and has_storage(tensor)


def tensors_in(tree: object) -> Iterator[torch.Tensor]:
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, torch.Tensor):
            yield leaf


def mutated(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    """The arguments that the operation changes, by its schema; t_ and squeeze_ change metadata only."""
    if torch.Tag.inplace_view in func.tags:
        return
    for position, declared in enumerate(schema_of(func).arguments):
        if _is_write(declared):
            value = args[position] if position < len(args) else kwargs.get(declared.name)
            yield from tensors_in(value)


def bytes_read(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Bytes the operation reads; the same view passed twice is read once."""
    name = base_name(func)
    unread: set[int] = set()
    for position, declared in enumerate(schema_of(func).arguments):
        value = args[position] if position < len(args) else kwargs.get(declared.name)
        # An out= variant only writes its result, and so do the in-place operations that replace everything.
        skipped = _is_write(declared) and (declared.kwarg_only or name in _OVERWRITING)
        skipped = skipped or (name in _BETA and position == 0 and argument(func, args, kwargs, "beta") == 0)
        skipped = skipped or (position == 0 and (name in _GATHERS or _is_scatter(func)))
        if skipped:
            unread.update(id(tensor) for tensor in tensors_in(value))
    distinct = {
        (storage_key(part), part.storage_offset(), tuple(part.shape), part.stride()): part
        for tensor in tensors_in((args, kwargs))
        if id(tensor) not in unread
        for part in parts(tensor)
    }
    total = sum(storage_bytes(part) for part in distinct.values())
    if name in _GATHERS:
        total += _gathered(func, name, args, kwargs)
    elif _is_scatter(func) and _accumulates(func, args, kwargs):
        total += _scattered(func, args, kwargs)
    return total


def bytes_written(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], changed: Iterable[torch.Tensor]
) -> int:
    """Bytes written into `changed`, the arguments that the operation changes; fresh results are extra."""
    if _is_scatter(func):
        return _scattered(func, args, kwargs)
    return sum(storage_bytes(tensor) for tensor in changed)


def _is_write(declared: Any) -> bool:
    return declared.alias_info is not None and declared.alias_info.is_write


def _is_scatter(func: Any) -> bool:
    """An in-place update through an index: it touches the addressed entries of its first argument only."""
    return base_name(func) in _SCATTERS and _is_write(schema_of(func).arguments[0])


def _accumulates(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    adds = base_name(func) in ("index_add", "scatter_add", "scatter_reduce")
    return adds or bool(argument(func, args, kwargs, "accumulate"))


def _scattered(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Bytes of the entries an index update addresses: one per value, at most the whole target."""
    target = args[0]
    if base_name(func) in ("index_put", "_index_put_impl", "index_fill"):
        # Here the value broadcasts against the index, so the addressed entries are counted at the index.
        entries = _addressed(func, args, kwargs)
    else:
        source = argument(func, args, kwargs, "source")
        source = argument(func, args, kwargs, "src") if source is None else source
        index = argument(func, args, kwargs, "index")
        # scatter takes the entries of the index, of which there may be fewer than of the source.
        sizes = [t.numel() for t in (source, index) if isinstance(t, torch.Tensor)]
        entries = sizes[0] if base_name(func) in ("index_add", "index_copy") else min(sizes)
    return min(entries * target.element_size(), storage_bytes(target))


def _gathered(func: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Bytes a gather takes from its source: one entry per entry of the result, at most the whole source."""
    source = args[0]
    if name in ("gather", "take"):
        index = argument(func, args, kwargs, "index")
        entries = index.numel() if isinstance(index, torch.Tensor) else 0
    elif name == "index_select":
        entries = _slices(source, args[1], args[2])
    elif name == "embedding":
        entries = args[1].numel() * source.shape[-1]
    else:
        entries = _addressed(func, args, kwargs)
    return min(int(entries) * source.element_size(), storage_bytes(source))


def _addressed(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Entries of the first argument that `index`, `index_put` or `index_fill` addresses, from the shapes."""
    target = args[0]
    if base_name(func) == "index_fill":
        return _slices(target, args[1], args[2])
    indices = [index for index in args[1] if index is not None]
    if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
        # How many entries a mask selects is data; the whole target is the bound that shapes give.
        return int(target.numel())
    shape = torch.broadcast_shapes(*(index.shape for index in indices))
    kept = [size for axis, size in enumerate(target.shape) if axis >= len(args[1]) or args[1][axis] is None]
    return torch.Size(kept).numel() * shape.numel()


def _slices(tensor: torch.Tensor, axis: int, index: torch.Tensor) -> int:
    """Entries of `tensor` in the slices `index` along `axis`, counted once for each time they are named."""
    return tensor.numel() // max(int(tensor.shape[axis]), 1) * index.numel() if tensor.dim() else 1


_OVERWRITING = frozenset(
    "zero fill copy normal uniform random exponential bernoulli log_normal geometric cauchy".split()
)
_BETA = frozenset("addmm baddbmm addmv addbmm addr".split())
_GATHERS = frozenset("gather take index_select index _unsafe_index embedding".split())
_SCATTERS = frozenset(
    "index_put _index_put_impl index_add index_copy index_fill scatter scatter_add scatter_reduce".split()
)
