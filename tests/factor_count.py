"""Counts factorisations as the library makes them, whatever the rung of its ladder.

In: the `monkeypatch` of a test. Out: a list of names, one a factorisation. Used by `test_factorisations.py` and
`test_shared_factor.py`.
"""

from collections.abc import Callable
from typing import Any

import pytest

from implicitdiff.derivatives.autodiff import AutodiffPlan
from implicitdiff.kkt import saddle
from implicitdiff.solvers import Schur
from implicitdiff.solvers.base import LinearSolver


def count_factorisations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that gets "factor" for `factor` of a solver, "K" for the KKT matrix of a structured plan taken as one,
    "H" for the Hessian of a dense plan.

    Each of the last two is formed once for one LU or LDL' factorisation, and for nothing else in a backward pass.
    """
    made: list[str] = []

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            made.append(name)
            return function(*args, **named)

        return call

    plain = Schur.factor

    def eliminated(*args: Any) -> Any:
        before = len(made)
        found = plain(*args)
        if len(made) == before:  # else it came through `LinearSolver.factor`
            made.append("factor")
        return found

    monkeypatch.setattr(LinearSolver, "factor", counted("factor", LinearSolver.factor))
    monkeypatch.setattr(Schur, "factor", eliminated)
    monkeypatch.setattr(saddle.FullKKT, "__init__", counted("K", saddle.FullKKT.__init__))
    monkeypatch.setattr(AutodiffPlan, "hessian_matrix", counted("H", AutodiffPlan.hessian_matrix))
    return made
