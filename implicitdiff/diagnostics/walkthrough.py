"""Diagnostics, `walkthrough`: the derivation from the Lagrangian to the gradient, step by step, in the paper's symbols.

In: a problem and inputs. Out: text, with the numbers of the first sample beside the symbols. For lessons; the layer
does none of this. `derivatives/eqn3.py` multiplies out; `explain.py` is the report for people who know the mathematics.
"""

import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from implicitdiff.derivatives import eqn3
from implicitdiff.diagnostics.declared import Declared, double, normal, to_double
from implicitdiff.diagnostics.examples import example_inputs
from implicitdiff.diagnostics.explain import Explanation, explain
from implicitdiff.diagnostics.held import fresh, plan_of
from implicitdiff.diagnostics.reference import Reference, made_consistent
from implicitdiff.diagnostics.tables import first_sentence
from implicitdiff.errors import ImplicitDiffWarning
from implicitdiff.layer import DeclarativeLayer, solve
from implicitdiff.problem import Problem, Solution, require_problem
from implicitdiff.torch_private import pytree
from implicitdiff.vjp import Derivatives, derivatives

COLUMNS = 80
LARGE = 400
"""Above this many variables, inputs or constraints no matrix is made: the derivation stays in symbols."""


@dataclass(frozen=True)
class Step:
    """One step: a heading, sentences and equations, and numbers."""

    heading: str
    text: str


def walkthrough(problem: Problem, *inputs: Any, in_dims: Any = 0) -> None:
    """Print how the gradient of a problem is derived, from the Lagrangian to the vector-Jacobian product.

    The symbols are those of Gould et al. (2022): x the inputs, y(x) the solution, u the variable, f and h, λ, and A, B,
    C, H of Eqn. 3; v is the incoming gradient DJ(y). The numbers are those of the first sample, in float64.

    Args:
        problem: The declared problem.
        inputs: As for the layer; small ones are best. None: the problem's `example`.
        in_dims: As for the layer.

    Raises:
        ImplicitDiffError: The problem or the inputs are refused at the door, or there is no solution.
    """
    print(text(steps(problem, *inputs, in_dims=in_dims)))


def text(found: Sequence[Step]) -> str:
    """The steps, numbered, in lines of at most 80 characters."""
    parts = []
    for number, step in enumerate(found, 1):
        heading = f"{number}. {step.heading}"
        parts.append(f"{heading}\n{'-' * len(heading)}\n\n{step.text}")
    return "\n\n".join(parts)


def steps(problem: Problem, *inputs: Any, in_dims: Any = 0) -> list[Step]:
    """The steps of `walkthrough`."""
    require_problem(problem)
    inputs = inputs or example_inputs(problem)
    # The first sample in float64, solved anew: rounding would hide what the lesson shows.
    planned = plan_of(problem, inputs, in_dims)
    plain, twin = planned.bound.sample(0), double(problem)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", ImplicitDiffWarning)
        near = solve(problem, *plain, in_dims=None, on_failure="warn")
    sample = tuple(pytree.tree_map(to_double, plain))
    # What rounding made dependent constraints inconsistent by is not zero in float64.
    sample = made_consistent(sample, Reference(Declared(twin, sample, None, near.u)))
    found = explain(twin, *sample, in_dims=None)
    leaves, _ = pytree.tree_flatten(sample)
    size = max(
        found.hessian.shape[0],
        found.constraint_jacobian.shape[0],
        sum(leaf.numel() for leaf in leaves if isinstance(leaf, Tensor)),
    )
    shown = _numbers(twin, sample) if size <= LARGE else None
    constrained = found.constraint_jacobian.shape[0] > 0
    return [
        _problem(problem, found, constrained),
        _lagrangian(shown, constrained),
        _conditions(constrained),
        _eqn3(shown, constrained),
        _structure(found),
        _left_to_right(shown, constrained),
    ]


@dataclass(frozen=True)
class _Numbers:
    """One sample: its solution, the matrices, one cotangent, and the gradient by two ways."""

    solution: Solution
    matrices: Derivatives
    walked: eqn3.Walk
    v: Tensor
    by_formula: Tensor
    by_layer: Tensor


def _numbers(problem: Problem, sample: Sequence[Any]) -> _Numbers:
    moved, moving = fresh(sample)
    layer = DeclarativeLayer(problem, in_dims=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ImplicitDiffWarning)
        solution = layer.solve(*moved)
        u = pytree.tree_map(lambda leaf: leaf.detach(), solution.u)
        matrices = derivatives(problem, u, *sample)
        generator = torch.Generator().manual_seed(0)
        cotangent = [normal(generator, leaf) for leaf in pytree.tree_leaves(solution.u)]
        given = torch.autograd.grad(pytree.tree_leaves(solution.u), moving, cotangent, allow_unused=True)
    by_layer = torch.cat(
        [(torch.zeros_like(x) if g is None else g).reshape(-1) for x, g in zip(moving, given, strict=True)]
    )
    walked = eqn3.walk(matrices.A, matrices.B, matrices.C, matrices.H)
    v = torch.cat([leaf.reshape(-1) for leaf in cotangent])
    return _Numbers(solution, matrices, walked, v, v @ walked.Dy, by_layer)


# The steps


def _problem(problem: Problem, found: Explanation, constrained: bool) -> Step:
    name = type(problem).__name__
    declared = first_sentence(problem)
    m, p = found.hessian.shape[0], found.constraint_jacobian.shape[0]
    lines = [_fill(f"{name}: {declared}" if declared else name), ""]
    lines.append("    y(x) ∈ arg min  f(x, u)" + ("   subject to  h(x, u) = 0" if constrained else ""))
    lines.append("          u ∈ R^m")
    lines.append("")
    given = ", ".join(f"{item.name} {_shape(item.shape)}" for item in found.inputs)
    counts = f"u has m = {m} entries" + (
        f", h has p = {p}" if constrained else ", and there are no constraints"
    )
    lines.append(
        _fill(
            f"{counts}; the inputs x are {given}. The functions are {name}.objective (f)"
            + (f" and {name}.equality (h), for one sample." if constrained else ", for one sample.")
        )
    )
    return Step("The problem", "\n".join(lines))


def _lagrangian(shown: _Numbers | None, constrained: bool) -> Step:
    if not constrained:
        lines = ["    L = f,   and at a minimum   D_Y f(x, y) = 0"]
    else:
        lines = ["    L(x, u, λ) = f(x, u) - Σ_i λ_i h_i(x, u)", ""]
        lines.append(
            _fill("At a minimum where the rows of A = D_Y h are independent, some λ makes L stationary:")
        )
        lines += ["", "    D_Y L = 0,   that is   λ'A = D_Y f"]
    if shown is not None:
        lines += ["", "here, at the solution of the first sample:"]
        lines += ["", "y =", eqn3.matrix_text(_flat(shown.solution.u))]
        if constrained:
            lines += ["λ =", eqn3.matrix_text(shown.matrices.multipliers)]
    return Step("The Lagrangian" if constrained else "The condition of optimality", "\n".join(lines))


def _conditions(constrained: bool) -> Step:
    if not constrained:
        words = "The condition holds for every x, with y(x) in the place of u. Differentiate it with respect to x:"
        lines = [_fill(words), "", "    D_Y f(x, y(x)) = 0     =>    H Dy(x) + B = 0"]
        return Step("Differentiate the condition", "\n".join([*lines, "", "with", "", *_LETTERS[:2]]))
    words = "Both conditions hold for every x, with y(x) and λ(x). Differentiate them with respect to x:"
    lines = [_fill(words), ""]
    lines.append("    (D_Y f - λ'A)(x, y(x), λ(x)) = 0    =>    H Dy(x) + B - A' Dλ(x) = 0")
    lines.append("    h(x, y(x)) = 0                      =>    A Dy(x) + C = 0")
    return Step("Differentiate the conditions", "\n".join([*lines, "", "with", "", *_LETTERS]))


_LETTERS = [
    "    H = D_YY L   (m x m)",
    "    B = D_XY L   (m x n)",
    "    A = D_Y h    (p x m)",
    "    C = D_X h    (p x n)",
]


def _eqn3(shown: _Numbers | None, constrained: bool) -> Step:
    if constrained:
        words = (
            "The first equation gives Dy = H^-1 (A' Dλ - B); put into the second, it gives Dλ, and then Dy:"
        )
        lines = [_fill(words), "", "    Dλ(x) = (A H^-1 A')^-1 (A H^-1 B - C)"]
        lines.append("    Dy(x) = H^-1 A' (A H^-1 A')^-1 (A H^-1 B - C) - H^-1 B          (Eqn. 3)")
    else:
        lines = ["    Dy(x) = -H^-1 B                                  (Eqn. 3 with p = 0)"]
    if shown is None:
        lines += ["", _fill(f"The matrices have more than {LARGE} rows or columns and are not made here.")]
        return Step("Solve for Dy(x)", "\n".join(lines))
    lines += ["", "with the numbers of the first sample:", ""]
    for name, value in (("H", shown.matrices.H), ("B", shown.matrices.B)):
        lines += [f"{name} {eqn3.shape(value)}", eqn3.matrix_text(value)]
    if constrained:
        for name, value in (("A", shown.matrices.A), ("C", shown.matrices.C)):
            lines += [f"{name} {eqn3.shape(value)}", eqn3.matrix_text(value)]
    for factor in shown.walked.factors:
        lines.append(f"{factor.formula} {eqn3.shape(factor.value)}")
        lines += [_fill(f"    ({factor.remark})")] if factor.remark else []
        lines.append(eqn3.matrix_text(factor.value))
    return Step("Solve for Dy(x)", "\n".join(lines))


def _structure(found: Explanation) -> Step:
    words = (
        "Multiplied out as above this costs O(m^3 + p^3) and all of B. Before any number is known, the framework reads "
        "off the graph of f and h what the matrices look like, in index notation:"
    )
    lines = [_fill(words), ""]
    lines += [_fill(line, "    ", "        ") for line in found.derivation]
    kinds = [f"H is {found.hessian.kind}"]
    kinds += [f"S = A H^-1 A' is {found.schur.kind}"] if found.schur is not None else []
    lines += ["", _fill(f"{'; '.join(kinds)}. Solver: {found.solver}.")]
    lines += [_fill(f"Dependent constraints: {text}.") for text in found.dependent]
    for step in found.fallbacks:
        place = f" at {step.line}" if step.line else ""
        lines.append(_fill(f"Without a rule: {step.operation or 'as a whole'}{place}: {step.reason}."))
    return Step("The structure of the matrices", "\n".join(lines))


def _left_to_right(shown: _Numbers | None, constrained: bool) -> Step:
    words = "The loss J needs DJ(x) = v'Dy(x) with v' = DJ(y): one row, not all of Dy(x). One solve gives it:"
    lines = [_fill(words), ""]
    if constrained:
        lines.append("    H w - A's = -v,   A w = 0          (one right-hand side)")
        lines.append("    DJ(x) = w'B - s'C = D_X ( D_Y L · w - h's )     with w and s held fixed")
    else:
        lines.append("    H w = -v                           (one right-hand side)")
        lines.append("    DJ(x) = w'B = D_X ( D_Y f · w )    with w held fixed")
    lines += ["", _fill("The last line is one pullback through f and h: B and C are never formed.")]
    if shown is not None:
        difference = float((shown.by_formula - shown.by_layer).abs().max()) if shown.v.numel() else 0.0
        scale = max(float(shown.by_formula.abs().max()), 1e-300) if shown.by_formula.numel() else 1.0
        lines += ["", "for a random v:", "", "v =", eqn3.matrix_text(shown.v)]
        lines += ["DJ(x) = v'Dy(x), by Eqn. 3 =", eqn3.matrix_text(shown.by_formula)]
        lines += ["DJ(x), by the layer's backward pass =", eqn3.matrix_text(shown.by_layer)]
        lines += ["", f"largest difference, relative: {difference / scale:.1e}"]
    return Step("The gradient, from left to right", "\n".join(lines))


def _flat(u: Any) -> Tensor:
    return torch.cat([leaf.detach().reshape(-1) for leaf in pytree.tree_leaves(u)])


def _shape(shape: tuple[int, ...]) -> str:
    return f"({', '.join(str(size) for size in shape)}{',' * (len(shape) == 1)})"


def _fill(words: str, first: str = "", rest: str = "") -> str:
    return textwrap.fill(words, COLUMNS, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)
