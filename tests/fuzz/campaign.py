"""Runs random programs in several processes and adds up: counts per kind, mismatches, fallbacks, rule files.

`make fuzz` runs it as `python -m tests.fuzz.campaign`; test_fuzz.py uses the same class for its few programs.
The exit status is 1 if a program differs from the dense formula or a worker dies.
"""

import argparse
import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tests.fuzz.check import Outcome
from tests.fuzz.generator import KINDS, generate

ROOT = Path(__file__).resolve().parents[2]
SHOWN = 3


def run_worker(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    """A worker process, its output piped."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.fuzz.worker", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def answer(process: subprocess.Popen[str]) -> Any:
    """What a worker printed; its own failure is shown in full.

    Raises:
        RuntimeError: The worker died.
    """
    out, err = process.communicate()
    if process.returncode != 0:
        raise RuntimeError(f"a worker ended with status {process.returncode}:\n{err}")
    return json.loads(out)


class Campaign:
    """The outcomes of ranges of seeds.

    Attributes:
        outcomes: By seed.
        rules: Calls of the translation rules, by file.
        dead: What the workers that died left, by their first seed.
    """

    def __init__(self) -> None:
        self.outcomes: dict[int, Outcome] = {}
        self.rules: Counter[str] = Counter()
        self.dead: dict[int, str] = {}

    def add(self, result: Any) -> None:
        """One worker's answer."""
        self.rules.update(result["rules"])
        for seed, plain in result["outcomes"].items():
            plain["fallbacks"] = tuple(plain["fallbacks"])
            self.outcomes[int(seed)] = Outcome(**plain)

    def run(self, starts: Sequence[int], count: int, processes: int) -> None:
        """`count` seeds from each of `starts`; a worker that dies raises."""
        for k in range(0, len(starts), processes):
            running = [run_worker(str(first), str(count)) for first in starts[k : k + processes]]
            for process in running:
                self.add(answer(process))

    def run_until(self, wanted: int, processes: int, chunk: int = 200, first: int = 0) -> Iterator[int]:
        """Seeds from `first` on, `chunk` per process, until `wanted` programs are checked; yields how many are.

        A worker that dies is noted in `dead`, and the others go on.
        """
        with ThreadPoolExecutor(processes) as pool:
            waiting: dict[Future[Any], int] = {}
            while len(self.checked) < wanted or waiting:
                # What the running workers will add at least is not started again.
                while len(waiting) < processes and len(self.checked) + len(waiting) * chunk // 2 < wanted:
                    waiting[pool.submit(lambda at=first: answer(run_worker(str(at), str(chunk))))] = first
                    first += chunk
                finished, _ = wait(waiting, return_when=FIRST_COMPLETED)
                for future in finished:
                    at = waiting.pop(future)
                    error = future.exception()
                    if error is None:
                        self.add(future.result())
                    else:
                        self.dead[at] = str(error)
                        wanted -= chunk
                yield len(self.checked)

    @property
    def checked(self) -> dict[int, Outcome]:
        """The outcomes of the programs that are a test."""
        return {seed: o for seed, o in self.outcomes.items() if not o.rejected}

    @property
    def wrong(self) -> list[int]:
        """Seeds of the programs that differ from the dense formula, or crash."""
        return [seed for seed, outcome in self.checked.items() if outcome.wrong]

    @property
    def missed(self) -> list[int]:
        """Seeds of the programs whose planted kind was not found; a dense one promises nothing."""
        return [s for s, o in self.checked.items() if o.planted != "dense" and not o.structure_found]

    @property
    def promised(self) -> int:
        """Programs with a planted kind."""
        return sum(o.planted != "dense" for o in self.checked.values())

    @property
    def fell_back(self) -> list[int]:
        """Seeds of the programs with a step down the ladder."""
        return [seed for seed, outcome in self.checked.items() if outcome.fallbacks or outcome.crash]

    def table(self) -> str:
        """Counts per planted kind."""
        checked = self.checked
        lines = [f"{len(checked)} programs checked, {len(self.outcomes) - len(checked)} rejected"]
        lines += [f"{'planted':24}{'programs':>9}{'found':>7}{'fell back':>11}{'wrong':>7}  solvers"]
        for kind, counts, solvers in self.rows():
            lines.append("{:24}{:9}{:7}{:11}{:7}  {}".format(kind, *counts, solvers))
        reasons = Counter(line for o in checked.values() for line in o.fallbacks)
        lines += [f"  {count} x {line}" for line, count in reasons.most_common()]
        lines += [f"rules: {dict(sorted(self.rules.items()))}"]
        return "\n".join(lines)

    def rows(self) -> Iterator[tuple[str, tuple[int, int, int, int], str]]:
        """(planted kind, (programs, found, fell back, wrong), solvers) of each kind."""
        for kind in KINDS:
            rows = [o for o in self.checked.values() if o.planted == kind]
            solvers = ", ".join(f"{name} {n}" for name, n in Counter(o.solver for o in rows).most_common())
            fallbacks, wrong = sum(bool(o.fallbacks) for o in rows), sum(o.wrong for o in rows)
            yield kind, (len(rows), sum(o.structure_found for o in rows), fallbacks, wrong), solvers

    def show(self, seeds: list[int]) -> str:
        """The first programs among `seeds`, with what came of them."""
        shown = [f"seed {s}: {self.outcomes[s]}\n{generate(random.Random(s))}" for s in seeds[:SHOWN]]
        return f"{len(seeds)} programs: {seeds}\n" + "\n".join(shown)

    def summary(self) -> dict[str, Any]:
        """The numbers that goals are set for."""
        checked = max(1, len(self.checked))
        return {
            "checked": len(self.checked),
            "rejected": len(self.outcomes) - len(self.checked),
            "wrong": len(self.wrong) + len(self.dead),
            "found": 1 - len(self.missed) / max(1, self.promised),
            "fallbacks": len(self.fell_back) / checked,
            "rarest_rule": min(self.rules.values(), default=0),
            "rules": dict(sorted(self.rules.items())),
        }


def _print(console: Console, campaign: Campaign) -> None:
    kinds = Table("planted", title="Random programs", box=box.SIMPLE_HEAD, title_justify="left")
    for name in ("programs", "found", "fell back", "wrong"):
        kinds.add_column(name, justify="right")
    kinds.add_column("solvers")
    for kind, counts, solvers in campaign.rows():
        kinds.add_row(kind, *map(str, counts), solvers)
    console.print(kinds)
    constraints = Counter(o.constraints for o in campaign.checked.values())
    console.print(_counts("constraints", "programs", constraints))
    reasons = Counter(line for o in campaign.checked.values() for line in o.fallbacks)
    console.print(_counts("falls back at | because", "programs", reasons))
    console.print(_counts("rule file", "hits", campaign.rules))
    found = campaign.summary()
    goals = Table(
        "goal", "limit", "found", "reached", title="Goals", box=box.SIMPLE_HEAD, title_justify="left"
    )
    for name, limit, value, good in (
        ("mismatches", "0", str(found["wrong"]), found["wrong"] == 0),
        ("planted kinds found", ">= 95 %", f"{found['found']:.1%}", found["found"] >= 0.95),
        ("programs that fall back", "<= 5 %", f"{found['fallbacks']:.1%}", found["fallbacks"] <= 0.05),
        ("hits of the rarest rule file", ">= 50", str(found["rarest_rule"]), found["rarest_rule"] >= 50),
    ):
        goals.add_row(name, limit, value, "yes" if good else "no")
    console.print(f"{found['checked']} programs checked, {found['rejected']} rejected as no test")
    console.print(goals)


def _counts(first: str, second: str, counts: Counter[str]) -> Table:
    table = Table(first, box=box.SIMPLE_HEAD)
    table.add_column(second, justify="right")
    for name, count in counts.most_common():
        table.add_row(name, str(count))
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a campaign, print it, leave a summary; 1 if something is wrong."""
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=10_000, help="programs to check")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="workers at a time")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "fuzz", help="folder for the summary")
    options = parser.parse_args(arguments)
    console = Console() if Console().is_terminal else Console(width=160)
    campaign = Campaign()
    bar = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    chunk = max(1, min(200, options.count // options.processes))
    with Progress(*bar, console=console) as progress:
        task = progress.add_task("programs", total=options.count)
        for done in campaign.run_until(options.count, options.processes, chunk, options.first):
            progress.update(task, completed=min(done, options.count))
    _print(console, campaign)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "summary.json").write_text(
        json.dumps(campaign.summary(), indent=1) + "\n", encoding="utf-8"
    )
    for first, left in campaign.dead.items():
        console.print(f"the worker of seeds {first} to {first + chunk - 1} died: {left}", markup=False)
    if campaign.wrong:
        console.print(campaign.show(campaign.wrong), markup=False, highlight=False)
    if campaign.missed:
        console.print(f"planted kind not found: seeds {campaign.missed[:50]}", markup=False)
    return 1 if campaign.wrong or campaign.dead else 0


if __name__ == "__main__":
    sys.exit(main())
