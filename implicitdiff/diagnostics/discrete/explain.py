"""Diagnostics of discrete layers, `explain`: what is solved, what stands for the derivative, and why that is valid.

In: a `DiscreteLayer` and costs, with or without data. Out: a frozen `DiscreteExplanation`. Next file to read:
``check.py``.
"""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass
from typing import Any

from implicitdiff.combinatorial import DiscreteLayer, Perturbed, check_invariance
from implicitdiff.combinatorial.estimator import Estimator
from implicitdiff.diagnostics.discrete import only_cost
from implicitdiff.diagnostics.page import document, framed, rows
from implicitdiff.diagnostics.tables import WIDTH, pairs
from implicitdiff.errors import ProjectionError

REPLACEMENT = "a replacement: the derivative of y(w) is zero almost everywhere"
EXPECTATION = "unbiased for the expectation over the noise, not for y(w)"


@dataclass(frozen=True)
class DiscreteExplanation:
    """What is known about a discrete layer before anything is solved.

    Attributes:
        solver: Its name.
        summary: The first sentence of its docstring.
        batch: Samples in the given costs.
        dtype: Of the costs.
        shape: Of one sample's cost, and of its solution.
        sense: "min" or "max".
        domain: The costs that the solver takes: "any", "nonnegative" or "no_negative_cycle".
        policy: What happens to others: "error" or "clamp".
        fixed: The number of independent equalities that all solutions satisfy, as far as they are declared: cost
            directions that cannot matter.
        estimator: Its name.
        formula: Its gradient.
        meaning: What that gradient is, since it is not the derivative of the solution.
        projection: P(w), "w" where there is none.
        valid: Whether P leaves every solution alone.
        proved: Whether that follows from the declarations; if not, it was tested on solutions.
        reason: Why, in words.
        margin: The noise of a margin, or of samples; "" without.
        calls: (forward, backward) instances solved for one sample in training; None where not declared.
        modes: The derivatives that exist.
    """

    solver: str
    summary: str
    batch: int
    dtype: str
    shape: tuple[int, ...]
    sense: str
    domain: str
    policy: str
    fixed: int
    estimator: str
    formula: str
    meaning: str
    projection: str
    valid: bool
    proved: bool
    reason: str
    margin: str
    calls: tuple[int, int] | None
    modes: str

    def __str__(self) -> str:
        return self.text()

    def text(self, width: int = WIDTH) -> str:
        """A report for a person, in lines of at most `width` characters."""
        title = f"{self.solver} with {self.estimator}: {self.summary}"
        title = textwrap.fill(title, width) if width < WIDTH else title
        return f"{title}\n\n{pairs(self._lines(), width)}"

    def _lines(self) -> list[tuple[str, str]]:
        size = math.prod(self.shape)
        takes = "any cost" if self.domain == "any" else f"{self.domain.replace('_', ' ')} costs"
        domain = takes if self.domain == "any" else f"{takes}; others: {self.policy}"
        equalities = (
            f"{self.fixed} of {size} directions of w cannot matter" if self.fixed else "none declared"
        )
        how = "proved" if self.proved else "tested, which is no proof" if self.valid else "refused"
        lines = [
            ("sizes", f"batch {self.batch}, {self.dtype}; costs and solutions {self.shape}, {size} entries"),
            ("solver", f"{self.solver}: arg{self.sense} of <w, y> over a finite set, {domain}"),
            ("equalities", equalities),
            ("", ""),
            ("estimator", f"{self.estimator}: {self.formula}"),
            ("meaning", self.meaning),
            ("projection", f"P(w) = {self.projection}"),
            ("valid", f"{how}: {self.reason}"),
        ]
        if self.margin:
            lines.append(("noise", f"{self.margin}, in training"))
        return [*lines, ("derivatives", self.modes), ("", ""), ("solver calls", self._calls())]

    def _calls(self) -> str:
        if self.calls is None:
            return "not declared by the estimator; the layer counts them: layer.solver_calls"
        ahead, back = self.calls
        total = self.batch * (ahead + back)
        each = f"{ahead} forward and {back} backward a sample"
        return f"{each}, {total} for batch {self.batch}; in evaluation {self.batch}"

    def to_html(self) -> str:
        """The report as one self-contained page; every text is escaped."""
        table = f"<table>{rows((label, text) for label, text in self._lines() if label)}</table>"
        return document(f"{self.solver} with {self.estimator}", self.summary, "", [("The layer", table)])

    def _repr_html_(self) -> str:
        """What a notebook shows: the page in a frame of its own."""
        return framed(self.to_html(), height=520)

    def to_latex(self) -> str:
        """The layer and its gradient in symbols, an `align*` environment."""
        size = math.prod(self.shape)
        return "\n".join(
            (
                r"\begin{align*}",
                rf"y(w) &= \arg\{self.sense}_{{y \in Y}} \langle w, y \rangle,",
                rf"\quad w, y \in \mathbb{{R}}^{{{size}}} \\",
                rf"P(w) &= \text{{{_plain(self.projection)}}} \\",
                rf"\text{{gradient:}} &\quad \text{{{_plain(self.formula)}}}",
                r"\end{align*}",
            )
        )


def _plain(text: str) -> str:
    """A formula of a report as LaTeX text."""
    signs = {"<": r"$\langle$", ">": r"$\rangle$", "^": r"\^{}", "_": r"\_", "|": r"$|$"}
    return "".join(signs.get(letter, letter) for letter in text)


def explain_discrete(layer: DiscreteLayer, inputs: tuple[Any, ...], in_dims: Any) -> DiscreteExplanation:
    """The explanation; where the projection is not proved by declarations it is tested on 32 random costs."""
    cost, shape = only_cost(layer, inputs, in_dims)
    solver, estimator = layer.solver, layer.estimator
    try:
        invariance = check_invariance(solver, layer.projection, shape=shape)
        valid, proved, reason = True, invariance.proved, invariance.reason
    except ProjectionError as error:
        valid, proved, reason = False, False, str(error)
    return DiscreteExplanation(
        solver=solver.name,
        summary=_summary(solver),
        batch=len(cost),
        dtype=str(cost.dtype).removeprefix("torch."),
        shape=shape,
        sense=solver.sense,
        domain=solver.domain,
        policy=layer.oracle.domain,
        fixed=len(solver.row_space(shape)),
        estimator=estimator.name,
        formula=estimator.formula,
        meaning=EXPECTATION if isinstance(estimator, Perturbed) else REPLACEMENT,
        projection=layer.projection.formula,
        valid=valid,
        proved=proved,
        reason=reason,
        margin=_noise(estimator),
        calls=estimator.calls,
        modes=_modes(estimator),
    )


def _summary(solver: object) -> str:
    text = " ".join((type(solver).__doc__ or "").split())
    first, dot, _ = text.partition(". ")
    return first + "." if dot else text


def _noise(estimator: Estimator) -> str:
    found = [getattr(estimator, name, None) for name in ("margin", "noise")]
    return ", ".join(str(noise) for noise in found if noise is not None)


def _modes(estimator: Estimator) -> str:
    if estimator.smooth:
        return "reverse, forward and second"
    linear = type(estimator).jvp is not Estimator.jvp
    return "reverse and forward" if linear else "reverse; not linear in g, so that there is no Jacobian"


__all__ = ["DiscreteExplanation", "explain_discrete"]
