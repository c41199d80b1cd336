"""What a walk downhill cannot do: come back to the constraints from a dead end, leave a saddle or a maximum.

Points (iterate.py) come in and go out; only the samples asked for move. Both work on small dense matrices and
do nothing for problems too large for that. Called by newton.py between two walks.
"""

import torch
from torch import Tensor

from implicitdiff.optimizers.iterate import Point, System, largest, unpack

# Entries of A (all samples) up to which restoration forms it, and variables up to which H is formed to look
# for negative curvature: about the cost of one dense factorisation.
_JACOBIAN_LIMIT = 1 << 25
_HESSIAN_LIMIT = 512
_HESSIAN_ENTRIES = 1 << 24
_DIAGONAL_KINDS = ("zero", "scaled-identity", "diagonal")


def restore(
    system: System, point: Point, wanted: Tensor, tol: float, steps: int = 60
) -> tuple[Point, Tensor]:
    """Minimise |h|^2 by Levenberg and Marquardt's method from where each wanted sample stands.

    Step: (A A' + mu I) y = h, w = -A'y, with mu tenfold smaller after a step that helped and larger after one
    that did not.

    Args:
        system: The plan with its inputs.
        point: Where the samples stand.
        wanted: Which of them to move (B,).
        tol: The relative tolerance of the optimality rule.
        steps: Most steps.

    Returns:
        (point, mask): the mask says which wanted samples became feasible; the others stand where |h| is
        smallest nearby.
        Cost: per step one dense A and one p x p Cholesky factorisation.
    """
    entries = point.u.shape[0] * point.u.shape[1] * system.constraints
    if not bool(wanted.any()) or entries > _JACOBIAN_LIMIT:
        return point, torch.zeros_like(wanted)
    eps = torch.finfo(point.u.dtype).eps
    damping = torch.full_like(point.value, 1e-6)
    moving = wanted & point.finite
    for _ in range(steps):
        moving = moving & (point.violation > 0.01 * tol) & (damping < 1e8)
        if not bool(moving.any()):
            break
        trial = system.evaluate(
            point.u + _towards_constraints(system, point, damping, moving), point.multipliers
        )
        better = moving & trial.finite & (_square(trial) < _square(point) * (1 - eps))
        point = trial.where(better, point)
        damping = torch.where(
            moving, torch.where(better, (damping / 10).clamp_min(eps), damping * 10), damping
        )
    feasible = wanted & (point.violation <= tol)
    fresh = system.evaluate(point.u, system.estimate_multipliers(point.u))
    return fresh.where(wanted & fresh.finite, point), feasible


def _square(point: Point) -> Tensor:
    return point.constraint.square().sum(1)


def _towards_constraints(system: System, point: Point, damping: Tensor, moving: Tensor) -> Tensor:
    jacobian = system.plan.constraint_jacobian(unpack(point.u, system.variable_shapes), system.theta)
    jacobian = torch.where(moving[:, None, None] & torch.isfinite(jacobian), jacobian, 0)
    gram = jacobian @ jacobian.mT
    size = gram.diagonal(dim1=1, dim2=2).amax(1)
    size = torch.where(size > 0, size, torch.ones_like(size))
    identity = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    factor, _ = torch.linalg.cholesky_ex(gram + (damping * size)[:, None, None] * identity)
    y = torch.cholesky_solve(torch.where(moving[:, None], point.constraint, 0)[..., None], factor)
    step = -(jacobian.mT @ y)[..., 0]
    return torch.where(moving[:, None] & torch.isfinite(step), step, 0)


def escape(system: System, point: Point, wanted: Tensor, tol: float) -> tuple[Point, Tensor]:
    """Leave stationary points that are no minima, along the most negative curvature on the tangent space.

    Both signs and a range of lengths are tried; with constraints each trial is brought back to h = 0 first. A
    trial counts if f falls by a tenth of what the curvature promises.

    Args:
        system: The plan with its inputs.
        point: Where the samples stand.
        wanted: Which of them to look at (B,): the converged ones.
        tol: The relative tolerance of the optimality rule.

    Returns:
        (point, mask of the samples that moved). Cost: one Cholesky factorisation of H (m <= 512) where it is
        positive definite, else one symmetric eigenvalue problem; nothing beyond a product for a diagonal H.
    """
    nobody = torch.zeros_like(wanted)
    if not bool(wanted.any()):
        return point, nobody
    curvature, direction = negative_curvature(system, point, wanted)
    saddle = wanted & (curvature < 0)
    if not bool(saddle.any()):
        return point, nobody
    moved = nobody
    start = point
    length = (1 + largest(point.u)) / largest(direction).clamp_min(torch.finfo(point.u.dtype).tiny)
    direction = torch.where(saddle[:, None], direction, 0)
    for _ in range(20):
        for sign in (1.0, -1.0):
            pending = saddle & ~moved
            step = sign * torch.where(pending, length, 0)[:, None] * direction
            trial = system.evaluate(start.u + step, start.multipliers)
            if system.constraints:
                trial, feasible = restore(system, trial, pending & trial.finite, tol)
                pending = pending & feasible
            promised = 0.5 * length.square() * curvature
            falls = pending & trial.finite & (trial.value < start.value + 0.1 * promised)
            point = trial.where(falls, point)
            moved = moved | falls
        if bool((moved | ~saddle).all()):
            break
        length = length / 2
    return point, moved


def escape_small(system: System, point: Point, wanted: Tensor, tol: float) -> tuple[Point, Tensor]:
    """`escape` up to 512 variables; beyond, nothing moves and no H is formed (some plans have it only dense)."""
    if point.u.shape[1] > _HESSIAN_LIMIT:
        return point, torch.zeros_like(wanted)
    return escape(system, point, wanted, tol)


def negative_curvature(system: System, point: Point, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The most negative curvature of L on the tangent space of the constraints.

    Args:
        system: The plan with its inputs.
        point: Stationary points.
        wanted: Which samples to look at (B,).

    Returns:
        (curvature (B,), direction (B, m) of unit length); 0 where there is none beyond rounding, and where it
        was not looked for: samples not wanted, a matrix-free H, m > 512 or B m^2 > 2^24 with H not diagonal.
    """
    none = torch.zeros_like(point.value), torch.zeros_like(point.u)
    variables, lam = system.leaves(point.u, point.multipliers)
    operator = system.plan.hessian(variables, lam, system.theta)
    slack = torch.finfo(point.u.dtype).eps ** 0.5
    if operator.kind in _DIAGONAL_KINDS:
        diagonal = operator.matvec(torch.ones_like(point.u))
        lowest, index = diagonal.min(1)
        negative = wanted & (lowest < -slack * largest(diagonal))
        if not bool(negative.any()):
            return none
        if not system.constraints:
            direction = torch.nn.functional.one_hot(index, point.u.shape[1]).to(point.u.dtype)
            return torch.where(negative, lowest, 0), torch.where(negative[:, None], direction, 0)
    batch, m = point.u.shape
    if operator.kind == "matrix-free" or m > _HESSIAN_LIMIT or batch * m * m > _HESSIAN_ENTRIES:
        return none
    identity = torch.eye(point.u.shape[1], dtype=point.u.dtype, device=point.u.device)
    dense = torch.where(wanted[:, None, None], operator.to_dense(), identity)
    dense = torch.where(torch.isfinite(dense).all(2).all(1)[:, None, None], dense, identity)
    _, info = torch.linalg.cholesky_ex(dense)
    suspects = (info != 0).nonzero()[:, 0]
    if not len(suspects):
        return none
    # Only the suspects from here on: eigenvectors cost more than all that went before.
    reduced = 0.5 * (dense[suspects] + dense[suspects].mT)
    size = reduced.abs().amax((1, 2))
    if system.constraints:
        reduced = _on_tangent_space(system, point, reduced, size, suspects)
    values, vectors = torch.linalg.eigh(reduced)
    found = values[:, 0] < -slack * size
    curvature, direction = none
    curvature[suspects] = torch.where(found, values[:, 0], 0)
    direction[suspects] = torch.where(found[:, None], vectors[:, :, 0], 0)
    return curvature, direction


def _on_tangent_space(
    system: System, point: Point, hessian: Tensor, size: Tensor, suspects: Tensor
) -> Tensor:
    """P H P + |H| (I - P), P the projector on ker A: negative eigenvalues are those on the tangent space."""
    jacobian = system.plan.constraint_jacobian(unpack(point.u, system.variable_shapes), system.theta)[
        suspects
    ]
    jacobian = torch.where(torch.isfinite(jacobian), jacobian, 0)
    _, values, right = torch.linalg.svd(jacobian, full_matrices=False)
    eps = torch.finfo(point.u.dtype).eps
    kept = values > values.amax(1, keepdim=True) * eps * max(jacobian.shape[1:])
    right = right * kept[:, :, None]
    normal = right.mT @ right
    tangent = torch.eye(normal.shape[1], dtype=normal.dtype, device=normal.device) - normal
    return tangent @ hessian @ tangent + size[:, None, None] * normal
