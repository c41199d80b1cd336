"""Diagnostics, finite differences of the solution map: the one oracle that needs no derivative at all.

In: a problem in float64, its refined solution, gradients to test. Out: one relative error per input. Used by
`check.py`.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from implicitdiff.diagnostics.declared import Declared, double, flat_dims, floating, moving_names, normal
from implicitdiff.diagnostics.limits import active_of
from implicitdiff.diagnostics.reference import orthogonal_to, polish, worse
from implicitdiff.errors import ImplicitDiffError
from implicitdiff.layer import solve
from implicitdiff.problem import Problem, Solution
from implicitdiff.torch_private import pytree

STEP = 1e-5


def directional(
    problem: Problem,
    inputs: Sequence[Any],
    in_dims: Any,
    u: Any,
    v: Any,
    gradients: Sequence[Tensor],
    null: Tensor,
) -> Iterator[tuple[str, float, str]]:
    """Compare <gradient, d> with (<v, u(x + t d)> - <v, u(x - t d)>) / 2t, one direction d for each input.

    Both solutions come through the layer's forward and are then refined by dense Newton steps, so that the
    difference shows the solution map and not the tolerance of a solver. d is relative to the size of the
    entries (positive inputs stay positive) and keeps dependent constraints consistent.

    Args:
        problem, inputs: In float64.
        in_dims: As for the layer.
        u: The refined solution.
        v: The cotangent.
        gradients: To be tested: one for each member of `Declared.moving`.
        null: `Reference.null_directions`.

    Yields:
        (name, relative error, remark) per input; NaN with the reason where it could not be tried. Cost: two
        solves.
    """
    names = moving_names(problem, inputs)
    widths = [gradient.numel() for gradient in gradients]
    generator = torch.Generator().manual_seed(1)
    for position, (name, gradient) in enumerate(zip(names, gradients, strict=True)):
        value = moving_values(problem, inputs)[position]
        if not value.numel() or (name.startswith("Parameter") and not value.requires_grad):
            continue
        size = float(value.detach().abs().max()) or 1.0
        draw = normal(generator, gradient)
        direction = draw * (value.detach().abs() + 1e-3 * size)
        rows = null.split(widths, 1)[position]
        direction = orthogonal_to(rows, direction.reshape(-1)).reshape(value.shape)
        if float(direction.norm()) < 1e-9 * float(draw.norm()) * size:
            yield name, math.nan, "no direction keeps the dependent constraints consistent"
            continue
        step = STEP * size / float(direction.abs().max())
        ends, worst, remark = [], 0.0, ""
        for sign in (1.0, -1.0):
            end, last, remark = moved_solution(problem, inputs, in_dims, u, position, sign * step * direction)
            ends.append(end)
            worst = worse(worst, last)
        if not worst < 1e-9:
            yield name, math.nan, "the moved solution could not be refined"
            continue
        pairs = zip(
            pytree.tree_leaves(v), pytree.tree_leaves(ends[0]), pytree.tree_leaves(ends[1]), strict=True
        )
        measured = float(sum((w * (a - b)).sum() for w, a, b in pairs)) / (2 * step)
        claimed = float((gradient * direction).sum())
        # A scalar product may cancel: it is measured against the size its factors give it.
        spread = 1e-2 * float(gradient.norm()) * float(direction.norm())
        natural = 1e-4 * _norm(v) * _norm(u) * float(direction.abs().max()) / size
        yield (
            name,
            abs(measured - claimed) / max(abs(measured), abs(claimed), spread, natural, 1e-300),
            remark,
        )


def _norm(tree: Any) -> float:
    return math.sqrt(sum(float(leaf.double().square().sum()) for leaf in pytree.tree_leaves(tree)))


def moving_values(problem: Problem, inputs: Sequence[Any]) -> list[Tensor]:
    """The tensors that `moving_names` names."""
    return [leaf for leaf in pytree.tree_leaves(tuple(inputs)) if floating(leaf)] + list(problem.parameters())


def moved_solution(
    problem: Problem, inputs: Sequence[Any], in_dims: Any, u: Any, position: int, change: Tensor
) -> tuple[Any, float, str]:
    """(u, last refinement step, remark) with one input moved."""
    moved = double(problem)
    leaves, spec = pytree.tree_flatten(tuple(inputs))
    leaves = [leaf.detach().clone() if floating(leaf) else leaf for leaf in leaves]
    inputs = pytree.tree_unflatten(leaves, spec)
    with torch.no_grad():
        moving_values(moved, inputs)[position].add_(change)
        remark = ""
        try:
            found = solve(moved, *inputs, in_dims=in_dims)
        except ImplicitDiffError as error:
            found, remark = Solution(u), f"continued from u, the solve fails: {type(error).__name__}"
    unbatched = all(dim is None for dim in flat_dims(inputs, in_dims))
    active = active_of(moved, found, unbatched)
    return *polish(Declared(moved, inputs, in_dims, found.u, active)), remark
