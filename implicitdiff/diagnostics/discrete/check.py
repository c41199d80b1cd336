"""Diagnostics of discrete layers, `check`: is the solver exact, and is the gradient what its formula says?

In: a `DiscreteLayer` and costs. Out: the rows of a `CheckReport`. Nothing is compared with a derivative of the
solution, which is zero; the value min <w, y> has one, and the solver is tested by it. Next file to read:
``compare.py``.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from implicitdiff.combinatorial import (
    IMLE,
    LPGD,
    Blackbox,
    DiscreteLayer,
    Estimator,
    Identity,
    StraightThrough,
    check_invariance,
)
from implicitdiff.combinatorial.invariance import random_costs
from implicitdiff.diagnostics.check_report import CheckReport, Rows
from implicitdiff.diagnostics.discrete import only_cost
from implicitdiff.errors import ImplicitDiffError, ImplicitDiffWarning, ProjectionError

EXACT, FORMULA, FINITE = 1e-9, 1e-10, 1e-6
OTHERS = 64
STEPS = (0.1, 1.0, 10.0)
DIFFERENCE = 1e-6

# name, value, tolerance (or None: not run), remark
Found = tuple[str, float, float | None, str]


class Checked:
    """A layer in float64 with everything that the statements are about: w, y(w), a cotangent and dl/dw."""

    def __init__(self, layer: DiscreteLayer, cost: Tensor) -> None:
        self.layer, self.solver = layer, layer.solver
        self.sign = layer.oracle.sign
        self.cost = cost.double()
        if self.solver.domain == "nonnegative" and layer.oracle.domain == "clamp":
            self.cost = self.cost.clamp(min=layer.oracle.eps)
        self.w = self.sign * self.cost
        self.y = self.solver(self.cost)
        drawn = torch.from_numpy(np.random.default_rng(1).standard_normal(self.y.shape))
        self.g = drawn.to(self.y)
        self.gradient = torch.zeros_like(self.y)

    def solve(self, w: Tensor) -> Tensor:
        """y(w), always as a minimisation."""
        return self.solver(self.sign * w)

    def differentiate(self) -> None:
        """dl/dw in evaluation mode, without noise; the counts and the mode of the layer are left as they are."""
        fresh = DiscreteLayer(
            self.solver,
            copy.deepcopy(self.layer.estimator),
            domain=self.layer.oracle.domain,
            eps=self.layer.oracle.eps,
            check=False,  # has a row of its own
        ).eval()
        with torch.enable_grad():
            cost = self.cost.clone().requires_grad_()
            (found,) = torch.autograd.grad(fresh(cost), cost, self.g)
        self.gradient = self.sign * found

    def inner(self, a: Tensor, b: Tensor) -> Tensor:
        """<a, b> of each sample."""
        return (a * b).flatten(1).sum(1)

    def scale(self, w: Tensor) -> Tensor:
        """|w|_1 max |y| of each sample: what rounding of <w, y> is relative to."""
        return w.flatten(1).abs().sum(1).clamp(min=1e-300) * self.y.abs().amax().clamp(min=1)


def check_discrete(layer: DiscreteLayer, inputs: tuple[Any, ...], in_dims: Any) -> CheckReport:
    """The report: `statements` as rows."""
    rows = Rows()
    for name, value, tolerance, remark in statements(layer, inputs, in_dims):
        if tolerance is None:
            rows.not_run(name, remark)
        else:
            rows.upper(name, value, tolerance, remark)
    return CheckReport(f"{layer.solver.name} with {layer.estimator.name}", tuple(rows.rows))


def statements(layer: DiscreteLayer, inputs: tuple[Any, ...], in_dims: Any) -> list[Found]:
    """What was tried and what came out; what follows "solve" only if the solver solved."""
    cost, shape = only_cost(layer, inputs, in_dims)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ImplicitDiffWarning)
        try:
            case = Checked(layer, cost)
        except ImplicitDiffError as error:
            return [("solve", float("nan"), 0.0, f"{type(error).__name__}: {error}")]
        others = case.sign * random_costs(case.solver, shape, OTHERS, 2).to(case.w)
        found = case.solve(others)
        listed = case.solver.known_solutions()
        known = torch.cat((found, case.y) if listed is None else (found, case.y, listed.to(found)))
        rows: list[Found] = [
            ("solve", 0.0, 0.0, ""),
            _optimal(case, known),
            _equalities(case, shape, known),
            _projection(case, shape),
            _value(case),
        ]
        try:
            case.differentiate()
        except ImplicitDiffError as error:
            return [*rows, ("backward", float("nan"), 0.0, f"{type(error).__name__}: {error}")]
        return [*rows, _monotone(case), _orthogonal(case, shape), _formula(case)]


def _optimal(case: Checked, known: Tensor) -> Found:
    """<w, y(w)> <= <w, y'> for all solutions known, those of other costs included."""
    values = case.w.flatten(1) @ known.flatten(1).mT
    gap = (case.inner(case.w, case.y) - values.amin(1)) / case.scale(case.w)
    return "optimal among known", float(gap.amax()), EXACT, f"{len(known)} solutions"


def _equalities(case: Checked, shape: tuple[int, ...], known: Tensor) -> Found:
    basis = torch.from_numpy(case.solver.row_space(shape)).to(known)
    if len(basis) == 0:
        return "declared equalities", float("nan"), None, "none are declared"
    moved = (known - known[:1]).flatten(1) @ basis.mT
    return "declared equalities", float(moved.abs().amax()), EXACT, f"{len(basis)} independent ones"


def _projection(case: Checked, shape: tuple[int, ...]) -> Found:
    try:
        invariance = check_invariance(case.solver, case.layer.projection, shape=shape)
    except ProjectionError as error:
        return "projection", float("nan"), 0.0, str(error)
    return "projection", 0.0, 0.0, ("proved: " if invariance.proved else "tested: ") + invariance.reason


def _value(case: Checked) -> Found:
    """The derivative of min <w, y> is y(w): central differences along a random direction, relative to |y|.

    Where the solution changes between the two sides the value has a kink, and the sample says nothing.
    """
    t = torch.from_numpy(np.random.default_rng(3).uniform(0.5, 1, case.w.shape)).to(case.w)
    step = DIFFERENCE * case.w.flatten(1).abs().mean(1).clamp(min=DIFFERENCE)
    shift = t * step.reshape(-1, *(1,) * (t.dim() - 1))
    # Costs at zero have one side only.
    behind = case.w - shift if case.solver.domain != "nonnegative" else (case.w - shift).clamp(min=0)
    ahead = case.w + shift
    ends = [case.solve(end) for end in (behind, ahead)]
    same = torch.stack([(end == case.y).flatten(1).all(1) for end in ends]).all(0)
    if not same.any():
        return "value's derivative", float("nan"), None, "every sample is at a tie"
    slope = (case.inner(ahead, ends[1]) - case.inner(behind, ends[0])) / step
    exact = case.inner((ahead - behind), case.y) / step
    error = ((slope - exact).abs() / case.scale(t))[same]
    return "value's derivative", float(error.amax()), FINITE, f"{int(same.sum())} of {len(same)} samples"


def _monotone(case: Checked) -> Found:
    """<y(w - a d) - y(w), d> >= 0 for d = dl/dw and every a > 0: a step never raises the projected, linearised loss."""
    size = torch.linalg.vector_norm(case.gradient.flatten(1), dim=1).clamp(min=1e-300)
    length = torch.linalg.vector_norm(case.w.flatten(1), dim=1).clamp(min=1e-300)
    worst = 0.0
    for step in STEPS:
        factor = (step * length / size).reshape(-1, *(1,) * (case.w.dim() - 1))
        moved = case.w - factor * case.gradient
        if case.solver.domain == "nonnegative":
            moved = moved.clamp(min=0)
        try:
            change = case.solve(moved) - case.y
        except ImplicitDiffError:
            continue  # outside of a domain that depends on cycles; shorter steps may be inside
        actual = case.w - moved
        rise = -case.inner(change, actual) / case.scale(actual)
        worst = max(worst, float(rise.amax()))
    return "descent of a step", worst, EXACT, f"steps of {', '.join(f'{step:g}' for step in STEPS)} |w|"


def _orthogonal(case: Checked, shape: tuple[int, ...]) -> Found:
    """dl/dw has no part along what P takes out: its normals, and L w where P divides by a norm."""
    name = "orthogonal to what P removes"
    projection = case.layer.projection
    normals = projection.normals(case.solver, shape)
    if not isinstance(case.layer.estimator, Identity) or normals is None:
        return name, float("nan"), None, "for Identity with a projection given by name"
    gradient = case.gradient.flatten(1)
    size = torch.linalg.vector_norm(gradient, dim=1).clamp(min=1e-300)
    along = (gradient @ torch.from_numpy(np.ascontiguousarray(normals)).to(gradient).mT).abs() / size[:, None]
    worst = float(along.amax()) if along.numel() else 0.0
    if projection.formula.endswith("/ |w|") or projection.formula.startswith("u / |u|"):
        u = projection.linear(case.w).flatten(1)
        radial = (u * gradient).sum(1).abs() / size / torch.linalg.vector_norm(u, dim=1).clamp(min=1e-300)
        worst = max(worst, float(radial.amax()))
    return name, worst, EXACT, f"P(w) = {projection.formula}"


def _formula(case: Checked) -> Found:
    """dl/dw against the formula, by another way: autograd through P, or solutions at moved costs."""
    name = "gradient by its formula"
    try:
        other = _another_way(case, case.layer.estimator)
    except ImplicitDiffError as error:
        return name, float("nan"), None, f"perturbed costs are outside of the domain: {type(error).__name__}"
    if other is None:
        return name, float("nan"), None, "no second way to compute it is known"
    worst = (other - case.gradient).abs().amax() / case.gradient.abs().amax().clamp(min=1e-300)
    return name, float(worst), FORMULA, case.layer.estimator.formula


def _another_way(case: Checked, estimator: Estimator) -> Tensor | None:
    match estimator:
        case Identity():
            return _through_projection(case)
        case StraightThrough(temperature=None):
            return -case.g
        case StraightThrough(temperature=float(temperature)):
            return _through_softmax(case, temperature)
        case Blackbox(lam=step) | IMLE(lam=step, scale=True):
            return _quotient(case, step, "right")
        case LPGD(tau=step, rho=0.0, side=side):
            return _quotient(case, step, side)
        case _:
            return None


def _through_projection(case: Checked) -> Tensor:
    """-P'(w)^T g by autograd through P."""
    with torch.enable_grad():
        w = case.w.clone().requires_grad_()
        (pulled,) = torch.autograd.grad(case.layer.projection(w) + 0 * w, w, case.g)
    return -pulled


def _through_softmax(case: Checked, temperature: float) -> Tensor:
    with torch.enable_grad():
        w = case.w.clone().requires_grad_()
        ones = case.y.flatten(1).sum(1, keepdim=True)
        soft = (ones * torch.softmax(-w.flatten(1) / temperature, dim=1)).reshape(w.shape)
        (found,) = torch.autograd.grad(soft, w, case.g)
    return found


def _quotient(case: Checked, step: float, side: str) -> Tensor:
    ahead = case.solve(case.w + step * case.g) if side != "left" else case.y
    behind = case.solve(case.w - step * case.g) if side != "right" else case.y
    return (ahead - behind) / (2 * step if side == "both" else step)


__all__ = ["check_discrete", "statements"]
