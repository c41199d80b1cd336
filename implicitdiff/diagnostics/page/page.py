"""Diagnostics, the page: the sections of a report joined into one HTML document that needs no network.

In: an `Explanation`. Out: text. Every text of the problem is escaped. Used by `explain.py`.
"""

from html import escape
from typing import TYPE_CHECKING

from implicitdiff.diagnostics.meter import format_bytes
from implicitdiff.diagnostics.page.document import asset, document, rows
from implicitdiff.diagnostics.page.equations import equations
from implicitdiff.diagnostics.page.listing import listing
from implicitdiff.diagnostics.page.matrices import matrices
from implicitdiff.diagnostics.page.network import network

if TYPE_CHECKING:
    from implicitdiff.diagnostics.explain import Explanation

_LEGEND = (
    ("variable", "variable"),
    ("input", "input"),
    ("tensor", "parameter or constant"),
    ("result", "objective or constraint"),
)


def page_of(found: "Explanation") -> str:
    """The whole document."""
    sections = [
        ("Declared functions", _declared(found)),
        ("The graph", _graph(found)),
        ("The matrices, before and after", matrices(found.drawing.patterns) or _no_pattern(found)),
        ("The equation with its blocks", equations(found)),
        ("The derivation in index notation", _derivation(found)),
        ("The decision", _decision(found)),
        ("The emitted backward pass", listing(found.code)),
    ]
    return document(found.problem, found.summary, _cards(found), sections, asset("page.js"))


def _cards(found: "Explanation") -> str:
    cards = [("H", found.hessian.kind)]
    if found.schur is not None:
        cards.append(("A H⁻¹ Aᵀ", found.schur.kind))
    cards += [
        ("solver", found.solver),
        ("one backward", f"{found.flops:,} FLOPs"),
        ("bytes moved", format_bytes(found.bytes)),
        ("peak", format_bytes(found.peak)),
    ]
    boxes = "".join(
        f"<div class='card'><span>{escape(name)}</span><b>{escape(value)}</b></div>" for name, value in cards
    )
    return f"<div class='cards'>{boxes}</div>"


def _declared(found: "Explanation") -> str:
    sources = "\n".join(
        f"<details{' open' if name == 'objective' else ''}><summary>{escape(name)}</summary>"
        f"<pre tabindex='0'><code>{escape(text)}</code></pre></details>"
        for name, text in found.sources
    )
    return f"<table>{rows([('sizes', found.sizes)])}</table>\n{sources}"


def _graph(found: "Explanation") -> str:
    legend = "".join(
        f"<span><i style='background: var(--{role})'></i>{escape(name)}</span>" for role, name in _LEGEND
    )
    covered = "".join(
        f"<p class='warn'><b>{escape(step.operation or 'as a whole')}</b>"
        f"{f' at <code>{escape(step.line)}</code>' if step.line else ''}: {escape(step.reason)}</p>"
        for step in found.fallbacks
    )
    return (
        f"{covered or '<p class=good>Every operation is covered by the labelled algebra.</p>'}\n"
        "<div class='stage'>"
        f"{network(found.drawing.nodes)}"
        "<div class='tools'><button id='closer' aria-label='zoom in'>+</button>"
        "<button id='farther' aria-label='zoom out'>−</button>"
        "<button id='all' aria-label='show all'>⤢</button></div>"
        "<div class='facts' id='facts' aria-live='polite'>Choose a node to see its formula and what its derivative "
        "by the variables is. Drag to move; the buttons, Ctrl and the wheel, or two fingers zoom.</div></div>\n"
        f"<div class='legend'>{legend}</div>"
    )


def _no_pattern(found: "Explanation") -> str:
    return f"<p>No pattern is proved: H is {escape(found.hessian.kind)}. {escape(found.hessian.reason)}.</p>"


def _derivation(found: "Explanation") -> str:
    lines = [*found.dependent, *found.derivation]
    if not lines:
        return "<p>None: H and A are taken by automatic differentiation.</p>"
    return "<ul class='lines mono'>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def _decision(found: "Explanation") -> str:
    multipliers = "needed" if found.multipliers else "not needed"
    constrained = found.constraint_jacobian.shape[0] > 0
    rest = [
        ("cost of one backward", found.cost),
        *([("multipliers in the backward", multipliers)] if constrained else []),
        ("forward", found.forward),
    ]
    return (
        "<div class='wide'><table><thead><tr><th scope='col'>solver</th><th scope='col'>why</th></tr></thead><tbody>"
        f"<tr class='chosen'><th scope='row'>{escape(found.solver)}</th><td>chosen</td></tr>{rows(found.rejected)}"
        f"{rows(rest)}</tbody></table></div>"
    )
