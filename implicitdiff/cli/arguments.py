"""Command line, arguments that several commands take: PROBLEM, --with and --size.

In: a function. Out: the same with these arguments, and shell completion for them. Used by the commands.
"""

from collections.abc import Callable
from typing import Any

import click
from click.shell_completion import CompletionItem

from implicitdiff.cli.target import builtin_problems
from implicitdiff.diagnostics.tables import first_sentence


class _ProblemName(click.ParamType):
    """The name of a built-in problem, or a file with a class."""

    name = "problem"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """The built-in names, and files."""
        names = [
            CompletionItem(name, help=first_sentence(kind))
            for name, kind in builtin_problems().items()
            if name.startswith(incomplete)
        ]
        return names or [CompletionItem(incomplete, type="file")]


def takes_problem(function: Callable[..., Any]) -> Callable[..., Any]:
    """PROBLEM, --with name=value and --size name=number."""
    for add in (
        click.option(
            "--size", "sizes", multiple=True, metavar="NAME=N",
            help="A size of the problem's example, as n=64; may be repeated.",
        ),
        click.option(
            "--with", "-w", "options", multiple=True, metavar="NAME=VALUE",
            help="An argument of its constructor, as penalty=welsch; may be repeated.",
        ),
        click.argument("problem", type=_ProblemName()),
    ):  # fmt: skip
        function = add(function)
    return function
