"""Small problems for the tests of the layer and its derivatives, each with inputs to try it on.

Several have a `solve` that works in numpy on detached data: a gradient can then come from the implicit
function alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import implicitdiff as idf


class GeometricMedian(idf.Problem):
    """minimise over u  sum_j sqrt(|u - x_j|^2 + eps); the first example of the contract."""

    def __init__(self, eps: float = 0.1) -> None:
        super().__init__()
        self.eps = torch.nn.Parameter(torch.tensor(eps, dtype=torch.float64))

    def objective(self, u, x):
        return torch.sqrt(((u[:, None] - x) ** 2).sum(0) + self.eps).sum()

    def init(self, x):
        return x.mean(1)


class Portfolio(idf.Problem):
    """minimise over u  u'Q u / 2 - mu'u  s.t.  sum(u) = 1; the second example of the contract."""

    def objective(self, u, Q, mu):
        return 0.5 * u @ Q @ u - mu @ u

    def equality(self, u, Q, mu):
        return u.sum() - 1

    def init(self, Q, mu):
        return torch.full_like(mu, 1 / len(mu))


class Sphere(idf.Problem):
    """minimise over u  -x'u  s.t.  |u|^2 = 1 + mean(x^2); solved in closed form, in numpy."""

    def objective(self, u, x):
        return -(x * u).sum()

    def equality(self, u, x):
        return (u * u).sum() - 1 - (x * x).mean()

    def init(self, x):
        return torch.ones_like(x)

    def solve(self, x):
        data = x.detach().numpy()
        radius = np.sqrt(1 + (data**2).mean(1, keepdims=True))
        return torch.from_numpy(radius * data / np.linalg.norm(data, axis=1, keepdims=True))


class Tree(idf.Problem):
    """Two variables, one of them 0-dim, two inputs in a dict and a number, two constraints in a tuple, one
    Parameter.

    The constraints are nonlinear in the variables and in the inputs; the objective couples everything.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([0.7, -0.2, 0.4], dtype=torch.float64))
        self.power = 2

    def objective(self, u, x, scale):
        a, t = u["a"], u["t"]
        pull = ((a - x["p"]) ** 2).sum() + 0.5 * (t - x["s"]) ** 2
        return scale * pull + 0.1 * torch.cosh(a @ self.weight - t) + 0.05 * (a**self.power).sum() * t**2

    def equality(self, u, x, scale):
        a, t = u["a"], u["t"]
        return (a[0] * t - 0.3 * x["s"], torch.stack([(a * a).sum() - 2 - 0.1 * (x["p"] ** 2).sum()]))

    def init(self, x, scale):
        return {"a": torch.ones_like(x["p"]), "t": torch.ones_like(x["s"])}


class Point(idf.Problem):
    """A variable and an input without axes: minimise u^4 / 4 + u^2 / 2 - x u, so u^3 + u = x; solved in
    numpy.
    """

    def objective(self, u, x):
        return u**4 / 4 + u**2 / 2 - x * u

    def init(self, x):
        return torch.zeros_like(x)

    def solve(self, x):
        data = x.detach().numpy()
        roots = [next(r.real for r in np.roots([1, 0, 1, -value]) if abs(r.imag) < 1e-9) for value in data]
        u = np.array(roots, dtype=data.dtype)
        for _ in range(3):
            u = u - (u**3 + u - data) / (3 * u**2 + 1)
        return torch.from_numpy(u)


class Torch(idf.Problem):
    """A `solve` that is all torch: gradient descent on u^4 / 4 + u^2 / 2 - x u, many steps."""

    def objective(self, u, x):
        return (u**4 / 4 + u**2 / 2 - x * u).sum()

    def init(self, x):
        return torch.zeros_like(x)

    def solve(self, x):
        u = torch.zeros_like(x)
        for _ in range(200):
            u = u - 0.2 * (u**3 + u - x)
        return u


class Quartic(idf.Problem):
    """The problem of the design notes: quartic, a shared constraint vector, a parameter; no constraint
    qualifies as linear in the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = torch.nn.Parameter(torch.tensor(1.3, dtype=torch.float64))

    def objective(self, u, x, a):
        return (u**4).sum() / 4 + self.theta / 2 * (u * u).sum() * (1 + (x * x).mean()) - x @ u

    def equality(self, u, x, a):
        return {"plane": a @ u - 1}

    def init(self, x, a):
        return a / (a @ a)


class Marginals(idf.Problem):
    """A strictly convex problem with redundant constraints: both marginals of a small table, all declared."""

    def objective(self, u, x):
        return ((u - x) ** 2 / 2 + 0.1 * (u - x) ** 4).sum()

    def equality(self, u, x):
        return u.sum(1) - 0.5, u.sum(0) - 1 / 3

    def init(self, x):
        return torch.full_like(x, 1 / 6)


@dataclass(frozen=True)
class Small:
    """A problem, its in_dims and a maker of inputs: (batch, seed) -> inputs that require gradients."""

    name: str
    make: Callable[[], idf.Problem]
    in_dims: Any
    inputs: Callable[[int, int], tuple[Any, ...]]


def draw(*shape: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """A float64 leaf that requires a gradient."""
    generator = torch.Generator().manual_seed(seed)
    data = shift + scale * torch.randn(shape, generator=generator, dtype=torch.float64)
    return data.requires_grad_()


def _portfolio(batch: int, seed: int) -> tuple[Tensor, Tensor]:
    factor = draw(4, 4, seed=seed).detach()
    return (factor @ factor.T + torch.eye(4, dtype=torch.float64)).requires_grad_(), draw(
        batch, 4, seed=seed + 1
    )


def _tree(batch: int, seed: int) -> tuple[dict[str, Tensor], float]:
    return {
        "p": draw(batch, 3, seed=seed, scale=0.2, shift=1.0),
        "s": draw(batch, seed=seed + 1, scale=0.1, shift=1.2),
    }, 0.9


SMALL = (
    Small("median", GeometricMedian, 0, lambda batch, seed: (draw(batch, 2, 5, seed=seed),)),
    Small("portfolio", Portfolio, (None, 0), _portfolio),
    Small("sphere", Sphere, 0, lambda batch, seed: (draw(batch, 3, seed=seed, shift=0.3),)),
    Small("tree", Tree, 0, _tree),
    Small("point", Point, 0, lambda batch, seed: (draw(batch, seed=seed),)),
    Small(
        "quartic",
        Quartic,
        (0, None),
        lambda batch, seed: (draw(batch, 3, seed=seed), draw(3, seed=seed + 1, scale=0.2, shift=1.0)),
    ),
    Small("marginals", Marginals, 0, lambda batch, seed: (draw(batch, 2, 3, seed=seed, scale=0.3),)),
)
BY_NAME = {small.name: small for small in SMALL}
