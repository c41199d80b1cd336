"""Diagnostics, pictures of matrices for the page: what a dense method forms beside what is proved, as SVG.

In: `Pattern`s. Out: HTML. Used by `page.py`.
"""

from html import escape

from implicitdiff.structure.drawing import FULL, SPLIT, Pattern

_SIDE = 168
_MEANING = {"H": "H = D²ᵤᵤ L", "A": "A = Dᵤ h", "S": "S = A H⁻¹ Aᵀ"}


def matrices(patterns: tuple[Pattern, ...]) -> str:
    """One figure for each matrix."""
    return "\n".join(_figure(pattern) for pattern in patterns)


def _figure(pattern: Pattern) -> str:
    rows, columns = pattern.shape
    name = _MEANING.get(pattern.name, pattern.name)
    dense = rows * columns
    kept = (
        "; ".join(f"{part}: {count:,}" for part, count in pattern.parts)
        or "no numbers at all: ones and zeros"
    )
    share = f"{dense:,} numbers against {pattern.kept:,}"
    cut = "<p class='note'>Long axes are cut in the picture; the numbers count the whole matrix.</p>"
    return (
        f"<figure class='matrix' id='matrix-{escape(pattern.name)}'>\n"
        f"<figcaption><b>{name}</b>, {rows} × {columns}: {share} a sample</figcaption>\n"
        "<div class='pair'>\n"
        f"<div><p>a dense method forms</p>{_spy(pattern, full=True)}<p class='note'>{dense:,} entries</p></div>\n"
        f"<div><p>proved from the declaration</p>{_spy(pattern)}<p class='note'>kept: {escape(kept)}</p></div>\n"
        f"</div>{cut if pattern.cropped else ''}\n</figure>"
    )


def _spy(pattern: Pattern, *, full: bool = False) -> str:
    """Cells as rectangles, runs of equal cells in a row joined."""
    height, width = len(pattern.cells), len(pattern.cells[0]) if pattern.cells else 0
    unit = _SIDE / max(height, width, 1)
    label = f"{pattern.name}: {'every entry' if full else 'the entries that can be nonzero'}"
    parts = [
        f"<svg class='spy' role='img' aria-label='{escape(label)}' viewBox='0 0 {width * unit:.2f} "
        f"{height * unit:.2f}' width='{width * unit:.2f}' height='{height * unit:.2f}'>",
        f"<rect class='paper' width='{width * unit:.2f}' height='{height * unit:.2f}'/>",
    ]
    if full:
        parts.append(f"<rect class='full' width='{width * unit:.2f}' height='{height * unit:.2f}'/>")
    for i, row in enumerate(() if full else pattern.cells):
        for start, end, cell in _runs(row):
            kind = "full" if cell == FULL else "split"
            parts.append(
                f"<rect class='{kind}' x='{start * unit:.2f}' y='{i * unit:.2f}' "
                f"width='{(end - start) * unit:.2f}' height='{unit:.2f}'/>"
            )
    return "".join([*parts, "</svg>"])


def _runs(row: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """(start, end, cell) of the stretches that are not empty."""
    out: list[tuple[int, int, int]] = []
    for k, cell in enumerate(row):
        if cell not in (SPLIT, FULL):
            continue
        if out and out[-1][1] == k and out[-1][2] == cell:
            out[-1] = (out[-1][0], k + 1, cell)
        else:
            out.append((k, k + 1, cell))
    return out
