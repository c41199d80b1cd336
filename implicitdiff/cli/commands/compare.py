"""The command `compare`: backward passes of one problem side by side.

In: PROBLEM, sizes to sweep, names of backward passes. Out: the tables and the verdict of `idf.compare`, CSV, a picture.
"""

from pathlib import Path
from typing import Any

import click

import implicitdiff as idf
from implicitdiff import combinatorial
from implicitdiff.cli import output
from implicitdiff.cli.arguments import takes_problem
from implicitdiff.cli.commands.list import estimator_names
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
    help=f"Backward passes: {', '.join(BACKWARDS)}; of a discrete problem: estimators. May be "
    "repeated, or separated by commas.",
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
    chosen: Any = make_problem(problem, pairs(options, "--with"))
    names: Any = [name for word in backwards for name in word.split(",") if name]
    if not isinstance(chosen, idf.Problem):
        if swept or plot:
            raise click.UsageError(f"{problem} is discrete: --sizes and --plot are for declared problems")
        names = [_estimator(name) for name in names]
    names = names or DEFAULT
    fixed, sweep = pairs(sizes, "--size"), lists(swept, "--sizes")

    def make(**setting: Any) -> tuple[Any, ...]:
        return example_inputs(chosen, {**fixed, **setting})

    with output.progress("compare") as advance:
        if sweep:
            found: Any = idf.compare(
                chosen, make, sweep=sweep, backwards=names, rounds=rounds, advance=advance
            )
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


def _estimator(word: str) -> combinatorial.Estimator:
    """The estimator that `blackbox:lam=2` names, with these arguments."""
    name, *settings = word.split(":")
    kinds = {key.lower(): getattr(combinatorial, key) for key in estimator_names()}
    if name.lower() not in kinds:
        raise click.UsageError(f"there is no estimator {name!r}: choose from {', '.join(estimator_names())}")
    try:
        made: combinatorial.Estimator = kinds[name.lower()](**pairs(tuple(settings), "--backward"))
    except TypeError as error:
        raise click.UsageError(f"{word}: {error}; give arguments as in blackbox:lam=2") from error
    return made
