"""A form over several blocks as an `operators.Block`: diagonal corners stay diagonal, so that they can be eliminated.

In: the form of S over several constraints, or of H over several variables. Out: the ref of the operator, or its
shapes for the cost model. Next file: `symbolic.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from implicitdiff import operators
from implicitdiff.graph.build import Builder
from implicitdiff.graph.calls import call
from implicitdiff.graph.ir import BATCHED, Label, Ref
from implicitdiff.kkt import lowering
from implicitdiff.structure.forms import Entry, Form, Space

Arguments = list[tuple[Ref, Sequence[Label], int]]


def grid_operator(build: Builder, form: Form, *, null_vectors: bool = False) -> Ref:
    """The operator; only the couplings above the diagonal are computed, those below are their transposes."""
    space = form.space
    count = len(space.names)
    args: Arguments = []
    cells: list[list[str]] = [["None"] * count for _ in range(count)]
    for i in range(count):
        for j in range(i, count):
            text = grid_cell(build, form.grid[i][j], i, j, space, args)
            if text is not None:
                cells[i][j] = text
                if i != j:
                    cells[j][i] = f"{text}.mT"
    grid = ", ".join(f"({', '.join(row)},)" for row in cells)
    sizes = tuple(space.entries(k) for k in range(count))
    null = ", null_vectors=null_vectors" if null_vectors else ""
    return call(build, f"operators.Block(({grid},), {sizes}{null})", args, (), BATCHED)


def grid_cell(build: Builder, entry: Entry, i: int, j: int, space: Space, args: Arguments) -> str | None:
    """Template of one block; its arguments are appended to `args`."""
    if entry.empty and i != j:
        return None
    if i == j and entry.is_diagonal:
        text = lowering.renumbered(
            f"operators.Diagonal({lowering.flat_text([space.sizes[i]])})", 1, len(args)
        )
        assert entry.diagonal is not None
        args.append((entry.diagonal, space.rows[i], BATCHED))
        return text
    text, own = lowering.dense_block(
        build, entry, space.rows[i], space.columns[j], (space.entries(i), space.entries(j))
    )
    text = lowering.renumbered(text, len(own), len(args))
    args.extend(own)
    return f"operators.Dense({text})" if i == j else text


def meta_grid(form: Form, dtype: torch.dtype) -> operators.Block:
    """The operator by its shapes: what the cost model looks at."""
    number = range(len(form.space.names))
    sizes = tuple(form.space.entries(k) for k in number)

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(1, *shape, dtype=dtype, device="meta")

    def cell(i: int, j: int) -> operators.LinearOperator | torch.Tensor | None:
        entry = form.grid[i][j]
        if i == j:
            if entry.is_diagonal:
                return operators.Diagonal(empty(sizes[i]))
            return operators.Dense(empty(sizes[i], sizes[i]))
        return None if entry.empty else empty(sizes[i], sizes[j])

    return operators.Block(tuple(tuple(cell(i, j) for j in number) for i in number), sizes)
