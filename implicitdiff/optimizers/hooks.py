"""The user's hooks `solve` and `init`, called on plain tensors.

A problem and the tensors of one call come in; checked leaves go out. Next: returned.py, which checks them.
"""

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor

from implicitdiff.errors import SolutionError
from implicitdiff.graph.skeleton import skeleton
from implicitdiff.inputs import Bound, unflatten_inputs
from implicitdiff.optimizers.returned import (
    Declares,
    Proposal,
    check_start,
    checked_leaves,
    checked_solution,
    joined,
)
from implicitdiff.problem import Problem
from implicitdiff.pytrees import flatten_like, unflatten
from implicitdiff.torch_private import is_wrapped

Leaves = tuple[Tensor, ...]

# What torch raises when a function cannot be vmapped: control flow on values, operations without a rule, a
# result that is no tensor, random numbers.
_NOT_VMAPPABLE = (RuntimeError, ValueError, TypeError, NotImplementedError)


def _flags(plan: Declares) -> tuple[bool, ...]:
    return tuple(placeholder.batched for placeholder in (*plan.trace.inputs, *plan.trace.tensors))


def batch_of(plan: Declares, theta: Sequence[Tensor]) -> int:
    """B, from the first tensor with a batch axis; 1 if there is none."""
    return next((tensor.shape[0] for tensor, flag in zip(theta, _flags(plan), strict=True) if flag), 1)


def _sample(plan: Declares, theta: Sequence[Tensor], index: int) -> Leaves:
    return tuple(tensor[index] if flag else tensor for tensor, flag in zip(theta, _flags(plan), strict=True))


def _plain(problem: Problem, plan: Declares, bound: Bound, theta: Sequence[Tensor]) -> Problem:
    """The problem with plain tensors for attributes; itself in plain eager code.

    Inside vmap or grad its Parameters may be wrappers without data, or differ between the samples. The copy
    leaves the original alone, so that other threads may use it.
    """
    first = len(plan.trace.inputs)
    if not any(is_wrapped(tensor) for tensor in bound.tensors) and not any(_flags(plan)[first:]):
        return problem
    given = theta[first : first + len(bound.tensors)]
    memo = {id(old): new for old, new in zip(bound.tensors, given, strict=True)}
    return skeleton(problem, memo)


def takes_start(problem: Problem) -> bool:
    """Whether `solve` has a parameter `init`."""
    return "init" in inspect.signature(problem.solve).parameters


def run_solve(
    problem: Problem, plan: Declares, bound: Bound, theta: Leaves, batch: int, start: Leaves | None
) -> Proposal:
    """Call `solve` once, batched, and check what it returns.

    Where tensors of the problem differ between the samples (vmap over Parameters) it is called for one sample
    at a time.

    Args:
        problem: It declares `solve`.
        plan: Its plan: structures, shapes and flags.
        bound: For the structure and the constants of the inputs.
        theta: Plain tensors.
        batch: B > 0.
        start: Leaves of a warm start, handed to `solve` as init=, or None.

    Returns:
        Proposal.

    Raises:
        SolutionError: Wrong structure, shape, dtype, device, or something that is no tensor.
    """
    count = len(plan.trace.inputs)
    if batch > 1 and any(_flags(plan)[count:]):
        single = [_narrow(plan, theta, index) for index in range(batch)]
        starts = [None if start is None else tuple(leaf[i : i + 1] for leaf in start) for i in range(batch)]
        return joined([_call(problem, plan, bound, t, 1, s) for t, s in zip(single, starts, strict=True)])
    return _call(problem, plan, bound, theta, batch, start)


def _narrow(plan: Declares, theta: Sequence[Tensor], index: int) -> Leaves:
    """One sample of theta, still with a batch axis of size 1."""
    return tuple(t[index : index + 1] if flag else t for t, flag in zip(theta, _flags(plan), strict=True))


def _call(
    problem: Problem, plan: Declares, bound: Bound, theta: Leaves, batch: int, start: Leaves | None
) -> Proposal:
    flags, count = _flags(plan), len(plan.trace.inputs)
    expanded = [
        t if f else t.expand(batch, *t.shape) for t, f in zip(theta[:count], flags[:count], strict=True)
    ]
    inputs = unflatten_inputs(expanded, bound.constants, bound.spec)
    # Tensors of the problem have no batch axis in a hook; if they have one here, it is of size 1.
    own = (*theta[:count], *(t[0] if f else t for t, f in zip(theta[count:], flags[count:], strict=True)))
    plain = _plain(problem, plan, bound, own)
    if start is None:
        found = plain.solve(*inputs)
    else:
        found = plain.solve(*inputs, init=unflatten(start, plan.trace.variable_spec))
    return checked_solution(f"solve of {type(problem).__name__}", plan, found, batch, bound.device)


def initial_leaves(problem: Problem, plan: Declares, bound: Bound, theta: Leaves, batch: int) -> Leaves:
    """The start points of `init`, written for one sample: under vmap, or sample by sample where vmap cannot.

    Returns:
        Leaves (B, *shape).

    Raises:
        SolutionError: Wrong structure, shape or dtype. What `init` itself raises is passed on.
    """
    flags, count = _flags(plan), len(plan.trace.inputs)
    what = f"init of {type(problem).__name__}"
    if any(flags[:count]) and not any(flags[count:]):
        plain = _plain(problem, plan, bound, theta)

        def one(*leaves: Tensor) -> Leaves:
            return flatten_like(
                plain.init(*unflatten_inputs(leaves, bound.constants, bound.spec)), spec, what
            )

        spec = plan.trace.variable_spec
        try:
            vmapped = torch.func.vmap(one, in_dims=tuple(0 if flag else None for flag in flags[:count]))
            return check_start(plan, vmapped(*theta[:count]), batch, bound.device, what)
        except SolutionError:
            raise
        except _NOT_VMAPPABLE:
            pass  # whatever is truly wrong comes up again below, without vmap in the way
    rows = []
    for index in range(batch):
        sample = _sample(plan, theta, index)
        tree = _plain(problem, plan, bound, sample).init(
            *unflatten_inputs(sample[:count], bound.constants, bound.spec)
        )
        rows.append([leaf[None] for leaf in checked_leaves(what, plan, tree, None, bound.device)])
    return tuple(torch.cat(leaves) for leaves in zip(*rows, strict=True))
