"""Diagnostics, the derivation in LaTeX: the same steps for each problem, with the proved kinds put in.

In: an `Explanation`. Out: text. Used by `explain.py`.
"""

from typing import TYPE_CHECKING

from implicitdiff.structure.report import MatrixReport

if TYPE_CHECKING:
    from implicitdiff.diagnostics.explain import Explanation

_FORMS = {
    "zero": r"0",
    "scaled-identity": r"\sigma I",
    "diagonal": r"\operatorname{diag}(d)",
    "kronecker": r"K_1 \otimes K_2",
    "banded": r"\operatorname{band}(d_{-b}, \dots, d_b)",
    "block-diagonal": r"\operatorname{blkdiag}(%(name)s_1, \dots, %(name)s_k)",
    "low-rank-plus-diagonal": r"D + U C U^\top",
    "block": r"\begin{pmatrix} %(name)s_{11} & %(name)s_{12} \\ %(name)s_{21} & %(name)s_{22} \end{pmatrix}",
}
_SPECIAL = str.maketrans({
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
})  # fmt: skip


def escape(text: str) -> str:
    """Text that LaTeX prints as it is."""
    return text.translate(_SPECIAL)


def derivation_in_latex(found: "Explanation") -> str:
    """The derivation as an `align*` environment, a remark with the reason beside each matrix.

    It is the general derivation (Gould et al., Eqn. 3, in KKT form) with the form of H, A and S filled in;
    the entries themselves are in `Explanation.code`.
    """
    if found.square:
        return _equations(found)
    p = found.constraint_jacobian.shape[0]
    lines = [rf"\text{{{escape(found.problem)}:}}\quad u(x) &\in \arg\min_u f(u, x)"]
    lines[0] += r"\ \text{ s.t. }\ h(u, x) = 0" if p else ""
    if p:
        lines.append(r"L &= f - \lambda^\top h, \qquad \lambda^\top A = \mathrm{D}_u f")
    else:
        lines.append(r"L &= f")
    lines.append(rf"H &= \mathrm{{D}}^2_{{uu}} L {_matrix('H', found.hessian)}")
    if not p:
        lines.append(r"H w &= -v")
        lines.append(r"\nabla_x &= \mathrm{D}_x \bigl( \mathrm{D}_u L \cdot w \bigr) = B^\top w")
        return _align(lines)
    lines.append(rf"A &= \mathrm{{D}}_u h {_matrix('A', found.constraint_jacobian)}")
    if found.schur is not None:
        lines.append(rf"S &= A H^{{-1}} A^\top {_matrix('S', found.schur)}")
    lines += [f"&{_remark(text)}" for text in found.dependent]
    lines.append(
        r"\begin{pmatrix} H & -A^\top \\ -A & 0 \end{pmatrix} \begin{pmatrix} w \\ s \end{pmatrix}"
        r" &= -\begin{pmatrix} v \\ 0 \end{pmatrix}"
    )
    lines.append(
        r"\nabla_x &= \mathrm{D}_x \bigl( \mathrm{D}_u L \cdot w - h^\top s \bigr) = B^\top w - C^\top s"
    )
    return _align(lines)


def _equations(found: "Explanation") -> str:
    """The same for a system of equations."""
    residual = r"u - \operatorname{step}(u, x)" if found.square == "step" else "r(u, x)"
    return _align(
        [
            rf"\text{{{escape(found.problem)}:}}\quad {residual} &= 0"
            + (r" \quad (= r(u, x))" if found.square == "step" else ""),
            rf"J &= \mathrm{{D}}_u r {_matrix('J', found.hessian)}",
            r"J^\top s &= v",
            r"\nabla_x &= -(\mathrm{D}_x r)^\top s",
        ]
    )


def _matrix(name: str, found: MatrixReport) -> str:
    rows, columns = found.shape
    form = f" = {_FORMS[found.kind]}".replace("%(name)s", name) if found.kind in _FORMS else ""
    if name == "A" and found.kind == "block":
        # The outputs of `equality`, one below the other.
        form = r" = \begin{pmatrix} A_1 \\ A_2 \\ \vdots \end{pmatrix}"
    return (
        rf"{form} \in \mathbb{{R}}^{{{rows} \times {columns}}} \\ &{_remark(f'{found.kind}: {found.reason}')}"
    )


def _remark(text: str) -> str:
    """Words below an equation, in lines of their own: beside it they would leave the page."""
    return rf"\quad \parbox[t]{{0.6\linewidth}}{{\footnotesize {escape(text)}}}"


def _align(lines: list[str]) -> str:
    return "\\begin{align*}\n  " + " \\\\\n  ".join(lines) + "\n\\end{align*}"
