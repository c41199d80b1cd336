"""The identity experiments: figures of cost collapse, the norm of predicted costs and the score while training.

In: a family with its runs. Out: SVG, PDF and PNG files, 8.5 cm wide. Next file to read: ``../../problems/discrete.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from implicitdiff.errors import ImplicitDiffError
from implicitdiff.experiments.identity.family import Family
from implicitdiff.experiments.identity.results import Run, Summary

# Okabe and Ito's colours, which readers with any colour vision can tell apart, without the yellow that is faint on
# white; line styles repeat what they say.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#000000", "#56B4E9")
STYLES: tuple[Any, ...] = ("-", "--", (0, (4, 1, 1, 1)), ":", (0, (6, 2)), (0, (1, 1)))
WIDTH, HEIGHT = 8.5 / 2.54, 9.5 / 2.54
TEXT = 7.5
FORMATS = ("svg", "pdf", "png")
SETTINGS: Any = {
    "font.size": TEXT,
    "axes.labelsize": TEXT,
    "xtick.labelsize": TEXT,
    "ytick.labelsize": TEXT,
    "legend.fontsize": TEXT,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.2,
    "svg.hashsalt": "implicitdiff",
    "pdf.fonttype": 42,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def draw_collapse(family: Family, summary: Summary, folder: Path) -> list[Path]:
    """collapse-`family`.svg, .pdf and .png: mean over seeds as a line, from the least to the largest as a band.

    Raises:
        ImplicitDiffError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise ImplicitDiffError(
            "figures need matplotlib, which is not installed: pip install matplotlib, or implicitdiff[demo]"
        ) from missing
    drawn = [(name, label) for name, label in family.collapse if any(run.curve for run in summary.of(name))]
    if not drawn:
        return []
    with rc_context(SETTINGS):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        norms, scores = figure.subplots(2, 1, sharex=True)
        for (name, label), colour, style in zip(drawn, COLOURS, STYLES, strict=False):
            for axes, field in ((norms, "norm"), (scores, "score")):
                epochs, values = _curves(summary.of(name), field)
                axes.plot(epochs, values.mean(0), color=colour, linestyle=style, label=label)
                axes.fill_between(epochs, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)
        norms.set_yscale("log")
        norms.set_ylabel("mean |w| on test data\n(units of cost)")
        scores.set_ylabel(_heading(family))
        scores.set_xlabel("epoch")
        figure.legend(*norms.get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
        paths = []
        for kind in FORMATS:
            path = folder / f"collapse-{family.name}.{kind}"
            metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {"Software": None}}[kind]
            figure.savefig(path, dpi=300, metadata=metadata)
            paths.append(path)
    return paths


def _curves(runs: list[Run], field: str) -> tuple[np.ndarray, np.ndarray]:
    """(epochs, values (seeds, epochs))."""
    values = np.array([[getattr(point, field) for point in run.curve] for run in runs])
    return np.array([point.epoch for point in runs[0].curve]), np.maximum(values, 1e-12)


def _heading(family: Family) -> str:
    return f"{family.values[0][1]}\n(test data)"


__all__ = ["draw_collapse"]
