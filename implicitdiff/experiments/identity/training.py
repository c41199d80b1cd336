"""The identity experiments: what the training loops of all families share.

In: data and an applied method. Out: batches, a stop watch, the norm of predicted costs. Next file to read:
``families/terrain.py``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from implicitdiff.errors import ImplicitDiffError
from implicitdiff.experiments.identity.applied import Applied
from implicitdiff.experiments.identity.results import Point, Run


def batches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of all samples in random order, in parts."""
    order = torch.randperm(count, generator=generator, device=generator.device)
    return iter(order.split(size))


class Watch:
    """Time, calls and the curve of one training; evaluation in between is not counted."""

    def __init__(self, applied: Applied) -> None:
        self.applied = applied
        self.curve: list[Point] = []
        self.seconds, self.solver_seconds, self.calls = 0.0, 0.0, 0
        self._begin()

    def _begin(self) -> None:
        self._start = time.process_time()
        self._solver, self._calls = self.applied.solver.seconds, self.applied.solver.instances

    def pause(self) -> None:
        """Add up what happened since the last resumption."""
        self.seconds += time.process_time() - self._start
        self.solver_seconds += self.applied.solver.seconds - self._solver
        self.calls += self.applied.solver.instances - self._calls

    def resume(self) -> None:
        """Go on."""
        self._begin()

    def run(self, family: str, seed: int, values: dict[str, float]) -> Run:
        """The result."""
        return Run(
            family,
            self.applied.method.name,
            seed,
            values,
            self.calls,
            self.solver_seconds,
            self.seconds,
            tuple(self.curve),
        )


def mean_norm(applied: Applied, cost: Tensor) -> float:
    """mean |w| over samples, of the part of a cost that can matter."""
    kept = applied.solver.without_normals(cost.detach())
    return float(torch.linalg.vector_norm(kept.flatten(1), dim=1).mean())


def digits(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """scikit-learn's handwritten digits: images (1797, 64) in [0, 1], labels (1797,).

    Raises:
        ImplicitDiffError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as missing:
        raise ImplicitDiffError(
            "these experiments need scikit-learn's digits: pip install scikit-learn, or implicitdiff[demo]"
        ) from missing
    data: Any = load_digits()
    home = torch.Generator().device
    images = torch.as_tensor(data.data / 16, dtype=dtype, device=home)
    return images, torch.as_tensor(data.target, dtype=torch.int64, device=home)


__all__ = ["Watch", "batches", "digits", "mean_norm"]
