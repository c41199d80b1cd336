"""What a discrete layer has seen: solver calls, sizes of costs and gradients, and whether the costs collapse.

In: plain tensors of each forward and backward pass. Out: `Diagnostics`, a frozen record that names what is wrong.
Nothing here waits for a device; numbers are read when they are asked for.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from implicitdiff.combinatorial.projections import Projection

COLLAPSE = 0.05
# The first passes are all measured, later ones at this interval, so that measuring costs next to nothing.
INTERVAL = 10


@dataclass(frozen=True)
class Diagnostics:
    """The state of a `DiscreteLayer`; means are over the samples of the last pass that was measured: each of the first
    ten passes is, then every tenth.

    Attributes:
        solver_calls: instances solved so far, in forward and backward passes.
        cost_norm: mean |L w|, with L the linear part of the projection: what of a cost can matter.
        largest_cost_norm: the largest such mean seen.
        zero_gradients: the share of samples whose incoming gradient g is exactly zero.
        cosine: mean cosine of g and -dl/dw where neither is zero; -dl/dw is P'(w)^T g for `Identity`. NaN while
            there was no backward pass.
        boundary: the share of entries, in all costs solved so far, that were clamped to the boundary of the domain.
        verdict: "ok", or what is wrong and what helps.
    """

    solver_calls: int
    cost_norm: float
    largest_cost_norm: float
    zero_gradients: float
    cosine: float
    boundary: float
    verdict: str

    @property
    def collapsed(self) -> bool:
        """Whether the costs have shrunk to where all solutions tie."""
        return self.verdict.startswith("cost collapse")

    def __str__(self) -> str:
        return (
            f"solver calls {self.solver_calls}, |L w| {self.cost_norm:.3g} (largest {self.largest_cost_norm:.3g}), "
            "zero "
            f"gradients {self.zero_gradients:.0%}, cos(g, -dl/dw) {self.cosine:.3g}, at the boundary "
            f"{self.boundary:.0%}: {self.verdict}"
        )


class Tally:
    """Counters and last values; several threads may add to one tally."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Forget everything seen."""
        self._instances = 0
        self._clamped = 0
        self._entries = 0
        self._forwards = 0
        self._backwards = 0
        self._norm: Tensor | None = None
        self._largest: Tensor | None = None
        self._zero: Tensor | None = None
        self._cosine: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._lock = threading.Lock()

    @property
    def instances(self) -> int:
        """Instances solved so far."""
        return self._instances

    def calls(self, instances: int) -> None:
        """Count solved instances."""
        with self._lock:
            self._instances += instances

    def boundary(self, clamped: int, entries: int) -> None:
        """Count entries of costs, and those that were clamped."""
        with self._lock:
            self._clamped += clamped
            self._entries += entries

    def costs(self, projection: Projection, w: Tensor) -> None:
        """Note the costs (B, *shape) of a forward pass."""
        self._forwards += 1
        if w.numel() == 0 or _passed_over(self._forwards):
            return
        norm = torch.linalg.vector_norm(projection.linear(w).flatten(1), dim=1).mean()
        with self._lock:
            self._norm = norm
            self._largest = norm if self._largest is None else torch.maximum(self._largest, norm)

    def gradients(self, g: Tensor, outgoing: Tensor) -> None:
        """Note the gradients g = dl/dy and dl/dw of a backward pass."""
        self._backwards += 1
        if g.numel() == 0 or _passed_over(self._backwards):
            return
        flat, other = g.flatten(1), outgoing.flatten(1)
        sizes = torch.linalg.vector_norm(flat, dim=1)
        products = sizes * torch.linalg.vector_norm(other, dim=1)
        there = products > 0
        inner = (flat * other).sum(1)
        cosines = -inner / products.where(there, torch.ones_like(products))
        with self._lock:
            self._zero = (sizes == 0).to(g.dtype).mean()
            self._cosine = cosines.where(there, torch.zeros_like(cosines)).sum() / there.sum()

    def diagnostics(self) -> Diagnostics:
        """The record of this moment."""
        with self._lock:
            norm, largest = _number(self._norm), _number(self._largest)
            zero, cosine = _number(self._zero), _number(self._cosine)
            boundary = self._clamped / self._entries if self._entries else 0.0
            instances = self._instances
        return Diagnostics(
            instances, norm, largest, zero, cosine, boundary, _verdict(norm, largest, zero, boundary)
        )


def _passed_over(count: int) -> bool:
    return count > INTERVAL and count % INTERVAL != 0


def _number(value: Tensor | None) -> float:
    return float("nan") if value is None else float(value)


def _verdict(norm: float, largest: float, zero: float, boundary: float) -> str:
    if norm < COLLAPSE * largest or norm == 0:
        return (
            f"cost collapse: mean |L w| fell from {largest:.3g} to {norm:.3g}, where all solutions tie; use a "
            "projection with norm (projection='auto'), or a margin (margin=Rademacher(a))"
        )
    if boundary > 0.5:
        return "most costs are at the boundary of the domain: predict larger ones, or make them positive by softplus"
    if zero == 1:
        return "all gradients are zero: the loss is at its target, or does not depend on the solution"
    return "ok"


__all__ = ["Diagnostics", "Tally"]
