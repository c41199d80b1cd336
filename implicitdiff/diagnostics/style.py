"""Diagnostics, the look of every figure: one size of print, Okabe and Ito's colours, a marker for each series.

In: numbers of panels. Out: matplotlib Figures for a column of 8.5 cm, drawn without pyplot, and files of them. Used by
`plots.py` and by the experiments; imported only when a picture is asked for, since matplotlib is optional.
"""

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

COLUMN = 8.5  # cm, the width of one column of a paper
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D00")
"""Okabe and Ito (2008), told apart by colour-blind readers too; their yellow, which fades on white, is darkened."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
FORMATS = ("svg", "pdf", "png")
_SETTINGS: Any = {
    "font.size": 7.5,
    "axes.titlesize": 7.5,
    "axes.labelsize": 7.5,
    "xtick.labelsize": 7.0,
    "ytick.labelsize": 7.0,
    "legend.fontsize": 7.0,
    "figure.titlesize": 8.0,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.linewidth": 0.4,
    "grid.color": "#DDDDDD",
    "lines.linewidth": 1.0,
    "lines.markersize": 3.5,
    "legend.frameon": False,
    "legend.handlelength": 1.8,
    "legend.columnspacing": 1.0,
    "svg.fonttype": "none",  # text stays text: it can be searched, and edited
    "svg.hashsalt": "implicitdiff",  # the same figure gives the same file
    "pdf.fonttype": 42,
    "savefig.dpi": 300,
}


@contextlib.contextmanager
def house_style() -> Iterator[None]:
    """Figures made and saved inside have the look of this library; matplotlib's settings are put back after."""
    with matplotlib.rc_context(_SETTINGS):
        yield


def new_figure(height: float, width: float = COLUMN) -> Figure:
    """An empty figure of this many centimetres; make and fill it inside `house_style`."""
    return Figure(figsize=(width / 2.54, height / 2.54), layout="constrained")


def looks() -> Iterator[dict[str, Any]]:
    """Colour and marker of one series after the other; the first eight differ in both."""
    series = zip(itertools.cycle(COLOURS), itertools.cycle(MARKERS), strict=False)
    return ({"color": colour, "marker": marker} for colour, marker in series)


def log_scale(axis: Any, values: Iterable[float] | None = None) -> None:
    """Make an axis (axes.xaxis, axes.yaxis) logarithmic with plain numbers at its ticks: exponents would be too small.

    Args:
        axis: Of a panel in which everything is drawn already.
        values: Where the ticks are, thinned to a quarter of the axis apart; None: at round numbers.
    """
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: plain_number(value)))
    if values is None:
        axis.set_major_locator(FixedLocator(_round_values(*axis.get_view_interval())))
    else:
        axis.set_major_locator(FixedLocator(_thinned(sorted(set(values)))))


def _round_values(low: float, high: float) -> list[float]:
    """At most six powers of ten between the two, or 1, 2 and 5 times powers, or whatever is round there."""
    powers = [
        10.0**k for k in range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)
    ]
    if len(powers) >= 2:
        return powers[:: math.ceil(len(powers) / 6)]
    first = math.floor(math.log10(low))
    found = [digit * 10.0**k for k in range(first, first + 3) for digit in (1, 2, 5)]
    found = [value for value in found if low <= value <= high]
    return (
        found
        if len(found) >= 2
        else [float(v) for v in MaxNLocator(3).tick_values(low, high) if low <= v <= high]
    )


def plain_number(value: float) -> str:
    """0.05, 20, 5000, 20k, 3M, 1e-07."""
    if value >= 1e4:
        power = min(int(math.log10(value) + 1e-9) // 3, 4)
        return f"{value / 1000**power:.3g}{'kMGT'[power - 1]}"
    return f"{value:g}"


def _thinned(values: Sequence[float]) -> list[float]:
    if not values or values[0] <= 0:
        return list(values)
    span = math.log(values[-1] / values[0])
    kept = [values[0]]
    for value in values[1:]:
        if math.log(value / kept[-1]) >= span / 4:
            kept.append(value)
    if kept[-1] != values[-1]:  # the last one counts more than its neighbour
        kept[-1:] = [values[-1]] if len(kept) > 1 else [kept[-1], values[-1]]
    return kept


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """The figure as SVG, PDF and PNG (300 dpi) in the folder, without dates inside, so that files can be compared."""
    folder.mkdir(parents=True, exist_ok=True)
    undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None, "ModDate": None}, "png": None}
    paths = [folder / f"{name}.{kind}" for kind in FORMATS]
    with house_style():
        for path in paths:
            figure.savefig(path, metadata=undated[path.suffix[1:]])
    return paths
