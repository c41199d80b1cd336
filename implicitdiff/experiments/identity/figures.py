"""The identity experiments: figures of cost collapse, the norm of predicted costs and the score while training.

In: a family with its runs. Out: matplotlib Figures in the look of the library. Next file to read:
``../../problems/discrete.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from implicitdiff.diagnostics.tables import require_matplotlib
from implicitdiff.experiments.identity.family import Family
from implicitdiff.experiments.identity.results import Run, Summary

HEIGHT = 9.5  # cm
# Line styles repeat what colours say.
STYLES: tuple[Any, ...] = ("-", "--", (0, (4, 1, 1, 1)), (0, (1, 1)), (0, (7, 2)), "-.")
LEAST = 1e-12
LONG = 21  # characters of a label that leave no room for a second column


def drawn(family: Family, summary: Summary) -> list[tuple[str, str]]:
    """(method, label) of the lines of a family's figure; none where the runs have no curves."""
    return [(name, label) for name, label in family.collapse if any(run.curve for run in summary.of(name))]


def collapse(family: Family, summary: Summary) -> Any:
    """The norm of costs above, the score below: the mean over seeds as a line, from the least to the largest as a band.

    Raises:
        ImplicitDiffError: matplotlib is not installed.
    """
    require_matplotlib("a figure of cost collapse")
    from matplotlib.ticker import MaxNLocator

    from implicitdiff.diagnostics.style import COLOURS, house_style, new_figure

    with house_style():
        figure = new_figure(HEIGHT)
        norms, scores = figure.subplots(2, 1, sharex=True)
        for (name, label), colour, style in zip(drawn(family, summary), COLOURS, STYLES, strict=False):
            for axes, field in ((norms, "norm"), (scores, "score")):
                epochs, values = _curves(summary.of(name), field)
                axes.plot(epochs, values.mean(0), color=colour, linestyle=style, label=label, linewidth=1.3)
                axes.fill_between(epochs, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)
        norms.set_yscale("log")
        norms.set_ylabel("mean |w|, test data\n(units of cost)")
        scores.set_ylabel(f"{family.values[0][1]}\n(test data)")
        scores.set_xlabel("epoch")
        scores.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        figure.align_ylabels()
        columns = 1 if max(len(label) for _, label in drawn(family, summary)) > LONG else 2
        handles = norms.get_legend_handles_labels()
        figure.legend(*handles, loc="outside upper center", ncols=columns, handlelength=2.6)
    return figure


def save_collapse(family: Family, summary: Summary, folder: Path) -> list[Path]:
    """collapse-`family`.svg, .pdf and .png; nothing where there are no curves."""
    if not drawn(family, summary):
        return []
    figure = collapse(family, summary)
    from implicitdiff.diagnostics.style import save

    return list(save(figure, folder, f"collapse-{family.name}"))


def _curves(runs: list[Run], field: str) -> tuple[np.ndarray, np.ndarray]:
    """(epochs, values (seeds, epochs)), as far as all seeds went."""
    last = min(len(run.curve) for run in runs)
    values = np.array([[getattr(point, field) for point in run.curve[:last]] for run in runs])
    return np.array([point.epoch for point in runs[0].curve[:last]]), np.maximum(values, LEAST)


__all__ = ["collapse", "drawn", "save_collapse"]
