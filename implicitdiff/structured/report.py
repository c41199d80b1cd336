"""What a structured plan says about itself.

In: the declared derivatives, the forms and the route. Out: `Analysis`. Next file: `plan.py`.
"""

from __future__ import annotations

from implicitdiff.derivatives.declared import Declared
from implicitdiff.kkt.route import Route
from implicitdiff.structure.forms import Form
from implicitdiff.structure.report import Analysis, MatrixReport
from implicitdiff.structured.describe import Notebook, derivation


def report(declared: Declared, hessian: Form, route: Route, code: str, *, anchored: bool = False) -> Analysis:
    """The findings, in the words of the contract; `anchored`: H + rho A'A is factored in place of H."""
    m, p = hessian.space.size, declared.constraint_space.size
    constrained = bool(declared.constraints)
    schur = None
    if constrained:
        if route.schur is not None:
            schur = MatrixReport(route.schur.kind, (p, p), route.schur.reason)
        else:
            matrix = "H + rho A'A, since H alone is most likely singular" if anchored else "H"
            reason = {
                "numeric": f"formed from p solves with {matrix}",
                "sparse": "not formed: K is factored as one sparse matrix",
            }.get(route.name, "H is singular: K is factored as one matrix")
            schur = MatrixReport("dense", (p, p), reason)
    return Analysis(
        hessian=MatrixReport(hessian.kind, (m, m), hessian.reason, hessian.parts),
        constraint_jacobian=_jacobian(declared, (p, m)),
        schur=schur,
        solver=route.solver,
        rejected=route.rejected,
        code=code,
        derivation=derivation(declared, hessian, route.schur, _common(declared, route)),
        dependent=() if route.dependent is None else route.dependent.sentences,
    )


def _common(declared: Declared, route: Route) -> str:
    """The factor that was divided out of S, as text in front of each block."""
    factor = declared.build.mul(route.common, route.common_coefficient)
    text = Notebook(declared.build).write(factor, inside=True)
    return "" if text == "1" else f"{text} * "


def _jacobian(declared: Declared, shape: tuple[int, int]) -> MatrixReport:
    if not declared.constraints:
        return MatrixReport("zero", shape, "there are no constraints")
    terms = [t for c in declared.constraints for t in c.terms]
    if not terms:
        return MatrixReport("zero", shape, "no constraint depends on the variables")
    tied = all(any(k in c.labels for k in t.columns) for c in declared.constraints for t in c.terms)
    if len(declared.constraints) > 1:
        how = (
            "each ties an axis of the variable to its own" if tied else "not all tie an axis of the variable"
        )
        return MatrixReport("block", shape, f"{len(declared.constraints)} constraints; {how}")
    only = declared.constraints[0]
    if all(set(t.columns) == set(only.labels) for t in only.terms) and len(only.terms) == 1:
        return MatrixReport("diagonal", shape, "the constraint ties every axis of the variable")
    return MatrixReport(
        "block" if tied and only.labels else "dense",
        shape,
        "the constraint ties an axis of the variable to its own"
        if tied and only.labels
        else "one dense row each",
    )
