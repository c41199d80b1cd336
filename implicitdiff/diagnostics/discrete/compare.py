"""Diagnostics of discrete layers, `compare`: estimators side by side, for the same costs and the same cotangent.

In: a `DiscreteLayer`, costs and estimators. Out: a frozen `DiscreteComparison`. There is no true gradient to measure an
error against; what is measured is what a step along each gradient does to the solution.
"""

from __future__ import annotations

import csv
import io
import statistics
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from implicitdiff.combinatorial import (
    IMLE,
    LPGD,
    Blackbox,
    DiscreteLayer,
    Estimator,
    Gumbel,
    Identity,
    Perturbed,
    StraightThrough,
)
from implicitdiff.combinatorial.invariance import random_costs
from implicitdiff.diagnostics.discrete import only_cost
from implicitdiff.diagnostics.race import quiet_thread
from implicitdiff.diagnostics.tables import WIDTH, number, pairs, seconds, table
from implicitdiff.errors import ImplicitDiffError, OptionError

# The length of the step that is tried, in units of |w|.
STEP = 0.1
SAMPLES = 10


@dataclass(frozen=True)
class DiscreteRow:
    """One estimator.

    Attributes:
        estimator: Its name.
        gradient: Its formula.
        projection: P(w).
        calls: Instances solved for one sample in forward and backward, counted; None if it did not run.
        seconds: Median time of one forward and backward pass.
        ratio: Median over the rounds of its time over that of the first that ran.
        cosine: Mean cosine with the gradient of the first that ran, over samples where neither is zero.
        zero: The share of samples whose gradient is exactly zero.
        progress: How much of <y - y*, g> a step of 0.1 |w| against the gradient takes away; 1: all of it. Without a
            given cotangent g = y - y*, the gradient of |y - y*|^2 / 2 for solutions y* of random costs.
        note: Why it did not run.
    """

    estimator: str
    gradient: str
    projection: str
    calls: float | None = None
    seconds: float | None = None
    ratio: float | None = None
    cosine: float | None = None
    zero: float | None = None
    progress: float | None = None
    note: str = ""


@dataclass(frozen=True)
class DiscreteComparison:
    """What `compare` found for a discrete layer."""

    solver: str
    rows: tuple[DiscreteRow, ...]

    @property
    def verdict(self) -> str:
        """Who needs the fewest calls, and whose step goes furthest."""
        ran = [row for row in self.rows if row.seconds is not None]
        if not ran:
            return "none of the estimators could run"
        fewest = min(ran, key=lambda row: (row.calls or 0.0, row.seconds or 0.0))
        text = f"fewest solver calls: {fewest.estimator} ({number(fewest.calls)} a sample)"
        moved = [row for row in ran if row.progress is not None]
        if moved:
            furthest = max(moved, key=lambda row: row.progress or 0.0)
            share = number(furthest.progress)
            text += f"; a step goes furthest with {furthest.estimator}, {furthest.gradient} ({share})"
        return text

    def __str__(self) -> str:
        return self.text()

    def text(self, width: int = WIDTH) -> str:
        """The rows as a table, in lines of at most `width` characters, the formulas and the verdict."""
        cells = [
            (
                row.estimator,
                row.projection,
                number(row.calls),
                seconds(row.seconds),
                number(row.ratio),
                number(row.cosine),
                number(row.zero),
                number(row.progress),
            )
            for row in self.rows
        ]
        notes = list(dict.fromkeys((row.estimator, row.note) for row in self.rows if row.note))
        formulas = list(dict.fromkeys((row.estimator, row.gradient) for row in self.rows))
        body, told = table(_HEADER, cells, _HEADER[2:], width), pairs([*formulas, *notes], width)
        last = f"time: forward and backward, one thread, median in alternation; progress: of a step of {STEP:g} |w|"
        lines = "\n".join(textwrap.fill(line, width) for line in (last, self.verdict))
        return f"estimators for {self.solver}\n\n{body}\n\n{told}\n\n{lines}"

    def to_csv(self, path: str | Path | None = None) -> str:
        """The rows as comma-separated values with a header; also written to `path` if given."""
        sink = io.StringIO()
        writer = csv.writer(sink, lineterminator="\n")
        names = [field.name for field in fields(DiscreteRow)]
        writer.writerow(names)
        for row in self.rows:
            cells = [getattr(row, name) for name in names]
            writer.writerow(["" if cell is None else cell for cell in cells])
        if path is not None:
            Path(path).write_text(sink.getvalue(), encoding="utf-8")
        return sink.getvalue()


_HEADER = ("estimator", "P(w)", "calls", "time", "ratio", "cosine", "zero", "progress")


@dataclass(frozen=True)
class _Entry:
    layer: DiscreteLayer
    gradient: Tensor
    calls: float


def compare_discrete(
    layer: DiscreteLayer,
    inputs: tuple[Any, ...],
    in_dims: Any,
    estimators: Sequence[Estimator],
    cotangent: Tensor | None,
    rounds: int,
) -> DiscreteComparison:
    """The rows: the layer's own estimator first, then the given ones, or one of each kind.

    All run in training mode with seeded noise, and with domain="clamp", since perturbed costs may leave a domain.

    Raises:
        OptionError: something in `backwards` is no estimator.
        ImplicitDiffError: the costs cannot be solved.
    """
    cost, shape = only_cost(layer, inputs, in_dims)
    for estimator in estimators:
        if not isinstance(estimator, Estimator):
            raise OptionError(
                f"backwards={estimator!r}: of a discrete layer estimators are compared, such as Blackbox(20.0)"
            )
    with quiet_thread():
        y = layer.solver(cost)
        target = layer.solver(random_costs(layer.solver, shape, len(cost), 5).to(cost))
        g = y - target if cotangent is None else cotangent.detach().reshape(y.shape).to(y)
        chosen = [layer.estimator, *(estimators or _one_of_each(layer, cost, g))]
        rows: list[DiscreteRow | None] = []
        entries: dict[int, _Entry] = {}
        for position, estimator in enumerate(chosen):
            if position and estimator == chosen[0]:
                continue
            found = _enter(layer, estimator, cost, g)
            rows.append(found if isinstance(found, DiscreteRow) else None)
            if isinstance(found, _Entry):
                entries[len(rows) - 1] = found
        times = _alternate(entries, cost, g, rounds)
        first = next(iter(entries), None)
        for position, entry in entries.items():
            rows[position] = _row(entry, entries[first or 0], times, position, first or 0, cost, y, target, g)
    return DiscreteComparison(layer.solver.name, tuple(row for row in rows if row is not None))


def _one_of_each(layer: DiscreteLayer, cost: Tensor, g: Tensor) -> list[Estimator]:
    """Interpolations of the size that the rule of thumb gives, noise of the size of the costs' spread."""
    size = float(g.abs().mean())
    lam = float(cost.abs().mean()) / size if size > 0 else 1.0
    spread = max(float(cost.std()) if cost.numel() > 1 else 1.0, 1e-6)
    found: list[Estimator] = [Identity(name) for name in ("none", "norm", "auto")]
    found += [Blackbox(lam), LPGD(lam), IMLE(lam, Gumbel(spread / 2)), Perturbed(spread / 2, SAMPLES)]
    return [*found, StraightThrough(spread)]


def _enter(layer: DiscreteLayer, estimator: Estimator, cost: Tensor, g: Tensor) -> _Entry | DiscreteRow:
    generator = torch.Generator(device=cost.device).manual_seed(0)
    made = DiscreteLayer(layer.solver, estimator, domain="clamp", eps=layer.oracle.eps, generator=generator)
    try:
        gradient = _once(made, cost, g)
    except ImplicitDiffError as error:
        reason = f"{type(error).__name__}: {error}"
        return DiscreteRow(estimator.name, estimator.formula, made.projection.formula, note=reason)
    return _Entry(made, gradient, made.solver_calls / max(1, len(cost)))


def _once(layer: DiscreteLayer, cost: Tensor, g: Tensor) -> Tensor:
    w = cost.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(layer(w), w, g)
    return gradient


def _alternate(entries: dict[int, _Entry], cost: Tensor, g: Tensor, rounds: int) -> dict[int, list[float]]:
    taken: dict[int, list[float]] = {position: [] for position in entries}
    for _ in range(rounds):
        for position, entry in entries.items():
            start = time.perf_counter()
            _once(entry.layer, cost, g)
            taken[position].append(time.perf_counter() - start)
    return taken


def _row(
    entry: _Entry,
    first: _Entry,
    times: dict[int, list[float]],
    position: int,
    base: int,
    cost: Tensor,
    y: Tensor,
    target: Tensor,
    g: Tensor,
) -> DiscreteRow:
    flat, other = entry.gradient.flatten(1), first.gradient.flatten(1)
    sizes = torch.linalg.vector_norm(flat, dim=1)
    products = sizes * torch.linalg.vector_norm(other, dim=1)
    both = products > 0
    cosines = ((flat * other).sum(1) / products)[both]
    ratios = [mine / theirs for mine, theirs in zip(times[position], times[base], strict=True)]
    estimator = entry.layer.estimator
    return DiscreteRow(
        estimator.name,
        estimator.formula,
        entry.layer.projection.formula,
        calls=entry.calls,
        seconds=statistics.median(times[position]),
        ratio=statistics.median(ratios),
        cosine=float(cosines.mean()) if len(cosines) else None,
        zero=float((sizes == 0).double().mean()) if len(sizes) else None,
        progress=_progress(entry, cost, y, target, g),
    )


def _progress(entry: _Entry, cost: Tensor, y: Tensor, target: Tensor, g: Tensor) -> float | None:
    def inner(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).flatten(1).sum(1)

    size = torch.linalg.vector_norm(entry.gradient.flatten(1), dim=1)
    length = torch.linalg.vector_norm(cost.flatten(1), dim=1)
    factor = STEP * length / size.where(size > 0, torch.ones_like(size))
    moved = cost - factor.reshape(-1, *(1,) * (cost.dim() - 1)) * entry.gradient
    if entry.layer.solver.domain == "nonnegative":
        moved = moved.clamp(min=entry.layer.oracle.eps)
    try:
        after = entry.layer.solver(moved)
    except ImplicitDiffError:
        return None
    there = inner(y - target, g)
    counted = there > 0
    return float((inner(y - after, g) / there)[counted].mean()) if counted.any() else None


__all__ = ["DiscreteComparison", "DiscreteRow", "compare_discrete"]
