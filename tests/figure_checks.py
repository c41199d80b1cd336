"""What makes a figure fit for print, as assertions: sizes of text, units, overlaps, series that can be told apart.

In: a matplotlib Figure. Out: a list of complaints; empty if there are none. Used by the tests of figures.
"""

import itertools
import re
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

SMALLEST = 7.0  # points, at the size of the figure
UNIT = re.compile(r"\(.+\)$")
OKABE_ITO = {
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
    "#8C6D00",
    "#555555",
}


def complaints(figure: Figure) -> list[str]:
    """Everything that is wrong with a figure."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    found = []
    if abs(figure.get_figwidth() * 2.54 - 8.5) > 0.01:
        found.append(f"{figure.get_figwidth() * 2.54:.1f} cm wide")
    shown = [(text, text.get_window_extent(renderer)) for text in _texts(figure)]
    for text, box in shown:
        if text.get_fontsize() < SMALLEST:
            found.append(f"{text.get_text()!r} has {text.get_fontsize()} pt")
        if "$" in text.get_text():
            found.append(f"{text.get_text()!r} has exponents, which are smaller than the text")
        if box.x0 < -1 or box.y0 < -1 or box.x1 > figure.bbox.x1 + 1 or box.y1 > figure.bbox.y1 + 1:
            found.append(f"{text.get_text()!r} leaves the figure")
    for (one, a), (two, b) in itertools.combinations(shown, 2):
        if a.x0 < b.x1 - 1 and b.x0 < a.x1 - 1 and a.y0 < b.y1 - 1 and b.y0 < a.y1 - 1:
            found.append(f"{one.get_text()!r} overlaps {two.get_text()!r}")
    for axes in figure.axes:
        found += _of_axes(axes)
    return found


def _of_axes(axes: Any) -> list[str]:
    found = []
    named = [axis.get_label_text() for axis in (axes.xaxis, axes.yaxis) if not _names(axis)]
    named = [label for label in named if label or not _shares(axes)]
    found += [f"axis {label!r} has no unit" for label in named if not UNIT.search(label)]
    lines = [
        line for line in axes.lines if len(line.get_xdata()) and line.get_marker() not in ("None", None, "")
    ]
    looks = [(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines]
    if len(set(looks)) != len(looks):
        found.append("two series look the same")
    markers = {line.get_color(): line.get_marker() for line in lines}
    if len(set(markers.values())) != len(markers):
        found.append("two colours share a marker")
    found += [f"colour {line.get_color()}" for line in axes.lines if line.get_color() not in OKABE_ITO]
    if not axes.lines:
        found.append("nothing is drawn")
    return found


def _names(axis: Any) -> bool:
    """Whether the ticks of an axis are names, which have no unit."""
    texts = [tick.get_text() for tick in axis.get_ticklabels() if tick.get_text()]
    return bool(texts) and all(text[:1].isalpha() for text in texts)


def _shares(axes: Any) -> bool:
    return len(axes.get_shared_x_axes().get_siblings(axes)) > 1


def _texts(figure: Figure) -> list[Text]:
    """Every text that shows; tick labels outside of the view do not."""
    found = []
    for text in figure.findobj(Text):
        if text.get_visible() and text.get_text().strip():
            found.append(text)
    hidden = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                slack = 1e-6 * (low if axis.get_scale() == "log" else high - low)
                inside = low - slack <= tick.get_loc() <= high + slack
                for label in (tick.label1, tick.label2):
                    if not inside or not label.get_visible() or not tick.get_visible():
                        hidden.add(label)
    return [text for text in found if text not in hidden]
