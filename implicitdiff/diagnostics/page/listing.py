"""Diagnostics, the emitted code with colours: Pygments' classes, so that the page's own style sheet decides.

In: Python text. Out: HTML. Used by `page.py`.
"""

from html import escape

from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer


def listing(code: str) -> str:
    """A numbered listing; a sentence where there is no code."""
    if not code:
        return (
            "<p>No code is emitted: this plan forms its products by automatic differentiation while it runs. "
            f"{escape('See what it falls back from, above.')}</p>"
        )
    lines = highlight(code, PythonLexer(), HtmlFormatter(nowrap=True)).rstrip("\n").split("\n")
    body = "".join(f"<span class='line'>{line}\n</span>" for line in lines)
    return f"<pre class='code' tabindex='0'><code>{body}</code></pre>"
