"""The source text of an emitted function: a statement a line, with the step of the derivation that it takes beside it.

In: lines and what is returned. Out: text. Next file: `emit.py`.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence

from implicitdiff.graph.purpose import Step
from implicitdiff.graph.text import wrapped
from implicitdiff.graph.tidy import Line

LONGEST = 100
"""A comment stands above its statement where the two together would be longer."""


def listing(
    name: str,
    arguments: Sequence[str],
    opening: Sequence[str],
    lines: Sequence[Line],
    returned: Sequence[str],
    steps: Sequence[Step | None],
    shown: Mapping[str, str],
) -> str:
    """`def name(*arguments)` with its opening (docstring, reshaped arguments), the lines and the return statement.

    Args:
        name, arguments: of the function.
        opening: lines that come before all others.
        lines: statements with their comments.
        returned: the returned expressions.
        steps: the steps that they are, as far as they are some.
        shown: names of the user's that stand under another one so far: emitted code uses them itself.
    """
    tail = "return " + ", ".join(returned) + ("," if len(returned) == 1 else "")
    ending = "; ".join(
        step.equation
        for text, step in zip(returned, steps, strict=True)
        if step is not None and not (step.name and re.search(rf"\b{re.escape(step.name)}\b", text))
    )
    gradients = any(step is not None and step.name.startswith("grad_") for step in steps)
    ending = ending or ("the gradients, and a verdict on each sample" if gradients else "the results")
    inside = list(opening)
    for text, comment in (*lines, Line(tail, ending)):
        inside += _commented(wrapped(_shown(text, shown)), _shown(comment, shown))
    head = _shown(f"def {name}({', '.join(arguments)}):", shown)
    return "\n".join([head, *("    " + line for line in inside)]) + "\n"


def _shown(text: str, shown: Mapping[str, str]) -> str:
    """The user's own names in the place of those that stand for them; equal names of ours get an underscore."""
    for internal, own in shown.items():
        text = re.sub(rf"(?<![\w.]){own}\b", f"{own}_", text)
        text = re.sub(rf"\b(grad_|d|){internal}\b", rf"\g<1>{own}", text)
    return text


def _commented(lines: list[str], comment: str) -> list[str]:
    if not comment:
        return lines
    if len(lines) == 1 and len(lines[0]) + len(comment) + 4 <= LONGEST:
        return [f"{lines[0]}  # {comment}"]
    return [*(f"# {part}" for part in textwrap.wrap(comment, LONGEST)), *lines]
