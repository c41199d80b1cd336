"""Diagnostics, the report as a web page: one file, no network, drawn from an `Explanation`.

`page.py` joins the sections in a `document.py`; `network.py` draws the graph, `matrices.py` the patterns,
`equations.py` writes MathML, `listing.py` colours the code; `page.css` and `page.js` are put in as they are.
"""

from implicitdiff.diagnostics.page.document import document, framed, rows
from implicitdiff.diagnostics.page.page import page_of

__all__ = ["document", "framed", "page_of", "rows"]
