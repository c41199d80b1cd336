"""Diagnostics, kinks: what the solution does on either side of a point where it has no derivative.

In: a problem in float64 and its solution at the kink. Out: for each input the two one-sided derivatives along one fixed
direction, by solving again beside the point. Used by `check.py`.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from implicitdiff.diagnostics.declared import moving_names, normal
from implicitdiff.diagnostics.differences import STEP, moved_solution, moving_values
from implicitdiff.problem import Problem
from implicitdiff.torch_private import pytree


def one_sided(
    problem: Problem, inputs: Sequence[Any], in_dims: Any, u: Any, v: Any
) -> Iterator[tuple[str, float, float]]:
    """The derivatives of <v, u> at t = 0 from below and from above, for x + t d with one direction d an input.

    Args:
        problem, inputs: In float64.
        in_dims: As for the layer.
        u: The solution.
        v: The cotangent.

    Yields:
        (name, derivative from below, from above), NaN where the moved problem has no solution. Where they differ the
        solution has a kink; where they agree it may have one along another direction. Cost: two solves an input.
    """
    generator = torch.Generator().manual_seed(1)
    for position, (name, value) in enumerate(
        zip(moving_names(problem, inputs), moving_values(problem, inputs), strict=True)
    ):
        if not value.numel() or (name.startswith("Parameter") and not value.requires_grad):
            continue
        size = float(value.detach().abs().max()) or 1.0
        direction = normal(generator, value.detach())
        step = STEP * size / float(direction.abs().max())
        sides = []
        for sign in (-1.0, 1.0):
            moved, last, remark = moved_solution(
                problem, inputs, in_dims, u, position, sign * step * direction
            )
            pairs = zip(pytree.tree_leaves(v), pytree.tree_leaves(moved), pytree.tree_leaves(u), strict=True)
            change = sum(float((w * (a - b)).sum()) for w, a, b in pairs)
            sides.append(float("nan") if remark or not last < 1e-6 else sign * change / step)
        yield name, sides[0], sides[1]
