"""Experiments, what one is: a function from settings to findings.

In: `Settings`. Out: `Findings`: rows, claims with a verdict, figures that are drawn only if somebody wants them. Next:
`registry.py`.
"""

import os
import platform
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from implicitdiff.diagnostics.tables import WIDTH, pairs, table

Advance = Callable[[int, int, str], object]
"""Called before each step: (steps done, steps in all, what comes next)."""


@dataclass(frozen=True)
class Settings:
    """How much work an experiment may do.

    Attributes:
        quick: Small sizes, a few seconds: enough to see that everything runs, too small for the claims.
        rounds: Readings of each time.
        cpu_clock: Take the processor's time of this process, which moves less than the wall clock on a busy machine.
    """

    quick: bool = False
    rounds: int = 7
    cpu_clock: bool = False


@dataclass(frozen=True)
class Claim:
    """A statement of the paper, held against what was measured.

    Attributes:
        text: The statement.
        holds: Whether it holds here.
        evidence: The numbers, in one line, with the line that was drawn between yes and no.
    """

    text: str
    holds: bool
    evidence: str

    @property
    def sentence(self) -> str:
        """Statement and evidence."""
        return f"{self.text}: {self.evidence}."


@dataclass(frozen=True)
class Table:
    """Rows of one kind.

    Attributes:
        name: Of its CSV file.
        title: What it shows.
        rows: Frozen dataclasses of numbers and strings; their fields are the columns of the CSV file.
        header, cells: Columns and their texts as a person reads them.
        right: Columns of numbers.
        printed: Whether it belongs on the terminal too, not in the files alone.
    """

    name: str
    title: str
    rows: tuple[Any, ...]
    header: tuple[str, ...]
    cells: Callable[[Any], Sequence[str]]
    right: tuple[str, ...] = ()
    printed: bool = True

    def text(self, width: int = WIDTH) -> str:
        """The table, in lines of at most `width` characters."""
        return table(self.header, [self.cells(row) for row in self.rows], self.right, width)


@dataclass(frozen=True)
class Findings:
    """What an experiment found.

    Attributes:
        title: Of the experiment.
        about: What was run, in a few sentences.
        tables: The numbers.
        claims: The statements that they bear on.
        figures: (name, function that draws it): matplotlib is needed only there.
        further: Writes more files into a folder, and returns them.
    """

    title: str
    about: str
    tables: tuple[Table, ...]
    claims: tuple[Claim, ...] = ()
    figures: tuple[tuple[str, Callable[[], Any]], ...] = ()
    further: Callable[[Path], list[Path]] | None = None

    def text(self, width: int = WIDTH) -> str:
        """Tables and claims, in lines of at most `width` characters."""
        parts = [self.title, textwrap.fill(self.about, width)]
        for item in self.tables:
            if item.printed:
                parts.append(f"{item.title}\n\n{item.text(width)}")
        if self.claims:
            told = (pairs([(f"{verdict(claim):3}", claim.sentence)], width) for claim in self.claims)
            parts.append("\n".join(["The claims, held against these numbers", "", *told]))
        return "\n\n".join(parts)


@dataclass(frozen=True)
class Experiment:
    """An experiment by its name.

    Attributes:
        name: On the command line.
        summary: What it reproduces, in one line.
        run: Does it.
    """

    name: str
    summary: str
    run: Callable[[Settings, Advance], Findings]


def verdict(claim: Claim) -> str:
    """Whether it holds, in a word."""
    return "yes" if claim.holds else "no"


def nobody(done: int, total: int, what: str) -> None:
    """An `Advance` that nobody watches."""


def machine(settings: Settings) -> str:
    """Where the numbers come from, in one line."""
    clock = "the processor's time" if settings.cpu_clock else "wall clock"
    return (
        f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} cores, "
        f"one thread, {clock}"
    )
