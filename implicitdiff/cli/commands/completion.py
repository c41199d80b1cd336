"""The command `completion`: the script that makes a shell complete the others.

In: the name of a shell. Out: the script, as click makes it.
"""

import click
from click.shell_completion import get_completion_class

from implicitdiff.cli import output
from implicitdiff.cli.tool import tool


@tool("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str, as_json: bool) -> None:
    """Print a script that completes commands, options and names.

    \b
    bash:  eval "$(implicitdiff completion bash)"       in ~/.bashrc
    zsh:   eval "$(implicitdiff completion zsh)"        in ~/.zshrc
    fish:  implicitdiff completion fish | source        in config.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None  # one of click's own
    script = kind(ctx.find_root().command, {}, "implicitdiff", "_IMPLICITDIFF_COMPLETE").source()
    if as_json:
        output.print_json({"shell": shell, "script": script})
    else:
        output.plain(script)
