"""The command `compare`: backward passes of one problem side by side.

In: PROBLEM, sizes to sweep, names of backward passes. Out: the tables and the verdict of `idf.compare`, CSV, a picture.
"""

from pathlib import Path
from typing import Any

import click

import implicitdiff as idf
from implicitdiff.cli import output
from implicitdiff.cli.arguments import takes_problem
from implicitdiff.cli.target import lists, make_problem, pairs
from implicitdiff.cli.tool import tool
from implicitdiff.diagnostics.compare import DEFAULT
from implicitdiff.diagnostics.examples import example_inputs
from implicitdiff.diagnostics.tables import require_matplotlib
from implicitdiff.plan import BACKWARDS


@tool("compare")
@takes_problem
@click.option(
    "--sizes", "swept", multiple=True, metavar="NAME=N,N,...", help="Sizes to sweep over, as n=16,64,256."
)
@click.option(
    "--backward", "-b", "backwards", multiple=True, metavar="NAME",
    help=f"Backward passes: {', '.join(BACKWARDS)}; may be repeated, or separated by commas.",
)  # fmt: skip
@click.option("--rounds", type=click.IntRange(1), default=9, show_default=True, help="Readings of each time.")
@click.option("--csv", "csv", type=click.Path(path_type=Path, dir_okay=False), help="Write the rows as CSV.")
@click.option(
    "--plot", "plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw them: .svg, .pdf, .png."
)
def compare(
    problem: str,
    options: tuple[str, ...],
    sizes: tuple[str, ...],
    swept: tuple[str, ...],
    backwards: tuple[str, ...],
    rounds: int,
    csv: Path | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Compare backward passes of PROBLEM by error, time and memory.

    \b
    implicitdiff compare robust-pooling --sizes n=16,64,256 --size m=32
    implicitdiff compare my_problem.py:Median -b auto,dense --plot out.svg
    """
    if plot is not None:
        require_matplotlib("--plot")  # before the work, not after it
    chosen = make_problem(problem, pairs(options, "--with"))
    names = [name for word in backwards for name in word.split(",") if name] or list(DEFAULT)
    fixed, sweep = pairs(sizes, "--size"), lists(swept, "--sizes")

    def make(**setting: Any) -> tuple[Any, ...]:
        return example_inputs(chosen, {**fixed, **setting})

    with output.progress("compare") as advance:
        if sweep:
            found = idf.compare(chosen, make, sweep=sweep, backwards=names, rounds=rounds, advance=advance)
        else:
            found = idf.compare(chosen, *make(), backwards=names, rounds=rounds)
    if csv is not None:
        found.to_csv(csv)
        output.note(f"written: {csv}")
    if plot is not None:
        found.plot(plot)
        output.note(f"written: {plot}")
    if as_json:
        output.print_json({**output.as_plain(found), "verdict": found.verdict})
    else:
        output.report(found.text(output.width()))
