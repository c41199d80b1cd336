"""The identity experiments: tables as Markdown, beside the paper's own numbers, and which orderings hold.

In: families with their runs. Out: one page of text. Next file to read: ``figures.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from implicitdiff.experiments.identity.family import Family, Ordering
from implicitdiff.experiments.identity.results import Summary

_OPENING = """\
Sahoo et al., *Backpropagation through Combinatorial Algorithms: Identity with Projection Works* (ICLR 2023), at sizes
that one processor core can do; data are generated, or come with scikit-learn. Made by

```bash
COMMAND
```

Mean ± standard deviation over seeds, which change data, initial weights and noise. Calls are instances solved in
training, forward and backward together, a sample with a zero gradient not being solved again; times are those of the
processor, in training. The column *paper* is what was published for the original, much larger experiment: only
orderings can be compared. In names, *noise a* is the margin of the paper, -a/2 or +a/2 on every cost in training;
*informed a* the margin that needs labels. Projections are inside of Identity, and in front of the others."""


@dataclass(frozen=True)
class Verdict:
    """Whether a statement holds in the runs; None where its methods were not run."""

    statement: str
    holds: bool | None


def verdicts(family: Family, summary: Summary) -> list[Verdict]:
    """All orderings of a family."""
    return [Verdict(ordering.statement, _holds(ordering, summary)) for ordering in family.orderings]


def _holds(ordering: Ordering, summary: Summary) -> bool | None:
    try:
        return ordering.holds(summary)
    except (KeyError, ValueError):
        return None  # a method that it speaks of was not run


def page(reports: Sequence[tuple[Family, Summary | None]], command: str) -> str:
    """The whole report.

    Args:
        reports: All families; None for those that were not run.
        command: What made the runs.
    """
    parts = [
        "# Identity with projection, and everything it is compared with",
        _opening(command),
        _overview(reports),
    ]
    for family, summary in reports:
        parts.append(f"## {family.title}")
        parts.append(_section(family, summary) if summary else "Not run.")
    return "\n\n".join(parts) + "\n"


def _opening(command: str) -> str:
    return _OPENING.replace("COMMAND", command)


def _overview(reports: Sequence[tuple[Family, Summary | None]]) -> str:
    head = (
        "| experiment | seeds | methods | orderings that hold | those that do not | not tried |\n"
        + "|---" * 6
        + "|"
    )
    return "\n".join([head, *(_overview_row(family, summary) for family, summary in reports)])


def _overview_row(family: Family, summary: Summary | None) -> str:
    if summary is None:
        return f"| {family.title} | - | 0 of {len(family.methods)} | - | - | {len(family.orderings)} |"
    found = verdicts(family, summary)
    tried = [verdict for verdict in found if verdict.holds is not None]
    failed = [verdict.statement.split(" (")[0].split(";")[0] for verdict in tried if not verdict.holds]
    seeds = len({run.seed for run in summary.runs})
    methods = f"{len(summary.methods())} of {len(family.methods)}"
    cells = (
        family.title,
        str(seeds),
        methods,
        f"{len(tried) - len(failed)} of {len(tried)}",
        "; ".join(failed) or "-",
        str(len(found) - len(tried)),
    )
    return f"| {' | '.join(cells)} |"


def _section(family: Family, summary: Summary) -> str:
    headings = [
        "method",
        *(heading for _, heading in family.values),
        "calls",
        "solver, s",
        "training, s",
        "paper",
    ]
    lines = [f"| {' | '.join(headings)} |", "|" + "---|" * len(headings)]
    best = _best(family, summary)
    for method in summary.methods():
        cells = [str(summary.value(method, name)) for name, _ in family.values]
        if method == best:
            cells[0] = f"**{cells[0]}**"
        calls, solver = f"{summary.calls(method):,.0f}", f"{summary.solver_seconds(method):.1f}"
        row = [method, *cells, calls, solver, str(summary.seconds(method)), family.published.get(method, "")]
        lines.append(f"| {' | '.join(row)} |")
    parts = [family.setup, "\n".join(lines), f"Published: {family.source}."]
    if family.note:
        parts.append(family.note)
    missing = [method.name for method in family.methods if method.name not in summary.methods()]
    if missing:
        parts.append(f"Not run: {', '.join(missing)}.")
    parts.append(
        "\n".join(f"- {_word(verdict)}: {verdict.statement}." for verdict in verdicts(family, summary))
    )
    if family.collapse and any(run.curve for run in summary.runs):
        parts.append(f"![Norm of predicted costs and score while training](collapse-{family.name}.svg)")
    return "\n\n".join(parts)


def _best(family: Family, summary: Summary) -> str:
    name = family.values[0][0]
    choose = max if family.larger else min
    return choose(summary.methods(), key=lambda method: summary.mean(method, name))


def _word(verdict: Verdict) -> str:
    return {True: "Holds", False: "**Does not hold**", None: "Not tried"}[verdict.holds]


__all__ = ["Verdict", "page", "verdicts"]
