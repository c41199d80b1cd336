"""The identity experiments as one experiment of `implicitdiff reproduce`: all families, a claim for each ordering.

In: settings. Out: findings; the page, the curves and the figures of cost collapse are written by
`experiments/identity/`, which does the work.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from implicitdiff.diagnostics.tables import number, require_matplotlib, seconds
from implicitdiff.experiments.identity.family import Family, run_family
from implicitdiff.experiments.identity.report import verdicts
from implicitdiff.experiments.identity.reproduce import FAMILIES, write_page
from implicitdiff.experiments.identity.results import Run, Summary
from implicitdiff.experiments.identity.store import write_runs
from implicitdiff.reproduce.base import Advance, Claim, Experiment, Findings, Settings, Table

COMMAND = "implicitdiff reproduce identity"


@dataclass(frozen=True)
class Row:
    """One method of one family over all seeds: the family's first number, its spread, instances solved, seconds."""

    family: str
    method: str
    quantity: str
    value: float
    deviation: float
    calls: float
    seconds: float


def run(settings: Settings, advance: Advance) -> Findings:
    """Train every method of every family; about 15 minutes of one core."""
    seeds = (0,) if settings.quick else (0, 1, 2)
    total = sum(len(family.methods) for family in FAMILIES.values()) * len(seeds)
    found: list[tuple[Family, Summary]] = []
    done = 0

    def told(name: str, finished: Run) -> None:
        nonlocal done
        done += 1
        advance(done, total, f"{name}: {finished.method}")

    for name, family in FAMILIES.items():
        advance(done, total, name)
        found.append((family, run_family(family, seeds, settings.quick, report=partial(told, name))))
    rows = tuple(_row(family, summary, method) for family, summary in found for method in summary.methods())
    table = Table("identity", f"Means over {len(seeds)} seed{'s' * (len(seeds) > 1)}, on test data", rows,
                  ("family", "method", "quantity", "value", "calls", "time"), _cells,
                  ("value", "calls", "time"))  # fmt: skip
    claims = [
        Claim(verdict.statement, verdict.holds, f"family {family.name}")
        for family, summary in found
        for verdict in verdicts(family, summary)
        if verdict.holds is not None
    ]
    about = (
        "Sahoo et al., Backpropagation through Combinatorial Algorithms: Identity with Projection Works (ICLR 2023), "
        "at sizes that one core can do; data are generated, or come with scikit-learn. results.md has everything."
    )
    return Findings(
        "Identity with projection", about, (table,), tuple(claims), further=partial(_write, found)
    )


def _row(family: Family, summary: Summary, method: str) -> Row:
    name = family.values[0][0]
    spread = summary.value(method, name)
    taken = summary.seconds(method).mean
    return Row(
        family.name, method, family.values[0][1], spread.mean, spread.deviation, summary.calls(method), taken
    )


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.family,
        row.method,
        row.quantity,
        number(row.value, 4),
        number(row.calls, 4),
        seconds(row.seconds),
    )


def _write(found: list[tuple[Family, Summary]], folder: Path) -> list[Path]:
    require_matplotlib("figures of an experiment")
    written = [path for family, summary in found for path in write_runs(folder, family.name, summary)]
    return written + write_page(folder, COMMAND)


EXPERIMENT = Experiment("identity", "the identity paper's experiments on discrete layers, 15 minutes", run)
