"""Experiments, files: CSV for every table, SVG, PDF and PNG of every figure, one page of Markdown for all of it.

In: `Findings`. Out: files in a folder. Used by the command line.
"""

from pathlib import Path

from implicitdiff.diagnostics.tables import require_matplotlib, write_csv
from implicitdiff.reproduce.base import Findings, verdict


def write(found: Findings, folder: Path) -> list[Path]:
    """Write everything into the folder, which is made.

    Returns:
        The files.

    Raises:
        ImplicitDiffError: There are figures, and matplotlib is not installed; the tables are written before.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for item in found.tables:
        paths.append(folder / f"{item.name}.csv")
        write_csv(paths[-1], item.rows, type(item.rows[0]))
    if found.figures:
        require_matplotlib("figures of an experiment")
        from implicitdiff.diagnostics.style import save

        for name, draw in found.figures:
            paths += save(draw(), folder, name)
    if found.further is not None:
        paths += found.further(folder)
    paths.append(folder / "report.md")
    paths[-1].write_text(_markdown(found), encoding="utf-8")
    return paths


def _markdown(found: Findings) -> str:
    parts = [f"# {found.title}", found.about]
    parts += [f"- **{verdict(claim)}**: {claim.sentence}" for claim in found.claims]
    parts += [f"![{name}]({name}.svg)" for name, _ in found.figures]
    for item in found.tables:
        lines = [item.header, ["---"] * len(item.header), *(item.cells(row) for row in item.rows)]
        rows = ("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        parts += [f"## {item.title}", "\n".join(rows)]
    return "\n\n".join(parts) + "\n"
