"""backward="unrolled": the solver itself is differentiated, no implicit function; for comparison with the implicit
gradient.

In: a prepared call. Out: its outputs, with the history of the iterations behind them. Next: nothing; autograd does
the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from implicitdiff.autograd import Call, KKTSolve
from implicitdiff.autograd.call import without
from implicitdiff.errors import UnrollError
from implicitdiff.failures import enforce, validate_policy
from implicitdiff.layer.prepare import Outputs, Prepared
from implicitdiff.optimality import check, tolerance
from implicitdiff.optimizers import Newton
from implicitdiff.problem import Solution
from implicitdiff.pytrees import flatten_like
from implicitdiff.status import Status
from implicitdiff.torch_private import has_tangent, is_traced, is_wrapped, without_saved_tensor_hooks

Leaves = tuple[Tensor, ...]

STEPS = 20
"""Newton steps that are unrolled when the problem has no differentiable `solve`, unless `optimizer` says
otherwise.
"""
HALVINGS = 12


def run_unrolled(prepared: Prepared) -> Outputs:
    """Solve with the graph recorded.

    The problem's `solve` is run with gradients enabled. Where it is not all torch (its result has no history though an
    input needs a gradient, or torch refuses, as `.numpy()` does), a fixed number of Newton steps from `init` takes its
    place, each built of differentiable parts.

    Returns:
        The outputs. The multipliers after a `solve` follow u by one solve with K (see `_multipliers`). Inside vmap,
        grad or a graph that is being recorded the result is not checked for optimality (status OK, residual NaN),
        since values cannot be read there.

    Raises:
        UnrollError: `solve` is not all torch and there is no `init` to start from, or optimizer= is not Newton.
        NotOptimalError: under on_failure="raise", as in every forward.
    """
    name = type(prepared.problem).__name__
    if prepared.bound.batch == 0:
        return prepared.apply()
    reason: Exception | None = None
    if prepared.problem.declares("solve") and prepared.options.optimizer is None:
        try:
            u = _solve_with_history(prepared)
        except (RuntimeError, TypeError) as error:
            u, reason = None, error
        if u is not None:
            return _judged(prepared, u, None, -1)
    if not prepared.problem.declares("init") and prepared.start is None:
        raise UnrollError(
            f"backward='unrolled': solve of {name} is not all torch"
            + (
                f" ({type(reason).__name__}: {reason})"
                if reason
                else " (its result carries no gradient history)"
            )
            + " and there is no init to unroll Newton's method from: declare init, or use backward='auto'"
        ) from reason
    optimizer = prepared.options.optimizer
    if optimizer is not None and not isinstance(optimizer, Newton):
        raise UnrollError(
            f"backward='unrolled' knows how to unroll a solve of {name} and Newton's method, not "
            f"{type(optimizer).__name__}: leave optimizer= out, give Newton(), or use backward='auto'"
        )
    steps = STEPS if optimizer is None else optimizer.max_iter
    with without_saved_tensor_hooks():
        u, lam = _newton(prepared, steps)
    return _judged(prepared, u, lam, steps)


def _solve_with_history(prepared: Prepared) -> Leaves | None:
    """What `solve` returns, or None where an input needs a gradient and the result has no history."""
    found: Any = prepared.hooks.solve(*prepared.bound.expanded())
    tree = found.u if isinstance(found, Solution) else found
    name = f"solve of {type(prepared.problem).__name__}"
    leaves = flatten_like(tree, prepared.plan.trace.variable_spec, name)
    needed = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in prepared.theta)
    if needed and not any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves):
        return None
    return leaves


def _start(prepared: Prepared) -> Leaves:
    """The start of every sample, with the history of `init`."""
    if prepared.start is not None:
        return prepared.start
    bound, spec = prepared.bound, prepared.plan.trace.variable_spec
    what = f"init of {type(prepared.problem).__name__}"
    rows = [flatten_like(prepared.hooks.init(*bound.sample(i)), spec, what) for i in range(bound.batch)]
    return tuple(torch.stack(leaves) for leaves in zip(*rows, strict=True))


def _newton(prepared: Prepared, steps: int) -> tuple[Leaves, Leaves]:
    """`steps` Newton steps on F(u, lam) = (D_u L, -h), each shortened until |F| falls; the step lengths are
    constants.
    """
    call = prepared.call()
    u, theta = _start(prepared), prepared.theta
    equality = prepared.plan.trace.equality
    shapes = equality.output_shapes if equality is not None else ()
    lam: Leaves = tuple(u[0].new_zeros((call.batch, *shape)) for shape in shapes)
    count = len(u)
    for _ in range(steps):
        residual = _residual(call, u, lam, theta)
        z = KKTSolve.apply(call, *(-leaf[None] for leaf in residual), *u, *lam, *theta)
        point, step = (*u, *lam), tuple(leaf[0] for leaf in z)
        with torch.no_grad():
            length = _length(call, point, step, theta, count)
        moved = [a + length.reshape(-1, *(1,) * (a.dim() - 1)) * b for a, b in zip(point, step, strict=True)]
        u, lam = tuple(moved[:count]), tuple(moved[count:])
    return u, lam


def _residual(call: Call, u: Leaves, lam: Leaves, theta: Leaves) -> Leaves:
    h = call.lagrangian.constraints(u, theta)
    return (*call.lagrangian.gradient(u, lam, theta), *(-leaf for leaf in h))


def _length(call: Call, point: Leaves, step: Leaves, theta: Leaves, count: int) -> Tensor:
    """The longest of 1, 1/2, 1/4, ... (B,) with |F|^2 smaller than before; the shortest where none is."""
    before = _size(_residual(call, point[:count], point[count:], theta))
    chosen = torch.full_like(before, 0.5**HALVINGS)
    for power in range(HALVINGS - 1, -1, -1):
        trial = [a + 0.5**power * b for a, b in zip(point, step, strict=True)]
        after = _size(_residual(call, tuple(trial[:count]), tuple(trial[count:]), theta))
        chosen = torch.where(after < before, 0.5**power, chosen)
    return chosen


def _size(leaves: Sequence[Tensor]) -> Tensor:
    return torch.stack([(leaf * leaf).reshape(leaf.shape[0], -1).sum(1) for leaf in leaves]).sum(0)


def _judged(prepared: Prepared, u: Leaves, lam: Leaves | None, steps: int) -> Outputs:
    """The outputs with the verdict of the ordinary optimality check."""
    options, theta = prepared.options, prepared.theta
    status = torch.full((prepared.bound.batch,), Status.OK.value, dtype=torch.int8, device=u[0].device)
    iterations = torch.full_like(status, steps, dtype=torch.int64)
    residual = torch.full_like(status, torch.nan, dtype=u[0].dtype)
    if is_traced(u) or any(is_wrapped(tensor) for tensor in (*u, *theta)):
        return Outputs(
            u, _multipliers(prepared, u, None) if lam is None else lam, status, iterations, residual
        )
    with torch.no_grad(), without_saved_tensor_hooks():
        plain_u, plain = tuple(leaf.detach() for leaf in u), tuple(tensor.detach() for tensor in theta)
        constants = (
            prepared.plan.multipliers(plain_u, plain) if lam is None else tuple(leaf.detach() for leaf in lam)
        )
        allowed = tolerance(u[0].dtype, options.optimality_tol)
        found = check(prepared.plan, plain_u, constants, plain, allowed)
        source = "the unrolled solve" if steps < 0 else f"{steps} unrolled Newton steps"
        status = enforce(
            found, validate_policy(options.on_failure), f"{source} of {type(prepared.problem).__name__}"
        )
    if lam is None:
        lam = _multipliers(prepared, u, constants) if _moving((*u, *theta)) else constants
    return Outputs(u, lam, status, iterations, found.residuals.relative)


def _moving(tensors: Sequence[Tensor]) -> bool:
    recorded = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return recorded or any(has_tangent(tensor) for tensor in tensors)


def _multipliers(prepared: Prepared, u: Leaves, near: Leaves | None) -> Leaves:
    """lam of a solution u, as a function of u and theta.

    F = (D_u f - A'lam, -h) is linear in lam, so one Newton step from any (u, lam) with u a solution ends in its
    multipliers exactly, derivatives of every order included. `near` are constants to step from, None where values
    cannot be read: then 0.
    """
    equality = prepared.plan.trace.equality
    if equality is None:
        return ()
    batch = prepared.bound.batch
    start = near or tuple(u[0].new_zeros((batch, *shape)) for shape in equality.output_shapes)
    call = prepared.call()
    inside, lost = call.lagrangian.inside(u, start, prepared.theta)
    residual = _residual(call, inside, start, prepared.theta)
    towards_u = without(residual[: len(u)], lost)
    z = KKTSolve.apply(
        call, *(-leaf[None] for leaf in (*towards_u, *residual[len(u) :])), *u, *start, *prepared.theta
    )
    return tuple(a + b[0] for a, b in zip(start, z[len(u) :], strict=True))
