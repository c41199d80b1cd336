"""Diagnostics, calling the library: one point for several backward passes, the plan behind a call, the hand's
gradients.

In: a problem and its inputs as the user passes them. Out: a problem that is already solved, leaf copies of
the inputs, plans, and gradients as lists. Used by `explain.py`, `check.py` and `compare.py`.
"""

import copy
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from implicitdiff.diagnostics.declared import flat_dims, floating
from implicitdiff.graph.active import default_masks
from implicitdiff.graph.trace import variable_example
from implicitdiff.inputs import Bound, bind
from implicitdiff.layer.discover import solved_example
from implicitdiff.layer.options import Options
from implicitdiff.layer.prepare import prepare
from implicitdiff.plan import Plan, plan_for
from implicitdiff.problem import Problem, Solution
from implicitdiff.torch_private import pytree

_CLASSES: dict[type[Problem], type[Problem]] = {}
_HELD: weakref.WeakKeyDictionary[Problem, Solution] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Planned:
    """The plan that a layer would use for a call, with the tensors it takes."""

    plan: Plan
    bound: Bound
    theta: tuple[Tensor, ...]

    @property
    def needs(self) -> tuple[bool, ...]:
        """Which theta get a gradient: floating inputs, and what of the problem requires one; no buffers."""
        asked = [tensor.is_floating_point() for tensor in self.bound.leaves]
        trained = [tensor.requires_grad for tensor in self.theta[len(asked) :]]
        return (*asked, *trained)


def plan_of(problem: Problem, inputs: Sequence[Any], in_dims: Any, backward: str = "auto") -> Planned:
    """Bind the inputs and derive the plan; nothing is solved.

    Raises:
        ImplicitDiffError: As the layer would.
    """
    bound = bind(problem, inputs, in_dims)
    # The variables' shapes come from init, or from solve where there is none (which needs data).
    example = variable_example(problem, bound) if problem.declares("init") else solved_example(problem, bound)
    plan = plan_for(problem, bound, example.leaves, example.spec, backward=backward)
    masks = default_masks(plan.trace, bound.batch, bound.device)
    return Planned(plan, bound, (*plan.trace.theta(bound), *masks))


def held_at(problem: Problem, solution: Solution) -> Problem:
    """A twin of the problem whose `solve` returns this solution: every backward then starts from the same
    point.

    The twin shares all Parameters, buffers and attributes.

    Args:
        problem: Any problem.
        solution: What `idf.solve` returned for it, with the batch axis first on u and the multipliers.
    """
    twin = copy.copy(problem)
    twin.__dict__.pop("solve", None)
    twin.__class__ = _held_class(type(problem))
    _HELD[twin] = solution
    return twin


def _held_class(kind: type[Problem]) -> type[Problem]:
    # One class for each class of problems and no closure over tensors, so that plans are found again in the
    # cache and nothing keeps a solution alive.
    if kind not in _CLASSES:
        names = {"solve": _held_solve, "__module__": kind.__module__, "__doc__": kind.__doc__}
        _CLASSES[kind] = type(kind.__name__, (kind,), names)
    return _CLASSES[kind]


def _held_solve(self: Problem, *inputs: Any) -> Solution:
    return _HELD[self]


def batch_first(solution: Solution, unbatched: bool) -> Solution:
    """The variables and multipliers of a solution as the `solve` hook returns them: batch axis first."""

    def leaf(value: Any) -> Any:
        return value.detach()[None] if unbatched else value.detach()

    def tree(multipliers: Any) -> Any:
        return None if multipliers is None else pytree.tree_map(leaf, multipliers)

    return Solution(
        pytree.tree_map(leaf, solution.u),
        equality_multipliers=tree(solution.equality_multipliers),
        inequality_multipliers=tree(solution.inequality_multipliers),
    )


def fresh(inputs: Sequence[Any], flags: Sequence[bool] | None = None) -> tuple[tuple[Any, ...], list[Tensor]]:
    """(copies of the inputs, those of their leaves that require grad).

    Args:
        inputs: The layer's inputs.
        flags: For each floating leaf whether it shall require grad; None: all of them.
    """
    leaves, spec = pytree.tree_flatten(tuple(inputs))
    wanted = iter(flags if flags is not None else [True] * len(leaves))
    copies, moving = [], []
    for leaf in leaves:
        if floating(leaf):
            leaf = leaf.detach().clone().requires_grad_(next(wanted))
            if leaf.requires_grad:
                moving.append(leaf)
        copies.append(leaf)
    return tuple(pytree.tree_unflatten(copies, spec)), moving


def hand_gradients(
    problem: Problem, u: Any, v: Any, inputs: Sequence[Any], in_dims: Any
) -> list[Tensor | None]:
    """What the problem's own `vjp` gives, one entry per floating leaf of the inputs, in their layout.

    Args:
        problem: A problem that declares `vjp`.
        u, v: Solution and cotangent, pytrees with the batch axis first.
        inputs, in_dims: As for the layer.

    Returns:
        None where the hook gives nothing; for a shared input the sum over the batch.

    Raises:
        ProblemDefinitionError: The hook returns something that does not fit the inputs.
    """
    # Without grad mode Parameters that require a gradient are no obstacle: only inputs are asked for here.
    with torch.no_grad():
        prepared = prepare(problem, inputs, Options(in_dims=in_dims, backward="hand"))
        call = prepared.call()
        u_leaves, v_leaves = tuple(pytree.tree_leaves(u)), tuple(pytree.tree_leaves(v))
        assert call.vjp is not None
        found = call.vjp(call, u_leaves, v_leaves, prepared.theta)
    given = zip(pytree.tree_leaves(tuple(inputs)), flat_dims(inputs, in_dims), strict=True)
    dims = [dim for leaf, dim in given if isinstance(leaf, Tensor)]
    return [
        part.movedim(0, dim) if part is not None and dim is not None else part
        for part, dim, leaf in zip(found, dims, prepared.bound.leaves, strict=False)
        if floating(leaf)
    ]
