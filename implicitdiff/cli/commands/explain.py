"""The command `explain`: what was derived from a declaration, the solver and its cost.

In: PROBLEM. Out: the report of `idf.explain` at the sizes asked for, or its code, LaTeX, HTML or picture.
"""

from pathlib import Path
from typing import Any

import click

import implicitdiff as idf
from implicitdiff.cli import output
from implicitdiff.cli.arguments import takes_problem
from implicitdiff.cli.target import make_problem, pairs
from implicitdiff.cli.tool import tool
from implicitdiff.diagnostics import Explanation
from implicitdiff.diagnostics.examples import example_inputs


@tool("explain")
@takes_problem
@click.option("--code", is_flag=True, help="Print the emitted backward pass, and nothing else.")
@click.option("--latex", is_flag=True, help="Print the derivation as LaTeX, and nothing else.")
@click.option(
    "--html", "html", type=click.Path(path_type=Path, dir_okay=False), help="Write the report as a page."
)
@click.option(
    "--plot", "plot", type=click.Path(path_type=Path, dir_okay=False), help="Write the spy pictures."
)
def explain(
    problem: str,
    options: tuple[str, ...],
    sizes: tuple[str, ...],
    code: bool,
    latex: bool,
    html: Path | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Explain what was derived from PROBLEM.

    The structure found and why, the solver chosen, what one backward costs.

    \b
    implicitdiff explain robust-pooling --size n=256 --with penalty=welsch
    implicitdiff explain my_problem.py:Median --code
    """
    if code and latex:
        raise click.UsageError("--code and --latex both want the standard output: ask for one of them")
    chosen = make_problem(problem, pairs(options, "--with"))
    found: Any = idf.explain(chosen, *example_inputs(chosen, pairs(sizes, "--size")))
    if not isinstance(found, Explanation) and (code or latex or html or plot):
        raise click.UsageError(
            f"{problem} is discrete: --code, --latex, --html and --plot are for declared problems"
        )
    if html is not None:
        html.write_text(found.to_html(), encoding="utf-8")
        output.note(f"written: {html}")
    if plot is not None:
        from implicitdiff.diagnostics.plots import write

        write(found.plot(), plot)
        output.note(f"written: {plot}")
    if as_json:
        output.print_json(found)
    elif code:
        output.plain(
            found.code or "# no code is emitted: the backward pass runs by automatic differentiation"
        )
    elif latex:
        output.plain(found.to_latex())
    else:
        output.report(found.text(output.width()))
