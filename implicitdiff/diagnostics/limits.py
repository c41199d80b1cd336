"""Diagnostics, inequalities and bounds at a solution: which are active, as equalities of the declared functions.

In: a solution as the layer returns it. Out: `ActiveRows`, with which `Declared` joins active inequalities and bounds to
the equalities of each sample, so that the dense formula stays what it is. Next: `declared.py`.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from implicitdiff.problem import Problem, Solution
from implicitdiff.torch_private import pytree


@dataclass(frozen=True)
class ActiveRows:
    """Active members by their multipliers: rows of g (B, q), entries of u on a lower or an upper bound (B, m)."""

    rows: Tensor
    low: Tensor
    high: Tensor

    def most(self) -> int:
        """How many there are in the sample with most."""
        return int((self.rows.sum(1) + self.low.sum(1) + self.high.sum(1)).max()) if len(self.rows) else 0


def active_of(problem: Problem, solution: Solution, unbatched: bool) -> ActiveRows | None:
    """What is active with a multiplier that is not 0; None for a problem without inequalities and bounds."""
    if not (problem.declares("inequality") or problem.declares("bounds")):
        return None
    u = _flat(solution.u, unbatched)
    none = torch.zeros(u.shape[0], 0, dtype=torch.bool, device=u.device)
    free = torch.zeros_like(u, dtype=torch.bool)
    rows = (
        none
        if solution.inequality_multipliers is None
        else _flat(solution.inequality_multipliers, unbatched) != 0
    )
    if solution.bound_multipliers is None:
        return ActiveRows(rows, free, free)
    lower, upper = (_flat(side, unbatched) != 0 for side in solution.bound_multipliers)
    return ActiveRows(rows, lower, upper)


def _flat(tree: Any, unbatched: bool) -> Tensor:
    leaves = [leaf.detach() for leaf in pytree.tree_leaves(tree)]
    leaves = [leaf[None] if unbatched else leaf for leaf in leaves]
    return torch.cat([leaf.reshape(leaf.shape[0], -1) for leaf in leaves], 1)


def active_residuals(
    problem: Problem,
    active: ActiveRows,
    b: int,
    u: Tensor,
    arguments: Sequence[Any],
    shapes: Sequence[torch.Size],
) -> list[Tensor]:
    """g and u - bound of sample b in its active members, for u flat (m,); `arguments` begin with its tree."""
    found = []
    if active.rows.shape[1]:
        g = pytree.tree_leaves(problem.inequality(*arguments))
        found.append(torch.cat([leaf.reshape(-1) for leaf in g])[active.rows[b]])
    for side, mask in enumerate((active.low[b], active.high[b])):
        if bool(mask.any()):
            bound = _bound(problem.bounds(*arguments[1:])[side], arguments[0], shapes, u)
            found.append((u - bound)[mask])
    return found


def _bound(value: Any, tree: Any, shapes: Sequence[torch.Size], u: Tensor) -> Tensor:
    """One side of the bounds as a vector (m,), infinite where there is none."""
    single = value is None or isinstance(value, numbers.Real | Tensor)
    leaves = [value] * len(shapes) if single else pytree.tree_structure(tree).flatten_up_to(value)
    parts = []
    for leaf, shape in zip(leaves, shapes, strict=True):
        number = torch.inf if leaf is None else leaf
        part = number if isinstance(number, Tensor) else u.new_full((), float(number))
        parts.append(part.expand(shape).reshape(-1))
    return torch.cat(parts)


def signs(solution: Solution) -> float:
    """The largest multiplier of the wrong sign over the largest multiplier: mu <= 0 at a minimum."""
    trees = [solution.inequality_multipliers, solution.bound_multipliers]
    leaves = [
        leaf.detach()
        for tree in trees
        if tree is not None
        for leaf in pytree.tree_leaves(tree)
        if leaf.numel()
    ]
    size = max((float(leaf.abs().max()) for leaf in leaves), default=0.0)
    return max((float(leaf.max()) for leaf in leaves), default=0.0) / size if size else 0.0


def held_multipliers(
    solution: Solution, active: ActiveRows, equalities: Sequence[Tensor | None], unbatched: bool
) -> list[Tensor | None]:
    """The multipliers of each sample for the rows of `Declared.equality`: those of equalities, then of what is active.

    u - lower = 0 as an equality has the negative of the multiplier of lower - u <= 0.
    """
    zeros = torch.zeros_like(active.low, dtype=torch.float64)
    mu = solution.inequality_multipliers
    rows = zeros[:, :0] if mu is None else _flat(mu, unbatched).double()
    bounds = solution.bound_multipliers
    lower, upper = (zeros, zeros) if bounds is None else (_flat(side, unbatched).double() for side in bounds)
    found: list[Tensor | None] = []
    for b, lam in enumerate(equalities):
        parts = [] if lam is None else [lam]
        parts += [rows[b][active.rows[b]], -lower[b][active.low[b]], upper[b][active.high[b]]]
        found.append(torch.cat(parts))
    return found
