"""What can be drawn of a plan: the graph of the declared functions, and where H, A and S have entries.

In: the nodes of `graph/drawing.py`. Out: frozen records, made on request from a plan and never changed.
Next file: `structured/drawing.py`, which fills them; `diagnostics/page/` draws them.
"""

from __future__ import annotations

from dataclasses import dataclass

from implicitdiff.graph.drawing import DrawnNode

EMPTY, SPLIT, FULL = 0, 1, 2
"""What a cell of a pattern holds: nothing, a sum of few products of a row and a column side, an entry of its own."""


@dataclass(frozen=True)
class Pattern:
    """Where a matrix can have entries, one row of cells for each row of the matrix.

    Attributes:
        name: "H", "A" or "S".
        shape: of the matrix.
        cropped: whether long axes were cut, so that `cells` shows a smaller matrix of the same structure.
        cells: EMPTY, SPLIT or FULL.
        parts: (what is kept, how many numbers) of one sample.
        blocks: what each block is, in a word or two: a row for each variable or constraint.
    """

    name: str
    shape: tuple[int, int]
    cropped: bool
    cells: tuple[tuple[int, ...], ...]
    parts: tuple[tuple[str, int], ...]
    blocks: tuple[tuple[str, ...], ...]

    @property
    def kept(self) -> int:
        """Numbers kept for one sample."""
        return sum(count for _, count in self.parts)


@dataclass(frozen=True)
class Drawing:
    """Everything that a page draws of a plan."""

    nodes: tuple[DrawnNode, ...]
    patterns: tuple[Pattern, ...]
