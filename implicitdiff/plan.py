"""The plan of a problem: everything decided once per signature, run many times.

In: a problem, its bound inputs and the options. Out: a `Plan`, from a bounded cache. A structured plan is tried
first; what it cannot do falls back to `derivatives/autodiff.py`. Next: `autograd/implicit.py` and
`optimizers/forward.py` run plans.
"""

from __future__ import annotations

import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from implicitdiff.derivatives.autodiff import ApproximatePlan, AutodiffPlan
from implicitdiff.derivatives.equations import EquationsMatrixFreePlan, EquationsPlan, OneStepPlan
from implicitdiff.derivatives.factor import KKTFactor
from implicitdiff.derivatives.matrixfree import MatrixFreePlan
from implicitdiff.derivatives.stationarity import Stationarity as Stationarity
from implicitdiff.errors import FallbackWarning, OptionError
from implicitdiff.graph.active import active_trace, interior_trace
from implicitdiff.graph.ir import Unsupported
from implicitdiff.graph.record import LOCK
from implicitdiff.graph.trace import Trace, trace_problem
from implicitdiff.inputs import Bound
from implicitdiff.memory import memory_limit, over_limit
from implicitdiff.operators import LinearOperator
from implicitdiff.problem import Problem
from implicitdiff.pytrees import Spec, describe
from implicitdiff.structure.report import Analysis, Fallback, MatrixReport
from implicitdiff.structured.hook import DeclaredHessian, declared_hessian
from implicitdiff.structured.hybrid import HybridPlan
from implicitdiff.structured.plan import StructuredPlan
from implicitdiff.structured.square import SquarePlan
from implicitdiff.torch_private import clean_context

Leaves = tuple[Tensor, ...]

BACKWARDS = ("auto", "dense", "matrix-free", "unrolled", "hand", "approximate")
LINEAR_SOLVERS = (
    "auto", "divide", "block-cholesky", "woodbury", "cholesky", "lu", "ldl", "banded-cholesky", "tridiagonal",
    "kronecker", "schur", "cg", "schur-cg", "minres", "gmres", "sparse-lu",
)  # fmt: skip
# Plans kept for one problem: more than the signatures of a training loop with its evaluation, few enough to
# hold.
PLANS_PER_PROBLEM = 32


class Plan(Protocol):
    """What the layer and the optimizers ask about one problem; tensors are plain, no gradient is recorded.

    u are the leaves of the variables (B, *shape), lam those of the multipliers, theta the inputs followed by the
    tensors of the problem and the captured ones, in the order of `trace.placeholders`. K = [[H, -A'], [-A, 0]].
    """

    trace: Trace
    analysis: Analysis
    needs_multipliers: bool
    """False where lam reaches neither H nor any input gradient."""

    def value(self, u: Leaves, theta: Leaves) -> Tensor:
        """The objective of each sample, (B,)."""

    def value_and_gradient(self, u: Leaves, theta: Leaves, lam: Leaves = (),
                           penalty: Tensor | None = None) -> tuple[Tensor, Leaves]:  # fmt: skip
        """f - lam'h + penalty |h|^2 / 2 (f alone without lam) and its gradient in u: what a walk downhill asks most.

        By automatic differentiation on every plan: without the scales that `stationarity` adds it is the cheapest.
        """

    def stationarity(self, u: Leaves, lam: Leaves, theta: Leaves) -> Stationarity:
        """D_u L and h, with the scales they are measured against."""

    def multipliers(self, u: Leaves, theta: Leaves) -> Leaves:
        """The least-squares solution of A'lam = D_u f, of minimum norm where constraints are dependent."""

    def kkt_solve(self, u: Leaves, lam: Leaves, theta: Leaves, rhs_u: Leaves, rhs_h: Leaves,
                  shift: Tensor | None = None) -> tuple[Leaves, Leaves, Tensor]:  # fmt: skip
        """(w, s, status): K^-1 rhs for right-hand sides (R, B, *shape); `shift` (B,) adds shift * I to H."""

    def kkt_factor(self, u: Leaves, lam: Leaves, theta: Leaves, shift: Tensor | None = None) -> KKTFactor:
        """The same in two steps, for solves that come one after the other: factor K now, solve as often as needed."""

    def vjp(self, u: Leaves, lam: Leaves, theta: Leaves, v_u: Leaves, v_lam: Leaves | None, needs: Sequence[bool],
            factor: KKTFactor | None = None) -> tuple[tuple[Tensor | None, ...], Tensor]:  # fmt: skip
        """(a gradient per theta or None, status): the backward pass. Not differentiable, may work in place.

        `factor` is what `kkt_factor` of this plan gave at this point, if something did.
        """

    def hessian(self, u: Leaves, lam: Leaves, theta: Leaves) -> LinearOperator:
        """H = D_uu L."""

    def constraint_jacobian(self, u: Leaves, theta: Leaves) -> Tensor:
        """A = D_u h, dense, (B, p, m)."""


def plan_for(
    problem: Problem,
    bound: Bound,
    variables: Sequence[Tensor],
    variable_spec: Spec,
    *,
    backward: str = "auto",
    linear_solver: str = "auto",
    compiled: bool = False,
) -> Plan:
    """The plan of a call: from the cache, or derived now.

    Args:
        problem: the declared problem.
        bound: its inputs.
        variables: one sample's leaves of u; only shapes, dtypes and devices are read.
        variable_spec: their structure.
        backward: the layer's option; it decides which kind of plan is made.
        linear_solver: the layer's option.
        compiled: the layer's option `compile`.

    Returns:
        The plan. The signature is that of the contract: shapes, dtypes, device, which tensors need gradients, training,
        the default dtype, the values of the problem's attributes, the options, the memory limit. Values of tensors are
        no part of it, nor is the batch size.

    Raises:
        TraceError: the declared functions cannot be traced.
        OptionError: an unknown name.
    """
    check_options(backward, linear_solver)
    needs = tuple(tensor.requires_grad for tensor in (*bound.leaves, *bound.tensors))
    shapes = tuple((tuple(leaf.shape), leaf.dtype, str(leaf.device)) for leaf in variables)
    traced = ("trace", bound.signature, shapes, describe(variable_spec))
    planned = ("plan", *traced, needs, backward, linear_solver, compiled, memory_limit())

    def derive() -> Plan:
        trace = _TRACES.get(
            problem, traced, lambda: _traced(problem, (list(variables), variable_spec), bound)
        )
        shown = (
            *(leaf.is_floating_point() for leaf in bound.leaves),
            *(tensor.requires_grad for tensor in bound.tensors),
        )
        with clean_context():  # a plan outlives the graph that is being recorded, if one is
            return _build(trace, backward, linear_solver, shown, compiled=compiled)

    return _PLANS.get(problem, planned, derive)


def _traced(problem: Problem, variables: tuple[Sequence[Tensor], Spec], bound: Bound) -> Trace:
    """The trace; where there are inequalities or bounds, that of the problem on an active set."""
    trace = trace_problem(problem, variables, bound)
    if problem.declares("hessian") and not trace.limited:
        trace = replace(trace, hessian=declared_hessian(problem, trace, bound, variables[0]))
    if not trace.limited:
        return trace
    with clean_context():  # shapes are worked out on meta tensors, which no recorder may see
        return active_trace(trace)


def interior_plan(plan: Plan, *, linear_solver: str = "auto", dense: bool = False) -> Plan:
    """The plan of the interior-point steps for the plan of a problem with inequalities or bounds: H and A as there.

    Its constraints are (h, g), and its masks are last in theta, see `graph.active.interior_trace`.
    """

    def derive() -> Plan:
        with clean_context():
            return _build(interior_trace(plan.trace.origin), "dense" if dense else "auto", linear_solver)

    return _REBATCHED.get(plan.trace, ("interior", linear_solver, dense), derive)


def with_batched(plan: Plan, batched: tuple[bool, ...], *, backward: str, linear_solver: str) -> Plan:
    """The same plan for other flags: which theta carry the batch axis (vmap folds its axis into the batch).

    Args:
        plan: a plan made with the same options.
        batched: one flag per theta.
        backward: the layer's option.
        linear_solver: the layer's option.
    """
    theta = (*plan.trace.inputs, *plan.trace.tensors)
    if batched == tuple(placeholder.batched for placeholder in theta):
        return plan

    def derive() -> Plan:
        moved = tuple(replace(p, batched=flag) for p, flag in zip(theta, batched, strict=True))
        trace = replace(plan.trace, placeholders=(*plan.trace.variables, *moved))
        with clean_context():
            return _build(trace, backward, linear_solver)

    return _REBATCHED.get(plan.trace, (batched, backward, linear_solver, memory_limit()), derive)


def check_options(backward: str, linear_solver: str) -> None:
    """Raise OptionError for a name that does not exist."""
    for option, name, known in (
        ("backward", backward, BACKWARDS),
        ("linear_solver", linear_solver, LINEAR_SOLVERS),
    ):
        if name not in known:
            raise OptionError(f"{option}={name!r} does not exist; choose one of {', '.join(known)}")


def _build(
    trace: Trace, backward: str, linear_solver: str, shown: Sequence[bool] = (), *, compiled: bool = False
) -> Plan:
    """Choose the kind of plan for a trace; `shown` are the theta whose gradients the report's code computes."""
    if trace.square:
        return _build_square(trace, backward, linear_solver, shown, compiled=compiled)
    fallbacks: tuple[Fallback, ...] = ()
    if backward == "matrix-free":
        return MatrixFreePlan(trace, unstructured(trace, "matrix-free", "minres", fallbacks))
    if backward == "approximate":
        return ApproximatePlan(trace, unstructured(trace, "dense", "lu", fallbacks))
    if isinstance(trace.hessian, DeclaredHessian) and backward != "dense":
        return HybridPlan(trace, trace.hessian, linear_solver)
    if backward != "dense":
        try:
            dense = AutodiffPlan(trace, unstructured(trace, "dense", "lu", ()))
            return StructuredPlan(trace, linear_solver, dense, shown, compiled=compiled)
        except Unsupported as refusal:
            if compiled:
                not_compiled(f"{refusal.operation or 'the problem'} is not covered: {refusal.reason}")
            fallbacks = (Fallback(refusal.operation, refusal.line, refusal.reason),)
        if needed := over_limit("K", _rows(trace), trace.variables[0].dtype.itemsize):
            analysis = unstructured(trace, "matrix-free", "minres", fallbacks)
            return MatrixFreePlan(trace, replace(analysis, rejected=(("lu", needed),)))
    return AutodiffPlan(trace, unstructured(trace, "dense", "lu", fallbacks))


def _build_square(
    trace: Trace, backward: str, linear_solver: str, shown: Sequence[bool], *, compiled: bool
) -> Plan:
    """The plan of a system of equations."""
    fallbacks: tuple[Fallback, ...] = ()
    if backward == "approximate":
        return OneStepPlan(trace, unstructured(trace, "scaled-identity", "divide", fallbacks))
    large = over_limit("J", _rows(trace), trace.variables[0].dtype.itemsize)
    if backward == "matrix-free":
        return EquationsMatrixFreePlan(trace, unstructured(trace, "matrix-free", "gmres", fallbacks))
    dense = EquationsPlan(trace, unstructured(trace, "dense", "lu", fallbacks))
    if backward == "dense":
        return dense
    try:
        return SquarePlan(trace, linear_solver, dense, shown, compiled=compiled)
    except Unsupported as refusal:
        fallbacks = (Fallback(refusal.operation, refusal.line, refusal.reason),)
    if large:
        fallbacks = (*fallbacks, Fallback("", "", large))
        return EquationsMatrixFreePlan(trace, unstructured(trace, "matrix-free", "gmres", fallbacks))
    return EquationsPlan(trace, unstructured(trace, "dense", "lu", fallbacks))


def not_compiled(reason: str) -> None:
    """Warn that compile=True has no effect."""
    warnings.warn(
        f"compile=True: nothing is compiled, since no code is emitted: {reason}",
        FallbackWarning,
        stacklevel=2,
    )


def _rows(trace: Trace) -> int:
    """Rows of one sample's KKT matrix."""
    size = sum(torch.Size(placeholder.shape).numel() for placeholder in trace.variables)
    if trace.equality is not None and not trace.square:
        size += sum(torch.Size(shape).numel() for shape in trace.equality.output_shapes)
    return size


def unstructured(trace: Trace, kind: str, solver: str, fallbacks: tuple[Fallback, ...]) -> Analysis:
    """The analysis of a plan that proves no structure."""
    reason = fallbacks[0].reason if fallbacks else "structure was not asked for"
    m = sum(torch.Size(placeholder.shape).numel() for placeholder in trace.variables)
    p = (
        0
        if trace.equality is None or trace.square
        else sum(torch.Size(shape).numel() for shape in trace.equality.output_shapes)
    )
    return Analysis(
        hessian=MatrixReport(kind, (m, m), reason),
        constraint_jacobian=MatrixReport(
            kind if p else "zero", (p, m), reason if p else "there are no constraints"
        ),
        schur=MatrixReport(kind, (p, p), reason) if p else None,
        solver=solver,
        fallbacks=fallbacks,
    )


Value = TypeVar("Value")


class _Cache:
    """Least recently used entries per owner; owners are held weakly. Safe to use from several threads."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._owned: weakref.WeakKeyDictionary[object, OrderedDict[Hashable, object]] = (
            weakref.WeakKeyDictionary()
        )

    def get(self, owner: object, key: Hashable, make: Callable[[], Value]) -> Value:
        """The entry, made outside the lock if there is none (two threads may both make it; all get the first)."""
        with LOCK:
            entries = self._owned.setdefault(owner, OrderedDict())
            if key in entries:
                entries.move_to_end(key)
                return entries[key]  # type: ignore[return-value]
        made = make()
        with LOCK:
            kept = entries.setdefault(key, made)
            while len(entries) > self._size:
                entries.popitem(last=False)
        return kept  # type: ignore[return-value]


_TRACES = _Cache(PLANS_PER_PROBLEM)
_PLANS = _Cache(PLANS_PER_PROBLEM)
_REBATCHED = _Cache(PLANS_PER_PROBLEM)
