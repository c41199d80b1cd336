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
    tiny, stop = torch.finfo(rhs.dtype).tiny, tolerance**2
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
        worst = left.amax(1, keepdim=True)
        if steps == 0:
            solution, shortcut = along * direction, along
            enough = _enough(worst, 4.0 * rhs.shape[-1], stop, tiny)
        else:
            solution.addcmul_(along, direction)
        steps += 1
        lowest, highest = _range(worst, enough)
        if highest <= 1.0 or steps >= limit:
            break
        if steps >= 3 or not (lowest > 1.0 and highest < math.inf):
            # A sample with a length of 0 stays where it is.
            going = (worst > enough) & (worst <= _rate(enough, steps, limit))
            if not bool(going.any()):
                break
            following = torch.where(going, following, 0.0)
        turn = following / length.clamp_(min=tiny)
        direction = torch.addcmul(scaled, turn, direction)
        length = following
    solution.addcmul_(shortcut * (enough > stop), scaled)
    return Iteration(solution.mul_(size), None if highest <= 1.0 else (left <= enough)[..., 0], steps)


def lost_samples(found: Iteration, unfit: Tensor | None) -> Tensor:
    """Return which samples (B,) have a row that did not converge, or were not fit for the iteration."""
    lost = found.solution.new_zeros(len(found.solution), dtype=torch.bool)
    if found.converged is not None:
        lost = ~found.converged.all(1)
    return lost if unfit is None else lost | unfit


def _enough(worst: Tensor, spread: float, stop: float, tiny: float) -> Tensor | float:
    """Return what each sample's residual may end at, (B, 1, 1), or one number for a single sample."""
    if worst.numel() == 1:
        return stop / min(1.0, max(spread * float(worst), tiny))
    return stop / (spread * worst).clamp_(min=tiny, max=1.0)


def _range(worst: Tensor, enough: Tensor | float) -> tuple[float, float]:
    """Return the least and the largest of worst / enough; NaN where there is one."""
    if isinstance(enough, float):
        ratio = float(worst) / enough
        return ratio, ratio
    lowest, highest = torch.aminmax(worst / enough)
    return float(lowest), float(highest)


def _rate(enough: Tensor | float, steps: int, limit: int) -> Tensor | float:
    """Return what the residual must be by now if the rate so far is to reach ``enough`` within the limit.

    Half as many steps again are allowed for, and the first three tell nothing.
    """
    return 1e300 if steps < 3 else enough ** (steps / (1.5 * limit))
