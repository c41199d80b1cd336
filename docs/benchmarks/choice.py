"""Report 4: the solver that the cost model chooses, against the fastest one measured, on a grid of sizes.

Nothing comes in; one `Choice` per work goes out. Every solver that can take the matrix is forced by
linear_solver= and timed in alternation with the others.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import implicitdiff as idf
from benchmarks import works
from benchmarks.methods import Absent, Racer, racer
from benchmarks.output import duration
from benchmarks.race import alternate
from benchmarks.work import Work
from implicitdiff.plan import LINEAR_SOLVERS

LARGE = 1500  # above this many rows of K, dense solvers are not tried


@dataclass(frozen=True)
class Choice:
    """One size of the grid. `lost`: time of the choice over that of the best, less one; `times`: medians."""

    structure: str
    setting: str
    chosen: str
    best: str
    lost: float
    seconds: str
    wrong: str


HEADER = ("structure", "setting", "chosen", "best", "lost", "times", "wrong")


def cells(row: Choice) -> tuple[str, ...]:
    """A row for people."""
    return row.structure, row.setting, row.chosen, row.best, f"{row.lost:.0%}", row.seconds, row.wrong


def grid(quick: bool) -> Iterator[Callable[[], Work]]:
    """The works of the grid: low rank plus diagonal, grids with a Schur complement, bands, dense KKT."""
    rows, columns = ((8, 128), (4, 64)) if quick else ((8, 32, 128, 512), (4, 16, 64, 256, 1024))
    for m in rows:
        for n in columns:
            yield lambda m=m, n=n: works.pooling(2, m, n)
    for n in (10, 50) if quick else (10, 30, 100, 300, 500):
        yield lambda n=n: works.transport(1, n, n)
    for b in () if quick else (8,):
        yield lambda b=b: works.transport(b, 100, 100)
        yield lambda b=b: works.transport(b, 300, 30)
    for m in (10, 300) if quick else (10, 100, 1000, 10_000, 100_000):
        yield lambda m=m: works.smoothing(1, m)
    for m, p in ((10, 5),) if quick else ((10, 5), (40, 10), (100, 50), (100, 90)):
        yield lambda m=m, p=p: works.quadratic(8, m, p, whole=False)
    for m, n in ((6, 30),) if quick else ((6, 30), (50, 200), (300, 100)):
        yield lambda m=m, n=n: works.logistic(4, m, n)


def solvers_for(work: Work) -> list[str]:
    """The names that are worth trying; those that cannot take the matrix refuse it."""
    _, m, p = work.size
    dense = ("cholesky", "lu", "ldl")
    return [s for s in LINEAR_SOLVERS if s != "auto" and (m + p <= LARGE or s not in dense)]


def measure(work: Work, rounds: int) -> Choice | None:
    """Every feasible solver on one work; None where not even the choice runs."""
    truth = work.truth()
    chosen = racer(work, "auto", truth)
    if isinstance(chosen, Absent):
        return None
    found = {chosen.solver: chosen}
    for name in solvers_for(work):
        if name not in found:
            other = racer(work, "auto", truth, name)
            if isinstance(other, Racer):
                found[name] = other
    wrong = [name for name, other in found.items() if other.wrong]
    raced = {name: other.run for name, other in found.items() if name not in wrong or other is chosen}
    times = alternate(raced, rounds)
    # Ratios to the choice, taken in the same round: they move less than the times.
    ordered = sorted(times, key=lambda name: times[name].ratio)
    best = ordered[0]
    return Choice(
        structure=_structure(work),
        setting=work.setting,
        chosen=chosen.solver,
        best=best,
        lost=1 / times[best].ratio - 1,
        seconds=", ".join(f"{name} {duration(times[name].seconds)}" for name in ordered),
        wrong=", ".join(wrong),
    )


def _structure(work: Work) -> str:
    found = idf.explain(work.problem, *(torch.empty_like(x, device="meta") for x in work.inputs))
    return found.hessian.kind + (f", S {found.schur.kind}" if found.schur is not None else "")


def report(quick: bool, rounds: int) -> Iterator[list[Choice]]:
    """The choice at one size after the other."""
    for make in grid(quick):
        row = measure(make(), rounds)
        yield [] if row is None else [row]


def summary(rows: list[Choice]) -> str:
    """How much is lost over the grid, in one line."""
    losses = torch.tensor([row.lost for row in rows], dtype=torch.float64)
    right = sum(row.chosen == row.best for row in rows)
    mean, worst = _percent(losses.mean()), _percent(losses.max())
    return f"{right} of {len(rows)} choices were the fastest; lost on average {mean}, at most {worst}"


def _percent(value: Tensor) -> str:
    return f"{float(value):.0%}"
