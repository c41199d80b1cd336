"""The identity experiments: what one run gives, and means and spreads over seeds.

In: runs. Out: rows of a table. Next file to read: ``family.py``.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Point:
    """The state after an epoch: the mean norm of the costs that the network predicts, and the score on test data."""

    epoch: int
    norm: float
    score: float


@dataclass(frozen=True)
class Run:
    """One method, trained once.

    Attributes:
        family, method, seed: What was run.
        values: Named numbers at the end, on test data.
        calls: Instances solved in training, forward and backward.
        solver_seconds: Time inside the solver in training.
        seconds: Time of training.
        curve: The state after each epoch; empty where it is not followed.
    """

    family: str
    method: str
    seed: int
    values: Mapping[str, float]
    calls: int
    solver_seconds: float
    seconds: float
    curve: tuple[Point, ...] = field(default=())


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over seeds; of one seed the deviation is NaN."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan)

    def __str__(self) -> str:
        digits = 0 if abs(self.mean) >= 1000 else 1 if abs(self.mean) >= 10 else 2
        spread = "" if math.isnan(self.deviation) else f" ± {self.deviation:.{digits}f}"
        return f"{self.mean:.{digits}f}{spread}"


@dataclass(frozen=True)
class Summary:
    """All runs of one family, by method.

    Attributes:
        runs: In the order of the methods.
    """

    runs: tuple[Run, ...]

    def methods(self) -> list[str]:
        """The names, in order, each once."""
        return list(dict.fromkeys(run.method for run in self.runs))

    def of(self, method: str) -> list[Run]:
        """The runs of one method."""
        return [run for run in self.runs if run.method == method]

    def value(self, method: str, name: str) -> Spread:
        """One named number over seeds.

        Raises:
            KeyError: the method was not run.
        """
        found = [run.values[name] for run in self.of(method)]
        if not found:
            raise KeyError(method)
        return Spread.of(found)

    def mean(self, method: str, name: str) -> float:
        """The mean of a named number."""
        return self.value(method, name).mean

    def best(self, methods: Iterable[str], name: str, larger: bool = True) -> float:
        """The best mean among methods: what tuning over them would give."""
        return (max if larger else min)(self.mean(method, name) for method in methods)

    def calls(self, method: str) -> float:
        """Mean calls in training."""
        return statistics.fmean(run.calls for run in self.of(method))

    def seconds(self, method: str) -> Spread:
        """Time of training."""
        return Spread.of([run.seconds for run in self.of(method)])

    def solver_seconds(self, method: str) -> float:
        """Mean time inside of the solver in training."""
        return statistics.fmean(run.solver_seconds for run in self.of(method))


__all__ = ["Point", "Run", "Spread", "Summary"]
