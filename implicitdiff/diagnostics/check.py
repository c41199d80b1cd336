"""Diagnostics, `check`: is this problem declared and solved so that its gradient means what it should?

In: a problem and inputs. Out: a frozen `CheckReport`, one row per statement with its value and tolerance.
Residuals are taken at the solution as it is; everything about derivatives in a float64 copy, against
`reference.py` and finite differences. Next: `compare.py`, which puts backward passes side by side.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from implicitdiff.diagnostics.active import active_of, held_multipliers, signs
from implicitdiff.diagnostics.check_report import CheckReport, Rows
from implicitdiff.diagnostics.declared import (
    Declared,
    double,
    gradient,
    jacobian,
    moving_names,
    normal,
    to_double,
)
from implicitdiff.diagnostics.differences import directional
from implicitdiff.diagnostics.discrete import as_discrete
from implicitdiff.diagnostics.held import Planned, batch_first, fresh, hand_gradients, held_at, plan_of
from implicitdiff.diagnostics.one_sided import one_sided
from implicitdiff.diagnostics.reference import (
    LIMIT,
    Reference,
    made_consistent,
    polish,
    relative_error,
    worse,
)
from implicitdiff.errors import ImplicitDiffError, ImplicitDiffWarning
from implicitdiff.layer import DeclarativeLayer, solve
from implicitdiff.problem import Problem, Solution, require_problem
from implicitdiff.records import record
from implicitdiff.status import Status
from implicitdiff.torch_private import pytree

if TYPE_CHECKING:
    from implicitdiff.combinatorial import DiscreteLayer, Solver

FINITE_DIFFERENCE_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-8
HAND_TOLERANCE = 1e-6


def check(problem: Problem | DiscreteLayer | Solver, *inputs: Any, in_dims: Any = 0) -> CheckReport:
    """Test a problem at its solution for these inputs, or a discrete layer (see `diagnostics/discrete/check.py`).

    The rows, in this order: "solve" (samples whose status is not OK), "stationarity" and "feasibility" (|D_u
    L| and |h| over the largest of the terms that cancel, by autograd on the declared functions),
    "multipliers" (A'lam against the least-squares fit of D_u f), "refined in float64" (the last of the Newton
    steps that make the solution exact for all that follows), "LICQ" (least over largest singular value of A
    with rows of length one), "second order" (least over largest eigenvalue of H along the constraints),
    "finite differences" of the solution map through the layer (one direction per input), "structured against
    dense" (the layer's gradient against Eqn. 3), and "vjp against dense" if the problem declares one. At a kink
    (NOT_REGULAR) "one-sided derivatives" of <v, u> take the place of the last three: one direction d for each input,
    the derivative along it from below and from above, and their difference as the value. Signs of inequality
    multipliers come with inequalities. For a system of equations "residual" takes the place of the rows before
    "refined", and "regular Jacobian" (least over largest singular value of J with rows of length one) that of "LICQ"
    and "second order".

    Args:
        problem: The declared problem, a `DiscreteLayer`, or a discrete solver (with Identity).
        inputs: As for the layer; small ones are best.
        in_dims: As for the layer.

    Returns:
        CheckReport. Cost: (2 n + 1) solves for n inputs, and dense matrices of m + p rows in float64 for each
        sample (nothing of that above 3000 rows).

    Raises:
        ImplicitDiffError: The problem or the inputs are refused at the door.
    """
    layer = as_discrete(problem)
    if layer is not None:
        from implicitdiff.diagnostics.discrete.check import check_discrete

        return check_discrete(layer, inputs, in_dims)
    problem = require_problem(problem)
    inputs = tuple(fresh(inputs, [False] * len(pytree.tree_leaves(inputs)))[0])
    planned = plan_of(problem, inputs, in_dims)
    rows = Rows()
    with warnings.catch_warnings():
        # The rows say what the warnings would.
        warnings.simplefilter("ignore", ImplicitDiffWarning)
        try:
            with torch.no_grad():
                solution = solve(problem, *inputs, in_dims=in_dims, on_failure="warn")
        except ImplicitDiffError as error:
            rows.failed("solve", error)
            return CheckReport(type(problem).__name__, tuple(rows.rows))
        _residuals(rows, problem, inputs, in_dims, planned, solution)
        _derivatives(rows, problem, inputs, in_dims, planned, solution)
    return CheckReport(type(problem).__name__, tuple(rows.rows))


# At the solution as it is


def _residuals(
    rows: Rows, problem: Problem, inputs: Sequence[Any], in_dims: Any, planned: Planned, solution: Solution
) -> None:
    """Status, stationarity, feasibility, multipliers, denormal numbers."""
    assert isinstance(solution.status, Tensor)  # the layer's solutions have one
    status = torch.atleast_1d(solution.status)
    names = sorted({Status(int(code)).name for code in status if int(code) != Status.OK})
    rows.upper("solve", float((status != Status.OK).sum()), 0, ", ".join(names))
    active = active_of(problem, solution, planned.bound.unbatched)
    declared = Declared(problem, inputs, in_dims, solution.u, active)
    held = batch_first(solution, planned.bound.unbatched)
    u = tuple(pytree.tree_leaves(held.u))
    lam = (
        tuple(pytree.tree_leaves(held.equality_multipliers)) if held.equality_multipliers is not None else ()
    )
    mu = held.inequality_multipliers
    with torch.no_grad():
        every = lam if mu is None else (*lam, *pytree.tree_leaves(mu))
        scales = planned.plan.stationarity(u, every, planned.theta)
    tolerance = torch.finfo(planned.bound.dtype).eps ** 0.5
    flat_lam = [
        torch.cat([leaf[b].double().reshape(-1) for leaf in lam]) if lam else None
        for b in range(declared.batch)
    ]
    if active is not None:
        flat_lam = held_multipliers(solution, active, flat_lam, planned.bound.unbatched)
        rows.upper("multiplier signs", signs(solution), tolerance)
        assert isinstance(solution.margin, Tensor)  # there are inequalities or bounds
        rows.lower("strict complementarity", float(solution.margin.min()), tolerance)
    worst = [0.0, 0.0, 0.0]
    small = Reference(declared).feasible
    for b, multipliers in enumerate(flat_lam):
        slope, pulled, constraint = _terms(declared, b, multipliers)
        worst[0] = worse(worst[0], _ratio((slope - pulled).abs(), scales.gradient_scale[b]))
        if problem.square:
            residual = declared.equality(b, declared.point(b)).detach().abs()
            worst[1] = worse(worst[1], _ratio(residual, scales.constraint_scale[b]))
        if multipliers is not None:
            worst[1] = worse(worst[1], _ratio(constraint.abs(), scales.constraint_scale[b]))
            if small:
                projected = _range_part(declared, b, slope)
                worst[2] = worse(worst[2], _ratio((pulled - projected).abs(), slope.abs().max()))
    if problem.square:
        rows.upper("residual", worst[1], tolerance)
    else:
        rows.upper("stationarity", worst[0], tolerance)
    if lam or active is not None:
        rows.upper("feasibility", worst[1], tolerance)
        if small:
            rows.upper("multipliers", worst[2], tolerance)
        else:
            rows.not_run("multipliers", f"m + p is more than {LIMIT}")
    tiny = sum(int(((leaf != 0) & (leaf.abs() < torch.finfo(leaf.dtype).tiny)).sum()) for leaf in u)
    if tiny:
        rows.upper("denormal numbers in u", tiny, math.inf, "slow: torch.set_flush_denormal(True)")


def _terms(declared: Declared, b: int, multipliers: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(D_u f, A'lam, h) of one sample; entries at the edge of the domain are left out."""
    edge = declared.edge(b)
    with torch.enable_grad():
        u = declared.point(b)
        slope = gradient(declared.objective(b, u), u).detach().masked_fill(edge, 0)
        if multipliers is None:
            return slope, torch.zeros_like(slope), slope.new_zeros(0)
        constraint = declared.equality(b, u)
        pulled = gradient(constraint @ multipliers, u).detach().masked_fill(edge, 0)
    return slope, pulled, constraint.detach()


def _range_part(declared: Declared, b: int, slope: Tensor) -> Tensor:
    """A' lam for the least-squares lam: the part of D_u f in the range of A'."""
    with torch.enable_grad():
        u = declared.point(b)
        rows = jacobian(declared.equality(b, u), u).masked_fill(declared.edge(b), 0)
    return rows.mT @ (torch.linalg.pinv(rows.mT) @ slope)


def _ratio(size: Tensor, scale: Tensor) -> float:
    largest = float(size.max()) if size.numel() else 0.0
    if largest == 0:
        return 0.0
    return largest / float(scale) if float(scale) else math.inf


# In a float64 copy


def _derivatives(
    rows: Rows, problem: Problem, inputs: Sequence[Any], in_dims: Any, planned: Planned, solution: Solution
) -> None:
    """LICQ, second order, finite differences, structured against dense, the user's own vjp."""
    twin = double(problem)
    inputs = tuple(pytree.tree_map(to_double, tuple(inputs)))
    active = active_of(problem, solution, planned.bound.unbatched)
    declared = Declared(twin, inputs, in_dims, solution.u, active)
    if not Reference(declared).feasible:
        rows.not_run(
            "derivatives",
            f"m + p = {declared.size + declared.constraints} is more than {LIMIT}: try smaller inputs",
        )
        return
    inputs = made_consistent(inputs, Reference(declared))
    declared = Declared(twin, inputs, in_dims, solution.u, active)
    u, step = polish(declared)
    rows.upper("refined in float64", step, 1e-8)
    if not step <= 1e-8:
        return
    reference = Reference(declared)
    null = reference.null_directions()
    _regularity(rows, reference, planned)
    v = _cotangent(u)
    held = held_at(twin, batch_first(Solution(u), planned.bound.unbatched))
    moved, leaves = fresh(inputs)
    wanted = [*leaves, *(p for p in held.parameters() if p.requires_grad)]
    if not wanted:
        rows.not_run("gradients", "no input is floating and no Parameter requires a gradient")
        return
    with record() as log:
        try:
            found = _layer_gradients(held, moved, in_dims, v, wanted)
        except ImplicitDiffError as error:
            rows.failed("gradient through the layer", error)
            if any(event.kind == Status.NOT_REGULAR.name for event in log):
                for name, below, above in one_sided(twin, inputs, in_dims, u, v):
                    rows.one_sided(name, below, above)
            return
    by_leaf = iter(found)
    gradients = [next(by_leaf) if t.requires_grad else torch.zeros_like(t) for t in declared.moving]
    for name, value, remark in directional(twin, inputs, in_dims, u, v, gradients, null):
        if math.isnan(value):
            rows.not_run(f"finite differences: {name}", remark)
        else:
            rows.upper(f"finite differences: {name}", value, FINITE_DIFFERENCE_TOLERANCE, remark)
    truth = reference.vjp(v)
    rows.upper("structured against dense", relative_error(gradients, truth, null), GRADIENT_TOLERANCE)
    if problem.declares("vjp"):
        _own_vjp(rows, twin, u, v, inputs, in_dims, truth, null, planned)


def _regularity(rows: Rows, reference: Reference, planned: Planned) -> None:
    """LICQ and the second-order condition, the worst sample of each."""
    samples = [reference.matrices(b) for b in range(reference.declared.batch)]
    if reference.declared.constraints:
        dependent = max(sample.null.shape[1] for sample in samples)
        ratio = min(sample.singular_ratio for sample in samples)
        proved = planned.plan.analysis.dependent
        name = "regular Jacobian" if planned.plan.trace.square else "LICQ"
        if not dependent:
            rows.lower(name, ratio, 1e-11)
        elif proved:
            # One sentence may stand for a whole block of rows, so they are not counted against each other.
            rows.upper(name, ratio, 1e-11, f"{_dependent_rows(dependent)}, proved: {'; '.join(proved)}")
        else:
            rows.lower(
                name, ratio, 1e-11, f"{_dependent_rows(dependent)}, not proved; gradients are of minimum norm"
            )
    if planned.plan.trace.square:
        return
    curvature = min(_curvature(sample.hessian, sample.jacobian) for sample in samples)
    rows.lower("second order", curvature, 1e-12)


def _dependent_rows(count: int) -> str:
    return f"{count} dependent row{'s' if count > 1 else ''}"


def _curvature(hessian: Tensor, jacobian: Tensor) -> float:
    """Least eigenvalue of H on the null space of A over the largest, with the variables scaled to unit
    curvature.

    The scaling keeps the signs (Sylvester) and makes the number comparable where H spans many orders of
    magnitude. Directions along the rows of A get the largest eigenvalue, so that they do not count.
    """
    diagonal = hessian.diagonal().abs()
    floor = float(diagonal.max()) * 1e-30
    scale = torch.where(diagonal > floor, diagonal, torch.ones_like(diagonal)).rsqrt()
    hessian, jacobian = scale[:, None] * hessian * scale, jacobian * scale
    along = torch.linalg.pinv(jacobian) @ jacobian if jacobian.shape[0] else torch.zeros_like(hessian)
    tangent = torch.eye(hessian.shape[0], dtype=hessian.dtype, device=hessian.device) - along
    inner = tangent @ hessian @ tangent
    largest = float(torch.linalg.eigvalsh(inner).abs().max())
    if largest == 0:
        return 1.0 if float(tangent.diagonal().sum()) < 0.5 else 0.0
    return float(torch.linalg.eigvalsh(inner + largest * along)[0]) / largest


def _cotangent(u: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    return pytree.tree_map(lambda leaf: normal(generator, leaf), u)


def _layer_gradients(
    problem: Problem, inputs: Sequence[Any], in_dims: Any, v: Any, wanted: Sequence[Tensor]
) -> list[Tensor]:
    layer = DeclarativeLayer(problem, in_dims=in_dims)
    with torch.enable_grad():
        outputs = pytree.tree_leaves(layer(*inputs))
        cotangents = pytree.tree_leaves(v)
        found = torch.autograd.grad(outputs, list(wanted), cotangents, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, wanted, strict=True)]


def _own_vjp(
    rows: Rows,
    problem: Problem,
    u: Any,
    v: Any,
    inputs: Sequence[Any],
    in_dims: Any,
    truth: Sequence[Tensor],
    null: Tensor,
    planned: Planned,
) -> None:
    """The problem's `vjp` hook against the dense formula, over the inputs it has a gradient for."""

    def batched(tree: Any) -> Any:
        return pytree.tree_map(lambda leaf: leaf[None], tree) if planned.bound.unbatched else tree

    name = "vjp against dense"
    try:
        given = hand_gradients(problem, batched(u), batched(v), inputs, in_dims)
    except (ImplicitDiffError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        # Whatever the user's own code does wrong belongs into the report.
        rows.failed(name, error)
        return
    names = moving_names(problem, inputs)[: len(given)]
    missing = [label for label, part in zip(names, given, strict=True) if part is None]
    full = [t if part is None else part for part, t in zip(given, truth, strict=False)]
    parameters = list(truth[len(given) :])
    remark = f"it gives nothing for {', '.join(missing)}" if missing else ""
    rows.upper(name, relative_error([*full, *parameters], truth, null), HAND_TOLERANCE, remark)
