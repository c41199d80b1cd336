"""The command `walkthrough`: the derivation of a gradient, from the Lagrangian on, with the numbers of a small example.

In: PROBLEM. Out: the steps of `idf.walkthrough`.
"""

import click

from implicitdiff import Problem
from implicitdiff.cli import output
from implicitdiff.cli.arguments import takes_problem
from implicitdiff.cli.target import make_problem, pairs
from implicitdiff.cli.tool import tool
from implicitdiff.diagnostics.examples import example_inputs
from implicitdiff.diagnostics.walkthrough import steps, text


@tool("walkthrough")
@takes_problem
def walkthrough(problem: str, options: tuple[str, ...], sizes: tuple[str, ...], as_json: bool) -> None:
    """Derive the gradient of PROBLEM step by step.

    From the Lagrangian to Eqn. 3 and the vector-Jacobian product, in the paper's symbols, with
    the matrices of the first sample.
    """
    chosen = make_problem(problem, pairs(options, "--with"))
    if not isinstance(chosen, Problem):
        raise click.UsageError(f"{problem} is discrete: its solution has no derivative to derive")
    found = steps(chosen, *example_inputs(chosen, pairs(sizes, "--size")))
    if as_json:
        output.print_json({"steps": found})
    else:
        output.console().print(text(found))
