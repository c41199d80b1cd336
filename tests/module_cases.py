"""Problems for the tests of the layer as a module: each with a Parameter, its layer's in_dims and inputs.

They are defined here, not in a test, so that a spawned process can import them. `CASES` names what each one covers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import implicitdiff as idf
from implicitdiff.layer import DeclarativeLayer
from implicitdiff.problems import OptimalTransport, RobustPooling
from tests.small_problems import Quartic, draw


class Running(idf.Problem):
    """minimise over u  theta/2 |cumsum(u) - x|^2 + |u|^2 / 2 + w' u^3 / 12  s.t.  a'u = 1, sum(u_1, u_2) = 0.3.

    A running sum has no rule in the structured plan, so the dense one is taken; `solve` is Newton's method in numpy,
    as a user's own solver would be. The input a is shared, theta and w are Parameters.
    """

    def __init__(self) -> None:
        super().__init__()
        self.theta = torch.nn.Parameter(torch.tensor(1.7, dtype=torch.float64))
        self.w = torch.nn.Parameter(torch.tensor([0.2, -0.1, 0.3, 0.1], dtype=torch.float64))

    def objective(self, u, x, a):
        fit = self.theta / 2 * ((torch.cumsum(u, 0) - x) ** 2).sum()
        return fit + (u * u).sum() / 2 + (self.w * u**3).sum() / 12

    def equality(self, u, x, a):
        return {"plane": a @ u - 1, "pair": u[:2].sum() - 0.3}

    def init(self, x, a):
        return torch.zeros_like(x)

    def solve(self, x, a):
        target, plane = x.detach().cpu().double().numpy(), a.detach().cpu().double().numpy()
        theta, w = float(self.theta), self.w.detach().cpu().double().numpy()
        batch, m = target.shape
        if batch == 0:
            return torch.zeros_like(x)
        running = np.tril(np.ones((m, m)))
        rows = np.stack([plane, np.broadcast_to(np.arange(m) < 2, plane.shape)], 1)
        z = np.zeros((batch, m + 2))
        for _ in range(6):
            u = z[:, :m]
            slope = theta * (u @ running.T - target) @ running + u + w * u**2 / 4
            curvature = np.zeros((batch, m + 2, m + 2))
            curvature[:, :m, :m] = theta * running.T @ running + np.eye(m)
            curvature[:, range(m), range(m)] += w * u / 2
            curvature[:, m:, :m], curvature[:, :m, m:] = rows, rows.transpose(0, 2, 1)
            slack = np.einsum("bpm,bm->bp", rows, u) - np.array([1.0, 0.3])
            residual = np.concatenate([slope + np.einsum("bp,bpm->bm", z[:, m:], rows), slack], 1)
            z = z - np.linalg.solve(curvature, residual[:, :, None])[:, :, 0]
        return torch.from_numpy(z[:, :m]).to(x)


@dataclass(frozen=True)
class Case:
    """A problem with Parameters, as a layer.

    Attributes:
        name: for the test's id.
        make: the problem, in float64.
        in_dims: the layer's.
        inputs: (batch, seed) -> inputs in float64 that require gradients.
        entries: how many entries one sample's u has.
        structured: whether the plan is the structured one.
    """

    name: str
    make: Callable[[], idf.Problem]
    in_dims: Any
    inputs: Callable[[int, int], tuple[Tensor, ...]]
    entries: int
    structured: bool

    def layer(self, **options: Any) -> DeclarativeLayer:
        """A fresh layer."""
        return DeclarativeLayer(self.make(), in_dims=self.in_dims, **options)


def _parameter(value: float) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor(value, dtype=torch.float64))


def _pooling() -> idf.Problem:
    return RobustPooling("pseudo-huber", alpha=_parameter(0.8))


def _transport() -> idf.Problem:
    return OptimalTransport(gamma=_parameter(2.5))


def _costs(batch: int, seed: int) -> tuple[Tensor, ...]:
    costs = draw(batch, 3, 4, seed=seed, scale=0.4)
    r = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64, requires_grad=True)
    c = torch.tensor([0.1, 0.4, 0.3, 0.2], dtype=torch.float64, requires_grad=True)
    return costs, r, c


def _plane(batch: int, seed: int, size: int) -> tuple[Tensor, ...]:
    return draw(batch, size, seed=seed), draw(size, seed=seed + 1, scale=0.2, shift=1.0)


CASES = (
    Case("pooling", _pooling, 0, lambda batch, seed: (draw(batch, 3, 5, seed=seed),), 3, True),
    Case("transport", _transport, (0, None, None), _costs, 12, True),
    Case("quartic", Quartic, (0, None), lambda batch, seed: _plane(batch, seed, 3), 3, True),
    Case("running", Running, (0, None), lambda batch, seed: _plane(batch, seed, 4), 4, False),
)
BY_NAME = {case.name: case for case in CASES}


def run(layer: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """(u, a gradient per input, a gradient per Parameter) of a fixed loss that weighs every entry of u differently."""
    u = layer(*inputs)
    weight = torch.linspace(0.5, 1.5, u.numel(), dtype=u.dtype, device=u.device).reshape(u.shape)
    return u.detach(), *torch.autograd.grad((weight * u**2).sum(), (*inputs, *layer.parameters()))


def plain(inputs: tuple[Tensor, ...], **to: Any) -> tuple[Tensor, ...]:
    """Fresh leaves of the same values, moved as `Tensor.to` does."""
    return tuple(tensor.detach().to(**to).requires_grad_() for tensor in inputs)
