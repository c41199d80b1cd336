"""Diagnostics, plain text: tables and aligned reports of a given width, the same on every terminal.

In: cells and lines. Out: text without colour or markup, and CSV. Used by the reports of `explain`, `check` and
`compare`, and by the experiments. rich is imported where a text is made, so that importing the library stays quick.
"""

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from implicitdiff.errors import ImplicitDiffError

if TYPE_CHECKING:
    from rich.console import RenderableType

WIDTH = 110


def render(item: "RenderableType", width: int = WIDTH) -> str:
    """What rich makes of `item`, as plain text: no colour, no markup, no trailing blanks."""
    from rich.console import Console

    sink = io.StringIO()
    options = {
        "color_system": None,
        "force_terminal": False,
        "markup": False,
        "highlight": False,
        "emoji": False,
    }
    Console(file=sink, width=width, legacy_windows=False, **options).print(item)  # type: ignore[arg-type]
    return "\n".join(line.rstrip() for line in sink.getvalue().splitlines())


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = (), width: int = WIDTH
) -> str:
    """A table with one line under its header; the columns named in `right` are set flush right."""
    from rich import box
    from rich.table import Table

    gap = (0, 1) if width >= WIDTH else (0, 1, 0, 0)
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=gap, show_edge=False)
    for name in header:
        number = name in right
        grid.add_column(name, justify="right" if number else "left", no_wrap=number, overflow="fold")
    for row in rows:
        grid.add_row(*row)
    return render(grid, width)


def pairs(lines: Sequence[tuple[str, str]], width: int = WIDTH) -> str:
    """Label and text in two columns; long texts wrap inside theirs. An equal label is written once."""
    from rich.table import Table

    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    previous = None
    for label, text in lines:
        grid.add_row("" if label == previous else label, text)
        previous = label
    return render(grid, width)


def number(value: float | None, digits: int = 2) -> str:
    """A float in few characters; a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}g}"


def seconds(value: float | None) -> str:
    """A time for people: 12 us, 3.4 ms, 1.2 s."""
    if value is None:
        return "-"
    for unit, factor in (("us", 1e6), ("ms", 1e3)):
        if value * factor < 1000:
            return f"{value * factor:.3g} {unit}"
    return f"{value:.3g} s"


def require_matplotlib(what: str) -> None:
    """Raise a clear error where matplotlib, an optional dependency, is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as missing:
        raise ImplicitDiffError(
            f"{what} needs matplotlib, which is not installed: pip install matplotlib, or implicitdiff[plot]"
        ) from missing


def write_csv(path: Path, rows: Sequence[Any], kind: type) -> None:
    """Frozen dataclasses as comma-separated values, one column per field of `kind`; None is an empty cell."""
    names = [field.name for field in fields(kind)]
    with path.open("w", newline="", encoding="utf-8") as sink:
        writer = csv.writer(sink, lineterminator="\n")
        writer.writerow(names)
        for row in rows:
            cells = [getattr(row, name) for name in names]
            writer.writerow(
                ["" if cell is None else repr(cell) if isinstance(cell, float) else cell for cell in cells]
            )


def first_sentence(documented: object) -> str:
    """The first sentence of a docstring on one line, without its full stop; "" without a docstring."""
    paragraph = (getattr(documented, "__doc__", None) or "").strip().partition("\n\n")[0]
    return re.split(r"(?<!s\.t)\.\s", " ".join(paragraph.split()) + " ", maxsplit=1)[0].strip()
