"""The forward pass of a problem with inequalities or bounds: a solution of every sample, its active set, its verdict.

A problem, its plan on an active set and the plain tensors of one call come in; a frozen `Located` goes out. Next:
active_set.py decides what is active, optimality.py judges, interior.py is the optimizer where there is no `solve`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from implicitdiff.errors import OptionError, ProblemDefinitionError
from implicitdiff.failures import OnFailure, enforce, failed, name_samples, validate_policy
from implicitdiff.inputs import Bound
from implicitdiff.optimality import Check, Residuals, check, tolerance
from implicitdiff.optimizers.active_set import Settled, resolved, settle, with_multipliers
from implicitdiff.optimizers.default import optimizer_name
from implicitdiff.optimizers.forward import agreed
from implicitdiff.optimizers.hooks import batch_of, initial_leaves, run_solve, takes_start
from implicitdiff.optimizers.interior import InteriorPoint
from implicitdiff.optimizers.iterate import Optimizer, pack, unpack
from implicitdiff.optimizers.limited import Active, Declared, Limited
from implicitdiff.optimizers.returned import check_start
from implicitdiff.plan import Plan
from implicitdiff.problem import Problem
from implicitdiff.records import emit
from implicitdiff.status import Status
from implicitdiff.torch_private import without_autocast

Leaves = tuple[Tensor, ...]
SIGN = "a multiplier has the wrong sign: the objective still falls into the feasible set"


@dataclass(frozen=True)
class Located:
    """The solutions of one call and their active sets; plain tensors without gradient.

    Attributes:
        u: leaves of the variables (B, *shape).
        multipliers: leaves of (lam, mu), 0 for rows that are not active.
        masks: those of the active set that derivatives are taken on.
        closed: the masks with weakly active constraints in the set; the same tensors where there are none.
        status, iterations, residual, failed: see `forward.ForwardResult`; WEAKLY_ACTIVE where a constraint is active
            with a multiplier of 0.
        margin: strict complementarity of each sample (B,), see `active_set.Settled`.
    """

    u: Leaves
    multipliers: Leaves
    masks: Leaves
    closed: Leaves
    status: Tensor
    iterations: Tensor
    residual: Tensor
    failed: Tensor
    margin: Tensor


def solve_limited(
    problem: Problem,
    plan: Plan,
    bound: Bound,
    theta: Sequence[Tensor],
    *,
    init: Sequence[Tensor] | None = None,
    optimizer: Optimizer | None = None,
    tol: float | None = None,
    on_failure: str = "raise",
    tie: str = "inactive",
) -> Located:
    """Solve every sample of a call, find what is active, and check it.

    Args:
        problem: the declaration, for its hooks `solve` and `init`.
        plan: its plan on an active set, for the flags of theta with masks.
        bound: the inputs of the call; only structure, constants and names are read.
        theta: plain tensors: inputs, tensors of the problem, captured ones; no masks.
        init: leaves (B, *shape) of a warm start, or None.
        optimizer: from `implicitdiff.optimizers`, or None.
        tol: `optimality_tol` of the layer.
        on_failure: the policy.
        tie: whether weakly active constraints are in the set: "inactive", "active" or "average".

    Raises:
        As `forward.solve_forward`.
    """
    policy = validate_policy(on_failure)
    with torch.no_grad(), without_autocast(bound.device.type):
        theta = tuple(tensor.detach() for tensor in theta)
        origin = plan.trace.origin
        batch = batch_of(Declared(origin), theta)
        allowed = tolerance(origin.variables[0].dtype, tol)
        limited = Limited(plan, theta, batch)
        if batch == 0:
            return _empty(limited)
        found = _found(problem, bound, limited, init, optimizer, allowed)
        u = pack(found.u, batch, found.u[0])
        given = None if found.multipliers is None else pack(found.multipliers, batch, u)
        settled = settle(limited, u, allowed, given)
        return _judged(limited, settled, found.u, found, allowed, policy, tie)


@dataclass(frozen=True)
class Found:
    """What a `solve` or an optimizer returned, before it is judged; `source` names it."""

    u: Leaves
    multipliers: Leaves | None
    status: Tensor | None
    iterations: Tensor | None
    source: str
    iterative: bool = False


def _found(
    problem: Problem,
    bound: Bound,
    limited: Limited,
    init: Sequence[Tensor] | None,
    optimizer: Optimizer | None,
    tol: float,
) -> Found:
    """A point of every sample: by the problem's `solve`, or an optimizer."""
    declared, batch = limited.declared, limited.batch
    start = None if init is None else check_start(declared, init, batch, bound.device, "init=")
    if optimizer is None and problem.declares("solve"):
        if start is not None and not takes_start(problem):
            raise OptionError(
                f"{type(problem).__name__} has its own solve, which takes no start: give it a parameter "
                "init=None after the inputs, choose optimizer=, or leave init= out"
            )
        proposal = run_solve(problem, declared, bound, limited.theta, batch, start)
        lam, mu = proposal.multipliers, proposal.rows
        known = (lam is not None or limited.equalities == 0) and (mu is not None or not limited.row_shapes)
        given = (*(lam or ()), *(mu or ())) if known and limited.multiplier_shapes else None
        source = f"solve of {type(problem).__name__}"
        return Found(proposal.u, given, proposal.status, proposal.iterations, source)
    chosen = InteriorPoint() if optimizer is None else optimizer
    name = optimizer_name(chosen)
    minimize = getattr(chosen, "minimize_limited", None)
    if minimize is None:
        raise OptionError(
            f"{name} knows neither inequalities nor bounds, which {type(problem).__name__} declares: choose "
            "InteriorPoint(), which is also what optimizer=None does"
        )
    if start is None:
        if not problem.declares("init"):
            raise ProblemDefinitionError(
                f"{type(problem).__name__} declares no init, so {name} has no start: "
                "declare init(self, *inputs), or give init= to this call"
            )
        start = initial_leaves(problem, declared, bound, limited.theta, batch)
    outcome = minimize(limited, pack(start, batch, start[0]), tol)
    given = None
    if outcome.multipliers is not None and limited.multiplier_shapes:
        given = unpack(outcome.multipliers, limited.multiplier_shapes)
    return Found(limited.leaves(outcome.u), given, None, outcome.iterations, name, iterative=True)


def _judged(
    limited: Limited, settled: Settled, u: Leaves, found: Found, tol: float, policy: OnFailure, tie: str
) -> Located:
    active = resolved(settled, tie)
    settled = with_multipliers(settled, active, limited.equalities)
    multipliers = unpack(settled.multipliers, limited.multiplier_shapes)
    masked = limited.masked(active)
    verdict = _held(limited, settled, active, tol)
    if verdict is None:
        verdict = check(limited.plan, u, multipliers, masked, tol)
    verdict = _with_bounds(verdict, settled)
    status = verdict.status
    if found.iterative:
        status = status.masked_fill(status == int(Status.NOT_OPTIMAL), int(Status.NOT_CONVERGED))
    elif found.status is not None:
        status = agreed(status, found.status)
    weak = settled.weak.any() & (status == int(Status.OK))
    status = status.masked_fill(weak, int(Status.WEAKLY_ACTIVE))
    hint = SIGN if bool((settled.wrong & failed(status)).any()) else ""
    status = enforce(replace(verdict, status=status), policy, found.source, hint)
    samples = weak.nonzero()[:, 0].tolist()
    if samples:
        count = int(settled.weak.count().sum())
        those = "constraint is" if count == 1 else "constraints are"
        emit(
            Status.WEAKLY_ACTIVE.name,
            "forward",
            samples,
            f"{name_samples(samples, limited.batch)}: {count} {those} active with a "
            f"multiplier of 0: only one-sided derivatives exist, taken with tie={tie!r}",
        )
    masks = masked[len(limited.theta) :]
    closed = masks
    if samples and tie == "average":
        closed = limited.masks(settled.active)
    unknown = torch.full_like(status, -1, dtype=torch.int64)
    iterations = unknown if found.iterations is None else found.iterations
    return Located(
        u,
        multipliers,
        masks,
        closed,
        status,
        iterations,
        verdict.residuals.relative,
        failed(status),
        settled.margin,
    )


def _held(limited: Limited, settled: Settled, active: Active, tol: float) -> Check | None:
    """The verdict on a quadratic program from its matrices, where all samples are optimal; else None: see `check`."""
    matrices, u = limited.matrices, settled.u
    if matrices is None:
        return None
    terms = torch.stack(matrices.terms(u, settled.multipliers))
    left = torch.where(active.fixed, 0.0, terms.sum(0)).abs().amax(1)
    h, g = matrices.constraints(u)
    below = torch.cat([h, torch.where(active.rows, g, 0.0)], 1)
    rows = torch.cat([matrices.equality, matrices.rows], 1)
    zero = torch.zeros_like(left)
    constraint, scale = zero, zero
    if below.shape[1]:
        # of each constraint the largest of the terms that cancel in it
        size = (rows * u[:, None]).abs().amax(2).clamp(min=torch.finfo(u.dtype).tiny)
        worst = (below.abs() / size).argmax(1, keepdim=True)
        constraint, scale = below.abs().gather(1, worst)[:, 0], size.gather(1, worst)[:, 0]
    residuals = Residuals(
        left, terms.abs().amax(2).amax(0), constraint, scale, torch.zeros_like(left, dtype=torch.int64)
    )
    if not bool((residuals.relative <= tol).all()):
        return None
    return Check(residuals, torch.zeros_like(left, dtype=torch.int8), tol)


def _with_bounds(verdict: Check, settled: Settled) -> Check:
    """The verdict with violated bounds among the violated constraints."""
    residuals = verdict.residuals
    beyond = settled.excess / settled.excess_scale
    worse = beyond > torch.maximum(residuals.violation, torch.zeros_like(beyond) + verdict.tol)
    if not bool(worse.any()):
        return verdict
    status = torch.where(
        worse & (verdict.status == int(Status.OK)),
        torch.full_like(verdict.status, int(Status.NOT_OPTIMAL)),
        verdict.status,
    )
    residuals = replace(
        residuals,
        constraint=torch.where(worse, settled.excess, residuals.constraint),
        constraint_scale=torch.where(worse, settled.excess_scale, residuals.constraint_scale),
    )
    return replace(verdict, residuals=residuals, status=status)


def active_at(plan: Plan, u: Leaves, theta: Leaves) -> tuple[Leaves, Leaves, Tensor]:
    """(masks, multipliers, rows of the constraints that count) of one sample at any point.

    Args:
        plan: of the problem; without inequalities and bounds there are no masks, and all rows count.
        u: leaves (1, *shape).
        theta: the tensors of one sample, without masks.
    """
    if not plan.trace.limited:
        lam = plan.multipliers(u, theta)
        return (), lam, torch.ones(sum(leaf.numel() for leaf in lam), dtype=torch.bool, device=u[0].device)
    limited = Limited(plan, theta, 1)
    flat = pack(u, 1, u[0])
    settled = settle(limited, flat, tolerance(flat.dtype))
    active = resolved(settled, "inactive")
    multipliers = with_multipliers(settled, active, limited.equalities).multipliers
    kept = torch.nn.functional.pad(active.rows[0], (limited.equalities, 0), value=True)
    return limited.masks(active), unpack(multipliers, limited.multiplier_shapes), kept


def _empty(limited: Limited) -> Located:
    like = limited.theta[0].new_zeros(0, dtype=limited.plan.trace.variables[0].dtype)
    nothing = torch.zeros(0, dtype=torch.bool, device=like.device)
    m = limited.bounds[0].shape[1]
    rows = pack(tuple(like.new_zeros((0, *shape)) for shape in limited.row_shapes), 0, like)
    active = Active(nothing.new_zeros(0, m), nothing.new_zeros(0, m), nothing.new_zeros(0, rows.shape[1]))
    status = torch.zeros(0, dtype=torch.int8, device=like.device)
    masks = limited.masks(active)
    return Located(
        tuple(like.new_zeros((0, *shape)) for shape in limited.variable_shapes),
        tuple(like.new_zeros((0, *shape)) for shape in limited.multiplier_shapes),
        masks,
        masks,
        status,
        status.to(torch.int64),
        like,
        failed(status),
        like,
    )
