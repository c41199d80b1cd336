"""Fig. 3, the pictures: (a, b) time and (c, d) memory against size and iterations; how close the approximations are.

In: rows of `fig3.py`. Out: matplotlib Figures. Imported only where a figure is drawn.
"""

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from implicitdiff.diagnostics.style import house_style, log_scale, looks, new_figure

_AXES = {"n": "size n = m (points)", "iterations": "iterations (count)"}


def costs(rows: Sequence[Any], passes: str) -> Figure:
    """Four panels, of both passes or of the backward pass alone."""
    measures = {
        "both passes": (("seconds", "time (ms)", 1e3), ("peak", "peak memory (MB)", 1e-6)),
        "backward": (("backward", "time (ms)", 1e3), ("backward_peak", "peak memory (MB)", 1e-6)),
    }[passes]
    with house_style():
        figure = new_figure(12.0)
        figure.suptitle(f"optimal transport, {passes}")
        panels = figure.subplots(2, 2, sharex="col")
        letters = iter("abcd")
        for row, (quantity, label, scale) in zip(panels, measures, strict=True):
            for axes, swept in zip(row, _AXES, strict=True):
                _curves(axes, [r for r in rows if r.swept == swept], swept, quantity, scale)
                axes.set_title(f"({next(letters)})", loc="left")
                axes.set_ylabel(label)
        for axes, label in zip(panels[1], _AXES.values(), strict=True):
            axes.set_xlabel(label)
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure


def _curves(axes: Any, rows: Sequence[Any], swept: str, quantity: str, scale: float) -> None:
    for method, look in zip(dict.fromkeys(row.method for row in rows), looks(), strict=False):
        mine = [row for row in rows if row.method == method]
        values = [scale * getattr(row, quantity) for row in mine]
        axes.plot([getattr(row, swept) for row in mine], values, label=method, **look)
    log_scale(axes.xaxis, [getattr(row, swept) for row in rows])
    log_scale(axes.yaxis)


def closeness(rows: Sequence[Any]) -> Figure:
    """Cosine and length of the approximate gradients over the exact one, against the iterations the plan needs."""
    with house_style():
        figure = new_figure(10.0)
        figure.suptitle("approximate gradients for M")
        panels = figure.subplots(2, 1, sharex=True)
        keys = list(dict.fromkeys((row.method, row.loss) for row in rows))
        for axes, (quantity, label) in zip(
            panels, (("cosine", "cosine (no unit)"), ("norm", "length (over exact)")), strict=True
        ):
            for (method, loss), look in zip(keys, looks(), strict=False):
                mine = [row for row in rows if (row.method, row.loss) == (method, loss)]
                values = [getattr(row, quantity) for row in mine]
                axes.plot([row.iterations for row in mine], values, label=f"{method}, {loss}", **look)
            axes.set_ylabel(label)
            log_scale(axes.xaxis, [row.iterations for row in rows])
        log_scale(panels[1].yaxis)
        panels[1].set_xlabel("Sinkhorn iterations needed (count)")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure
