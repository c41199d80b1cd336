"""The identity experiments, from names to files: train, write the numbers, make the page and the figures.

In: names of families, seeds, a folder. Out: the files written. `python -m implicitdiff.experiments.identity` calls it.
Next file to read: ``family.py``; `implicitdiff reproduce identity` is
``implicitdiff/reproduce/identity.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from implicitdiff.errors import OptionError
from implicitdiff.experiments.identity.families import (
    dvae,
    explaining,
    globe,
    graph_matching,
    matching,
    retrieval,
    terrain,
)
from implicitdiff.experiments.identity.family import Family, run_family
from implicitdiff.experiments.identity.figures import save_collapse
from implicitdiff.experiments.identity.report import page
from implicitdiff.experiments.identity.results import Run, Summary
from implicitdiff.experiments.identity.store import read_runs, write_runs

FAMILIES: dict[str, Family] = {
    module.FAMILY.name: module.FAMILY
    for module in (terrain, dvae, explaining, matching, graph_matching, retrieval, globe)
}


def reproduce_identity(
    families: Sequence[str] = (),
    seeds: Sequence[int] = (0, 1, 2),
    out: str | Path = "out/identity",
    quick: bool = False,
    *,
    report: Callable[[str], None] = lambda line: None,
    command: str = "python -m implicitdiff.experiments.identity",
) -> list[Path]:
    """Train every method of every family with every seed, and write what came out.

    Numbers of families that are not run now are kept if they lie in the folder, so that one family can be done anew.

    Args:
        families: names, see `FAMILIES`; none: all of them.
        seeds: of data, initial weights and noise; at least three for a spread that says anything.
        out: the folder: `family`.csv, `family`-curves.csv, results.md, collapse-`family`.svg, .pdf and .png.
        quick: at sizes that only show that everything runs, in about a second a method.
        report: called with one line after each run.
        command: what made the runs, as text for the page.

    Returns:
        The files written. Cost: about 15 minutes of one core for all.

    Raises:
        OptionError: an unknown family, or no seed.
        ImplicitDiffError: scikit-learn (for digits) or matplotlib (for figures) is not installed.
    """
    unknown = [name for name in families if name not in FAMILIES]
    if unknown:
        raise OptionError(f"families={unknown}: choose from {', '.join(FAMILIES)}")
    if not seeds:
        raise OptionError("seeds is empty: give at least one")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for name in families or FAMILIES:
        summary = run_family(FAMILIES[name], seeds, quick, report=lambda run: report(_line(run)))
        written += write_runs(folder, name, summary)
    return written + write_page(folder, command)


def write_page(folder: Path, command: str) -> list[Path]:
    """results.md and the figures, from the numbers in the folder."""
    found: list[tuple[Family, Summary | None]] = [
        (family, read_runs(folder, name)) for name, family in FAMILIES.items()
    ]
    path = folder / "results.md"
    path.write_text(page(found, command), encoding="utf-8")
    figures = [save_collapse(family, summary, folder) for family, summary in found if summary is not None]
    return [path, *(figure for drawn in figures for figure in drawn)]


def _line(run: Run) -> str:
    values = ", ".join(f"{name} {value:.4g}" for name, value in run.values.items())
    return f"{run.family}: {run.method}, seed {run.seed}: {values}; {run.calls} calls, {run.seconds:.1f} s"


__all__ = ["FAMILIES", "reproduce_identity", "write_page"]
