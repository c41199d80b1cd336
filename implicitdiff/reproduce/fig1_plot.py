"""Fig. 1, the picture: time above, memory below; forward left, backward right; a line for each penalty.

In: rows of `fig1.py`. Out: a matplotlib Figure. Imported only where a figure is drawn.
"""

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from implicitdiff.diagnostics.style import house_style, log_scale, looks, new_figure


def draw(rows: Sequence[Any]) -> Figure:
    """Solid: ours; hollow markers, dotted: the paper's Fig. 2."""
    with house_style():
        figure = new_figure(10.5)
        panels = figure.subplots(2, 2, sharex=True, sharey="row")
        measures = (
            ("forward", "backward", "time (ms)", 1e3),
            ("forward_peak", "backward_peak", "peak memory (MB)", 1e-6),
        )
        for row, (left, right, label, scale) in zip(panels, measures, strict=True):
            for axes, quantity in zip(row, (left, right), strict=True):
                _curves(axes, rows, quantity, scale)
                log_scale(axes.xaxis, [r.n for r in rows])
            log_scale(row[0].yaxis)
            log_scale(row[1].yaxis)
            row[0].set_ylabel(label)
            row[1].set_ylabel(label)
        panels[0][0].set_title("forward")
        panels[0][1].set_title("backward")
        for axes in panels[1]:
            axes.set_xlabel("n (points)")
        handles, labels = panels[0][1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure


def _curves(axes: Any, rows: Sequence[Any], quantity: str, scale: float) -> None:
    for penalty, look in zip(dict.fromkeys(row.penalty for row in rows), looks(), strict=False):
        for method, style in (("ours", {}), ("Fig. 2", {"linestyle": ":", "markerfacecolor": "white"})):
            if quantity.startswith("forward") and method != "ours":
                continue
            mine = [row for row in rows if row.penalty == penalty and row.method == method]
            label = penalty if method == "ours" else None
            axes.plot(
                [r.n for r in mine],
                [scale * getattr(r, quantity) for r in mine],
                label=label,
                **look,
                **style,
            )
    if quantity.startswith("backward"):
        axes.plot(
            [],
            [],
            color="#555555",
            linestyle=":",
            marker="o",
            markerfacecolor="white",
            label="the paper's Fig. 2",
        )
