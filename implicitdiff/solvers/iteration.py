"""Conjugate gradients for many right-hand sides at once, written for few steps: no check that a direct solver would not
make either.

In: a product with a symmetric matrix, rows of right-hand sides. Out: ``Iteration``. A probe row tells singular matrices
from regular ones. Next files: ``low_rank_cg.py``, ``schur_cg.py``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from implicitdiff.solvers.base import Cost


def step_tolerance(dtype: torch.dtype) -> float:
    """Return the residual relative to the right-hand side: 2 eps in float32, eps^(7/8) = 2e-14 in float64."""
    eps: float = torch.finfo(dtype).eps
    return 2 * eps if eps > 1e-10 else eps**0.875


PREDICTED_STEPS = 3
"""What the cost model assumes: in float32, pooling of 128 x 256 to 128 x 4096 takes 2, transport with gamma = 10 takes
4 at 200 x 200 and 2 at 1000 x 1000. Where a matrix needs many more, ``iterate`` notices after three."""

STEP_OPERATIONS = 15
"""Operations on vectors in one step of ``iterate``, beside the product."""


def break_even(direct: Cost, step: Cost) -> int:
    """Return how many steps take as long as the direct solver: at least 4, at most 200."""
    return max(4, min(200, int(direct.seconds / step.seconds)))


@dataclass(frozen=True)
class Iteration:
    """What came of it.

    Attributes:
        solution: (B, R, m).
        converged: (B, R) bool; None where every row converged.
        steps: the steps of the slowest row.
    """

    solution: Tensor
    converged: Tensor | None
    steps: int


@lru_cache(maxsize=64)
def probe_row(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a fixed vector (1, 1, m) without structure.

    A singular matrix has no solution for it, and one that is nearly singular none that a few steps find: so the
    iteration of this row converges only if the matrix is regular, whatever the right-hand sides are.
    """
    places = torch.arange(size, dtype=torch.float64, device=device)
    return torch.cos(2.0 + 3.7 * places**1.1).to(dtype)[None, None]


def iterate(
    product: Callable[[Tensor], Tensor], rhs: Tensor, inverse: Tensor | None, tolerance: float, limit: int
) -> Iteration:
    """Solve matrix @ x = rhs for each row by preconditioned conjugate gradients.

    The residual is the one that the recursion carries. Its distance from the true one is bounded by
    eps * steps * |A| |x| (van der Vorst and Ye, Residual replacement strategies for Krylov subspace iterative methods,
    2000), which is rounding for the few steps that are allowed here.

    The last step is taken without its product, as x + a z with the first step's length a and the preconditioned
    residual z: it multiplies the residual by I - a A. The first step did the same to the rows given, the probe among
    them, and shrank them to the part q. For a vector without structure q^2 is about the mean of (1 - a lambda)^2 over
    the m eigenvalues, so 2 sqrt(m) q is at least about |I - a A|; the iteration may end as much earlier.

    Args:
        product: maps rows (B, R, m) to the matrix times them.
        rhs: (B, R, m), R at least 1.
        inverse: the inverse of a positive diagonal, broadcast against the rows; None for the identity.
        tolerance: a row has converged when its residual, in the norm of the preconditioner, is this part of the
            first one.
        limit: the largest number of steps; the iteration gives up early where its rate predicts half as many again.

    Returns:
        The solutions. Rows that are exactly zero give exactly zero. Rows of one sample that converge before the others
        go on, which changes rounding only; samples stop each for itself, so that none sees another. Cost: one product
        and about 15 operations on vectors a step, one number read.
    """
    tiny, ends = torch.finfo(rhs.dtype).tiny, _Ends(tolerance**2, 4.0 * rhs.shape[-1], limit)
    # Scaled to a largest entry of 1: squares of tiny cotangents would underflow in float32.
    size = rhs.abs().amax(-1, keepdim=True).clamp_(min=tiny)
    residual = rhs / size
    scaled = residual if inverse is None else residual * inverse
    length = (residual * scaled).sum(-1, keepdim=True)
    start = length.clamp(min=tiny)
    direction = scaled
    steps = 0
    while True:
        image = product(direction)
        curvature = (direction * image).sum(-1, keepdim=True)
        # Where the curvature is negative this is a huge step: the row is lost and the caller takes another way.
        along = length / curvature.clamp_(min=tiny)
        residual = torch.addcmul(residual, along, image, value=-1)
        scaled = residual if inverse is None else residual * inverse
        following = (residual * scaled).sum(-1, keepdim=True)
        left = following / start
        worst: list[float] = left.amax(1).flatten().tolist()
        if steps == 0:
            solution, shortcut = along * direction, along
            ends.begin(worst)
        else:
            solution.addcmul_(along, direction)
        steps += 1
        going = ends.going(worst, steps)
        if not any(going):
            break
        if not all(going):
            following = torch.where(_flags(going, rhs), following, 0.0)  # a length of 0: it stays where it is
        turn = following / length.clamp_(min=tiny)
        direction = torch.addcmul(scaled, turn, direction)
        length = following
    earlier = ends.earlier()
    if all(earlier):
        solution.addcmul_(shortcut, scaled)
    elif any(earlier):
        solution.addcmul_(torch.where(_flags(earlier, rhs), shortcut, 0.0), scaled)
    return Iteration(solution.mul_(size), ends.converged(worst, left), steps)


class _Ends:
    """When each sample may end: one number a sample, held in Python, where comparing them costs no operation of torch.

    Attributes:
        enough: what is left of the squared residual of a sample when it has converged.
    """

    def __init__(self, stop: float, spread: float, limit: int) -> None:
        """Take the tolerance squared, 4 m, and the largest number of steps."""
        self._stop, self._spread, self._limit = stop, spread, limit
        self.enough: list[float] = []

    def begin(self, worst: list[float]) -> None:
        """Set the ends from what is left after the first step: the last step will take as much off again."""
        self.enough = [self._stop / min(1.0, self._spread * w) if w > 0.0 else self._stop for w in worst]

    def going(self, worst: list[float], steps: int) -> list[bool]:
        """Return which samples go on: not done, finite, and at a rate that reaches the end within the limit.

        Half as many steps again are allowed for, and the first three tell nothing.
        """
        if steps >= self._limit:
            return [False] * len(worst)
        if steps < 3:
            return [e < w < math.inf for w, e in zip(worst, self.enough, strict=True)]
        rate = steps / (1.5 * self._limit)
        return [e < w < 1.0 and w <= e**rate for w, e in zip(worst, self.enough, strict=True)]

    def earlier(self) -> list[bool]:
        """Return which samples may end earlier than at the tolerance, because of the last step."""
        return [e > self._stop for e in self.enough]

    def converged(self, worst: list[float], left: Tensor) -> Tensor | None:
        """Return which rows (B, R) converged, None where all did."""
        if all(w <= e for w, e in zip(worst, self.enough, strict=True)):
            return None
        return left[..., 0] <= left.new_tensor(self.enough)[:, None]


def _flags(values: list[bool], like: Tensor) -> Tensor:
    return torch.tensor(values, device=like.device)[:, None, None]


def lost_samples(found: Iteration, unfit: Tensor | None) -> Tensor:
    """Return which samples (B,) have a row that did not converge, or were not fit for the iteration."""
    lost = found.solution.new_zeros(len(found.solution), dtype=torch.bool)
    if found.converged is not None:
        lost = ~found.converged.all(1)
    return lost if unfit is None else lost | unfit
