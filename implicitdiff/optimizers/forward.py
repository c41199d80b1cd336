"""The forward pass: a solution of every sample, by the problem's `solve` or an optimizer, and its verdict.

A problem, its plan and the plain tensors of one call come in; a frozen `ForwardResult` goes out. Nothing is
recorded for autograd. Next: optimality.py judges the points, failures.py acts on the verdict, hooks.py calls
the user's hooks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from implicitdiff.derivatives.factor import KKTFactor
from implicitdiff.errors import OptionError, ProblemDefinitionError
from implicitdiff.failures import OnFailure, enforce, failed, validate_policy
from implicitdiff.inputs import Bound
from implicitdiff.optimality import Check, check, measure, tolerance
from implicitdiff.optimizers.default import default_optimizer, optimizer_name
from implicitdiff.optimizers.equations import require_equations
from implicitdiff.optimizers.hooks import batch_of, initial_leaves, run_solve, takes_start
from implicitdiff.optimizers.iterate import Optimizer, System, pack
from implicitdiff.optimizers.quadratic import Solved, solve_quadratic
from implicitdiff.optimizers.returned import Proposal, check_start
from implicitdiff.plan import Plan
from implicitdiff.problem import Problem
from implicitdiff.status import Status
from implicitdiff.torch_private import without_autocast

Leaves = tuple[Tensor, ...]


@dataclass(frozen=True)
class ForwardResult:
    """The solutions of one call; plain tensors without gradient.

    Attributes:
        u: Leaves of the variables (B, *shape).
        multipliers: Leaves like the constraints (B, *shape), lambda'A = D_u f; () without constraints.
        status: Verdict per sample (B,) int8.
        iterations: Steps per sample (B,) int64; -1 where a `solve` does not say.
        residual: The larger of |D_u L|_inf and |h|_inf over the terms that cancel in it (B,); optimal means
            <= tol.
        failed: Samples without a usable solution (B,) bool, for on_failure "nan" and "zero".
        factor: K at this very solution, factored, where the forward pass has it.
    """

    u: Leaves
    multipliers: Leaves
    status: Tensor
    iterations: Tensor
    residual: Tensor
    failed: Tensor
    factor: KKTFactor | None = None


def solve_forward(
    problem: Problem,
    plan: Plan,
    bound: Bound,
    theta: Sequence[Tensor],
    *,
    init: Sequence[Tensor] | None = None,
    optimizer: Optimizer | None = None,
    tol: float | None = None,
    on_failure: str = "raise",
) -> ForwardResult:
    """Solve every sample of a call and check it.

    An optimizer that was asked for is used; else the problem's `solve`, if declared; else that of
    `default_optimizer`. Which samples and tensors are batched is read off the plan's trace, so that a vmapped
    axis may have been folded into the batch.

    Args:
        problem: The declaration, for its hooks `solve` and `init`.
        plan: Its plan.
        bound: The inputs of the call; only structure, constants and names are read.
        theta: Plain tensors: inputs, tensors of the problem, captured ones, in the order of the trace.
        init: Leaves (B, *shape) of a warm start, or None: the problem's `init`.
        optimizer: From `implicitdiff.optimizers`, or None.
        tol: `optimality_tol` of the layer; None: sqrt(eps) of the dtype.
        on_failure: The policy; see `failures.enforce`.

    Returns:
        ForwardResult. A batch of 0 samples calls no hook and returns empty leaves.

    Raises:
        SolutionError: `solve`, `init` or the warm start has a wrong structure, shape, dtype or device.
        OptionError: An unknown policy, a tolerance that is not positive, a warm start that `solve` does not
            take.
        NotOptimalError, InfeasibleError, ConvergenceError: Under on_failure="raise", naming samples.
    """
    policy = validate_policy(on_failure)
    with torch.no_grad(), without_autocast(bound.device.type):
        theta = tuple(tensor.detach() for tensor in theta)
        batch = batch_of(plan, theta)
        allowed = tolerance(plan.trace.variables[0].dtype, tol)
        if batch == 0:
            return _empty(plan, bound.device)
        start = None if init is None else check_start(plan, init, batch, bound.device, "init=")
        if optimizer is None and problem.declares("solve"):
            if start is not None and not takes_start(problem):
                raise OptionError(
                    f"{type(problem).__name__} has its own solve, which takes no start: give it a parameter "
                    "init=None after the inputs, choose optimizer=, or leave init= out"
                )
            proposal = run_solve(problem, plan, bound, theta, batch, start)
            return _judge_proposal(problem, plan, theta, proposal, allowed, policy)
        # a start that holds a NaN is refused, also where it is not needed: the optimizer says so
        direct = optimizer is None and all(bool(leaf.isfinite().all()) for leaf in start or ())
        solved = solve_quadratic(plan, theta, batch, allowed) if direct else None
        if solved is not None and solved.good is None:
            return _direct(solved)
        chosen = default_optimizer(problem, plan)[0] if optimizer is None else optimizer
        if chosen is None or not callable(getattr(chosen, "minimize", None)):
            raise OptionError(
                f"optimizer={chosen!r} is none: choose one of implicitdiff.optimizers, for instance Newton()"
            )
        if problem.square:
            require_equations(chosen)
        if start is None:
            if not problem.declares("init"):
                raise ProblemDefinitionError(
                    f"{type(problem).__name__} declares no init, so {optimizer_name(chosen)} has no start: "
                    "declare init(self, *inputs), or give init= to this call"
                )
            start = initial_leaves(problem, plan, bound, theta, batch)
        found = _run_optimizer(plan, theta, start, chosen, allowed, policy)
        return found if solved is None else _mixed(solved, found)


def _mixed(solved: Solved, found: ForwardResult) -> ForwardResult:
    """The good samples of a quadratic problem as if they were alone, the others as the optimizer left them."""
    good, direct = solved.good, _direct(solved)
    assert good is not None

    def pick(mine: Tensor, theirs: Tensor) -> Tensor:
        return torch.where(good.reshape(-1, *(1,) * (mine.dim() - 1)), mine, theirs)

    return ForwardResult(
        tuple(map(pick, direct.u, found.u)),
        tuple(map(pick, direct.multipliers, found.multipliers)),
        pick(direct.status, found.status),
        pick(direct.iterations, found.iterations),
        pick(direct.residual, found.residual),
        found.failed & ~good,
    )


def _direct(solved: Solved) -> ForwardResult:
    """The result of a quadratic problem whose samples are all OK."""
    status = torch.zeros_like(solved.residual, dtype=torch.int8)
    lost = torch.zeros_like(status, dtype=torch.bool)
    u, lam = solved.u, solved.multipliers
    return ForwardResult(u, lam, status, solved.solves, solved.residual, lost, solved.factor)


def _judge_proposal(
    problem: Problem, plan: Plan, theta: Leaves, proposal: Proposal, tol: float, policy: OnFailure
) -> ForwardResult:
    """Check what `solve` returned; the multipliers are estimated if it returned none."""
    lam = (
        estimate_multipliers(plan, proposal.u, theta)
        if proposal.multipliers is None
        else proposal.multipliers
    )
    found = check(plan, proposal.u, lam, theta, tol)
    status = found.status
    if proposal.status is not None:
        status = agreed(found.status, proposal.status)
        found = replace(found, status=status, all_ok=False)
    hint = ""
    if proposal.multipliers and not found.all_ok and bool((status == int(Status.NOT_OPTIMAL)).any()):
        hint = _multiplier_hint(plan, proposal.u, lam, theta, found)
    status = enforce(found, policy, f"solve of {type(problem).__name__}", hint)
    unknown = torch.full_like(status, -1, dtype=torch.int64)
    iterations = unknown if proposal.iterations is None else proposal.iterations
    lost = torch.zeros_like(status, dtype=torch.bool) if found.all_ok else failed(status)
    return ForwardResult(proposal.u, lam, status, iterations, found.residuals.relative, lost)


def estimate_multipliers(plan: Plan, u: Leaves, theta: Leaves) -> Leaves:
    """Least-squares multipliers, A'lambda = D_u f; () without constraints.

    Where D_u f is not finite because an entry of u underflowed to 0, the equation is weighted by H^-1
    instead, in which such an entry has no weight: A's = D_u f + H w with A w = 0, at u with its zeros
    replaced by the smallest positive number.
    """
    if plan.trace.equality is None:
        return ()
    lam = plan.multipliers(u, theta)
    if all(math.isfinite(float(leaf.sum())) for leaf in lam):
        return lam
    finite = torch.stack(
        [torch.isfinite(leaf).flatten(1).all(1) if leaf.dim() > 1 else leaf.isfinite() for leaf in lam]
    )
    broken = ~finite.all(0)
    zeros = torch.stack([(leaf == 0).reshape(leaf.shape[0], -1).any(1) for leaf in u]).any(0)
    if not bool((broken & zeros).any()):
        return lam
    inside = tuple(leaf.masked_fill(leaf == 0, torch.finfo(leaf.dtype).tiny) for leaf in u)
    nothing = tuple(torch.zeros_like(leaf) for leaf in lam)
    slope = plan.stationarity(inside, nothing, theta).gradient
    _, weighted, _ = plan.kkt_solve(
        inside, nothing, theta, tuple(-leaf[None] for leaf in slope), tuple(leaf[None] for leaf in nothing)
    )
    mend = broken & zeros
    return tuple(
        torch.where(mend.reshape(-1, *([1] * (old.dim() - 1))), new[0], old)
        for old, new in zip(lam, weighted, strict=True)
    )


def agreed(measured: Tensor, said: Tensor) -> Tensor:
    """One verdict from the measured one and the one that `solve` gave.

    The rule decides whether a sample is optimal, so "not converged" does not outlive it; any other remark of
    `solve` about an optimal sample stands. Of a sample that is merely not optimal, `solve` may know the
    reason.
    """
    superseded = (said == int(Status.NOT_CONVERGED)) | (said == int(Status.NOT_OPTIMAL))
    remark = (measured == int(Status.OK)) & ~superseded
    reason = (measured == int(Status.NOT_OPTIMAL)) & failed(said)
    return torch.where(remark | reason, said, measured)


def _multiplier_hint(plan: Plan, u: Leaves, lam: Leaves, theta: Leaves, found: Check) -> str:
    """Whether u is optimal with other multipliers than those returned; asked only after a failure."""
    wrong = found.status == int(Status.NOT_OPTIMAL)
    turned = measure(plan, u, tuple(-leaf for leaf in lam), theta).relative <= found.tol
    if bool(turned[wrong].all()):
        return "the multipliers have the wrong sign (here lambda'A = D_u f): return their negatives"
    estimated = measure(plan, u, estimate_multipliers(plan, u, theta), theta).relative <= found.tol
    if bool(estimated[wrong].all()):
        return (
            "u is optimal, but not with these multipliers (lambda'A = D_u f): correct them or return u alone"
        )
    return ""


def _run_optimizer(
    plan: Plan, theta: Leaves, start: Leaves, optimizer: Optimizer, tol: float, policy: OnFailure
) -> ForwardResult:
    system = System.of(plan, theta)
    outcome = optimizer.minimize(system, pack(start, start[0].shape[0], start[0]), tol)
    u, lam = system.leaves(outcome.point.u, outcome.point.multipliers)
    found = check(plan, u, lam, theta, tol)
    stopped = found.status == int(Status.NOT_OPTIMAL)
    status = found.status.masked_fill(stopped, int(Status.NOT_CONVERGED))
    # An optimizer never moves to such a point, so it is the start: f may overflow where its gradient is 0.
    outside = ~outcome.point.finite
    found = replace(found, status=status.masked_fill(outside, int(Status.NONFINITE)))
    hint = ""
    if bool(outside.any()):
        what = "residual" if found.square else "objective, a constraint or a derivative"
        hint = f"the {what} is not finite at the start"
    elif getattr(optimizer, "time_limit", None) is not None:
        hint = "raise time_limit="
    status = enforce(found, policy, optimizer_name(optimizer), hint)
    return ForwardResult(u, lam, status, outcome.iterations, found.residuals.relative, failed(status))


def _empty(plan: Plan, device: torch.device) -> ForwardResult:
    """The result of a batch of 0 samples."""
    dtype = plan.trace.variables[0].dtype
    shapes = plan.trace.equality.output_shapes if plan.trace.equality is not None else ()
    status = torch.zeros(0, dtype=torch.int8, device=device)
    return ForwardResult(
        tuple(
            torch.zeros((0, *variable.shape), dtype=variable.dtype, device=device)
            for variable in plan.trace.variables
        ),
        tuple(torch.zeros((0, *shape), dtype=dtype, device=device) for shape in shapes),
        status,
        status.to(torch.int64),
        status.to(dtype),
        failed(status),
    )
