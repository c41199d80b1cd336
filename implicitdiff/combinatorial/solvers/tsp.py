"""The symmetric travelling salesman, exactly: by dynamic programming, or by cutting planes for more cities.

In: edge costs (B, n (n - 1) / 2). Out: 0/1 indicators of the edges of a tour. Next file to read: ``quadratic.py``.
"""

from __future__ import annotations

import functools
from itertools import combinations

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from implicitdiff.combinatorial.base import NumpySolver, Sense, Shape
from implicitdiff.combinatorial.solvers.milp import each_sample, highs
from implicitdiff.errors import InputError, OptionError, SolverError

DYNAMIC_UP_TO = 12
# Floats of one table of candidates; a batch is cut into parts that need no more.
TABLE = 2**22


class TSP(NumpySolver):
    """min <w, y> over the tours through n cities, w and y over the edges i < j of the complete graph, any signs.

    Up to 12 cities by Held and Karp's dynamic programming for the whole batch, O(2^n n^2): 0.03 ms a sample at n = 5,
    1.4 at 10, 8 at 12. Beyond by integer programs with subtour cuts, about 30 ms a sample at n = 20. Both exact. Every
    city has two edges of a tour: the incidence matrix holds the declared equalities, and "mean" is among them.

    Args:
        cities: n >= 3.
        sense: "min" or "max".
        method: "auto", "dynamic" or "cuts".
    """

    def __init__(self, cities: int, *, sense: Sense = "min", method: str = "auto") -> None:
        if cities < 3:
            raise OptionError(f"TSP of {cities} cities: expected at least 3")
        if method not in ("auto", "dynamic", "cuts"):
            raise OptionError(f"method={method!r} of TSP: one of auto, dynamic, cuts")
        super().__init__((cities * (cities - 1) // 2,), sense=sense)
        self.cities = cities
        self.tail, self.head = np.triu_indices(cities, 1)
        small = cities <= DYNAMIC_UP_TO
        self.method = ("dynamic" if small else "cuts") if method == "auto" else method
        self._edge = np.zeros((cities, cities), dtype=np.int64)
        self._edge[self.tail, self.head] = self._edge[self.head, self.tail] = np.arange(len(self.tail))

    def edge_costs(self, distances: Tensor) -> Tensor:
        """Costs (*batch, n (n - 1) / 2) from symmetric matrices (*batch, n, n), differentiable."""
        if distances.shape[-2:] != (self.cities, self.cities):
            raise InputError(
                f"distances have shape {tuple(distances.shape)}, expected (*batch, {self.cities}, {self.cities})"
            )
        return distances[..., torch.from_numpy(self.tail), torch.from_numpy(self.head)]

    def solve_numpy(self, costs: np.ndarray) -> np.ndarray:
        """By the chosen method."""
        if self.method == "cuts":
            return each_sample(self._cuts, costs)
        plan = _plan(self.cities)
        together = max(1, TABLE // max(level.previous.size for level in plan.levels))
        parts = [self._held_karp(costs[at : at + together], plan) for at in range(0, len(costs), together)]
        return np.concatenate(parts)

    def _held_karp(self, costs: np.ndarray, plan: Plan) -> np.ndarray:
        """length[S, j]: the shortest way from the last city through all of S, ending at j in S."""
        batch, last = len(costs), self.cities - 1
        length = np.empty((batch, plan.states))
        length[:, plan.singles] = costs[:, self._edge[last, :last]]
        came = np.zeros((batch, plan.states), dtype=np.int64)
        for level in plan.levels:
            ways = length[:, level.previous] + costs[:, self._edge[level.before, level.city[:, None]]]
            best = ways.argmin(2)
            length[:, level.states] = np.take_along_axis(ways, best[..., None], 2)[..., 0]
            came[:, level.states] = level.previous[np.arange(len(level.states)), best]
        closing = length[:, plan.full] + costs[:, self._edge[last, :last]]
        state = plan.full[closing.argmin(1)]
        y = np.zeros(costs.shape)
        rows = np.arange(batch)
        y[rows, self._edge[last, plan.city_of[state]]] = 1
        for _ in range(self.cities - 2):
            before = came[rows, state]
            y[rows, self._edge[plan.city_of[before], plan.city_of[state]]] = 1
            state = before
        y[rows, self._edge[last, plan.city_of[state]]] = 1
        return y

    def _cuts(self, cost: np.ndarray) -> np.ndarray:
        """Degree constraints first; then for each solution of several circles, that two edges must leave each."""
        size, n = len(cost), self.cities
        constraints = [LinearConstraint(self._incidence(), 2, 2)]
        bounds, whole = Bounds(0, 1), np.ones(size, dtype=int)
        for _ in range(2**n):
            y = highs(cost, whole, bounds, constraints)
            used = y > 0.5
            graph = csr_matrix((np.ones(used.sum()), (self.tail[used], self.head[used])), shape=(n, n))
            parts, part = connected_components(graph, directed=False)
            if parts == 1:
                return y
            inside = part[None, :] == np.arange(parts)[:, None]
            leaving = (inside[:, self.tail] != inside[:, self.head]).astype(float)
            constraints.append(LinearConstraint(leaving, 2, np.inf))
        raise SolverError("the cuts of TSP did not end")

    def _incidence(self) -> np.ndarray:
        rows = np.zeros((self.cities, len(self.tail)))
        columns = np.arange(len(self.tail))
        rows[self.tail, columns] = rows[self.head, columns] = 1
        return rows

    def equalities(self, shape: Shape) -> np.ndarray | None:
        """Two edges at every city."""
        return self._incidence()


class Level:
    """All states (S, j) with |S| the same, and the states (S - j, k) they come from."""

    def __init__(
        self, states: np.ndarray, city: np.ndarray, previous: np.ndarray, before: np.ndarray
    ) -> None:
        self.states, self.city, self.previous, self.before = states, city, previous, before


class Plan:
    """The numbering of the states of Held and Karp's method for n cities; it does not depend on costs."""

    def __init__(self, cities: int) -> None:
        inner = range(cities - 1)
        number: dict[tuple[int, int], int] = {}
        for size in range(1, cities):
            for subset in combinations(inner, size):
                mask = sum(1 << city for city in subset)
                for city in subset:
                    number[mask, city] = len(number)
        self.states = len(number)
        self.city_of = np.array([city for _, city in number])
        self.singles = np.array([number[1 << city, city] for city in inner])
        everything = (1 << (cities - 1)) - 1
        self.full = np.array([number[everything, city] for city in inner])
        self.levels = []
        for size in range(2, cities):
            states, ends, previous, before = [], [], [], []
            for subset in combinations(inner, size):
                mask = sum(1 << city for city in subset)
                for end in subset:
                    others = [city for city in subset if city != end]
                    states.append(number[mask, end])
                    ends.append(end)
                    previous.append([number[mask ^ (1 << end), city] for city in others])
                    before.append(others)
            self.levels.append(Level(np.array(states), np.array(ends), np.array(previous), np.array(before)))


@functools.lru_cache(maxsize=8)
def _plan(cities: int) -> Plan:
    return Plan(cities)


__all__ = ["TSP"]
