"""Checks a range of seeds in a process of its own and prints one JSON document.

Run as `python -m tests.fuzz.worker FIRST COUNT`, or `... --code FIRST COUNT` for the plans' code alone.
test_fuzz.py starts several of these and adds up.
"""

import dataclasses
import json
import random
import sys
import warnings
from collections import Counter
from typing import Any

import torch
from torch.utils._pytree import tree_flatten

from implicitdiff import StructureMismatchWarning
from implicitdiff.graph.translate import RULES
from implicitdiff.inputs import bind
from implicitdiff.plan import plan_for
from tests.fuzz.check import Outcome, check
from tests.fuzz.generator import Program, generate


def programs(first: int, count: int) -> list[tuple[int, Program]]:
    """The programs of `count` seeds."""
    return [(seed, generate(random.Random(seed))) for seed in range(first, first + count)]


def counted_rules() -> Counter[str]:
    """Makes every translation rule count its calls by the name of the file it stands in."""
    hits: Counter[str] = Counter({rule.__module__.rsplit(".", 1)[1]: 0 for rule in RULES.values()})

    def counting(rule: Any) -> Any:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            hits[rule.__module__.rsplit(".", 1)[1]] += 1
            return rule(*arguments, **options)

        return wrapped

    for operation, rule in list(RULES.items()):
        RULES[operation] = counting(rule)
    return hits


def code_of(program: Program) -> str:
    """The emitted backward pass of a program's plan, with the derivation."""
    problem = program.problem()
    bound = bind(problem, program.make_inputs(), program.in_dims)
    leaves, spec = tree_flatten(problem.init(*bound.sample(0)))
    analysis = plan_for(problem, bound, leaves, spec).analysis
    return "\n".join([*analysis.derivation, analysis.code])


def main(arguments: list[str]) -> None:
    torch.set_num_threads(1)
    # a structure that the probe contradicts is a wrong proof, not something to fall back from
    warnings.simplefilter("error", StructureMismatchWarning)
    first, count = map(int, arguments[-2:])
    if arguments[0] == "--code":
        print(json.dumps({seed: code_of(program) for seed, program in programs(first, count)}))
        return
    hits = counted_rules()
    outcomes: dict[int, Outcome] = {seed: check(program) for seed, program in programs(first, count)}
    plain = {seed: dataclasses.asdict(outcome) for seed, outcome in outcomes.items()}
    print(json.dumps({"outcomes": plain, "rules": hits}))


if __name__ == "__main__":
    main(sys.argv[1:])
