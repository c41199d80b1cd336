"""Table 1, the picture: kappa_1 and kappa_2 over the distance, closed forms as lines, derived values as marks.

In: points of `table1.py`. Out: a matplotlib Figure. Imported only where a figure is drawn.
"""

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from implicitdiff.diagnostics.style import house_style, looks, new_figure


def draw(points: Sequence[Any], alpha: float) -> Figure:
    """Two panels, one below the other."""
    with house_style():
        figure = new_figure(10.0)
        panels = figure.subplots(2, 1, sharex=True)
        labels = (
            (panels[0], "kappa1", "closed1", "κ₁ (curvature)"),
            (panels[1], "kappa2", "closed2", "κ₂ (curvature / length²)"),
        )
        for axes, found, closed, label in labels:
            for penalty, look in zip(dict.fromkeys(p.penalty for p in points), looks(), strict=False):
                mine = [p for p in points if p.penalty == penalty]
                z = [p.z / alpha for p in mine]
                axes.plot(z, [getattr(p, closed) for p in mine], color=look["color"])
                axes.plot(z, [getattr(p, found) for p in mine], linestyle="", label=penalty, **look)
            axes.set_ylabel(label)
        panels[1].set_xlabel("z / α (distance over width)")
        figure.suptitle("lines: Table 1 of the paper; marks: derived")
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=2)
    return figure
