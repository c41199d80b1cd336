"""Diagnostics, pictures: the pattern of the matrices of a problem, and the rows of a comparison.

In: reports and rows. Out: matplotlib Figures, drawn without pyplot and without a display. Imported only when
a picture is asked for, since matplotlib is optional. Used by `explain.py` and `compare.py`.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from implicitdiff.diagnostics.contest import Row
from implicitdiff.diagnostics.style import house_style, log_scale, looks, new_figure
from implicitdiff.errors import ImplicitDiffError
from implicitdiff.structure.report import MatrixReport

_CELLS = 24  # a scheme is drawn with at most this many rows and columns
_BLOCKS = 4


def plot_structure(problem: str, matrices: Sequence[tuple[str, MatrixReport]]) -> Figure:
    """One panel for each matrix: the pattern that its kind implies, 2 full, 1 of low rank, 0 empty."""
    figure = Figure(figsize=(3.6 * len(matrices), 3.9), layout="constrained")
    figure.suptitle(f"{problem}: proved structure (scheme, not values)")
    for axes, (name, found) in zip(_panels(figure, len(matrices)), matrices, strict=True):
        axes.imshow(pattern(found), cmap="Blues", vmin=0, vmax=2, interpolation="nearest")
        axes.set_title(f"{name}: {found.kind}\n{found.shape[0]} x {found.shape[1]}", fontsize=10)
        axes.set_xticks([])
        axes.set_yticks([])
    return figure


def pattern(found: MatrixReport) -> list[list[int]]:
    """The scheme of a kind: 2 where entries are, 1 where they are sums of few products, 0 for none."""
    rows, columns = (min(size, _CELLS) for size in found.shape)
    return [[_cell(found.kind, i, j, rows, columns) for j in range(columns)] for i in range(rows)]


def _cell(kind: str, i: int, j: int, rows: int, columns: int) -> int:
    # Rectangular matrices: their diagonal runs from corner to corner.
    on_diagonal = i * columns // rows <= j < max((i + 1) * columns // rows, i * columns // rows + 1)
    match kind:
        case "zero":
            return 0
        case "scaled-identity" | "diagonal":
            return 2 * on_diagonal
        case "banded":
            return 2 * (abs(i * columns // rows - j) <= 1)
        case "block-diagonal":
            return 2 * (_BLOCKS * i // rows == _BLOCKS * j // columns)
        case "low-rank-plus-diagonal":
            return 2 if on_diagonal else 1
        case "block":
            return 2 if on_diagonal or (2 * i // rows) != (2 * j // columns) else 0
        case _:
            return 2


def plot_comparison(problem: str, rows: Sequence[Row]) -> Figure:
    """Time, peak and error, one below the other: dots for one setting, lines over the first name of a sweep."""
    measures = (("seconds", "time (s)"), ("peak", "peak memory (bytes)"), ("error", "error (relative)"))
    ran = [row for row in rows if row.seconds is not None]
    swept = any(row.setting for row in rows)
    names = list(dict.fromkeys(row.backward for row in ran))
    with house_style():
        figure = new_figure(11.0 if swept else 3.0 + 1.2 * max(len(names), 1) + 0.6)
        figure.suptitle(f"{problem}: backward passes")
        panels = figure.subplots(len(measures), 1, sharex=swept)
        for axes, (field, label) in zip(panels, measures, strict=True):
            positive = any((getattr(row, field) or 0) > 0 for row in ran)
            if swept:
                _lines(axes, ran, field)
                axes.set_ylabel(label)
                if positive:
                    log_scale(axes.yaxis)
            else:
                _dots(axes, ran, field)
                axes.set_xlabel(label)
                if positive:
                    log_scale(axes.xaxis)
        if swept and ran:
            panels[-1].set_xlabel(f"{ran[0].setting[0][0]} (size)")
            handles, labels = panels[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure


def write(figure: Figure, path: Path) -> None:
    """Write the figure in the format that the name ends in.

    Raises:
        ImplicitDiffError: matplotlib does not know the format.
    """
    known = figure.canvas.get_supported_filetypes()
    kind = path.suffix.removeprefix(".").lower()
    if kind not in known:
        raise ImplicitDiffError(
            f"cannot write a figure as {path.name!r}: let the name end in .svg, .pdf or .png (matplotlib knows "
            f"{', '.join(sorted(known))})"
        )
    with house_style():
        figure.savefig(path)


def _dots(axes: Any, rows: Sequence[Row], field: str) -> None:
    for place, (row, look) in enumerate(zip(rows, looks(), strict=False)):
        axes.plot([getattr(row, field) or math.nan], [place], linestyle="", **look)
    axes.set_yticks(range(len(rows)), [row.backward for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)


def _lines(axes: Any, rows: Sequence[Row], field: str) -> None:
    # The first name of a sweep is the axis; every combination of the others has a line of its own.
    keys = dict.fromkeys((row.backward, row.setting[1:]) for row in rows)
    for key, look in zip(keys, looks(), strict=False):
        points = [row for row in rows if (row.backward, row.setting[1:]) == key]
        label = ", ".join([key[0], *(f"{name} = {value}" for name, value in key[1])])
        places = [row.setting[0][1] for row in points]
        axes.plot(places, [getattr(row, field) or math.nan for row in points], label=label, **look)
    numbers = [row.setting[0][1] for row in rows]
    if all(isinstance(value, int | float) and value > 0 for value in numbers):
        log_scale(axes.xaxis, numbers)


def _panels(figure: Figure, count: int) -> Sequence[Any]:
    grid = figure.subplots(1, max(count, 1), squeeze=False)
    return list(grid[0])
