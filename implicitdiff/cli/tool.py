"""Command line, what every command shares: `--json`, errors as messages, exit codes.

In: a function. Out: a click command that never shows a traceback for what a user can mend. Errors of the library and of
the user's own file end with code 3, wrong words with 2 (click's); what is neither is a bug and keeps its traceback.
"""

import os
import sys
import textwrap
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from implicitdiff.cli.output import print_json, width
from implicitdiff.errors import ImplicitDiffError

REFUSED = 3
"""Exit code where the problem or its inputs are refused."""
Function = TypeVar("Function", bound=Callable[..., Any])
USER_MODULE = "implicitdiff_file_"
"""Files that the user names are imported under this name and their own."""


class Refused(click.ClickException):
    """The problem, its inputs or the user's file cannot be used; `kind` names the error behind it."""

    exit_code = REFUSED

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Tool(click.Command):
    """A command whose errors are messages: on the standard error, or as {"error": ...} with --json."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """Read the words of the command line."""
        as_json = "--json" in args  # the list is emptied while it is read
        try:
            return super().make_context(info_name, args, parent, **extra)
        except click.ClickException as error:
            raise _told(as_json, error, type(error).__name__) from error

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; IMPLICITDIFF_TRACEBACK=1 in the environment shows every traceback."""
        if os.environ.get("IMPLICITDIFF_TRACEBACK"):
            return super().invoke(ctx)
        as_json = bool(ctx.params.get("as_json"))
        try:
            return super().invoke(ctx)
        except click.ClickException as error:
            raise _told(as_json, error, getattr(error, "kind", type(error).__name__)) from error
        except ImplicitDiffError as error:
            kind = type(error).__name__
            raise _told(as_json, Refused(kind, f"{kind}: {error}"), kind) from error
        except Exception as error:
            # The user's own hooks run inside, and may raise anything.
            place = _in_user_file(error)
            if not place:
                raise
            kind = type(error).__name__
            raise _told(as_json, Refused(kind, f"{place}: {kind}: {error}"), kind) from error


def _told(as_json: bool, error: click.ClickException, kind: str) -> BaseException:
    """The error as click shows it, wrapped; or the end of the command after the error was printed as JSON."""
    if not as_json:
        # Wrapped together with the word that click puts in front; the attribute is declared final.
        vars(error)["message"] = textwrap.fill(
            f"Error: {error.format_message()}", width(), break_on_hyphens=False
        ).removeprefix("Error: ")
        return _Shown(error) if isinstance(error, click.BadParameter) else error
    print_json({"error": {"kind": kind, "message": error.format_message()}})
    return click.exceptions.Exit(error.exit_code)


class _Shown(click.UsageError):
    """A message about a parameter that names the parameter already."""

    def __init__(self, error: click.UsageError) -> None:
        super().__init__(error.message, error.ctx)


def tool(name: str) -> Callable[[Callable[..., Any]], click.Command]:
    """Make a command of a function: `--json` is added, and comes in as `as_json`."""

    def make(function: Callable[..., Any]) -> click.Command:
        option = click.option(
            "--json", "as_json", is_flag=True, help="Print the result as JSON, for programs."
        )
        return click.command(name, cls=Tool)(option(function))

    return make


def _in_user_file(error: BaseException) -> str:
    """ "file.py, line 12" of the innermost frame in the folder of a file that the user named; "" without one."""
    named = [module for name, module in sys.modules.items() if name.startswith(USER_MODULE)]
    folders = {Path(str(module.__file__)).resolve().parent for module in named}
    place = ""
    for frame in traceback.extract_tb(error.__traceback__):
        if Path(frame.filename).resolve().parent in folders:
            place = f"{frame.filename}, line {frame.lineno}"
    return place
