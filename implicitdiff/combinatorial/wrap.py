"""Users' own functions as solvers: for whole batches, or one instance at a time, in threads or processes.

In: a function and declared facts. Out: a `Solver`. Next file to read: ``base.py``.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from implicitdiff.combinatorial.base import Domain, Sense, Shape, Solver
from implicitdiff.errors import ImplicitDiffError, InputError, OptionError, SolverError
from implicitdiff.torch_private import HOST

BatchFunction: TypeAlias = Callable[[Tensor], Any]


class FunctionSolver(Solver):
    """A function of costs (B, *shape) as a solver; made by `solver`."""

    def __init__(
        self,
        function: BatchFunction,
        cost_shape: tuple[int | None, ...],
        *,
        sense: Sense = "min",
        domain: Domain = "any",
        equalities: Any = None,
    ) -> None:
        super().__init__(cost_shape, sense=sense, domain=domain)
        self.function = function
        self.rows = None if equalities is None else np.asarray(equalities, dtype=float)

    @property
    def name(self) -> str:
        """The function's name."""
        return str(getattr(self.function, "__name__", type(self.function).__name__))

    def solve(self, costs: Tensor) -> Tensor:
        """Call the function with costs in its own sense."""
        # Copies in and out: a function may work in place, and keep what it returns.
        found = self.function(costs.clone() if self.sense == "min" else -costs)
        if found is None:
            raise SolverError(
                f"{self.name} returned None instead of solutions for {tuple(costs.shape)} costs"
            )
        return torch.as_tensor(found, device=costs.device).detach().to(costs, copy=True)

    def equalities(self, shape: Shape) -> np.ndarray | None:
        """As declared, each row over the flattened cost."""
        if self.rows is None:
            return None
        size = int(np.prod(shape))
        if self.rows.size % size:
            raise InputError(
                f"equalities of {self.name} have shape {self.rows.shape}; a cost has {size} entries, so rows of "
                f"{size} are expected"
            )
        return self.rows.reshape(-1, size)


def solver(
    function: BatchFunction,
    *,
    cost_shape: tuple[int | None, ...] = (None,),
    sense: Sense = "min",
    domain: Domain = "any",
    equalities: Any = None,
) -> FunctionSolver:
    """A function of your own as a solver.

    Args:
        function: of costs (B, *shape), detached, to solutions of the same shape (tensor or array). It must minimise, or
            maximise with sense="max"; nothing can test that it finds the optimum. `batched` makes one of a function
            that takes one instance.
        cost_shape: the shape of one cost, None for sizes that are free.
        sense: "min" or "max".
        domain: "any", "nonnegative" or "no_negative_cycle", see `Solver`.
        equalities: A, (rows, *shape), with A y the same for all solutions; what projection="auto" takes out.
    """
    return FunctionSolver(function, cost_shape, sense=sense, domain=domain, equalities=equalities)


class Batched:
    """A function of one instance as a function of a batch; made by `batched`."""

    def __init__(self, function: Callable[[np.ndarray], Any], executor: Any = None) -> None:
        if not (
            executor is None or isinstance(executor, concurrent.futures.Executor) or _runs_tasks(executor)
        ):
            raise OptionError(
                f"executor is {type(executor).__name__}: expected None, a concurrent.futures.Executor or a "
                "joblib.Parallel"
            )
        self.function = function
        self.executor = executor
        self.__name__ = str(getattr(function, "__name__", type(function).__name__))

    def __call__(self, costs: Tensor) -> Tensor:
        """Costs (B, *shape) to solutions, one call of the function for each; order is kept."""
        instances = list(costs.detach().to(HOST).numpy())
        found = []
        results = self._results(instances)
        for index, cost in enumerate(instances):
            try:
                result = next(results)
            except ImplicitDiffError as error:
                raise type(error)(f"sample {index}: {error}") from error
            except Exception as error:
                raise SolverError(
                    f"{self.__name__} failed for sample {index} of {len(instances)}: {error}"
                ) from error
            if result is None:
                raise SolverError(f"{self.__name__} returned None for sample {index} of {len(instances)}")
            array = np.asarray(result)
            if array.shape != cost.shape:
                raise SolverError(
                    f"{self.__name__} returned shape {array.shape} for sample {index}, whose cost has {cost.shape}"
                )
            found.append(array)
        return torch.as_tensor(np.stack(found), device=HOST).to(costs)

    def _results(self, instances: list[np.ndarray]) -> Iterator[Any]:
        if self.executor is None:
            return map(self.function, instances)
        if isinstance(self.executor, concurrent.futures.Executor):
            return iter(self.executor.map(self.function, instances))
        # A task of joblib is (function, args, kwargs), which is what joblib.delayed makes.
        return self._tasks(instances)

    def _tasks(self, instances: list[np.ndarray]) -> Iterator[Any]:
        yield from self.executor((self.function, (cost,), {}) for cost in instances)


def _runs_tasks(executor: Any) -> bool:
    return callable(executor) and any(base.__name__ == "Parallel" for base in type(executor).__mro__)


def batched(function: Callable[[np.ndarray], Any], executor: Any = None) -> Batched:
    """A function of one NumPy instance as a function of a batch, for `solver`.

    Serial by default: threads help only where one solve takes more than about 2 ms and releases Python's lock (HiGHS,
    large assignments), processes where it is slow Python (networkx).

    Args:
        function: of one cost, an array, to one solution of the same shape.
        executor: None; a `concurrent.futures.Executor` (threads, processes, a Dask client's `get_executor()`); or a
            `joblib.Parallel` with any of joblib's backends (loky, Dask, Ray).

    Raises:
        SolverError: by the result, where the function raised or returned None, with the sample's index.
    """
    return Batched(function, executor)


__all__ = ["Batched", "FunctionSolver", "batched", "solver"]
