"""Pictures of the reports: matplotlib figures, each saved as SVG and as PNG.

In: the rows of the reports. Out: files. The figures are drawn without pyplot: no window, no global state.
"""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.choice import Choice
from benchmarks.comparison import Row
from benchmarks.growth import Point
from benchmarks.targets import Check


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Both files of a figure."""
    paths = [folder / f"{name}.svg", folder / f"{name}.png"]
    for path in paths:
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    return paths


def comparison(rows: Sequence[Row]) -> Figure:
    """Time and peak of every method over the hand-written pass, one line of dots per work."""
    ran = [row for row in rows if row.ratio is not None]
    labels = list(dict.fromkeys(f"{row.work} {row.setting}" for row in ran))
    hand = {(row.work, row.setting): row.peak for row in ran if row.method == "hand"}
    figure = Figure(figsize=(11, 1.5 + 0.32 * len(labels)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for method in dict.fromkeys(row.method for row in ran):
        mine = [row for row in ran if row.method == method]
        y = [labels.index(f"{row.work} {row.setting}") for row in mine]
        times = [row.ratio or 0.0 for row in mine]
        bars = [
            [max(0.0, t - (row.ratio_low or t)) for t, row in zip(times, mine, strict=True)],
            [max(0.0, (row.ratio_high or t) - t) for t, row in zip(times, mine, strict=True)],
        ]
        left.errorbar(times, y, xerr=bars, fmt="o", label=method, markersize=4)
        peaks = [(row.peak or 0) / (hand.get((row.work, row.setting)) or 1) for row in mine]
        right.plot(peaks, y, "o", markersize=4)
    for axes, title in ((left, "time / hand"), (right, "peak live bytes / hand")):
        _ratio_axis(axes, title)
    left.set_yticks(range(len(labels)), labels)
    left.invert_yaxis()
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize="small")
    return figure


def targets(checks: Sequence[Check]) -> Figure:
    """Measured over target, one line per goal; left of 1 is reached."""
    known = [c for c in checks if c.target and c.measured is not None]
    ratios = [
        (c.target or 0) / max(c.measured or 0, 1e-12) if c.at_least else (c.measured or 0) / (c.target or 1)
        for c in known
    ]
    figure = Figure(figsize=(9, 1.5 + 0.2 * len(known)), layout="constrained")
    axes = figure.subplots()
    colours = ["tab:green" if c.verdict == "yes" else "tab:red" for c in known]
    places = [max(ratio, 1e-3) for ratio in ratios]
    axes.hlines(range(len(known)), 1.0, places, colors=colours)
    axes.scatter(places, range(len(known)), c=colours, s=14)
    axes.margins(y=0.01)
    axes.set_yticks(range(len(known)), [f"{c.subject}: {c.quantity}" for c in known], fontsize="x-small")
    axes.invert_yaxis()
    _ratio_axis(axes, "measured / target")
    return figure


def growth(found: Sequence[Point]) -> Figure:
    """Seconds and bytes over the size, with a line of slope one."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, quantity in zip(panels, ("seconds", "bytes"), strict=True):
        for name in dict.fromkeys(point.curve for point in found):
            mine = [point for point in found if point.curve == name]
            axes.loglog([p.size for p in mine], [getattr(p, quantity) for p in mine], "o-", label=name)
        last = max(found, key=lambda p: p.size)
        top = getattr(last, quantity)
        axes.loglog([last.size / 1e3, last.size], [top / 1e3, top], "k:", label="slope one")
        axes.set_xlabel("size")
        axes.set_title(quantity)
    panels[0].legend(fontsize="small")
    return figure


def choices(rows: Sequence[Choice]) -> Figure:
    """What the cost model's choice loses at every size of the grid."""
    figure = Figure(figsize=(9, 1.5 + 0.25 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.barh(range(len(rows)), [100 * row.lost for row in rows])
    axes.margins(y=0.01)
    labels = [f"{row.structure} {row.setting}: {row.chosen} (best {row.best})" for row in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize="x-small")
    axes.invert_yaxis()
    axes.set_xlabel("time lost to the best solver, %")
    return figure


def _ratio_axis(axes: Axes, title: str) -> None:
    axes.set_xscale("log")
    axes.axvline(1.0, color="k", linewidth=0.8)
    axes.set_title(title)
    axes.grid(axis="x", alpha=0.3)
