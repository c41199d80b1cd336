"""Whether a projection leaves a solver's answer alone: proved from its declarations, or tested on solutions.

In: a solver, a projection and perhaps costs. Out: how it is known, or a ProjectionError. Next file to read:
``layer.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from implicitdiff.combinatorial.base import Shape, Solver
from implicitdiff.combinatorial.projections import Projection, resolve
from implicitdiff.errors import InputError, ProjectionError
from implicitdiff.torch_private import HOST, is_wrapped

SAMPLES = 32
PROOF_TOLERANCE = 1e-8
TEST_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Invariance:
    """Why a projection is taken to be valid.

    Attributes:
        proved: True if it follows from what the solver declares; False if it stood a test.
        reason: in words.
    """

    proved: bool
    reason: str


def proof(solver: Solver, projection: Projection, shape: Shape) -> Invariance | None:
    """The proof from declared equalities, None if there is none.

    A linear projection changes no argmin if <a, y> is the same for all y, for every direction a that it takes out, and
    that is so if a lies in the row space of the equalities A y = b. A positive factor never changes an argmin.
    """
    normals = projection.normals(solver, shape)
    if normals is None:
        return None
    if len(normals) == 0:
        return Invariance(True, "no direction is taken out, and a positive factor changes no argmin")
    if normals.shape[1] != int(np.prod(shape)):
        return None
    basis = solver.row_space(shape)
    if normals is basis:
        return Invariance(True, f"what is taken out are the equalities of {solver.name}")
    outside = normals - (normals @ basis.T) @ basis
    if np.abs(outside).max() > PROOF_TOLERANCE:
        return None
    return Invariance(True, f"all {len(normals)} directions taken out are equalities of {solver.name}")


def check_invariance(
    solver: Solver,
    projection: str | Projection | Callable[[Tensor], Tensor],
    costs: Tensor | None = None,
    *,
    shape: Shape | None = None,
    samples: int = SAMPLES,
    seed: int = 0,
) -> Invariance:
    """Refuse a projection P that changes what the solver returns.

    First by proof. Otherwise by test: a solution y(w) must also be optimal for P(w), so no solution y' that is known,
    of other costs or of P(w) itself, may have <P(w), y'> below <P(w), y(w)>. Since solutions are compared and not
    solved for, costs P(w) outside of the solver's domain do no harm. With an `EnumeratedSolver` all of Y is compared.

    Args:
        solver: the solver.
        projection: as for `Identity`.
        costs: (B, *shape), to be tested besides random ones.
        shape: of one cost, needed only if the solver leaves it free and costs are not given.
        samples: the number of random costs.
        seed: of the random costs.

    Returns:
        How it is known that P is valid. A test that was passed is no proof.

    Raises:
        ProjectionError: P is not valid; the message gives a cost at which it fails, by its index.
        InputError: the shape of a cost is not known.
    """
    if costs is not None:
        costs = costs.detach().reshape(-1, *costs.shape[len(solver.batch_shape(costs)) :])
        shape = tuple(costs.shape[1:])
    if shape is None:
        if None in solver.cost_shape:
            raise InputError(f"{solver.name} leaves the shape of its costs free: pass costs, or shape")
        shape = tuple(size for size in solver.cost_shape if size is not None)
    bound = resolve(projection, solver)
    known = proof(solver, bound, shape)
    if known is not None:
        return known
    drawn = random_costs(solver, shape, samples, seed)
    if costs is not None:
        drawn = torch.cat((costs.to(HOST, torch.float64), drawn))
    _test(solver, bound, drawn)
    return Invariance(False, f"tested on {len(drawn)} costs")


def project(
    solver: Solver, cost: Tensor, projection: str | Projection | Callable[[Tensor], Tensor] = "auto"
) -> Tensor:
    """P(cost) for costs (*batch, *cost_shape), differentiable: a projection in front of a layer of any estimator.

    `Identity` has its projection inside; for the others ``layer(project(solver, cost))`` is what the paper does: they
    see P(w), and autograd multiplies with P'. Where the solver takes no negative costs use "norm", which keeps signs.

    Raises:
        InputError: P has no derivative at a zero cost.
    """
    batch = solver.batch_shape(cost)
    flat = cost.reshape(-1, *cost.shape[len(batch) :])
    bound = resolve(projection, solver, "min")
    if not is_wrapped(flat):
        bound.check(flat.detach())
    return bound(flat).reshape(cost.shape)


def random_costs(solver: Solver, shape: Shape, samples: int, seed: int) -> Tensor:
    """Costs (samples, *shape) in the solver's domain, from NumPy's generator, which no transform of torch sees."""
    numbers = np.random.default_rng(seed)
    if solver.domain == "any":
        return torch.from_numpy(numbers.standard_normal((samples, *shape)))
    # Half of them vary by orders of magnitude, which finds the solutions that take detours.
    even = numbers.uniform(0.1, 1.1, (samples - samples // 2, *shape))
    return torch.from_numpy(
        np.concatenate((even, np.exp(3 * numbers.standard_normal((samples // 2, *shape)))))
    )


def _test(solver: Solver, projection: Projection, costs: Tensor) -> None:
    sign = 1 if solver.sense == "min" else -1
    w = sign * costs
    projected = projection(w)
    if projected.shape != w.shape:
        raise ProjectionError(
            f"the projection maps costs {tuple(w.shape)} to {tuple(projected.shape)}: they must be equal"
        )
    own = solver(costs)
    solutions = [own, solver.known_solutions()]
    if solver.domain == "any":
        solutions.append(solver(sign * projected))
    known = torch.cat([y.flatten(1).to(costs) for y in solutions if y is not None])
    values = projected.flatten(1) @ known.mT
    held = (projected * own).flatten(1).sum(1)
    scale = projected.abs().flatten(1).sum(1).clamp(min=1e-300) * known.abs().max().clamp(min=1)
    worst, index = ((held - values.amin(1)) / scale).max(0)
    if not worst <= TEST_TOLERANCE:
        raise ProjectionError(
            f"the projection changes the solution of {solver.name}: for cost {int(index)} of {len(costs)} the "
            "solution is "
            "no longer optimal after the projection. Valid are 'none', 'norm', and what removes declared equalities "
            "('auto'); if all solutions do satisfy an equality, declare it: solver(fn, equalities=A)"
        )


__all__ = ["Invariance", "check_invariance", "project", "proof"]
