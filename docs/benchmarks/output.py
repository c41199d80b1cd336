"""Tables of a report: the same rows as CSV, as Markdown and on the terminal.

In: frozen dataclasses of strings, numbers and None. Out: files and rich tables. `read_csv` gives back what
`write_csv` was given. Used by __main__.py.
"""

import csv
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from rich import box
from rich.table import Table

from implicitdiff.diagnostics.tables import number, seconds, write_csv

__all__ = ["duration", "grid", "markdown", "read_csv", "size", "spread", "write_csv"]

Record = TypeVar("Record")


def read_csv(path: Path, kind: type[Record]) -> list[Record]:
    """The rows that `write_csv` wrote."""
    types_of = typing.get_type_hints(kind)
    with path.open(newline="", encoding="utf-8") as source:
        return [
            kind(**{name: _read(text, types_of[name]) for name, text in cells.items()})
            for cells in csv.DictReader(source)
        ]


def _read(text: str, wanted: Any) -> Any:
    options = typing.get_args(wanted) if isinstance(wanted, types.UnionType) else (wanted,)
    if text == "" and type(None) in options:
        return None
    plain = next(option for option in options if option is not type(None))
    return text == "True" if plain is bool else plain(text)


def grid(header: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> Table:
    """A rich table; columns whose cells are all numbers or empty are set flush right."""
    table = Table(
        title=title or None, box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, title_justify="left"
    )
    for k, name in enumerate(header):
        right = all(row[k][:1].isdigit() or row[k] in ("", "-", "nan") for row in rows)
        table.add_column(name, justify="right" if right else "left", no_wrap=k < len(header) - 1)
    for row in rows:
        table.add_row(*row)
    return table


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def spread(middle: float | None, low: float | None, high: float | None) -> str:
    """A median with its quartiles: 0.52 (0.50-0.55)."""
    if middle is None:
        return "-"
    if low is None or high is None or low == high:
        return number(middle, 4)
    return f"{number(middle, 4)} ({number(low)}-{number(high)})"


def size(count: float | None) -> str:
    """Bytes for people; a dash for None."""
    if count is None:
        return "-"
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def duration(value: float | None) -> str:
    """A time for people."""
    return seconds(value)
