"""What was found about a problem: plain records without behaviour, made once per plan and never changed.

In: the findings of the structure analysis (or of a fallback). Out: the fields that `explain` shows and tests assert.
Next file: `plan.py`, which chooses the plan these records describe.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MatrixReport:
    """One matrix of the KKT system, for one sample.

    Attributes:
        kind: the structure proved, by the contract's name ("diagonal", "low-rank-plus-diagonal", ..., "dense").
        shape: (rows, columns).
        reason: why, in one line.
        parts: of a sum, the kinds of its summands.
    """

    kind: str
    shape: tuple[int, int]
    reason: str
    parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fallback:
    """One step down the ladder from a structured to a slower, equally exact path.

    Attributes:
        operation: the aten operation that the algebra does not cover ("" where no single operation is to blame).
        line: where the user's file calls it, "file.py:12: source text" ("" if unknown).
        reason: what is missing, in one line.
    """

    operation: str
    line: str
    reason: str


@dataclass(frozen=True)
class Analysis:
    """Everything `explain` says about a plan, apart from costs.

    Attributes:
        hessian: H = D_uu L.
        constraint_jacobian: A = D_u h.
        schur: S = A H^-1 A'; None without constraints.
        solver: the linear solver chosen, by the contract's name.
        rejected: (solver, reason) of each solver that was considered and not taken.
        fallbacks: every step down the ladder.
        code: the emitted backward pass as Python text; "" for a plan that emits none.
        dependent: proved dependences between constraints, one line each.
        derivation: the lines of the report: what H, A and S are, in symbols.
    """

    hessian: MatrixReport
    constraint_jacobian: MatrixReport
    schur: MatrixReport | None
    solver: str
    rejected: tuple[tuple[str, str], ...] = ()
    fallbacks: tuple[Fallback, ...] = ()
    code: str = ""
    dependent: tuple[str, ...] = ()
    derivation: tuple[str, ...] = ()
