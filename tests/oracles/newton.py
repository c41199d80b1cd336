"""An independent solver: dense null-space Newton in float64, by torch.func on one sample.

In: a Problem with `init`, the inputs of one sample. Out: its solution to rounding. `solved` makes it a
problem's `solve`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import grad
from torch.utils._pytree import tree_flatten, tree_map

from implicitdiff import Problem, Solution
from tests.oracles.linalg import null_space, pseudo_inverse
from tests.oracles.sample import Sample


@dataclass(frozen=True)
class NewtonResult:
    """A solution of one sample: u a pytree, multipliers (p,), the largest KKT residual, the steps taken."""

    u: Any
    multipliers: Tensor
    residual: float
    iterations: int


def newton_solution(
    problem: Problem, inputs: Sequence[Any], init: Any = None, max_iter: int = 200
) -> NewtonResult:
    """Solves one sample from its `init` by a dense null-space Newton method, to rounding.

    The step is normal + tangential: A y = -h through the pseudo-inverse (dependent rows do no harm), then the
    reduced Hessian Z'HZ, shifted until it is positive definite, on the null space Z of A. A step is accepted
    when the l1 merit function falls, or, close to a solution, when the KKT residual does.

    Raises:
        AssertionError: if the residual stays above 1e-9; a test's fixture is then at fault.
    """
    u = problem.init(*inputs) if init is None else init
    sample = Sample(problem, tree_map(lambda leaf: leaf.detach().clone(), u), inputs)
    point, steps = _Point(sample, sample.u), 0
    while steps < max_iter and point.residual > 1e-14 * point.scale:
        following = _line_search(sample, point)
        if following is None:
            break
        point, steps = following, steps + 1
    assert point.residual <= 1e-9 * point.scale, (
        f"the oracle's Newton stopped at a residual of {point.residual:.1e}"
    )
    return NewtonResult(sample.unflatten(point.u), point.multipliers, point.residual, steps)


class _Point:
    """f, h and their first derivatives at one u, and how far u is from a KKT point."""

    def __init__(self, sample: Sample, u: Tensor) -> None:
        self.u = u
        self.gradient = grad(sample.objective)(u, sample.theta)
        self.constraint = sample.equality(u, sample.theta)
        self.jacobian = sample.constraint_jacobian(u)
        self.multipliers = pseudo_inverse(self.jacobian.mT) @ self.gradient
        terms = torch.cat([self.gradient - self.jacobian.mT @ self.multipliers, self.constraint])
        self.residual = float(terms.abs().max())
        self.scale = 1.0 + float(self.gradient.abs().max())


def _direction(sample: Sample, point: _Point) -> tuple[Tensor, bool]:
    """The Newton step, and whether the reduced Hessian had to be shifted to be positive definite."""
    H = sample.hessian(point.u, point.multipliers)
    normal = -(pseudo_inverse(point.jacobian) @ point.constraint)
    Z = null_space(point.jacobian)
    if Z.shape[1] == 0:
        return normal, False
    reduced = Z.mT @ H @ Z
    spectrum = torch.linalg.eigvalsh(reduced)
    largest = float(spectrum.abs().max())
    shift = 0.0
    if float(spectrum[0]) < 1e-9 * max(1.0, largest):
        shift = -float(spectrum[0]) + max(0.1 * largest, 1e-2)
        reduced = reduced + shift * torch.eye(Z.shape[1], dtype=H.dtype)
    tangential = pseudo_inverse(reduced) @ (Z.mT @ (point.gradient + H @ normal))
    return normal - Z @ tangential, shift > 0


def _line_search(sample: Sample, point: _Point) -> _Point | None:
    """The next point, or None where rounding (or a bad problem) allows no progress."""
    direction, shifted = _direction(sample, point)
    penalty = 1.0 + 2.0 * float(point.multipliers.abs().max() if point.multipliers.numel() else 0.0)

    def merit(u: Tensor) -> float:
        return float(
            sample.objective(u, sample.theta) + penalty * sample.equality(u, sample.theta).abs().sum()
        )

    start, length = merit(point.u), 1.0
    while length > 1e-12:
        u = point.u + length * direction
        value = merit(u)
        # outside the domain (a logarithm of a negative number) the value is NaN or infinite: shorten the step
        if math.isfinite(value):
            trial = _Point(sample, u)
            closer = length == 1.0 and not shifted and trial.residual < 0.9 * point.residual
            if closer or value < start - 1e-12 * abs(start):
                return trial
        length *= 0.5
    return None


def solved(problem: Problem) -> Problem:
    """Gives `problem` a `solve` by `newton_solution`, detached: no gradient can pass through it.

    The class becomes a subclass of the problem's own, so that the declared functions stay the very same code.
    """

    def solve(self: Problem, *inputs: Any) -> Solution:
        batch = {leaf.shape[0] for leaf in tree_flatten(inputs)[0] if isinstance(leaf, Tensor)}
        assert len(batch) == 1, "solve is batched: every tensor among its inputs has the batch axis first"
        results = []
        for b in range(batch.pop()):
            one = tree_map(lambda leaf, b=b: leaf[b].detach() if isinstance(leaf, Tensor) else leaf, inputs)
            results.append(newton_solution(self, one).u)
        return Solution(tree_map(lambda *leaves: torch.stack(leaves), *results))

    problem.__class__ = type(type(problem).__name__, (type(problem),), {"solve": solve})
    return problem
