"""Command line, the door: the group of all commands.

In: the words after `implicitdiff`. Out: one command that runs. Next: `commands/`, one file for each, and `tool.py`,
which turns errors into messages and exit codes.
"""

import importlib.metadata

import click

from implicitdiff.cli.commands.check import check
from implicitdiff.cli.commands.compare import compare
from implicitdiff.cli.commands.completion import completion
from implicitdiff.cli.commands.demo import demo
from implicitdiff.cli.commands.explain import explain
from implicitdiff.cli.commands.list import list_names
from implicitdiff.cli.commands.reproduce import reproduce
from implicitdiff.cli.commands.walkthrough import walkthrough

_EPILOG = """\b
PROBLEM is the name of a built-in problem (implicitdiff list problems), or a
class in a file of your own: path/to/file.py:ClassName.

\b
Exit codes: 0 fine; 1 the answer is no (a check failed); 2 the command line is
wrong; 3 the problem or its inputs are refused. Every command takes --json.
"""


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
    epilog=_EPILOG,
    subcommand_metavar="COMMAND ...",
)
@click.version_option(importlib.metadata.version("implicitdiff"), prog_name="implicitdiff")
def main() -> None:
    """Exact, structured gradients through the solutions of optimisation problems."""


for command in (list_names, explain, check, compare, walkthrough, reproduce, demo, completion):
    main.add_command(command)
