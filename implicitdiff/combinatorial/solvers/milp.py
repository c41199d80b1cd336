"""Integer linear programs, by HiGHS in SciPy.

In: costs (B, n). Out: solutions, whole where they must be. Next file to read: ``tsp.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from implicitdiff.combinatorial.base import NumpySolver, Sense, Shape
from implicitdiff.errors import InfeasibleError, InputError, OptionError, SolverError

# HiGHS takes 1e-7 as zero and stops 1e-6 from the optimum, in absolute numbers: small costs would all be ties.
LARGEST_COST = 1e4
INFEASIBLE, UNBOUNDED = 2, 3


def highs(
    cost: np.ndarray,
    integrality: np.ndarray,
    bounds: Bounds,
    constraints: list[LinearConstraint],
    time_limit: float | None = None,
) -> np.ndarray:
    """An optimal x of one program; costs are scaled first, and the relative gap is zero.

    Raises:
        InfeasibleError: no point satisfies the constraints.
        SolverError: unbounded, out of time, or HiGHS failed; the message has its status.
    """
    largest = np.abs(cost).max(initial=0.0)
    scaled = cost * (LARGEST_COST / largest) if largest > 0 else cost
    options = {"mip_rel_gap": 0.0, "disp": False}
    if time_limit is not None:
        options["time_limit"] = time_limit
    found = milp(scaled, integrality=integrality, bounds=bounds, constraints=constraints, options=options)
    if found.status == INFEASIBLE:
        raise InfeasibleError(f"no point satisfies the constraints: {found.message}")
    if found.status != 0 or found.x is None:
        raise SolverError(f"HiGHS stopped with status {found.status}: {found.message}")
    x = np.asarray(found.x)
    return np.where(integrality > 0, np.round(x), x)


def each_sample(
    solve: Callable[[np.ndarray], np.ndarray], costs: np.ndarray, executor: Executor | None = None
) -> np.ndarray:
    """solve(cost) for every sample, its index added to the errors it raises."""
    results = iter(map(solve, costs) if executor is None else executor.map(solve, costs))
    found = []
    for sample in range(len(costs)):
        try:
            found.append(next(results))
        except (InfeasibleError, SolverError) as error:
            raise type(error)(f"sample {sample}: {error}") from error
    return np.stack(found)


class MILP(NumpySolver):
    """min <w, y> over y with lower <= y <= upper, A_eq y = b_eq, A_ub y <= b_ub and some entries whole; costs of any
    sign.

    By HiGHS, at least about 5 ms a sample. Y is finite, as theory wants it, if the bounds are and all entries are
    whole. The rows of A_eq are the declared equalities.

    Args:
        size: n.
        A_eq, b_eq, A_ub, b_ub: constraints, or None.
        lower, upper: bounds, numbers or (n,).
        integer: which entries are whole: True, False or a mask (n,).
        sense: "min" or "max".
        executor: a ThreadPoolExecutor to solve samples side by side (HiGHS releases Python's lock), or None.
        time_limit: seconds a sample, after which it counts as not solved.
    """

    def __init__(
        self,
        size: int,
        *,
        A_eq: Any = None,
        b_eq: Any = None,
        A_ub: Any = None,
        b_ub: Any = None,
        lower: Any = 0.0,
        upper: Any = 1.0,
        integer: Any = True,
        sense: Sense = "min",
        executor: Executor | None = None,
        time_limit: float | None = None,
    ) -> None:
        super().__init__((size,), sense=sense)
        self.A_eq, self.b_eq = self._constraint(A_eq, b_eq, size, "eq")
        self.A_ub, self.b_ub = self._constraint(A_ub, b_ub, size, "ub")
        self.lower = np.broadcast_to(np.asarray(lower, dtype=float), (size,))
        self.upper = np.broadcast_to(np.asarray(upper, dtype=float), (size,))
        self.integer = np.broadcast_to(np.asarray(integer, dtype=bool), (size,)).astype(int)
        if time_limit is not None and not time_limit > 0:
            raise OptionError(f"time_limit={time_limit} of {self.name}: expected seconds > 0")
        self.executor = executor
        self.time_limit = time_limit

    def _constraint(self, A: Any, b: Any, size: int, which: str) -> tuple[np.ndarray, np.ndarray]:
        if (A is None) != (b is None):
            raise InputError(f"{self.name}: A_{which} and b_{which} belong together, one of them is missing")
        matrix = np.zeros((0, size)) if A is None else np.asarray(A, dtype=float)
        rhs = np.zeros(0) if b is None else np.asarray(b, dtype=float).reshape(-1)
        if matrix.shape != (len(rhs), size):
            raise InputError(
                f"{self.name}: A_{which} has shape {matrix.shape}, expected ({len(rhs)}, {size}) for b_{which} and "
                f"{size} costs"
            )
        return matrix, rhs

    def solve_numpy(self, costs: np.ndarray) -> np.ndarray:
        """One program a sample."""
        constraints = []
        if len(self.b_eq):
            constraints.append(LinearConstraint(self.A_eq, self.b_eq, self.b_eq))
        if len(self.b_ub):
            constraints.append(LinearConstraint(self.A_ub, -math.inf, self.b_ub))
        bounds = Bounds(self.lower, self.upper)

        def one(cost: np.ndarray) -> np.ndarray:
            return highs(cost, self.integer, bounds, constraints, self.time_limit)

        return each_sample(one, costs, self.executor)

    def equalities(self, shape: Shape) -> np.ndarray | None:
        """A_eq."""
        return self.A_eq if len(self.A_eq) else None


class SetCover(MILP):
    """min <w, y> over the families of sets that cover every element: y in {0, 1}^n with M y >= 1; costs of any sign.

    Args:
        membership: M, (elements, n): whether an element is in a set.
        sense: "min" or "max".
        executor, time_limit: as for `MILP`.

    Raises:
        InfeasibleError: an element is in no set.
    """

    def __init__(
        self,
        membership: Any,
        *,
        sense: Sense = "min",
        executor: Executor | None = None,
        time_limit: float | None = None,
    ) -> None:
        matrix = np.asarray(membership).astype(bool)
        if matrix.ndim != 2:
            raise InputError(f"SetCover: membership has shape {matrix.shape}, expected (elements, sets)")
        lost = np.flatnonzero(~matrix.any(1))
        if len(lost):
            raise InfeasibleError(f"SetCover: element {lost[0]} is in no set")
        super().__init__(
            matrix.shape[1],
            A_ub=-matrix.astype(float),
            b_ub=-np.ones(len(matrix)),
            sense=sense,
            executor=executor,
            time_limit=time_limit,
        )


__all__ = ["MILP", "SetCover", "each_sample", "highs"]
