"""Systems of equations for the tests, none with a symmetric Jacobian, and the dense formula -J^-1 D_x r for them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import implicitdiff as idf


class Cubic(idf.Root):
    """W u + u^3 / 10 = b + s sin(u_(k+1)), with W a shared input and s a Parameter: 3 unknowns, not symmetric."""

    def __init__(self) -> None:
        super().__init__()
        self.s = torch.nn.Parameter(torch.tensor([0.3, -0.4, 0.2], dtype=torch.float64))

    def residual(self, u, W, b):
        return W @ u + 0.1 * u**3 - b - self.s * torch.sin(u.roll(1))

    def init(self, W, b):
        return torch.zeros_like(b)


class Tree(idf.Root):
    """Two unknowns in a dict, one 0-dim; the residual is a tuple of other shapes; inputs in a dict, and a number."""

    def residual(self, u, x, power):
        a, t = u["a"], u["t"]
        first = a[:2] * (1.5 + torch.sigmoid(t)) - x["p"][:2] + 0.2 * a[2] ** power
        second = torch.stack([a[2] * 2 + torch.tanh(a[0] * t) - x["p"][2], 3 * t + a.sum() * x["q"]])
        return first, second

    def init(self, x, power):
        return {"a": torch.zeros_like(x["p"]), "t": torch.zeros_like(x["q"])}


class Equilibrium(idf.FixedPoint):
    """u = tanh(mix u + x + bias), a layer of four units, with a weight that is no contraction times `gain`."""

    def __init__(self, gain: float = 0.5) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        weight = torch.randn(4, 4, generator=generator, dtype=torch.float64)
        self.mix = torch.nn.Parameter(gain * weight)
        self.bias = torch.nn.Parameter(torch.randn(4, generator=generator, dtype=torch.float64))

    def step(self, u, x):
        return torch.tanh(self.mix @ u + x + self.bias)

    def init(self, x):
        return torch.zeros_like(x)


class Pair(idf.FixedPoint):
    """Two variables in a tuple that feed each other, of shapes (2,) and (3, 2)."""

    def step(self, u, x):
        a, b = u
        return 0.4 * torch.cos(b.sum(0)) + x[0], 0.3 * torch.sin(a)[None, :] * x.flip(0)[:, :] + 0.1 * b.flip(
            0
        )

    def init(self, x):
        return x[0] * 0, x * 0


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cubic_inputs(batch: int = 2) -> tuple[Tensor, Tensor]:
    return 2.5 * torch.eye(3, dtype=torch.float64) + 0.7 * draw(3, 3, seed=1), draw(batch, 3, seed=2)


def tree_inputs(batch: int = 3) -> tuple[dict[str, Tensor], int]:
    return {"p": draw(batch, 3, seed=4), "q": 0.3 * draw(batch, seed=5)}, 2


def dense_jacobian(problem: idf.Problem, u: Tensor, inputs: Sequence[Any], which: int) -> Tensor:
    """-J^-1 D_x r of one sample with a tensor u of one axis, by torch.func.jacrev on the declared function alone."""
    jacobian = torch.func.jacrev(lambda v: problem.equality(v, *inputs))(u)
    by_input = torch.func.jacrev(lambda x: problem.equality(u, *inputs[:which], x, *inputs[which + 1 :]))(
        inputs[which]
    )
    return -torch.linalg.inv(jacobian) @ by_input.reshape(u.numel(), -1)
