"""Diagnostics, what a report draws: the labelled graph where the plan is structured, else the traced operations.

In: a problem and its plan. Out: a `Drawing`, and the source text of the declared functions. Used by `explain.py`.
"""

import inspect
import textwrap

from implicitdiff.graph.drawing import traced_nodes
from implicitdiff.graph.record import LOCK
from implicitdiff.plan import Plan
from implicitdiff.problem import Problem
from implicitdiff.structure.drawing import Drawing
from implicitdiff.structured.drawing import drawing
from implicitdiff.structured.plan import StructuredPlan

_HOOKS = ("objective", "equality", "inequality", "bounds")


def drawing_of(plan: Plan) -> Drawing:
    """The graph with what is proved of each node, and the patterns of the matrices (none where none are proved)."""
    if isinstance(plan, StructuredPlan):
        with LOCK:  # writing an expression takes new labels from the plan's builder
            square = bool(plan.trace.square)
            return drawing(plan.declared, plan.recipes.form, plan.recipes.route.schur, square=square)
    uncovered = [(step.operation, step.line) for step in plan.analysis.fallbacks]
    return Drawing(traced_nodes(plan.trace, uncovered), ())


def sources_of(problem: Problem) -> tuple[tuple[str, str], ...]:
    """(name, source) of each declared function; what was typed into a console without a file is left out."""
    found = []
    for name in (problem.MAIN,) if problem.square else _HOOKS:
        if problem.declares(name):
            try:
                found.append((name, textwrap.dedent(inspect.getsource(getattr(problem, name)))))
            except (OSError, TypeError):
                continue
    return tuple(found)
