"""The command `reproduce`: the paper's experiments on this machine.

In: names of experiments. Out: their tables and claims; CSV, figures and a page for each in a folder.
"""

from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from implicitdiff.cli import output
from implicitdiff.cli.tool import Refused, tool
from implicitdiff.errors import ImplicitDiffError
from implicitdiff.reproduce import Findings, Settings, experiment, names, write


class _ExperimentName(click.ParamType):
    """The name of an experiment; which there are is known only when the command runs."""

    name = "name"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The name, if there is such an experiment."""
        if value not in names():
            self.fail(f"there is no experiment {value!r}: choose from {', '.join(names())}", param, ctx)
        return str(value)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """All names, with their summaries."""
        return [
            CompletionItem(name, help=text) for name, text in names().items() if name.startswith(incomplete)
        ]


@tool("reproduce")
@click.argument("experiments", metavar="NAME...", nargs=-1, required=True, type=_ExperimentName())
@click.option(
    "--quick", is_flag=True, help="Small sizes, a few seconds: to see that it runs, not for the claims."
)
@click.option("--rounds", type=click.IntRange(1), help="Readings of each time; 7, with --quick 2.")
@click.option(
    "--cpu-clock", is_flag=True, help="Processor's time in place of the wall clock: for a busy machine."
)
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), default=Path("out", "reproduce"), show_default=True,
    help="Folder for the files; each experiment gets its own inside.",
)  # fmt: skip
def reproduce(
    experiments: tuple[str, ...], quick: bool, rounds: int | None, cpu_clock: bool, out: Path, as_json: bool
) -> None:
    """Reproduce figures and tables of the paper here.

    \b
    NAME: fig1, fig3, table1, operations, identity. Each writes CSV, SVG, PDF and
    PNG, and takes at most a few minutes; identity takes fifteen.
    """
    settings = Settings(quick, rounds or (2 if quick else 7), cpu_clock)
    results = {}
    for position, name in enumerate(experiments):
        with output.progress(name) as advance:
            found = experiment(name).run(settings, advance)
        results[name] = _as_plain(found)
        if not as_json:
            if position:
                output.console().print()
            output.report(found.text(output.width()))
        results[name]["files"] = [str(path) for path in _written(found, out / name, as_json)]
    if as_json:
        output.print_json(results)


def _written(found: Findings, folder: Path, as_json: bool) -> list[Path]:
    try:
        paths = write(found, folder)
    except ImplicitDiffError as error:
        raise Refused("ImplicitDiffError", f"{error}; the tables are in {folder}") from error
    except OSError as error:
        raise Refused("OSError", f"cannot write into {folder}: {error.strerror}") from error
    output.note(f"written: {len(paths)} files in {folder}")
    return paths


def _as_plain(found: Findings) -> dict[str, Any]:
    return {
        "title": found.title,
        "about": found.about,
        "claims": output.as_plain(found.claims),
        "tables": {item.name: output.as_plain(item.rows) for item in found.tables},
    }
