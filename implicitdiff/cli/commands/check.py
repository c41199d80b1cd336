"""The command `check`: is a problem declared and solved so that its gradient means what it should?

In: PROBLEM. Out: the table of `idf.check`; exit code 1 if a statement failed.
"""

import click

import implicitdiff as idf
from implicitdiff.cli import output
from implicitdiff.cli.arguments import takes_problem
from implicitdiff.cli.target import make_problem, pairs
from implicitdiff.cli.tool import tool
from implicitdiff.diagnostics.examples import example_inputs


@tool("check")
@takes_problem
@click.pass_context
def check(
    ctx: click.Context, problem: str, options: tuple[str, ...], sizes: tuple[str, ...], as_json: bool
) -> None:
    """Check PROBLEM against independent oracles.

    \b
    Exit code 1 if a statement fails. Tried are the
    KKT residuals, LICQ, second order, finite differences, the structured
    gradient against the dense formula, and your own vjp if there is one.
    """
    chosen = make_problem(problem, pairs(options, "--with"))
    found = idf.check(chosen, *example_inputs(chosen, pairs(sizes, "--size")))
    if as_json:
        output.print_json({"ok": found.ok, **output.as_plain(found)})
    else:
        output.report(found.text(output.width()))
    ctx.exit(0 if found.ok else 1)
