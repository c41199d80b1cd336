"""Diagnostics, the equations of the page as MathML, which browsers draw without any library.

In: an `Explanation`. Out: HTML: Eqn. 3 of Gould et al. (2022), then each matrix with its actual blocks, then the two
products that the backward pass is. Used by `page.py`.
"""

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from implicitdiff.structure.drawing import Pattern
from implicitdiff.structure.report import MatrixReport

if TYPE_CHECKING:
    from implicitdiff.diagnostics.explain import Explanation


def equations(found: "Explanation") -> str:
    """The list of equations, each with a sentence."""
    patterns = {pattern.name: pattern for pattern in found.drawing.patterns}
    constrained = found.constraint_jacobian.shape[0] > 0
    lines = [("the gradient that is wanted (Eqn. 3)", _eqn3(constrained))]
    named: list[tuple[str, MatrixReport, str]] = [("H", found.hessian, _second())]
    if constrained:
        named.append(("A", found.constraint_jacobian, _row(_sub(_i("D"), _i("u")), _i("h"))))
    if found.schur is not None:
        named.append(("S", found.schur, _row(_i("A"), _inverse("H"), _transposed("A"))))
    for name, report, meaning in named:
        form = _form(name, report.kind, patterns.get(name))
        left = _row(_i(name), _eq(), meaning)
        size = _sub(_i("ℝ"), _text(f"{report.shape[0]} × {report.shape[1]}"), up=True)
        lines.append((f"{report.kind}: {report.reason}", _row(left, _eq(), form, _op("∈"), size)))
    lines += _backward(constrained)
    items = "\n".join(
        f"<div class='equation'><math display='block'>{formula}</math><p>{escape(said)}</p></div>"
        for said, formula in lines
    )
    return f"<div class='equations'>\n{items}\n</div>"


def _eqn3(constrained: bool) -> str:
    tail = _row(_inverse("H"), _i("B"))
    if not constrained:
        return _row(_i("D"), _i("y"), _eq(), _op("−"), tail)
    inner = _row(_op("("), _i("A"), _inverse("H"), _i("B"), _op("−"), _i("C"), _op(")"))
    schur = _sup(_row(_op("("), _i("A"), _inverse("H"), _transposed("A"), _op(")")), _number("−1"))
    return _row(_i("D"), _i("y"), _eq(), _inverse("H"), _transposed("A"), schur, inner, _op("−"), tail)


def _backward(constrained: bool) -> list[tuple[str, str]]:
    gradient = _sub(_op("∇"), _i("x"))
    pulled = _row(_transposed("B"), _i("w"))
    if not constrained:
        return [
            ("one solve with the incoming gradient v", _row(_i("H"), _i("w"), _eq(), _op("−"), _i("v"))),
            ("B never exists: the product is one reverse sweep of D_u L · w", _row(gradient, _eq(), pulled)),
        ]
    matrix = _table([[_i("H"), _row(_op("−"), _transposed("A"))], [_row(_op("−"), _i("A")), _number("0")]])
    solve = _row(matrix, _table([[_i("w")], [_i("s")]]), _eq(), _op("−"), _table([[_i("v")], [_number("0")]]))
    product = _row(gradient, _eq(), pulled, _op("−"), _transposed("C"), _i("s"))
    return [
        ("one solve with the incoming gradient v, through S where S exists", solve),
        ("B and C never exist: the products are one reverse sweep of D_u L · w − hᵀs", product),
    ]


def _form(name: str, kind: str, pattern: Pattern | None) -> str:
    """The matrix with its blocks in it; for one block, by its kind."""
    if pattern is not None and (len(pattern.blocks) > 1 or len(pattern.blocks[0]) > 1):
        several = len(pattern.blocks[0]) > 1
        cells = [
            [_block(name, word, f"{a + 1}{b + 1}" if several else str(a + 1)) for b, word in enumerate(line)]
            for a, line in enumerate(pattern.blocks)
        ]
        return _table(cells)
    forms = {
        "zero": _number("0"),
        "scaled-identity": _row(_i("σ"), _i("I")),
        "diagonal": _call("diag", _i("d")),
        "kronecker": _row(_sub(_i("K"), _number("1")), _op("⊗"), _sub(_i("K"), _number("2"))),
        "banded": _call(
            "band", _row(_sub(_i("d"), _text("−b")), _op(","), _op("…"), _op(","), _sub(_i("d"), _text("b")))
        ),
        "block-diagonal": _call(
            "blkdiag",
            _row(_sub(_i(name), _number("1")), _op(","), _op("…"), _op(","), _sub(_i(name), _i("k"))),
        ),
        "low-rank-plus-diagonal": _row(_i("D"), _op("+"), _i("U"), _i("C"), _transposed("U")),
    }
    return forms.get(kind, _text(kind.replace("-", " ")))


def _block(name: str, word: str, index: str) -> str:
    """One block: 0, diag(..), or a name with what it is."""
    label = _sub(_i(name), _number(index))
    if word == "0":
        return _number("0")
    if word == "diagonal":
        return _call("diag", label)
    return f"<munder>{label}{_text(word)}</munder>"


def _second() -> str:
    return _row(f"<msubsup>{_i('D')}{_row(_i('u'), _i('u'))}{_number('2')}</msubsup>", _i("L"))


def _i(name: str) -> str:
    return f"<mi>{name}</mi>"


def _op(sign: str) -> str:
    return f"<mo>{sign}</mo>"


def _eq() -> str:
    return _op("=")


def _number(digits: str) -> str:
    return f"<mn>{digits}</mn>"


def _text(words: str) -> str:
    return f"<mtext>{escape(words)}</mtext>"


def _row(*parts: str) -> str:
    return f"<mrow>{''.join(parts)}</mrow>"


def _sup(base: str, power: str) -> str:
    return f"<msup>{base}{power}</msup>"


def _sub(base: str, index: str, *, up: bool = False) -> str:
    tag = "msup" if up else "msub"
    return f"<{tag}>{base}{index}</{tag}>"


def _inverse(name: str) -> str:
    return _sup(_i(name), _number("−1"))


def _transposed(name: str) -> str:
    return _sup(_i(name), _text("⊤"))


def _call(function: str, argument: str) -> str:
    return _row(_text(function), _op("("), argument, _op(")"))


def _table(rows: Sequence[Sequence[str]]) -> str:
    body = "".join(f"<mtr>{''.join(f'<mtd>{cell}</mtd>' for cell in row)}</mtr>" for row in rows)
    return f"<mtable class='matrix'>{body}</mtable>"
