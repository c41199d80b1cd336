"""What all optimizers share: limits of iterations and time, the report of progress, the check of options.

The options of an optimizer come in; a `Watch` goes out, which every walk asks before each step. Next: newton.py,
lbfgs.py and the others, which use it.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from implicitdiff.errors import OptionError
from implicitdiff.optimizers.iterate import Point, System


@dataclass(frozen=True)
class Progress:
    """What a `callback` is told before each iteration, and once more at the end of a walk.

    Attributes:
        iteration: Iterations of the walk so far, 0 at the start; a walk that is taken up again (from a saddle)
            counts on.
        residual: The relative residual of every sample (B,); a sample is optimal where it is <= tol.
        active: The samples that go on (B,) bool; the others keep their bits.
    """

    iteration: int
    residual: Tensor
    active: Tensor


Callback = Callable[[Progress], object]


class Watch:
    """One call's clock and its reports; made anew for each call, so that optimizers hold no state."""

    def __init__(self, time_limit: float | None, callback: Callback | None) -> None:
        """Starts the clock.

        Args:
            time_limit: Seconds of wall-clock time, or None.
            callback: Called with a `Progress`; what it returns is ignored, what it raises is passed on.
        """
        self._deadline = None if time_limit is None else time.monotonic() + time_limit
        self._callback = callback
        self._iteration = 0

    def over(self) -> bool:
        """Whether the time is up. A step that has begun is finished."""
        return self._deadline is not None and time.monotonic() >= self._deadline

    def goes_on(self, residual: Tensor, active: Tensor) -> bool:
        """Report, and say whether there is another iteration: somebody is active and there is time."""
        if self._callback is not None:
            self._callback(Progress(self._iteration, residual, active))
        self._iteration += 1
        return bool(active.any()) and not self.over()

    def silent(self) -> "Watch":
        """The same clock without reports, for a walk inside another."""
        inner = Watch(None, None)
        inner._deadline = self._deadline
        return inner


def check_limits(name: str, tol: float | None, time_limit: float | None, callback: object) -> None:
    """Check the options that every optimizer has.

    Raises:
        OptionError: One of them is wrong; the message names it and what is expected.
    """
    if tol is not None:
        check_positive(name, "tol", tol, "a positive number or None")
    if time_limit is not None:
        check_positive(name, "time_limit", time_limit, "a positive number of seconds or None")
    if callback is not None and not callable(callback):
        raise OptionError(f"{name}(callback=...) must be callable or None, got {callback!r}")


def check_positive(
    name: str, option: str, value: object, expected: str = "a positive number", below: float = float("inf")
) -> None:
    """Raise OptionError unless 0 < value < below."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < below:  # type: ignore[operator]
        raise OptionError(f"{name}({option}=...) must be {expected}, got {value!r}")


def check_whole(name: str, option: str, value: object, least: int) -> None:
    """Raise OptionError unless the value is an integer >= least."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise OptionError(f"{name}({option}=...) must be an integer >= {least}, got {value!r}")


def refuse_constraints(name: str, system: System) -> None:
    """Raise OptionError if the problem has constraints, for the optimizers that know of none."""
    if system.constraints:
        count = f"{system.constraints} equality constraint{'s' if system.constraints > 1 else ''}"
        raise OptionError(
            f"{name} is for problems without constraints, and this one has {count}: use AugmentedLagrangian(), "
            "Newton() or SciPy(method='SLSQP'), or leave optimizer= out"
        )


def tolerances(point: Point, tol: float) -> Tensor:
    """The same tolerance for every sample (B,)."""
    return torch.full_like(point.value, tol)
