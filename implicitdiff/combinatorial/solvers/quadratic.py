"""Quadratic assignment of small graphs (graph matching), by enumeration.

In: unary costs of node pairs and costs of edge pairs, in one vector. Out: which pairs are matched. Next file to read:
``../wrap.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import numpy as np
import torch
from torch import Tensor

from implicitdiff.combinatorial.base import NumpySolver, Sense, Shape
from implicitdiff.errors import InputError, OptionError

LARGEST = 8
# Floats of the table of values; a batch is cut into parts that need no more.
TABLE = 2**22


class QuadraticAssignment(NumpySolver):
    """min <w, y> over the bijections of the nodes of two graphs of n <= 8 nodes (Lawler's form).

    y = (Y, Z): Y (n, n) the permutation matrix, Z (E1, E2) with Z[e, f] = 1 if edge e = (i, j) of the first graph is
    mapped onto edge f = (k, l) of the second, Y[i, k] = Y[j, l] = 1. It is linear in w because Z is part of y. Exact,
    all n! bijections for the whole batch: about a millisecond a sample at n = 7. The row and column sums of Y are the
    declared equalities.

    Args:
        nodes: n.
        first, second: directed edges (i, j) of the two graphs; give both directions where they are undirected.
        sense: "min" or "max".
    """

    def __init__(
        self,
        nodes: int,
        first: Sequence[tuple[int, int]],
        second: Sequence[tuple[int, int]],
        *,
        sense: Sense = "min",
    ) -> None:
        if not 1 <= nodes <= LARGEST:
            raise OptionError(
                f"QuadraticAssignment of {nodes} nodes: 1 to {LARGEST}; write larger ones as MILP"
            )
        self.nodes = nodes
        self.first, self.second = _edges(first, nodes), _edges(second, nodes)
        self.pairs = (len(self.first), len(self.second))
        super().__init__((nodes * nodes + len(self.first) * len(self.second),), sense=sense)
        self._terms = self._used()

    def _used(self) -> np.ndarray:
        """(n!, n + E1): the entries of y that are 1; the number of costs stands for an edge mapped onto none."""
        maps = np.array(list(permutations(range(self.nodes))), dtype=np.int64)
        unary = np.arange(self.nodes) * self.nodes + maps
        number = np.full((self.nodes, self.nodes), -1, dtype=np.int64)
        number[self.second[:, 0], self.second[:, 1]] = np.arange(len(self.second))
        onto = number[maps[:, self.first[:, 0]], maps[:, self.first[:, 1]]]
        size = self.nodes**2 + self.pairs[0] * self.pairs[1]
        pairs = self.nodes**2 + np.arange(self.pairs[0]) * self.pairs[1] + onto
        return np.concatenate((unary, np.where(onto < 0, size, pairs)), axis=1)

    def join(self, unary: Tensor, quadratic: Tensor) -> Tensor:
        """One cost vector of (*batch, n, n) and (*batch, E1, E2), differentiable."""
        if unary.shape[-2:] != (self.nodes, self.nodes) or quadratic.shape[-2:] != self.pairs:
            raise InputError(
                f"QuadraticAssignment: unary {tuple(unary.shape)} and quadratic {tuple(quadratic.shape)} costs, "
                f"expected (*batch, {self.nodes}, {self.nodes}) and (*batch, {self.pairs[0]}, {self.pairs[1]})"
            )
        return torch.cat((unary.flatten(-2), quadratic.flatten(-2)), dim=-1)

    def split(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """(Y, Z) from a vector like `join` makes."""
        unary, quadratic = y[..., : self.nodes**2], y[..., self.nodes**2 :]
        return unary.unflatten(-1, (self.nodes, self.nodes)), quadratic.unflatten(-1, self.pairs)

    def solve_numpy(self, costs: np.ndarray) -> np.ndarray:
        """The value of every bijection."""
        padded = np.concatenate((costs, np.zeros((len(costs), 1))), axis=1)
        together = max(1, TABLE // self._terms.size)
        y = np.zeros(padded.shape)
        for at in range(0, len(costs), together):
            best = padded[at : at + together][:, self._terms].sum(2).argmin(1)
            np.put_along_axis(y[at : at + together], self._terms[best], 1, axis=1)
        return y[:, :-1]

    def equalities(self, shape: Shape) -> np.ndarray | None:
        """Row and column sums of Y."""
        n = self.nodes
        lines = np.concatenate((np.kron(np.eye(n), np.ones(n)), np.kron(np.ones(n), np.eye(n))))
        return np.concatenate((lines, np.zeros((2 * n, shape[0] - n * n))), axis=1)


def _edges(edges: Sequence[tuple[int, int]], nodes: int) -> np.ndarray:
    array = np.asarray(edges, dtype=np.int64).reshape(-1, 2)
    if array.size and not (array.min() >= 0 and array.max() < nodes):
        raise InputError(f"QuadraticAssignment: an edge leads out of the nodes 0..{nodes - 1}")
    if len({tuple(edge) for edge in array.tolist()}) != len(array):
        raise InputError("QuadraticAssignment: an edge is given twice")
    return array


__all__ = ["QuadraticAssignment"]
