"""The command line `implicitdiff`: list, explain, check, compare, walkthrough, reproduce, demo, completion.

In: the words of a command. Out: reports on the standard output, progress on the standard error, an exit code. It stands
above everything and is imported by nothing. Start reading at `main.py`; each command is a file in `commands/`.
"""

from implicitdiff.cli.main import main

__all__ = ["main"]
