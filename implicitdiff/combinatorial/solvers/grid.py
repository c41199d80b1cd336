"""Shortest paths on grids, with a cost for each cell or for each step.

In: costs (B, H, W), or (B, A) for steps. Out: cells, or steps, of a path from corner to corner. Next file to read:
``flow.py``.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from implicitdiff.combinatorial.base import NumpySolver, Shape
from implicitdiff.combinatorial.solvers.paths import Arcs, predecessors, walk
from implicitdiff.errors import InputError, OptionError

STEPS = {
    4: ((0, 1), (0, -1), (1, 0), (-1, 0)),
    8: tuple((a, b) for a in (-1, 0, 1) for b in (-1, 0, 1) if (a, b) != (0, 0)),
}


class GridShortestPath(NumpySolver):
    """min <w, y> over the paths from one cell of a grid to another, costs >= 0.

    With cell costs y (H, W) has a one in every cell of the path, both ends included. With step costs w and y are (A,)
    over all steps between neighbours, in the order of `steps`; flow conservation is then declared, while of cells no
    direction may be taken out (paths have different lengths).

    The whole batch is searched in a few calls of SciPy's Dijkstra: 12 x 12 in about 0.02 ms a sample, 30 x 30 in 0.13.

    Args:
        height, width: H, W.
        neighbours: 8 or 4.
        costs: "vertex" (cells) or "edge" (steps).
        source, target: (row, column); by default the first and the last cell.
    """

    def __init__(
        self,
        height: int,
        width: int,
        *,
        neighbours: Literal[4, 8] = 8,
        costs: Literal["vertex", "edge"] = "vertex",
        source: tuple[int, int] = (0, 0),
        target: tuple[int, int] | None = None,
    ) -> None:
        if height < 1 or width < 1 or height * width < 2:
            raise OptionError(f"a grid of {height} x {width}: expected at least two cells")
        if neighbours not in STEPS:
            raise OptionError(f"neighbours={neighbours} of GridShortestPath: 4 or 8")
        if costs not in ("vertex", "edge"):
            raise OptionError(f"costs={costs!r} of GridShortestPath: 'vertex' or 'edge'")
        target = (height - 1, width - 1) if target is None else target
        for cell in (source, target):
            if not (0 <= cell[0] < height and 0 <= cell[1] < width):
                raise InputError(f"cell {cell} is outside of the grid of {height} x {width}")
        if source == target:
            raise InputError("GridShortestPath: source and target are the same cell")
        self.source, self.target = source[0] * width + source[1], target[0] * width + target[1]
        self.by_cell = costs == "vertex"
        tail, head = _steps(height, width, neighbours)
        self.steps = np.stack((tail, head), axis=1)
        self._arcs = Arcs.of(height * width, tail, head)
        super().__init__((height, width) if self.by_cell else (len(tail),), domain="nonnegative")

    def solve_numpy(self, costs: np.ndarray) -> np.ndarray:
        """A step into a cell costs what the cell costs; the first cell is paid by all paths."""
        arcs = self._arcs
        flat = costs.reshape(len(costs), -1)
        weights = flat.take(arcs.head if self.by_cell else arcs.order, axis=1)
        y = np.zeros(flat.shape)
        found = predecessors(arcs, weights, self.source, self.name)
        for samples, before, node in walk(found, self.source, self.target, self.name):
            y[samples, node if self.by_cell else arcs.between(before, node)] = 1
        if self.by_cell:
            y[:, self.source] = 1
        return y.reshape(costs.shape)

    def equalities(self, shape: Shape) -> np.ndarray | None:
        """Flow conservation for steps; nothing for cells."""
        if self.by_cell:
            return None
        rows = np.zeros((self._arcs.nodes, len(self.steps)))
        columns = np.arange(len(self.steps))
        rows[self.steps[:, 0], columns] = 1
        rows[self.steps[:, 1], columns] = -1
        return rows


def _steps(height: int, width: int, neighbours: int) -> tuple[np.ndarray, np.ndarray]:
    """(tail, head) of all steps, ordered by tail."""
    row, column = np.divmod(np.arange(height * width), width)
    tails, heads = [], []
    for down, right in STEPS[neighbours]:
        inside = (row + down >= 0) & (row + down < height) & (column + right >= 0) & (column + right < width)
        tails.append(np.flatnonzero(inside))
        heads.append((row + down)[inside] * width + (column + right)[inside])
    tail, head = np.concatenate(tails), np.concatenate(heads)
    order = np.lexsort((head, tail))
    return tail[order], head[order]


__all__ = ["GridShortestPath"]
