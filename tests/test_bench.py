"""The benchmarks' harness on tiny sizes: it runs, its tables are complete, and it would see a wrong gradient.

No time is asserted, only that there is one.
"""

import dataclasses
import functools
import importlib.util
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import implicitdiff as idf
from benchmarks import (
    byhand,
    choice,
    comparison,
    declared,
    growth,
    methods,
    output,
    peers,
    race,
    targets,
    works,
)
from benchmarks.__main__ import main

WORKS = {
    "pooling": lambda: works.pooling(2, 5, 9),
    "flat pooling": lambda: works.pooling(2, 5, 9, "truncated-quadratic"),
    "transport": lambda: works.transport(2, 4, 6),
    "QP layer": lambda: works.quadratic(3, 5, 2),
    "QP backward": lambda: works.quadratic(3, 5, 2, whole=False),
    "softmax": lambda: works.softmax(3, 7),
    "smoothing": lambda: works.smoothing(2, 8),
    "logistic": lambda: works.logistic(2, 4, 7),
    "tiny median": works.median,
}


@pytest.fixture
def settings() -> Iterator[None]:
    """The command sets the clock, threads and denormals for its process; here they are put back."""
    threads, clock = torch.get_num_threads(), race.clock.get()
    yield
    race.clock.set(clock)
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


@pytest.mark.parametrize("name", WORKS)
def test_every_method_has_the_gradient_of_the_dense_formula(name: str) -> None:
    """The hand-written passes are the yardstick, so they are held against the formula, and so are the others."""
    work = WORKS[name]()
    for method in ("hand", "auto"):
        found = methods.racer(work, method)
        assert isinstance(found, methods.Racer), found
        inputs, asked = work.leaves()
        layer = idf.DeclarativeLayer(work.problem if work.whole else work.held, backward="dense")
        dense = torch.autograd.grad(layer(*inputs), asked, work.cotangent())
        assert work.error(found.run(), work.determined([g.double() for g in dense])) < 1e-4
        assert found.error < 1e-4
        assert found.counts.bytes > 0
        assert found.counts.operations > 0


@pytest.mark.parametrize("name", ["pooling", "transport", "QP backward"])
def test_a_wrong_gradient_is_seen(name: str) -> None:
    """A pass that scales one gradient by 1.1 is called wrong in the table, and so is one with a NaN."""
    work = WORKS[name]()
    truth = work.truth()

    def scaled(factor: float, u: Tensor, v: Tensor, *inputs: Tensor) -> tuple[Tensor | None, ...]:
        copies = [x.detach().requires_grad_(need) for x, need in zip(inputs, work.needs, strict=True)]
        with torch.enable_grad():
            asked = [x for x in copies if x.requires_grad]
            grads = iter(torch.autograd.grad(work.hand(u, *copies), asked, v))
        found = [next(grads) if need else None for need in work.needs]
        last = max(k for k, need in enumerate(work.needs) if need)
        found[last] = factor * found[last]
        return tuple(found)

    for factor, wrong in ((1.0, False), (1.1, True), (math.nan, True)):
        tampered = dataclasses.replace(work, hand=byhand.with_backward(functools.partial(scaled, factor)))
        found = methods.racer(tampered, "hand", truth)
        assert isinstance(found, methods.Racer)
        assert found.wrong is wrong
        row = comparison.ran(work, found, race.alternate({"hand": found.run}, 1, 1e-6)["hand"])
        assert row.note.startswith("WRONG") is wrong


def test_comparison_has_a_row_for_each_method_and_comes_back_from_csv(tmp_path: Path) -> None:
    work = works.transport(1, 3, 4)
    asked = ("hand", "auto", "dense", "unrolled", "compiled")
    rows = comparison.compare(work, asked, rounds=2)
    assert [row.method for row in rows] == list(asked)
    rows.append(comparison.absent(work, methods.Absent("matrix-free", 'left out, "for" a reason')))
    assert rows[0].ratio == 1.0
    assert all(row.note or row.seconds for row in rows)
    for row in rows[:3]:
        assert None not in dataclasses.astuple(row)
    output.write_csv(tmp_path / "rows.csv", rows, comparison.Row)
    assert output.read_csv(tmp_path / "rows.csv", comparison.Row) == rows
    assert all(len(comparison.cells(row)) == len(comparison.HEADER) for row in rows)
    table = output.markdown(comparison.HEADER, [comparison.cells(row) for row in rows])
    assert len(table.splitlines()) == len(rows) + 2


def test_checks_come_back_from_csv(tmp_path: Path) -> None:
    goal = targets.Goal(lambda: works.pooling(1, 4, 6), 0.5, 0.5, 0.5, 0.5)
    checks = [
        *targets.measure(goal, rounds=2),
        targets.Check("a", "b", None, 1.5),
        growth.dense_rung(True)[0],
    ]
    assert {check.quantity for check in checks} >= {"bytes", "peak", "time", "time, compiled", "error"}
    output.write_csv(tmp_path / "checks.csv", checks, targets.Check)
    assert output.read_csv(tmp_path / "checks.csv", targets.Check) == checks
    assert all(len(targets.cells(check)) == len(targets.HEADER) for check in checks)


@pytest.mark.parametrize(
    ("target", "measured", "at_least", "verdict"),
    [
        (0.5, 0.5, False, "yes"),
        (0.5, 0.51, False, "no"),
        (0.5, 0.51, True, "yes"),
        (0.5, 0.4, True, "no"),
        (0.5, None, False, "-"),
        (None, 1.0, False, "-"),
        (0.5, math.nan, False, "no"),
    ],
)
def test_verdicts(target: float | None, measured: float | None, at_least: bool, verdict: str) -> None:
    assert targets.Check("", "", target, measured, at_least=at_least).verdict == verdict


def test_errors_leave_out_what_no_method_determines() -> None:
    work = works.transport(2, 3, 5)
    truth = work.truth()
    M, r, c = truth
    assert work.error([M, r + 2.0, c - 2.0], truth) < 1e-12
    assert work.error([M, r + 2.0, c], truth) > 1e-2
    assert math.isnan(work.error([M, r * math.nan, c], truth))


def test_slopes_are_those_of_the_curve() -> None:
    found = [growth.Point("c", "k", 10**k, 1e-9 * 10 ** (2 * k), 8 * 10**k, 8) for k in range(2, 7)]
    assert growth.slope(found, "seconds") == pytest.approx(2)
    assert growth.slope(found, "bytes") == pytest.approx(1)
    assert [check.verdict for check in growth.slopes(found)] == ["no", "yes"]


@pytest.mark.parametrize("number", range(4))
def test_curves_are_of_their_kind(number: int) -> None:
    curve = dataclasses.replace(growth.curves(True)[number], sizes=(20, 60))
    found = list(growth.points(curve, readings=1))
    assert [point.size for point in found] == [20, 60]
    kinds = ("diagonal", "banded", "low-rank-plus-diagonal", "block-diagonal")
    assert {point.kind for point in found} == {kinds[number]}


def test_choice_is_the_best_or_says_what_is_lost() -> None:
    row = choice.measure(works.pooling(2, 6, 3), rounds=2)
    assert row is not None
    assert row.structure == "low-rank-plus-diagonal"
    assert row.lost >= 0
    assert (row.lost == 0) == (row.best == row.chosen)
    assert {"woodbury", "cholesky"} <= {part.split()[0] for part in row.seconds.split(", ")}
    assert not row.wrong
    assert choice.summary([row, row]).startswith(("2 of 2", "0 of 2"))


def test_alternation_runs_every_pass_in_every_round() -> None:
    calls: list[str] = []
    times = race.alternate({name: lambda name=name: calls.append(name) for name in "abc"}, 4, reading=1e-9)
    assert set(times) == set("abc")
    assert all(found.rounds == 4 for found in times.values())
    assert times["a"].ratio == 1.0
    # Two calls before anything counts, then four rounds of 1 call each, each round from another start.
    assert "".join(calls[6:]) == "abc" + "bca" + "cab" + "abc"


def test_statements_are_counted_without_heads_and_docstrings() -> None:
    code = 'def f(a):\n    """Text."""\n    b = a\n    if b:\n        c = b\n    return c\n'
    assert declared.statements(code) == 4
    assert all(check.measured for check in declared.texts())


def test_fuzz_goals_are_read_from_the_last_campaign(tmp_path: Path) -> None:
    assert [check.verdict for check in declared.fuzz(tmp_path)] == ["-"]
    found = {"checked": 10_000, "wrong": 1, "found": 0.96, "fallbacks": 0.04, "rarest_rule": 60}
    (tmp_path / "summary.json").write_text(json.dumps(found))
    assert [check.verdict for check in declared.fuzz(tmp_path)] == ["yes", "no", "yes", "yes", "yes"]


@pytest.mark.parametrize("name", peers.ADAPTERS)
def test_adapters_are_found_only_where_their_distribution_is(name: str) -> None:
    """Peers are no dependency of the tests: an adapter that is not installed is never imported."""
    adapter = peers.ADAPTERS[name]
    assert importlib.util.find_spec(f"benchmarks.peers.{adapter.module}") is not None
    work = works.transport(1, 3, 4) if "transport" in adapter.works else works.quadratic(2, 4, 2)
    assert (name in peers.installed_for(work)) == (adapter.version is not None)
    missing = dataclasses.replace(adapter, distribution="no-such-distribution-of-implicitdiff")
    assert missing.version is None


@pytest.mark.usefixtures("settings")
def test_one_command_writes_all_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = (comparison.Entry(works.median, (("dense", "not wanted here"),)),)
    monkeypatch.setattr(comparison, "entries", lambda quick: entries)
    monkeypatch.setattr(targets, "goals", lambda quick: [targets.Goal(lambda: works.softmax(2, 6), time=2.0)])
    monkeypatch.setattr(targets, "long_shapes", lambda rounds: [])
    monkeypatch.setattr(choice, "grid", lambda quick: [lambda: works.pooling(1, 4, 3)])
    path = main(
        ["--quick", "--rounds", "2", "--only", "comparison", "targets", "choice", "--out", str(tmp_path)]
    )
    text = path.read_text(encoding="utf-8")
    for name in ("comparison", "targets", "choice"):
        assert (tmp_path / f"{name}.csv").stat().st_size > 0
        assert (tmp_path / f"{name}.svg").read_text(encoding="utf-8").rstrip().endswith("</svg>")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"]({name}.svg)" in text
    assert "not wanted here" in text
    assert "reached:" in capsys.readouterr().out
