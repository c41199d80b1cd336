"""Problems for what records graphs: each of the things a recorder finds hard, in asymmetric sizes.

minimise  sum u^4 / 4 + weight theta / 2 |u|^2 (1 + mean x^2) - x'u  subject to  a'u = 1.
"""

import numpy as np
import torch

import implicitdiff as idf


class Quartic(idf.Problem):
    """A Parameter, a tensor and a number as attributes, and a constant made inside a function."""

    def __init__(self, weight=2.0, theta=0.5):
        super().__init__()
        self.theta = torch.nn.Parameter(torch.tensor(theta, dtype=torch.float64))
        self.offsets = [torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64)]
        self.weight = weight

    def objective(self, u, x, a):
        ridge = self.weight * self.theta / 2 * (u * u).sum() * (1 + (x * x).mean())
        return (u**4).sum() / 4 + ridge - (x + self.offsets[0]) @ u

    def equality(self, u, x, a):
        return a @ u - torch.tensor(1.0, dtype=torch.float64)

    def init(self, x, a):
        return x


class NumpyQuartic(Quartic):
    """The same with Newton's method in NumPy, whose number of steps depends on the data; it counts its calls."""

    calls = 0

    def solve(self, x, a):
        type(self).calls += 1
        theta = float(self.theta.detach()) * self.weight
        offset = self.offsets[0].numpy()
        return (
            torch.from_numpy(
                np.stack(
                    [
                        _newton(*pair, theta)
                        for pair in zip(x.numpy() + offset, x.numpy(), a.numpy(), strict=True)
                    ]
                )
            )
            if len(x)
            else torch.zeros_like(x)
        )


def _newton(*given):
    (linear, x, a), theta = given[:3], given[3]
    ridge = theta * (1 + (x * x).mean())
    u, multiplier = a / (a @ a), 0.0
    while True:
        residual = np.concatenate([u**3 + ridge * u - linear - multiplier * a, [1 - a @ u]])
        if abs(residual).max() < 1e-13:
            return u
        matrix = np.block([[np.diag(3 * u * u + ridge), -a[:, None]], [-a[None], np.zeros((1, 1))]])
        step = np.linalg.solve(matrix, -residual)
        u, multiplier = u + step[:-1], multiplier + step[-1]


class Pair(idf.Problem):
    """Pytrees and a constant: u = {'p': (3,), 'q': ((2,), ())}, inputs a dict and a string."""

    def objective(self, u, data, mode):
        p, (q, r) = u["p"], u["q"]
        scale = 2.0 if mode == "steep" else 1.0
        fit = ((p - data["p"]) ** 2).sum() + scale * (q**4).sum() + (r - q.sum()) ** 2 + q @ q
        return fit - data["q"] @ q + 0.3 * p[0] * q[1]

    def init(self, data, mode):
        return {"p": data["p"], "q": (data["q"], data["q"].sum())}


def quartic_inputs(batch=5, seed=0):
    """x (batch, 3) and a (3,), which all samples share."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 3, dtype=torch.float64, generator=generator)
    return x.requires_grad_(), torch.tensor([0.7, -1.1, 0.4], dtype=torch.float64, requires_grad=True)
