"""Identity with projection: the experiments of Sahoo et al. (2023), as an experiment of the command line.

In: `Settings`. Out: `Findings`: a table for each of seven families, the paper's orderings as claims, figures of cost
collapse. The experiments themselves are in ``experiments/identity``. Next: `registry.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from implicitdiff.experiments.identity import FAMILIES
from implicitdiff.experiments.identity.family import Family, run_family
from implicitdiff.experiments.identity.figures import collapse, drawn
from implicitdiff.experiments.identity.report import verdicts
from implicitdiff.experiments.identity.results import Run, Summary
from implicitdiff.reproduce.base import Advance, Claim, Experiment, Findings, Settings, Table

SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Row:
    """One method of one family, means and standard deviations over seeds."""

    method: str
    score: float
    score_deviation: float
    values: str
    calls: float
    solver_seconds: float
    seconds: float
    paper: str


def run(settings: Settings, advance: Advance) -> Findings:
    """All families with three seeds; with `quick` one seed at tiny sizes, for which no claim is made."""
    seeds = SEEDS[:1] if settings.quick else SEEDS
    total, done = sum(len(family.methods) for family in FAMILIES.values()) * len(seeds), 0
    tables, claims, figures = [], [], []

    def report(finished: Run) -> None:
        nonlocal done
        done += 1
        advance(done, total, f"{finished.family}: {finished.method}")

    for name, family in FAMILIES.items():
        summary = run_family(family, seeds, settings.quick, report=report)
        tables.append(_table(family, summary))
        if not settings.quick:
            claims += [
                Claim(f"{family.title}: {verdict.statement}", verdict.holds, "means of the table above")
                for verdict in verdicts(family, summary)
                if verdict.holds is not None
            ]
        if drawn(family, summary):
            figures.append((f"collapse-{name}", partial(collapse, family, summary)))
    return Findings(EXPERIMENT.summary, _about(seeds), tuple(tables), tuple(claims), tuple(figures))


def _about(seeds: tuple[int, ...]) -> str:
    return (
        f"Seven families of experiments with {len(seeds)} seed{'s' if len(seeds) > 1 else ''} each, at sizes that one "
        "core can do: data are generated, or come with scikit-learn. Calls are instances solved in training, times are "
        "those of the processor; the paper's own numbers are those of its much larger experiments, so that only "
        "orderings can be compared."
    )


def _table(family: Family, summary: Summary) -> Table:
    names = [name for name, _ in family.values]
    rows = []
    for method in summary.methods():
        score = summary.value(method, names[0])
        values = ", ".join(f"{name} {summary.value(method, name)}" for name in names[1:])
        seconds, inside = summary.seconds(method).mean, summary.solver_seconds(method)
        paper = family.published.get(method, "")
        rows.append(
            Row(method, score.mean, score.deviation, values, summary.calls(method), inside, seconds, paper)
        )
    heading = family.values[0][1]
    return Table(
        f"identity-{family.name}",
        f"{family.title}: {family.setup} The paper's numbers: {family.source}.",
        tuple(rows),
        ("method", heading, "also", "calls", "solver, s", "time, s", "paper"),
        _cells,
        (heading, "calls", "solver, s", "time, s"),
    )


def _cells(row: Row) -> tuple[str, ...]:
    spread = "" if row.score_deviation != row.score_deviation else f" ± {row.score_deviation:.2f}"
    times = f"{row.solver_seconds:.1f}", f"{row.seconds:.1f}"
    return row.method, f"{row.score:.2f}{spread}", row.values, f"{row.calls:,.0f}", *times, row.paper


EXPERIMENT = Experiment("identity", "identity with projection (Sahoo et al. 2023)", run)

__all__ = ["EXPERIMENT", "Row", "run"]
