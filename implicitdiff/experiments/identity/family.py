"""The identity experiments: what a family is, and how one is run over methods and seeds.

In: a `Family` and seeds. Out: a `Summary`. One file of ``families/`` each. Next file to read: ``report.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from implicitdiff.experiments.identity.applied import Method
from implicitdiff.experiments.identity.results import Run, Summary


@dataclass(frozen=True)
class Ordering:
    """One statement of the paper or the note about which method is better.

    Attributes:
        statement: In words.
        holds: Whether it does, given the runs.
    """

    statement: str
    holds: Callable[[Summary], bool]


@dataclass(frozen=True)
class Family:
    """One experiment.

    Attributes:
        name: A word, for the command line and files.
        title: A line.
        setup: What is learnt from what, sizes included; and what the published experiment had instead.
        values: (name, heading) of the numbers of the table; the first is the score.
        larger: Whether a larger score is better.
        methods: All that is compared.
        train: (method, seed, quick) -> Run.
        published: The paper's own number by method, as text.
        source: Where the published numbers stand.
        orderings: What should hold.
        note: What else a reader needs.
        collapse: (method, label) whose norms are drawn.
    """

    name: str
    title: str
    setup: str
    values: tuple[tuple[str, str], ...]
    larger: bool
    methods: tuple[Method, ...]
    train: Callable[[Method, int, bool], Run]
    published: Mapping[str, str]
    source: str
    orderings: tuple[Ordering, ...]
    note: str = ""
    collapse: tuple[tuple[str, str], ...] = field(default=())


def run_family(
    family: Family,
    seeds: Sequence[int],
    quick: bool = False,
    methods: Sequence[str] | None = None,
    report: Callable[[Run], None] = lambda run: None,
) -> Summary:
    """Train every method with every seed, with one thread.

    Args:
        family: What is run.
        seeds: Of data, initial weights and noise.
        quick: At a size that only shows that it runs.
        methods: Names, to run a part.
        report: Called after each run.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        runs = []
        for method in family.methods:
            if methods is not None and method.name not in methods:
                continue
            for seed in seeds:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(seed)
                    run = family.train(method, seed, quick)
                report(run)
                runs.append(run)
    finally:
        torch.set_num_threads(threads)
    return Summary(tuple(runs))


__all__ = ["Family", "Ordering", "run_family"]
