"""Command line, what is printed: reports with a little colour, JSON, and progress.

In: texts, dataclasses. Out: the standard output, where results go, and the standard error, where progress goes. Colour
and width are the terminal's; without one it is 80 plain columns. Used by the commands.
"""

import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.highlighter import RegexHighlighter
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.theme import Theme

from implicitdiff.diagnostics.tables import WIDTH

Advance = Callable[[int, int, str], object]
_THEME = Theme(
    {"report.good": "green", "report.bad": "bold red", "report.label": "cyan", "report.strong": "bold"}
)


class _Report(RegexHighlighter):
    """Colours a report by its own words: verdicts, labels in the first column, the kinds of matrices."""

    base_style = "report."
    highlights = [  # noqa: RUF012  # rich's attribute
        r"(?m)^(?P<label>(sizes|H = D_uu L|A = D_u h|S = A H\^-1 A'|dependence|derivation|multipliers|solver"
        r"|rejected|falls back|forward|one backward))(?=\s)",
        r"(?P<good>\bok\b|\ball is well\b|\bholds\b)",
        r"(?P<bad>\bfail\b|\bnot the gradient\b|\bdoes not hold\b)",
        r"(?P<strong>\bis the fastest\b|\bneeds the least memory\b|\bhas the smallest error\b)",
    ]


def console(error: bool = False) -> Console:
    """A console on the standard output (or error) as it is now."""
    stream = sys.stderr if error else sys.stdout
    return Console(
        file=stream, theme=_THEME, highlighter=_Report(), markup=False, emoji=False, soft_wrap=True
    )


def width() -> int:
    """Characters of a line of a report."""
    return max(60, min(console().width, WIDTH))


def report(text: str) -> None:
    """Print a report; its first line is its title."""
    title, rest = text.partition("\n")[::2]
    out = console()
    out.print(title, style="bold")
    if rest:
        out.print(rest)


def plain(text: str) -> None:
    """Print a text for other programs as it is: code, LaTeX."""
    sys.stdout.write(text if text.endswith("\n") else text + "\n")


def note(text: str) -> None:
    """Say something beside the result, on the standard error."""
    console(error=True).print(text)


def print_json(value: Any) -> None:
    """Print a value as JSON; see `as_plain`."""
    plain(json.dumps(as_plain(value), indent=2, ensure_ascii=False))


def as_plain(value: Any) -> Any:
    """Dataclasses and named tuples as objects, numbers that JSON lacks (NaN, inf) as null, the rest by its text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: as_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple) and (names := getattr(type(value), "__annotations__", {})):
        return {name: as_plain(getattr(value, name)) for name in names}  # a named tuple
    if isinstance(value, Mapping):
        return {str(key): as_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [as_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int | bool):
        return value
    return str(value) if isinstance(value, Path) else repr(value)


@contextlib.contextmanager
def progress(title: str) -> Iterator[Advance]:
    """A bar on the standard error, if that is a terminal; yields what to call before each step of the work."""
    out = console(error=True)
    bar = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    # Asked of the stream itself: FORCE_COLOR makes rich take a file for a terminal.
    with Progress(*bar, console=out, transient=True, disable=not sys.stderr.isatty()) as shown:
        task = shown.add_task(title, total=None)

        def advance(done: int, total: int, what: str) -> None:
            shown.update(task, completed=done, total=total, description=f"{title}: {what}"[:40])

        yield advance
