"""Problems for the tests of the forward optimizers, and the optimizers themselves in short.

The sizes of batch, variables and data all differ; the Hessians are dense and not constant.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import implicitdiff as idf
from implicitdiff import optimizers as opt
from implicitdiff.graph.trace import variable_example
from implicitdiff.inputs import bind
from implicitdiff.optimizers.iterate import System
from implicitdiff.plan import plan_for

DOUBLE = torch.float64


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE).to(dtype)


def system_of(problem: idf.Problem, *inputs: Tensor, in_dims: Any = 0, backward: str = "auto") -> System:
    """The system of one call, as the forward pass makes it."""
    bound = bind(problem, inputs, in_dims)
    example = variable_example(problem, bound)
    plan = plan_for(problem, bound, example.leaves, example.spec, backward=backward)
    return System.of(plan, [t.detach() for t in (*bound.leaves, *bound.tensors, *plan.trace.captured)])


class Logistic(idf.Problem):
    """minimise over u  sum_i log(1 + exp(-b_i a_i'u)) + ridge |u|^2; convex."""

    def __init__(self) -> None:
        super().__init__()
        self.ridge = torch.nn.Parameter(torch.tensor(0.05, dtype=DOUBLE))

    def objective(self, u, a, b):
        return torch.nn.functional.softplus(-b * (a @ u)).sum() + self.ridge * u.square().sum()

    def init(self, a, b):
        return torch.zeros_like(a[0])


class Rosenbrock(idf.Problem):
    """minimise over u  sum_i c_i (u_i+1 - u_i^2)^2 + (1 - u_i)^2 + u_last^2 / 5; a curved valley of squares."""

    def objective(self, u, c):
        return (c * (u[1:] - u[:-1] ** 2) ** 2).sum() + ((1 - u[:-1]) ** 2).sum() + 0.2 * u[-1] ** 2

    def init(self, c):
        return torch.full((c.shape[0] + 1,), -0.5, dtype=c.dtype, device=c.device)


class Decay(idf.Problem):
    """minimise over u  |w (u_0 exp(-u_1 t) + u_2 - y)|^2 / 2 + mean(0.1 u)^2; nonlinear least squares."""

    def objective(self, u, t, y, w):
        r = w * (u[0] * torch.exp(-u[1] * t) + u[2] - y)
        return 0.5 * (r @ r) + (0.1 * u).mean() ** 2

    def init(self, t, y, w):
        return torch.ones(3, dtype=t.dtype, device=t.device)


class Circle(idf.Problem):
    """minimise over u  sum_i w_i (u_i - x_i)^2  s.t.  |u|^2 = 1 + mean(x^2), u_0 u_1 = u_2 / 2."""

    def objective(self, u, x, w):
        return (w * (u - x) ** 2).sum()

    def equality(self, u, x, w):
        return {"size": (u * u).sum() - 1 - (x * x).mean(), "tie": u[:1] * u[1:2] - 0.5 * u[2:3]}

    def init(self, x, w):
        return x + 0.3


class Wells(idf.Problem):
    """minimise over u  sum_i (u_i^2 - 1)^2 - s_i u_i / 4: minima near +-1, the lower one where s_i points."""

    def objective(self, u, s):
        return ((u**2 - 1) ** 2 - 0.25 * s * u).sum()

    def init(self, s):
        return -0.9 * torch.sign(s)


@dataclass(frozen=True, eq=False)
class Solved:
    """An optimizer, a problem that it is for, and inputs of it."""

    name: str
    make: Callable[..., Any]
    problem: Callable[[], idf.Problem]
    inputs: Callable[[int], tuple[Tensor, ...]]
    in_dims: Any = 0

    def __str__(self) -> str:
        return self.name

    @functools.cached_property
    def known(self) -> idf.Problem:
        """One instance in float64, so that it is traced once."""
        return self.problem()

    def given(self, dtype: torch.dtype = DOUBLE, batch: int = 3) -> tuple[Tensor, ...]:
        return tuple(value.to(dtype) for value in self.inputs(batch))


def _logistic(batch: int) -> tuple[Tensor, ...]:
    return normal(batch, 9, 4), normal(batch, 9, seed=1).sign()


def _valley(batch: int) -> tuple[Tensor, ...]:
    return (5 * normal(batch, 4).abs() + 1,)


def _decay(batch: int) -> tuple[Tensor, ...]:
    t = normal(11).abs()
    return (
        t,
        2 * torch.exp(-1.5 * t) + 0.3 + 0.02 * normal(batch, 11, seed=1),
        normal(batch, 11, seed=2).abs() + 0.3,
    )


def _circle(batch: int) -> tuple[Tensor, ...]:
    return normal(batch, 5, seed=3), normal(5, seed=4).abs() + 0.5


def _wells(batch: int) -> tuple[Tensor, ...]:
    return (normal(batch, 2, seed=6),)


ALL = (
    Solved("newton", opt.Newton, Logistic, _logistic),
    Solved("newton-constrained", opt.Newton, Circle, _circle, (0, None)),
    Solved("lbfgs", opt.LBFGS, Logistic, _logistic),
    Solved("lbfgs-valley", opt.LBFGS, Rosenbrock, _valley),
    Solved("gauss-newton", opt.GaussNewton, Decay, _decay, (None, 0, 0)),
    Solved("levenberg-marquardt", opt.LevenbergMarquardt, Decay, _decay, (None, 0, 0)),
    Solved("levenberg-marquardt-valley", opt.LevenbergMarquardt, Rosenbrock, _valley),
    Solved("augmented", opt.AugmentedLagrangian, Circle, _circle, (0, None)),
    Solved("scipy-bfgs", opt.SciPy, Logistic, _logistic),
    Solved("scipy-slsqp", opt.SciPy, Circle, _circle, (0, None)),
)
