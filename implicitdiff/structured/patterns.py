"""Where matrices have entries, read off their labels: no numbers are needed.

In: forms, or the terms of A. Out: `Pattern`s. Long axes are cut so that a page can show every cell: deltas and offsets
mean the same on a short axis. Used by `drawing.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from implicitdiff.derivatives.declared import Constrained, Declared
from implicitdiff.derivatives.jacobian import JacobianTerm
from implicitdiff.graph.build import Builder
from implicitdiff.graph.ir import Ref
from implicitdiff.graph.maps import start_and_step
from implicitdiff.structure.drawing import FULL, SPLIT, Pattern
from implicitdiff.structure.forms import Entry, Form
from implicitdiff.torch_private import HOST

CELLS = 36
"""Rows or columns of one block that are shown at most."""


def shown(sizes: Sequence[int]) -> tuple[int, ...]:
    """The axes of a block, cut so that about `CELLS` entries remain and no two axes become equal that were not."""
    if math.prod(sizes) <= CELLS:
        return tuple(sizes)
    out = [min(size, max(2, int(CELLS ** (1 / max(1, sum(s > 1 for s in sizes)))))) for size in sizes]
    for k in range(1, len(out)):
        if sizes[k] != sizes[k - 1] and out[k] == out[k - 1] and out[k] > 2:
            out[k - 1 if sizes[k] > sizes[k - 1] else k] -= 1
    return tuple(out)


def pattern_of_form(name: str, build: Builder, form: Form) -> Pattern:
    """The pattern of H or S, and the numbers that its parts take."""
    sizes = [shown(block) for block in form.space.sizes]
    rows = []
    for a, line in enumerate(form.grid):
        cells = [_entry(entry, sizes[a], sizes[b]) for b, entry in enumerate(line)]
        rows.append(torch.cat(cells, dim=1))
    parts: dict[str, int] = {}
    names = form.space.names
    for a, line in enumerate(form.grid):
        for b, entry in enumerate(line):
            if b >= a:  # the other half is its transposed
                block = f" [{names[a]}, {names[b]}]" if len(names) > 1 else ""
                for part, count in _parts(build, entry):
                    parts[part + block] = parts.get(part + block, 0) + count
    size = form.space.size
    blocks = tuple(tuple(map(_word, line)) for line in form.grid)
    return _pattern(name, (size, size), torch.cat(rows), sizes != list(form.space.sizes), parts, blocks)


def _word(entry: Entry) -> str:
    """The parts of one block: diagonal + low rank."""
    words = [
        ("diagonal", entry.diagonal is not None),
        ("blocks", bool(entry.partial)),
        ("band", bool(entry.bands)),
        ("low rank", bool(entry.low_rank)),
        ("full", bool(entry.dense)),
    ]
    return " + ".join(word for word, there in words if there) or "0"


def _entry(entry: Entry, rows: tuple[int, ...], columns: tuple[int, ...]) -> Tensor:
    """One block: the strongest statement of its parts for each cell."""
    cells = torch.zeros(math.prod(rows), math.prod(columns), dtype=torch.int64, device=HOST)
    if entry.low_rank:
        cells.fill_(SPLIT)
    if entry.dense:
        cells.fill_(FULL)
    if len(rows) == len(columns):
        for band in entry.tied(len(rows)):
            tied = torch.ones(1, 1, dtype=torch.int64, device=HOST)
            for offset, r, c in zip(band.offsets, rows, columns, strict=True):
                tied = torch.kron(tied, _axis(offset, r, c))
            cells = torch.maximum(cells, FULL * tied)
    return cells


def _axis(offset: int | None, rows: int, columns: int) -> Tensor:
    if offset is None:
        return torch.ones(rows, columns, dtype=torch.int64, device=HOST)
    at = torch.arange(columns, device=HOST)[None] - torch.arange(rows, device=HOST)[:, None]
    return (at == offset).to(torch.int64)


def _parts(build: Builder, entry: Entry) -> list[tuple[str, int]]:
    """(what is kept, numbers) of one block, for one sample."""

    def numbers(*refs: Ref) -> int:
        return sum(math.prod(build.labels.sizes[k] for k in ref.labels) for ref in refs)

    found = []
    if entry.diagonal is not None:
        found.append(("diagonal", numbers(entry.diagonal)))
    found += [("blocks", numbers(ref)) for _, ref in entry.partial]
    found += [("bands", numbers(band.value)) for band in entry.bands]
    for term in entry.low_rank:
        sides = (term.left,) if term.left.node is term.right.node else (term.left, term.right)
        found.append(("low-rank factor", numbers(*sides)))
        found.append(("low-rank weights", numbers(term.weights)))
    found += [("full", numbers(ref)) for ref in entry.dense]
    return found


def pattern_of_jacobian(declared: Declared) -> Pattern:
    """The pattern of A: one block row for each constraint, one block column for each variable."""
    build = declared.build
    rows, parts, blocks = [], {}, []
    cut = False
    for constraint in declared.constraints:
        terms = declared.jacobians.of(constraint.value)
        line, words = [], []
        for leaf in declared.variables:
            own = [term for term in terms if term.leaf.id == leaf.node.id]
            line.append(_block(build, constraint, own, leaf.sizes))
            words.append(_tie(constraint, own))
            cut = cut or shown(leaf.sizes) != tuple(leaf.sizes)
        count = sum(
            math.prod(build.labels.sizes[k] for k in t.coefficient.labels)
            for t in terms
            if build.as_number(t.coefficient) is None
        )
        parts[f"coefficients of {constraint.name}"] = count
        rows.append(torch.cat(line, dim=1))
        blocks.append(tuple(words))
    shape = (declared.constraint_space.size, declared.space.size)
    return _pattern("A", shape, torch.cat(rows), cut, parts, tuple(blocks))


def _tie(constraint: Constrained, terms: Sequence[JacobianTerm]) -> str:
    """How a constraint's axes meet those of a variable."""
    if not terms:
        return "0"
    tied = {sum(label in constraint.labels for label in term.columns) for term in terms}
    if tied == {0}:
        return "full rows" if constraint.labels else "one row"
    return "diagonal" if tied == {len(terms[0].columns)} else "tied rows"


def _block(
    build: Builder, constraint: Constrained, terms: Sequence[JacobianTerm], sizes: Sequence[int]
) -> Tensor:
    """Cells of one constraint against one variable; a label that both have is a delta, a place shifts it."""
    columns = shown(sizes)
    full = [build.labels.sizes[k] for k in constraint.labels]
    lengths = dict(zip(constraint.labels, shown(full), strict=True))
    for term in terms:
        for axis, (label, place) in enumerate(zip(term.columns, term.places, strict=True)):
            if label in lengths and place is None:
                lengths[label] = columns[axis]  # one axis for both sides: cut it once
    rows = [lengths[k] for k in constraint.labels]
    cells = torch.zeros((*rows, *columns), dtype=torch.int64, device=HOST)
    for term in terms:
        here = torch.full_like(cells, FULL)
        for axis, (label, place) in enumerate(zip(term.columns, term.places, strict=True)):
            start, step = start_and_step(place)
            at = _reach(len(rows) + axis, cells.dim(), columns[axis])
            if label in constraint.labels:
                row = _reach(constraint.labels.index(label), cells.dim(), lengths[label])
                here = here * (at == start % max(1, sizes[axis]) + step * row)
            elif place is not None:
                count = build.labels.sizes[label] if place[0] == "slice" else 1
                inside = (at >= start) & (at < start + step * count) & ((at - start) % step == 0)
                here = here * inside
        cells = torch.maximum(cells, here)
    return cells.reshape(math.prod(rows), math.prod(columns))


def _reach(axis: int, dims: int, size: int) -> Tensor:
    """0, 1, ... along one of `dims` axes."""
    shape = [1] * dims
    shape[axis] = size
    return torch.arange(size, device=HOST).reshape(shape)


def _pattern(
    name: str,
    shape: tuple[int, int],
    cells: Tensor,
    cut: bool,
    parts: dict[str, int],
    blocks: tuple[tuple[str, ...], ...],
) -> Pattern:
    listed = tuple(tuple(int(cell) for cell in row) for row in cells.tolist())
    kept = tuple((part, count) for part, count in parts.items() if count)
    return Pattern(name, shape, cut, listed, kept, blocks)
