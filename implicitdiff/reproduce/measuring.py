"""Experiments, one measurement: time and memory of the forward and of the backward pass of several methods.

In: `Method`s. Out: `Cost`s. Times by `diagnostics/race.py` in alternation, with one thread; memory is counted by the
meter, operation by operation, and does not depend on the machine. Used by fig1.py and fig3.py.
"""

import contextlib
import functools
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from implicitdiff.diagnostics.meter import measure
from implicitdiff.diagnostics.race import alternate, clock
from implicitdiff.errors import ImplicitDiffWarning

READING = 2e-3
"""Seconds of one reading of a time."""


@dataclass(frozen=True)
class Method:
    """One way to solve a problem and to differentiate the solution.

    Attributes:
        name: Of the method.
        forward: Solves; what it returns is handed to `backward`.
        backward: Gives the gradients, as often as it is called.
        held: Tensors that are there before and after: inputs and the cotangent.
    """

    name: str
    forward: Callable[[], Any]
    backward: Callable[[Any], Sequence[Tensor | None]]
    held: tuple[Tensor, ...]


@dataclass(frozen=True)
class Cost:
    """Of a method: medians and quartiles of its times in seconds, bytes alive at the peak with all inputs.

    The peak of the backward pass includes what the forward pass keeps for it.
    """

    forward: float
    forward_low: float
    forward_high: float
    backward: float
    backward_low: float
    backward_high: float
    forward_peak: int
    backward_peak: int

    @property
    def seconds(self) -> float:
        """Both passes."""
        return self.forward + self.backward

    @property
    def peak(self) -> int:
        """Of both passes."""
        return max(self.forward_peak, self.backward_peak)


def costs(methods: Sequence[Method], rounds: int) -> tuple[dict[str, Cost], dict[str, list[Tensor]]]:
    """(what each method costs, its gradients with zeros for None)."""
    runs: dict[str, Callable[[], Any]] = {}
    peaks: dict[str, tuple[int, int]] = {}
    gradients = {}
    for method in methods:
        method.forward()  # traces and plans
        held = sum(tensor.numel() * tensor.element_size() for tensor in method.held)
        state, forward = measure(method.forward)
        method.backward(state)  # the first backward pass of a plan also probes its structure
        found, backward = measure(method.backward, state)
        gradients[method.name] = [g.detach() for g in found if g is not None]
        peaks[method.name] = (held + forward.peak, held + forward.retained + backward.peak)
        runs[f"{method.name}/forward"] = method.forward
        runs[f"{method.name}/backward"] = functools.partial(method.backward, state)
    times = alternate(runs, rounds, READING)
    priced = {}
    for method in methods:
        there, back = times[f"{method.name}/forward"], times[f"{method.name}/backward"]
        numbers = (there.seconds, there.low, there.high, back.seconds, back.low, back.high)
        priced[method.name] = Cost(*numbers, *peaks[method.name])
    return priced, gradients


@contextlib.contextmanager
def one_quiet_thread(cpu_clock: bool = False) -> Iterator[None]:
    """One thread, no denormal numbers, no warnings of ours, the clock asked for; all of it is put back."""
    threads = torch.get_num_threads()
    token = clock.set(time.process_time if cpu_clock else time.perf_counter)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ImplicitDiffWarning)
            yield
    finally:
        clock.reset(token)
        torch.set_num_threads(threads)
        torch.set_flush_denormal(False)


def cosine_and_norm(found: Tensor, exact: Tensor) -> tuple[float, float]:
    """(cosine of the angle between a gradient and the exact one, length over the exact length)."""
    a, b = found.double().flatten(), exact.double().flatten()
    return float(a @ b / (a.norm() * b.norm())), float(a.norm() / b.norm())
