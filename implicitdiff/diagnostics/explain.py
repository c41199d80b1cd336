"""Diagnostics, `explain`: what was derived from a declaration, why, which solver was chosen, and what one
backward costs.

In: a problem and inputs, with or without data. Out: a frozen `Explanation`, which prints itself as a report,
as LaTeX, as HTML or as a picture. The findings are those of `plan.analysis`; the cost is counted by
`backward_cost.py`.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, overload

from implicitdiff.diagnostics.backward_cost import BackwardCost, backward_cost
from implicitdiff.diagnostics.discrete import as_discrete
from implicitdiff.diagnostics.drawn import drawing_of, sources_of
from implicitdiff.diagnostics.held import Planned, plan_of
from implicitdiff.diagnostics.latex import derivation_in_latex
from implicitdiff.diagnostics.meter import format_bytes
from implicitdiff.diagnostics.page import framed, page_of
from implicitdiff.diagnostics.tables import WIDTH, pairs, require_matplotlib
from implicitdiff.optimizers.default import default_optimizer, optimizer_name
from implicitdiff.problem import Problem, require_problem
from implicitdiff.structure.drawing import Drawing
from implicitdiff.structure.report import MatrixReport

if TYPE_CHECKING:
    from implicitdiff.combinatorial import DiscreteLayer, Solver
    from implicitdiff.diagnostics.discrete.explain import DiscreteExplanation


class Step(NamedTuple):
    """One step down the ladder: the aten operation, the user's line that called it, and the reason."""

    operation: str
    line: str
    reason: str


class Size(NamedTuple):
    """A variable, an input or a tensor of the problem: its name and the shape of one sample."""

    name: str
    shape: tuple[int, ...]
    batched: bool


@dataclass(frozen=True)
class Explanation:
    """What is known about a problem before anything is solved.

    Attributes:
        problem: Its class.
        summary: The first line of its docstring.
        batch: Samples in the given inputs.
        dtype: Of the floating inputs.
        variables, inputs, tensors: Names and shapes; tensors are the problem's parameters, buffers and
        attributes.
        hessian: H = D_uu L of the Lagrangian L = f - lam'h: its kind, shape, and why.
        constraint_jacobian: A = D_u h, likewise; kind "zero" without constraints.
        schur: S = A H^-1 A', likewise; None without constraints.
        dependent: Proved dependences between constraints, one line each.
        derivation: What H, A and S are in symbols, one line each.
        multipliers: Whether the backward pass needs lam.
        solver: The linear solver chosen.
        rejected: (solver, reason) of each other one that was considered.
        forward: What solves the problem where no optimizer= is given, and why.
        fallbacks: (operation, line, reason) of each step down to something slower and equally exact.
        flops, bytes, peak: Floating point operations, bytes moved and peak bytes of one backward pass for the
        whole batch,
            with gradients for all floating inputs and Parameters.
        measured: How these three were obtained.
        code: The emitted backward pass as Python text; "" where none is emitted.
        sources: (name, text) of the declared functions, as far as their source can be read.
        drawing: The graph of the declared functions, and where H, A and S have entries.
        square: For a system of equations "residual" or "step", the hook that states it; `hessian` is then J = D_u r,
            the Jacobian of the residual. "" otherwise.
    """

    problem: str
    summary: str
    batch: int
    dtype: str
    variables: tuple[Size, ...]
    inputs: tuple[Size, ...]
    tensors: tuple[Size, ...]
    hessian: MatrixReport
    constraint_jacobian: MatrixReport
    schur: MatrixReport | None
    dependent: tuple[str, ...]
    derivation: tuple[str, ...]
    multipliers: bool
    solver: str
    rejected: tuple[tuple[str, str], ...]
    forward: str
    fallbacks: tuple[Step, ...]
    flops: int
    bytes: int
    peak: int
    measured: str
    code: str
    sources: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    drawing: Drawing = field(default=Drawing((), ()), repr=False)
    square: str = ""

    def __str__(self) -> str:
        return self.text()

    def text(self, width: int = WIDTH) -> str:
        """A report for a person who wants to learn what was derived, in lines of at most `width` characters."""
        title = f"{self.problem}: {self.summary}" if self.summary else self.problem
        return f"{textwrap.fill(title, width)}\n\n{pairs(self._lines(), width)}"

    def _lines(self) -> list[tuple[str, str]]:
        lines = [("sizes", self.sizes), ("", "")]
        lines += [("J = D_u r" if self.square else "H = D_uu L", _matrix(self.hessian))]
        if not self.square:
            lines += [
                ("A = D_u h", _matrix(self.constraint_jacobian) if self._constrained else "no constraints")
            ]
        if self.schur is not None:
            lines.append(("S = A H^-1 A'", _matrix(self.schur)))
        lines += [("dependence", text) for text in self.dependent]
        lines += [("derivation", text) for text in self.derivation]
        if self._constrained:
            lines.append(("multipliers", "needed in the backward pass" if self.multipliers else "not needed"))
        lines += [("", ""), ("solver", self.solver)]
        lines += [("rejected", f"{solver}: {reason}") for solver, reason in self.rejected]
        if self.fallbacks:
            lines += [("falls back", _step(step)) for step in self.fallbacks]
        else:
            lines.append(("falls back", "nowhere: every operation is covered"))
        return [*lines, ("", ""), ("forward", self.forward), ("one backward", self.cost)]

    @property
    def _constrained(self) -> bool:
        return self.constraint_jacobian.shape[0] > 0

    @property
    def sizes(self) -> str:
        """Batch, dtype, variables, constraints, inputs and tensors, in one line."""
        m, p = self.hessian.shape[0], self.constraint_jacobian.shape[0]
        of = [_size(item) for item in self.variables]
        given = [_size(item) + ("" if item.batched else " shared") for item in self.inputs]
        held = [_size(item) for item in self.tensors]
        p_of = f", p = {p} constraint{'s' if p != 1 else ''}"
        counts = f"m = {m} variable{'s' if m != 1 else ''}{' and equation' + 's' * (m != 1) if self.square else p_of}"
        parts = [f"{counts}: {', '.join(of)}", f"inputs {', '.join(given)}"]
        parts += [f"the problem's {', '.join(held)}"] if held else []
        return f"batch {self.batch}, {self.dtype}; " + "; ".join(parts)

    @property
    def cost(self) -> str:
        """FLOPs, bytes moved and peak of one backward pass, in one line."""
        counts = f"{self.flops:,} FLOPs, {format_bytes(self.bytes)} moved, peak {format_bytes(self.peak)}"
        return f"{counts} for batch {self.batch} ({self.measured})"

    def to_latex(self) -> str:
        """The derivation in symbols, an `align*` environment: L, H, A, S, the KKT system and the gradient."""
        return derivation_in_latex(self)

    def to_html(self) -> str:
        """The report as one self-contained page: no network is needed, every text is escaped.

        The declared functions, their graph with the derivative proved of each node, the patterns of H, A and S, the
        equations with the actual blocks, the decision, the emitted code.
        """
        return page_of(self)

    def _repr_html_(self) -> str:
        """What a notebook shows: the page in a frame of its own."""
        return framed(self.to_html())

    def plot(self) -> Any:
        """A matplotlib Figure: the pattern of H, A and S that follows from their kinds (a scheme, no values).

        Raises:
            ImplicitDiffError: matplotlib is not installed.
        """
        require_matplotlib("Explanation.plot")
        from implicitdiff.diagnostics.plots import plot_structure

        named = [
            ("J" if self.square else "H", self.hessian),
            ("A", self.constraint_jacobian),
            ("S", self.schur),
        ]
        return plot_structure(
            self.problem, [(name, found) for name, found in named if found is not None and min(found.shape)]
        )


@overload
def explain(problem: Problem, *inputs: Any, in_dims: Any = 0) -> Explanation: ...
@overload
def explain(problem: DiscreteLayer | Solver, *inputs: Any, in_dims: Any = 0) -> DiscreteExplanation: ...
def explain(
    problem: Problem | DiscreteLayer | Solver, *inputs: Any, in_dims: Any = 0
) -> Explanation | DiscreteExplanation:
    """Derive the backward pass of a problem for inputs of these shapes and report it; nothing is solved.

    Args:
        problem: The declared problem; or a `DiscreteLayer`, or a discrete solver (with Identity), for which the
            report names the estimator, the projection, why it is valid, and the solver calls.
        inputs: As for the layer; tensors on the meta device, which have shapes and no data, will do.
        in_dims: As for the layer.

    Returns:
        Explanation, or DiscreteExplanation. Cost: one trace and one plan (kept for the layer), and the shapes of
        one backward pass.

    Raises:
        ImplicitDiffError: The problem or the inputs are refused at the door.
    """
    layer = as_discrete(problem)
    if layer is not None:
        from implicitdiff.diagnostics.discrete.explain import explain_discrete

        return explain_discrete(layer, inputs, in_dims)
    problem = require_problem(problem)
    planned = plan_of(problem, inputs, in_dims)
    return _explanation(problem, planned, backward_cost(problem, planned))


def _explanation(problem: Problem, planned: Planned, cost: BackwardCost) -> Explanation:
    analysis, trace, bound = planned.plan.analysis, planned.plan.trace, planned.bound
    optimizer, reason = default_optimizer(problem, planned.plan)
    documented = (type(problem).__doc__ or "").strip().splitlines()
    return Explanation(
        problem=type(problem).__name__,
        summary=" ".join(documented[0].split()) if documented else "",
        batch=bound.batch,
        dtype=str(bound.dtype).removeprefix("torch."),
        variables=tuple(Size(item.name, tuple(item.shape), True) for item in trace.variables),
        inputs=tuple(Size(item.name, tuple(item.shape), item.batched) for item in trace.inputs),
        tensors=tuple(
            Size(item.name, tuple(item.shape), item.batched) for item in trace.tensors if item.role != "mask"
        ),
        hessian=analysis.hessian,
        constraint_jacobian=analysis.constraint_jacobian,
        schur=analysis.schur,
        dependent=analysis.dependent,
        derivation=analysis.derivation,
        multipliers=planned.plan.needs_multipliers,
        solver=analysis.solver,
        rejected=analysis.rejected,
        forward=f"{optimizer_name(optimizer)}: {reason}",
        fallbacks=tuple(Step(step.operation, step.line, step.reason) for step in analysis.fallbacks),
        flops=cost.flops,
        bytes=cost.bytes,
        peak=cost.peak,
        measured=cost.how,
        code=analysis.code,
        sources=sources_of(problem),
        drawing=drawing_of(planned.plan),
        square=trace.square,
    )


def _matrix(found: MatrixReport) -> str:
    rows, columns = found.shape
    return f"{found.kind} ({rows} x {columns}): {found.reason}"


def _size(item: Size) -> str:
    return f"{item.name} {_shape(item.shape)}"


def _shape(shape: tuple[int, ...]) -> str:
    return "(" + ", ".join(str(size) for size in shape) + ("," if len(shape) == 1 else "") + ")"


def _step(step: Step) -> str:
    operation = step.operation or "as a whole"
    return f"{operation} at {step.line}: {step.reason}" if step.line else f"{operation}: {step.reason}"
