"""The identity experiments: one method, that is an estimator with a projection and a margin, applied to a solver.

In: a `Method` and a solver. Out: a module from costs to solutions that counts solver calls and time. Next file to read:
``results.py``.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from implicitdiff.combinatorial import (
    DiscreteLayer,
    Estimator,
    Identity,
    Rademacher,
    Solver,
    informed_margin,
    project,
)
from implicitdiff.combinatorial.base import Shape


@dataclass(frozen=True)
class Method:
    """What is compared.

    Attributes:
        name: As in the tables.
        estimator: The gradient. `Identity` has its projection inside.
        projection: In front of other estimators, by name; "none" for costs as they are.
        margin: a of the noise -a/2, +a/2 in training; 0 for none. It follows the projection, so that it is relative to
            costs of unit norm where the projection divides by it.
        informed: a of the informed margin, which needs the true solution; 0 for none.
        loss: "solution": a loss of the solution, through the layer; "spo+" or "fenchel-young": a loss of the costs that
            has an exact gradient; "costs": regression on the true costs, without a solver.
    """

    name: str
    estimator: Estimator
    projection: str = "none"
    margin: float = 0.0
    informed: float = 0.0
    loss: str = "solution"


def identity(projection: str, margin: float = 0.0, informed: float = 0.0, relative: bool = False) -> Method:
    """Identity with a projection by name, and a margin that is added as in the paper, or multiplies (relative)."""
    words = [_PROJECTIONS[projection]] + [f"{'relative ' * relative}noise {margin:g}"] * (margin > 0)
    words += [f"informed {informed:g}"] * (informed > 0)
    noise = Rademacher(margin) if margin else None
    name = "Identity" + (f", {', '.join(word for word in words if word)}" if any(words) else "")
    return Method(name, Identity(projection, noise, relative), informed=informed)


def other(
    name: str, estimator: Estimator, projection: str = "none", margin: float = 0.0, informed: float = 0.0
) -> Method:
    """Another estimator behind a projection, with a margin."""
    words = (
        [_PROJECTIONS[projection]]
        + [f"noise {margin:g}"] * (margin > 0)
        + [f"informed {informed:g}"] * (informed > 0)
    )
    full = name + "".join(f", {word}" for word in words if word)
    return Method(full, estimator, projection, margin, informed)


_PROJECTIONS = {
    "none": "",
    "mean": "P_mean",
    "norm": "P_norm",
    "std": "P_std",
    "affine": "P_aff",
    "auto": "P_aff then norm",
}


class Timed(Solver):
    """A solver with a clock (of the processor, so that other work does not count) and a counter."""

    def __init__(self, inner: Solver) -> None:
        super().__init__(inner.cost_shape, sense=inner.sense, domain=inner.domain)
        self.inner = inner
        self.seconds = 0.0
        self.instances = 0

    @property
    def name(self) -> str:
        """The inner solver's."""
        return self.inner.name

    def solve(self, costs: Tensor) -> Tensor:
        """Solve; add up time and instances."""
        start = time.process_time()
        found = self.inner.solve(costs)
        self.seconds += time.process_time() - start
        self.instances += len(costs)
        return found

    def equalities(self, shape: Shape) -> np.ndarray | None:
        """The inner solver's."""
        return self.inner.equalities(shape)

    def without_normals(self, w: Tensor) -> Tensor:
        """The inner solver's."""
        return self.inner.without_normals(w)


class Applied(nn.Module):
    """A method applied to a solver: costs to solutions."""

    def __init__(self, method: Method, solver: Solver, seed: int) -> None:
        super().__init__()
        # Estimators can have a state of their own, which must not pass from one run to the next.
        self.method = method = replace(method, estimator=copy.deepcopy(method.estimator))
        self.solver = Timed(solver)
        generator = torch.Generator().manual_seed(1000 + seed)
        self.generator = generator
        self.layer = DiscreteLayer(self.solver, method.estimator, domain="clamp", generator=generator)

    def forward(self, cost: Tensor, target: Tensor | None = None) -> Tensor:
        """Solutions; in training with the method's margin. `target` is what an informed margin needs."""
        method = self.method
        if not self.training:
            return cast(Tensor, self.layer(cost))
        if method.projection != "none":
            cost = project(self.solver, cost, method.projection)
        if method.informed and target is not None:
            # Relative to unit norm where Identity divides by it, as its own noise is.
            scale = self._scale(cost)
            cost = informed_margin(cost / scale, target, method.informed, self.solver.sense) * scale
        if method.margin:
            cost = cost + Rademacher(method.margin).draw(cost.detach(), self.generator)
        return cast(Tensor, self.layer(cost))

    def _scale(self, cost: Tensor) -> Tensor | float:
        norms = isinstance(self.method.estimator, Identity) and self.method.estimator.projection in (
            "norm", "std", "auto"
        )  # fmt: skip
        if not norms:
            return 1.0
        u = self.layer.projection.linear(cost.detach()).flatten(1)
        return torch.linalg.vector_norm(u, dim=1).reshape(-1, *(1,) * (cost.dim() - 1))

    def without_margin(self) -> None:
        """From now on train without noise."""
        method = self.method
        estimator = method.estimator
        if isinstance(estimator, Identity):
            estimator = replace(estimator, margin=None)
        self.method = replace(method, estimator=estimator, margin=0.0, informed=0.0)
        self.layer.estimator = estimator


__all__ = ["Applied", "Method", "Timed", "identity", "other"]
