"""Diagnostics, plain text: tables and aligned reports of a fixed width, the same on every terminal.

In: cells and lines. Out: text without colour or markup. Used by the reports of `explain`, `check` and
`compare`.
"""

import io
from collections.abc import Sequence

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table

from implicitdiff.errors import ImplicitDiffError

WIDTH = 110


def render(item: RenderableType, width: int = WIDTH) -> str:
    """What rich makes of `item`, as plain text: no colour, no markup, no trailing blanks."""
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


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> str:
    """A table with one line under its header; the columns named in `right` are set flush right."""
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False)
    for name in header:
        number = name in right
        grid.add_column(name, justify="right" if number else "left", no_wrap=number, overflow="fold")
    for row in rows:
        grid.add_row(*row)
    return render(grid)


def pairs(lines: Sequence[tuple[str, str]]) -> str:
    """Label and text in two columns; long texts wrap inside theirs. An equal label is written once."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    previous = None
    for label, text in lines:
        grid.add_row("" if label == previous else label, text)
        previous = label
    return render(grid)


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
            f"{what} needs matplotlib, which is not installed: pip install matplotlib, or implicitdiff[demo]"
        ) from missing
