"""200 random programs against the dense formula, in several processes; and tests of the generator and the
check.

A failure prints the program as a class to paste, and its seed: `generate(random.Random(seed))` makes it
again, `check(program)` runs it.
"""

import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from implicitdiff.plan import plan_for
from tests.fuzz.campaign import Campaign, answer, run_worker
from tests.fuzz.check import Point, check
from tests.fuzz.generator import KINDS, generate
from tests.fuzz.worker import programs

ROOT = Path(__file__).resolve().parents[2]
WORKERS = 4
SEEDS_PER_WORKER = 65  # about one program in six is no test (ill-conditioned), so that 200 remain
WANTED = 200


@pytest.fixture(scope="module")
def campaign() -> Campaign:
    campaign = Campaign()
    starts = [k * SEEDS_PER_WORKER for k in range(WORKERS)]
    campaign.run(starts, SEEDS_PER_WORKER, os.cpu_count() or 1)
    print(campaign.table())
    return campaign


@pytest.mark.slow
def test_enough_programs_are_checked(campaign: Campaign) -> None:
    assert len(campaign.checked) >= WANTED, campaign.table()
    counts = Counter(o.planted for o in campaign.checked.values())
    assert min(counts[kind] for kind in KINDS) >= 15, counts
    kinds = Counter(o.constraints for o in campaign.checked.values())
    assert min(kinds[k] for k in ("none", "linear", "nonlinear", "dependent")) >= 10, kinds


@pytest.mark.slow
def test_no_program_differs_from_the_dense_formula(campaign: Campaign) -> None:
    wrong = [seed for seed, outcome in campaign.checked.items() if outcome.wrong]
    assert not wrong, campaign.show(wrong)


@pytest.mark.slow
def test_planted_structure_is_found(campaign: Campaign) -> None:
    promised = {s: o for s, o in campaign.checked.items() if o.planted != "dense"}
    missed = [seed for seed, outcome in promised.items() if not outcome.structure_found]
    assert len(missed) <= 0.05 * len(promised), f"{campaign.table()}\n{campaign.show(missed)}"


@pytest.mark.slow
def test_few_programs_fall_back(campaign: Campaign) -> None:
    fell = [seed for seed, outcome in campaign.checked.items() if outcome.fallbacks or outcome.crash]
    assert len(fell) <= 0.15 * len(campaign.checked), f"{campaign.table()}\n{campaign.show(fell)}"


@pytest.mark.slow
def test_every_rule_file_is_hit(campaign: Campaign) -> None:
    files = {path.stem for path in (ROOT / "implicitdiff" / "graph" / "rules").glob("*.py")} - {"__init__"}
    assert set(campaign.rules) == files
    assert min(campaign.rules.values()) > 0, campaign.rules


@pytest.mark.slow
def test_two_processes_print_the_same_plans() -> None:
    """A plan is a pure function of the program: no order of a set, no address may show in it."""
    first, second = (
        answer(process)
        for process in [run_worker("--code", "0", "25", PYTHONHASHSEED=seed) for seed in ("1", "2")]
    )
    assert first == second
    assert sum(bool(code.strip()) for code in first.values()) >= 20, "hardly any plan has code to compare"


@pytest.mark.slow
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.randoms(use_true_random=False))
def test_shrinking_search(rng: random.Random) -> None:
    """The same check driven by hypothesis, which shrinks a failing program to a small one."""
    program = generate(rng)
    outcome = check(program)
    assert outcome.rejected or not outcome.wrong, f"{outcome}\n{program}"


# What follows tests the generator and the checker, without the library's plans.


def test_generator_is_a_function_of_its_seed() -> None:
    assert [p for _, p in programs(0, 20)] == [p for _, p in programs(0, 20)]


def test_programs_are_valid_and_their_planted_kind_is_true() -> None:
    """The dense Hessian has the pattern that was planted: no promise is false."""
    seen: Counter[str] = Counter()
    for seed, program in programs(0, 150):
        point = Point(program, program.problem())
        for d in point.derivatives():
            if not torch.isfinite(d.H).all():
                continue
            groups = torch.tensor(program.groups)
            places = torch.tensor(program.places)
            apart = groups[:, None] != groups[None, :]
            apart |= (places[:, None] - places[None, :]).abs() > program.reach
            scale = 1e-10 * max(float(d.H.abs().max()), 1.0)
            assert float((d.H * apart).abs().max()) <= scale, f"seed {seed}\n{program}"
            if program.planted == "scaled-identity":
                assert float(d.H.diagonal().std(unbiased=False)) <= scale, f"seed {seed}\n{program}"
            seen[program.planted] += 1
    assert set(seen) == set(KINDS)


def test_a_wrong_gradient_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check can fail: a plan that negates a single entry of a gradient is wrong."""

    class Tampered:
        def __init__(self, plan: Any) -> None:
            self._plan = plan

        def __getattr__(self, name: str) -> Any:
            return getattr(self._plan, name)

        def vjp(self, *arguments: Any) -> Any:
            (first, *others), status = self._plan.vjp(*arguments)
            if first is not None:
                first = first.clone()
                first.view(-1)[0] += 1e-3
            return (first, *others), status

    program = next(p for _, p in programs(0, 50) if not check(p).rejected and not check(p).wrong)
    monkeypatch.setattr("tests.fuzz.check.plan_for", lambda *a, **k: Tampered(plan_for(*a, **k)))
    assert check(program).wrong
