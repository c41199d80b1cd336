"""Random parameters for operators, and the numpy helpers that write their dense twins down.

In: a batch size and which parameters are shared. Out: ``Draw``, ``Row``. Next: tests/operator_cases.py.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from implicitdiff.operators import (
    LinearOperator,
)

BATCHES = {
    "batch 0": (0, "own"),
    "batch 1": (1, "own"),
    "batch 3": (3, "own"),
    "all shared": (1, "own"),
    "first shared": (3, "first shared"),
    "others shared": (3, "others shared"),
}
"""Batch size of the operator, and which of its parameters have batch axis 1."""

Twin = tuple[LinearOperator, np.ndarray]


class Draw:
    """Random parameters with a batch axis, some of them shared by the batch."""

    def __init__(
        self, batch: int, sharing: str = "own", dtype: torch.dtype = torch.float64, seed: int = 0
    ) -> None:
        self.batch = batch
        self.dtype = dtype
        self._sharing = sharing
        self._drawn = 0
        self._generator = torch.Generator().manual_seed(seed)

    def _axis(self) -> int:
        self._drawn += 1
        shared = {"own": False, "first shared": self._drawn == 1, "others shared": self._drawn > 1}[
            self._sharing
        ]
        return 1 if shared else self.batch

    def normal(self, *shape: int) -> Tensor:
        """Normal entries, (B or 1, *shape)."""
        values = torch.randn(self._axis(), *shape, generator=self._generator, dtype=torch.float64)
        return values.to(self.dtype)

    def positive(self, *shape: int) -> Tensor:
        """Entries between 0.5 and 2."""
        values = torch.rand(self._axis(), *shape, generator=self._generator, dtype=torch.float64)
        return (0.5 + 1.5 * values).to(self.dtype)

    def signed(self, *shape: int) -> Tensor:
        """Entries of both signs, between 0.5 and 2 in size."""
        values = self.positive(*shape)
        flip = torch.rand(shape, generator=self._generator, dtype=torch.float64) < 0.5
        flip.view(-1)[:1] = True
        return torch.where(flip, -values, values)

    def definite(self, *shape: int) -> Tensor:
        """Positive definite matrices, shape (..., s): (B or 1, ..., s, s), eigenvalues of 0.5 and above."""
        size = shape[-1]
        root = self.normal(*shape, size + 2)
        return root @ root.mT / size + 0.5 * torch.eye(size, dtype=self.dtype)


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        name: what is special about it.
        build: draws the parameters, returns the operator and its twin (B, m, m).
        singular: whether the matrices are singular, with a kernel that the operator states or that a solver
            has to find; solvers are then compared with the pseudo-inverse.
    """

    name: str
    build: Callable[[Draw], Twin]
    singular: bool = False


def array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().to(torch.float64).numpy()


def batched(*arrays: np.ndarray) -> list[np.ndarray]:
    """Repeat shared arrays (axis 0 of size 1) to the common batch."""
    batch = next((a.shape[0] for a in arrays if a.shape[0] != 1), 1)
    return [np.broadcast_to(a, (batch, *a.shape[1:])) for a in arrays]


def assemble(parts: list[list[np.ndarray | None]], sizes: tuple[int, ...]) -> np.ndarray:
    """Write a grid of batched blocks into one array (B, m, m)."""
    batch = next((p.shape[0] for row in parts for p in row if p is not None and p.shape[0] != 1), 1)
    twin = np.zeros((batch, sum(sizes), sum(sizes)))
    starts = np.concatenate([[0], np.cumsum(sizes)])
    for i, row in enumerate(parts):
        for j, part in enumerate(row):
            if part is not None:
                twin[:, starts[i] : starts[i + 1], starts[j] : starts[j + 1]] = part
    return twin


def diagonals(values: Tensor) -> np.ndarray:
    return array(values)[:, :, None] * np.eye(values.shape[-1])
