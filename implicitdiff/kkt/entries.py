"""Sparse matrices in emitted code: which entries there are, their values, and K as one sparse matrix.

In: values with the places that labels, slices and index tensors name. Out: `operators.Sparse`, and `SparseKKT`, which
solves with it. A pattern is worked out once for equal index tensors. Next file: `symbolic.py`.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from implicitdiff import operators, solvers
from implicitdiff.derivatives.kkt import SymmetricKKT
from implicitdiff.kkt.indexed import counted_from_zero, places
from implicitdiff.operators.block import NullVectors
from implicitdiff.operators.sparse import Pattern
from implicitdiff.solvers.base import from_columns, to_columns
from implicitdiff.solvers.sparse_lu import LARGEST_DENSE
from implicitdiff.status import Status


@dataclass(frozen=True)
class Along:
    """Along an axis of `size` entries the place is start + step * (the entry number along dimension `dim`)."""

    size: int
    dim: int
    start: int = 0
    step: int = 1


@dataclass(frozen=True)
class At:
    """Along an axis of `size` entries the place is always the same."""

    size: int
    place: int


@dataclass(frozen=True)
class Pointed:
    """Along an axis of `size` entries the place is what an index tensor over the dimensions `dims` says (`places`).

    Attributes:
        index: ((B,) *dims).
        batched: whether it has the batch axis.
        how: the numbers that `places` takes; none where the entries are the places, the negative ones from the end.
    """

    size: int
    index: Tensor
    dims: tuple[int, ...]
    batched: int = 0
    how: tuple[int, ...] = ()


Axis = Along | At | Pointed


@dataclass(frozen=True)
class Term:
    """Entries of a sparse matrix: values (B or 1, *sizes), and for each axis of the rows and columns where they lie.

    Attributes:
        values: see above.
        rows, columns: the axes, outermost first.
        offset: where the blocks of the rows and of the columns begin.
    """

    values: Tensor
    rows: tuple[Axis, ...]
    columns: tuple[Axis, ...]
    offset: tuple[int, int] = (0, 0)


def sparse(size: int, *terms: Term) -> operators.Sparse:
    """The symmetric m x m matrix that the terms add up to; the pattern is worked out once for equal index tensors."""
    batch = max(t.values.shape[0] for t in terms)
    flat = [t.values.reshape(t.values.shape[0], -1).expand(batch, -1) for t in terms]
    values = flat[0] if len(flat) == 1 else torch.cat(flat, dim=1)
    axes = [a for t in terms for a in (*t.rows, *t.columns)]
    apart = max((a.index.shape[0] for a in axes if isinstance(a, Pointed) and a.batched), default=1)
    found = [_pattern(size, terms, b if apart > 1 else 0) for b in range(apart)]
    widest = max(len(pattern) for pattern, _ in found)
    out = values.new_zeros(max(batch, apart), widest + 1)
    for b, (_, slots) in enumerate(found):
        if apart == 1:
            out.index_add_(1, slots, values.expand(out.shape[0], -1))
        else:
            out[b].index_add_(0, slots, values[b if batch > 1 else 0])
    if apart > 1:
        for b, (pattern, _) in enumerate(found):
            out[b, len(pattern) :] = 0.0  # entries without a place
    return operators.Sparse(out[:, :widest], tuple(pattern for pattern, _ in found))


KEPT = 64
"""Patterns kept: those of the problems and graphs that a program works with at a time."""
_PATTERNS: OrderedDict[object, tuple[Pattern, Tensor]] = OrderedDict()
_LOCK = threading.Lock()


def _pattern(size: int, terms: Sequence[Term], sample: int) -> tuple[Pattern, Tensor]:
    """The pattern of one sample, and for every entry of the terms its slot (the last one: no place)."""
    device = terms[0].values.device
    key = (size, str(device), *(_described(t, sample) for t in terms))
    with _LOCK:
        if key in _PATTERNS:
            _PATTERNS.move_to_end(key)
            return _PATTERNS[key]
    rows: list[Tensor] = []
    columns: list[Tensor] = []
    for t in terms:
        shape = t.values.shape[1:]
        for out, axes, offset in ((rows, t.rows, t.offset[0]), (columns, t.columns, t.offset[1])):
            out.append(_places_of(axes, offset, shape, sample, device))
    made = Pattern.of(size, torch.cat(rows), torch.cat(columns))
    with _LOCK:
        _PATTERNS[key] = made
        while len(_PATTERNS) > KEPT:
            _PATTERNS.popitem(last=False)
    return made


def _described(term: Term, sample: int) -> object:
    """All that the places of a term depend on; index tensors by a digest of their entries."""

    def axis(a: Axis) -> object:
        if not isinstance(a, Pointed):
            return a
        index = a.index[sample if a.index.shape[0] > 1 else 0] if a.batched else a.index
        numbers = index.contiguous().numpy(force=True)
        digest = hashlib.blake2b(numbers.tobytes(), digest_size=16).digest()
        return (a.size, a.dims, a.how, tuple(index.shape), str(index.dtype), digest)

    shape = tuple(term.values.shape[1:])
    return (shape, tuple(map(axis, term.rows)), tuple(map(axis, term.columns)), term.offset)


def _places_of(
    axes: Sequence[Axis], offset: int, shape: Sequence[int], sample: int, device: torch.device
) -> Tensor:
    """The row (or column) of every entry, flat; -1 where an axis has no such place."""
    total = torch.zeros(tuple(shape), dtype=torch.int64, device=device)
    good = torch.ones(tuple(shape), dtype=torch.bool, device=device)
    for axis in axes:
        if isinstance(axis, At):
            total = total * axis.size + axis.place
            continue
        if isinstance(axis, Along):
            count = shape[axis.dim]
            place = axis.start + axis.step * torch.arange(count, device=device)
            place = place.reshape(-1, *(1,) * (len(shape) - axis.dim - 1))
        else:
            index = axis.index[sample if axis.index.shape[0] > 1 else 0] if axis.batched else axis.index
            index = index.to(torch.int64)
            plain = not axis.how
            place = counted_from_zero(index, axis.size) if plain else places(index, *axis.how)
            if plain and index.numel() and not bool(((place >= 0) & (place < axis.size)).all()):
                raise IndexError(f"an index tensor points outside of an axis of {axis.size} entries")
            order = [1] * len(shape)
            for d, count in zip(axis.dims, place.shape, strict=True):
                order[d] = count
            place = place.reshape(order)
        good = good & (place >= 0) & (place < axis.size)
        total = total * axis.size + place
    return torch.where(good, total + offset, -1).reshape(-1)


class SparseKKT:
    """K = [[H, -A'], [-A, 0]] as one sparse matrix.

    Where dependences between constraints are proved, K is bordered by their null vectors Z: [[K, Z], [Z', 0]] is
    regular, and its solution has Z's = 0, the one of minimum norm. Samples that are singular all the same are solved
    densely where they are small: constraints that depend on each other by their values, or a u that is not determined.

    Attributes:
        status: (B,) int8.
    """

    def __init__(
        self, operator: operators.Sparse, variables: int, null_vectors: NullVectors | tuple[Tensor, ...] = ()
    ) -> None:
        """Factors K; its first `variables` rows belong to u, `null_vectors` (p,) to the constraints."""
        self.size, self.variables = operator.size, variables
        null = [torch.as_tensor(z, device=operator.device).to(operator.dtype) for z in null_vectors]
        whole = _bordered(operator, variables, null) if null else operator
        self._border = len(null)
        self._factor = solvers.SparseLU().factor(whole)
        self.status = self._factor.status
        self._dense: SymmetricKKT | None = None
        singular = self.status == Status.SINGULAR
        if bool(singular.any()) and operator.size <= LARGEST_DENSE:
            self._bad = singular.nonzero()[:, 0]
            dense = operators.select_samples(operator, self._bad).to_dense().expand(len(self._bad), -1, -1)
            self._dense = SymmetricKKT(dense, variables)
            # the verdict is known after the first solve: one with zeros costs little at this size
            _, verdict = self._dense.solve(dense.new_ones(len(self._bad), operator.size, 1))
            self.status = self.status.index_copy(0, self._bad, verdict)

    def solve(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """(w, s) with H w - A's = a and -A w = b."""
        lead = torch.broadcast_shapes(a.shape[:-1], b.shape[:-1])
        rhs = torch.cat([a.expand(*lead, -1), b.expand(*lead, -1)], dim=-1)
        padded = torch.nn.functional.pad(rhs, (0, self._border)) if self._border else rhs
        found = self._factor.solve(padded)[..., : self.size]
        if self._dense is not None:
            own = rhs.expand(found.shape)[..., self._bad, :]
            columns = (
                to_columns(own, len(self._bad)) if len(self._bad) > 1 else own.reshape(1, -1, self.size).mT
            )
            mended, _ = self._dense.solve(columns)
            back = from_columns(mended, own.shape) if len(self._bad) > 1 else mended.mT.reshape(own.shape)
            found = found.index_copy(-2, self._bad, back) if self.status.shape[0] > 1 else back
        return found[..., : self.variables], found[..., self.variables :]


def _bordered(operator: operators.Sparse, variables: int, null: Sequence[Tensor]) -> operators.Sparse:
    """[[K, Z], [Z', 0]]; the patterns with the border are kept beside those without."""
    size = operator.size + len(null)
    rows = torch.cat([z.nonzero()[:, 0] for z in null]) + variables
    counts = torch.tensor([int(z.count_nonzero()) for z in null], device=rows.device)
    columns = torch.arange(len(null), device=rows.device).repeat_interleave(counts) + operator.size
    entries = torch.cat([z[z != 0] for z in null])
    patterns, values = [], []
    for b, pattern in enumerate(operator.patterns):
        known = pattern.derived.get("bordered")
        if known is None:
            known = Pattern.of(
                size,
                torch.cat([pattern.rows, rows, columns]),
                torch.cat([pattern.columns, columns, rows]),
            )
            pattern.derived["bordered"] = known
        patterns.append(known[0])
        own = operator.values if len(operator.patterns) == 1 else operator.values[b : b + 1]
        own = torch.cat(
            [own[:, : len(pattern)], entries.expand(own.shape[0], -1), entries.expand(own.shape[0], -1)], 1
        )
        values.append(torch.zeros_like(own).index_copy_(1, known[1], own))
    widest = max(v.shape[1] for v in values)
    padded = [torch.nn.functional.pad(v, (0, widest - v.shape[1])) for v in values]
    return operators.Sparse(torch.cat(padded), tuple(patterns))
