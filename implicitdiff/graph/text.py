"""Pieces of torch source: operands with labelled axes, powers, numbers, brackets.

In: names and labels. Out: strings. Next file: `contraction.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from implicitdiff.graph.ir import Label


@dataclass(frozen=True)
class Operand:
    """A tensor expression, its trailing axes by label, and how many leading axes it has (0, 1 or 2)."""

    text: str
    labels: tuple[Label, ...]
    prefix: int
    certain: bool = False
    """Whether the leading axes are there for certain: no axis of size 1 shared by all samples."""

    def aligned(self, order: Sequence[Label]) -> str:
        """The expression with its axes in `order`, 1 where it has none."""
        own = [k for k in order if k in self.labels]
        text = self.text
        if tuple(own) != self.labels:
            text = permuted(text, [self.labels.index(k) for k in own], self.prefix)
        missing = [k not in self.labels for k in order]
        if not any(missing) or (not self.labels and self.prefix == 0):
            return text
        if self.prefix == 0:
            # leading ones come by themselves when there is no prefix to keep apart
            first = missing.index(False)
            missing = missing[first:]
            if not any(missing):
                return text
        return f"{bracket(text)}[..., {', '.join('None' if m else ':' for m in missing)}]"


def permuted(text: str, order: Sequence[int], prefix: int) -> str:
    """`text` with its trailing axes permuted."""
    if list(order) == list(range(len(order))):
        return text
    text = bracket(text)
    if list(order) == [1, 0]:
        return f"{text}.mT"
    return f"{text}.permute({', '.join(map(str, [*range(prefix), *(prefix + k for k in order)]))})"


def wrapped(line: str, width: int = 104) -> list[str]:
    """A statement in lines of about `width`, broken at spaces inside brackets, which are added where there are none."""
    if len(line) <= width:
        return [line]
    cuts = _cuts(line)
    if not any(place < width for place in cuts):
        head, rest = _headed(line)
        line = f"{head}({rest})"
        cuts = _cuts(line)
    pieces, start = [], 0
    while len(line) - start > width:
        ahead = [place for place in cuts if place > start + 8]
        fitting = [place for place in ahead if place - start <= width - 4] or ahead[:1]
        if not fitting:
            break
        pieces.append(line[start : fitting[-1]])
        start = fitting[-1] + 1
    pieces.append(line[start:])
    return [piece if k == 0 else "    " + piece for k, piece in enumerate(pieces)]


def _headed(line: str) -> tuple[str, str]:
    for head in ("return ", "del "):
        if line.startswith(head):
            return head, line[len(head) :]
    target, sign, value = line.partition(" = ")
    return (f"{target} = ", value) if sign else ("", line)


def _cuts(line: str) -> list[int]:
    """The spaces inside brackets after a comma or before an operator."""
    places, depth = [], 0
    for k, c in enumerate(line):
        depth += (c in "([{") - (c in ")]}")
        if c == " " and depth > 0 and (line[k - 1] == "," or line[k + 1] in "+-*/@"):
            places.append(k)
    return places


def bracket(text: str) -> str:
    """Parenthesises what is no single name or call."""
    depth = 0
    for c in text:
        depth += (c in "([") - (c in ")]")
        if c == " " and depth == 0:
            return f"({text})"
    return f"({text})" if text.startswith("-") else text


def literal(value: float) -> str:
    if value != value or value in (float("inf"), float("-inf")):
        return f'float("{value}")'
    return repr(float(value))


def raised(text: str, power: float) -> str:
    """text^power for a positive power."""
    names = {1.0: "{0}", 2.0: "{0}.square()", 0.5: "{0}.sqrt()"}
    return names[power].format(text) if power in names else f"{text}.pow({power!r})"


def product_text(text: str, members: Sequence[tuple[Operand, float]], order: Sequence[Label]) -> str:
    """`text` times the members, all over the same axes; a lone negative power is written as its inverse."""
    above = [m for m in members if m[1] > 0.0]
    below = [m for m in members if m[1] < 0.0]
    for operand, power in above:
        part = raised(bracket(operand.aligned(order)), power)
        text = f"{text} * {part}" if text else part
    for operand, power in below:
        own = operand.aligned(order)
        inverse = inverse_power(own, -power)
        if inverse and (not text or power != -1.0):
            text = f"{text} * {inverse}" if text else inverse
        else:
            text = f"{text or '1.0'} / {raised(bracket(own), -power)}"
    return text


def inverse_power(text: str, power: float) -> str:
    """text^-power where torch has a function for it, else ''."""
    text = bracket(text)
    names = {1.0: "{0}.reciprocal()", 0.5: "{0}.rsqrt()", 1.5: "({0}.rsqrt() / {0})"}
    return names[power].format(text) if power in names else ""


def axis_list(dims: Sequence[int]) -> str:
    return str(dims[0]) if len(dims) == 1 else f"({', '.join(map(str, dims))})"


def tuple_body(sizes: Sequence[int]) -> str:
    return "".join(f"{s}, " for s in sizes)


def forward(spec: Sequence[Any]) -> tuple[int, int, int]:
    """start, step > 0 and count of the same entries, in ascending order."""
    start, step, count = spec[1:4]
    return (start, step, count) if step > 0 else (start + step * (count - 1), -step, count)


def flipped(dims: Sequence[int]) -> str:
    """The call that turns these axes round; "" for none."""
    return f".flip({', '.join(map(str, dims))})" if dims else ""
