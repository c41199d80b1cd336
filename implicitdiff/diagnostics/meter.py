"""Diagnostics, the meter: what a callable does to memory and arithmetic, counted operation by operation.

In: any callable. Out: its result and a frozen `Measurement` (bytes, FLOPs, operations, peak, largest tensor).
It sees every aten operation that torch dispatches, on any device, on meta and fake tensors, and inside
autograd's backward. Used by `explain`, `check`, `compare`, tests and benchmarks; one operation is in
`flops.py` and `traffic.py`.
"""

import functools
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from implicitdiff.diagnostics.flops import base_name, count_flops
from implicitdiff.diagnostics.traffic import (
    bytes_read,
    bytes_written,
    mutated,
    parts,
    storage_bytes,
    stored,
    tensors_in,
)
from implicitdiff.torch_private import TorchDispatchMode, storage_key

T = TypeVar("T")


@dataclass(frozen=True)
class OperationTotal:
    """What all calls of one aten operation cost together."""

    name: str
    count: int
    flops: int
    bytes: int


@dataclass(frozen=True)
class Measurement:
    """What one call did.

    Attributes:
        bytes_read: Bytes the operations read: each distinct tensor argument of an operation once, at the size
            it has in storage (an expanded axis counts as one entry). Gathers read what they return; in-place
            updates through an index touch the addressed entries only.
        bytes_written: Bytes the operations wrote: their fresh results and the arguments they change in place.
        flops: Floating point operations (`flops.count_flops`).
        operations: Operations that compute or move data.
        views: Operations that do neither: views, metadata, allocation without a fill.
        peak: Largest number of bytes alive at once, of storages allocated during the call. What existed
            before (inputs, saved tensors) does not count; a view keeps its storage alive. Workspace inside a
            kernel is invisible, so this is a lower bound of the allocator's peak.
        peak_operation: The operation at which the peak was reached ('' when nothing was allocated).
        retained: Bytes allocated during the call and still alive at its end: its result, what autograd saved.
        largest: Entries of the largest storage allocated during the call.
        largest_operation: The operation that made it.
        by_operation: Totals per aten operation, most bytes first.
        unknown: Operations without a FLOP rule, counted as one per entry of their result.
    """

    bytes_read: int
    bytes_written: int
    flops: int
    operations: int
    views: int
    peak: int
    peak_operation: str
    retained: int
    largest: int
    largest_operation: str
    by_operation: tuple[OperationTotal, ...]
    unknown: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """Bytes moved: read and written together."""
        return self.bytes_read + self.bytes_written

    def __str__(self) -> str:
        moved = f"{format_bytes(self.bytes)} moved"
        moved += f" ({format_bytes(self.bytes_read)} read, {format_bytes(self.bytes_written)} written)"
        peak = f"peak {format_bytes(self.peak)}"
        largest = f"largest tensor {self.largest:,} entries"
        if self.peak_operation:
            peak += f" at {self.peak_operation}"
            largest += f" by {self.largest_operation}"
        counts = f"{self.operations} operations and {self.views} views, {self.flops:,} FLOPs"
        return f"{counts}, {moved}, {peak}, {largest}"


def measure(fn: Callable[..., T], *args: Any) -> tuple[T, Measurement]:
    """Call `fn(*args)` once and count what it does.

    Counted is what the calling thread dispatches, autograd's backward on the CPU included. A custom operator
    counts as one operation (its arguments read, its results written), whatever happens inside; so does a
    compiled region.

    Cost: the call itself plus tens of microseconds for each operation; never time a call that is being
        measured.

    Args:
        fn: Any callable; autograd's backward and torch.func transforms inside it are counted.
        args: Its arguments. Their storages, and all that exists before the call, are outside the peak.

    Returns:
        The result of the call, and its Measurement.
    """
    with Meter() as meter:
        result = fn(*args)
        measurement = meter.measurement()
    return result, measurement


class Meter(TorchDispatchMode):
    """The counting context behind `measure`; `measurement()` may be read inside it or after it."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.RLock()
        self._live: dict[int, int] = {}
        self._references: dict[int, weakref.ref[Any]] = {}
        self._live_bytes = 0
        self._peak, self._peak_operation = 0, ""
        self._largest, self._largest_operation = 0, ""
        self._read = self._written = self._flops = self._operations = self._views = 0
        self._totals: dict[str, list[int]] = {}
        self._unknown: set[str] = set()

    def measurement(self) -> Measurement:
        """What was counted so far; `retained` is what is alive now."""
        with self._lock:
            totals = (OperationTotal(name, *counts) for name, counts in self._totals.items())
            return Measurement(
                bytes_read=self._read,
                bytes_written=self._written,
                flops=self._flops,
                operations=self._operations,
                views=self._views,
                peak=self._peak,
                peak_operation=self._peak_operation,
                retained=self._live_bytes,
                largest=self._largest,
                largest_operation=self._largest_operation,
                by_operation=tuple(sorted(totals, key=lambda total: (-total.bytes, total.name))),
                unknown=tuple(sorted(self._unknown)),
            )

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func.namespace == "prim":
            # Questions about a tensor (its device), asked through the dispatcher by fake tensors only.
            return func(*args, **kwargs)
        # In inference mode composite operations (matmul, einsum) arrive whole: count their parts.
        with self:
            decomposed = func.decompose(*args, **kwargs)
        if decomposed is not NotImplemented:
            return decomposed
        # Bound before the call: afterwards an in-place resize would have changed the sizes.
        reads = bytes_read(func, args, kwargs)
        known = {storage_key(tensor) for tensor in tensors_in((args, kwargs)) if stored(tensor)}
        result = func(*args, **kwargs)
        with self._lock:
            self._count(func, args, kwargs, result, reads, known)
        return result

    def _count(
        self,
        func: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        result: Any,
        reads: int,
        known: set[int],
    ) -> None:
        name = str(func).removeprefix("aten.").removesuffix(".default")
        outputs = list(tensors_in(result))
        changed = list(mutated(func, args, kwargs))
        if func is torch.ops.aten.lift_fresh.default:
            # torch.tensor(...) fills its storage from Python numbers before the dispatcher sees it.
            known, reads = set(), 0
        fresh = [tensor for tensor in outputs if not stored(tensor) or storage_key(tensor) not in known]
        for tensor in fresh + changed:
            self._track(tensor, name, fresh=not any(tensor is other for other in changed))
        if base_name(func) in _ALLOCATIONS or not (fresh or changed or base_name(func) in _READERS):
            self._views += 1
            return
        written = sum(storage_bytes(tensor) for tensor in fresh) + bytes_written(func, args, kwargs, changed)
        flops = count_flops(func, args, kwargs, outputs or changed)
        if flops is None:
            self._unknown.add(name)
            flops = max((tensor.numel() for tensor in outputs), default=0)
        self._read += reads
        self._written += written
        self._flops += flops
        self._operations += 1
        total = self._totals.setdefault(name, [0, 0, 0])
        for position, amount in enumerate((1, flops, reads + written)):
            total[position] += amount

    def _track(self, tensor: torch.Tensor, name: str, fresh: bool) -> None:
        """Enter a fresh storage into the live set, or follow the new size of one that was resized."""
        for part in parts(tensor):
            storage, key = part.untyped_storage(), storage_key(part)
            size = int(storage.nbytes())
            if key in self._live:
                self._live_bytes += size - self._live[key]
                self._live[key] = size
            elif fresh:
                self._live[key] = size
                self._live_bytes += size
                # The Python object of a storage lives as long as the storage, saved tensors and views
                # included.
                self._references[key] = weakref.ref(storage, functools.partial(self._freed, key))
            else:
                continue
            entries = size // part.element_size()
            if entries > self._largest:
                self._largest, self._largest_operation = entries, name
        if self._live_bytes > self._peak:
            self._peak, self._peak_operation = self._live_bytes, name

    def _freed(self, key: int, _: object) -> None:
        with self._lock:
            self._live_bytes -= self._live.pop(key)
            del self._references[key]


def format_bytes(count: int) -> str:
    """A byte count for people, in decimal units: 512 B, 33.0 KB, 8.2 MB."""
    if count < 1000:
        return f"{count} B"
    amount, unit = count / 1000, "KB"
    for larger in ("MB", "GB"):
        if amount >= 999.95:
            amount, unit = amount / 1000, larger
    return f"{amount:.1f} {unit}"


_ALLOCATIONS = frozenset(
    "empty empty_like empty_strided new_empty new_empty_strided _efficientzerotensor resize set".split()
)
_READERS = frozenset("_local_scalar_dense equal is_nonzero _linalg_check_errors _assert_async".split())
