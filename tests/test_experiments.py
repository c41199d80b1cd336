"""The identity experiments: every family runs at a tiny size; what it writes can be read; pages, figures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import implicitdiff as idf
from implicitdiff.experiments.identity import FAMILIES, reproduce_identity
from implicitdiff.experiments.identity.applied import Applied, Method, identity, other
from implicitdiff.experiments.identity.families.retrieval import ranking_loss
from implicitdiff.experiments.identity.family import run_family
from implicitdiff.experiments.identity.figures import save_collapse
from implicitdiff.experiments.identity.report import page, verdicts
from implicitdiff.experiments.identity.results import Run, Spread, Summary
from implicitdiff.experiments.identity.store import read_runs, write_runs
from implicitdiff.problems import KeypointMatching, SubsetSelection
from implicitdiff.reproduce import Settings, experiment


@pytest.mark.parametrize("name", FAMILIES)
def test_family_runs_and_can_be_read_again(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    # The first, the last, and one that calls the solver in its backward pass.
    chosen = {family.methods[0].name, family.methods[-1].name}
    chosen.add(next(m.name for m in family.methods if m.name.startswith("Blackbox")))
    before = torch.get_num_threads(), torch.random.get_rng_state()
    summary = run_family(family, [0], quick=True, methods=sorted(chosen))
    assert torch.get_num_threads() == before[0]
    assert torch.equal(torch.random.get_rng_state(), before[1]), "the caller's random state is left alone"
    assert set(summary.methods()) == chosen
    assert all(set(run.values) == {value for value, _ in family.values} for run in summary.runs)
    assert any(run.calls > 0 for run in summary.runs)
    write_runs(tmp_path, name, summary)
    again = read_runs(tmp_path, name)
    assert again is not None
    assert [(r.method, r.calls, len(r.curve)) for r in again.runs] == [
        (r.method, r.calls, len(r.curve)) for r in summary.runs
    ]
    text = page([(family, again)], "the command")
    assert "the command" in text
    assert "Not tried" in text, "orderings of methods that were not run are not decided"
    assert set(family.published) <= {method.name for method in family.methods}
    assert {name for name, _ in family.collapse} <= {method.name for method in family.methods}
    assert len({method.name for method in family.methods}) == len(family.methods)


def test_the_same_seed_gives_the_same_numbers() -> None:
    family = FAMILIES["globe"]
    method = "Identity, noise 0.2"
    first, second = (run_family(family, [3], quick=True, methods=[method]).runs[0] for _ in range(2))
    assert first.values == second.values
    assert first.curve == second.curve
    other_seed = run_family(family, [4], quick=True, methods=[method]).runs[0]
    assert other_seed.values != first.values


def test_files_page_and_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    drawn = {name for name, _ in FAMILIES["globe"].collapse}
    few = tuple(method for method in FAMILIES["globe"].methods if method.name in drawn)
    monkeypatch.setitem(FAMILIES, "globe", replace(FAMILIES["globe"], methods=few))
    written = reproduce_identity(["globe"], [0, 1], tmp_path, quick=True, report=lines.append)
    names = {path.name for path in written}
    assert {"globe.csv", "globe-curves.csv", "results.md", "collapse-globe.svg"} <= names
    assert {"collapse-globe.pdf", "collapse-globe.png"} <= names
    assert all(path.stat().st_size > 0 for path in written)
    assert len(lines) == 2 * len(few)
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert text.count("Not run.") == len(FAMILIES) - 1
    assert "±" in text
    svg = (tmp_path / "collapse-globe.svg").read_text(encoding="utf-8")
    written = save_collapse(FAMILIES["globe"], read_runs(tmp_path, "globe") or Summary(()), tmp_path)
    assert written[0].read_text(encoding="utf-8") == svg, "the same numbers give the same figure"


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(idf.OptionError, match="choose from terrain"):
        reproduce_identity(["nothing"], [0], tmp_path)
    with pytest.raises(idf.OptionError, match="seeds"):
        reproduce_identity([], [], tmp_path)


def fake(method: str, seed: int, value: float, norm: float = 1.0) -> Run:
    values = {"accuracy": value, "norm": norm}
    return Run("globe", method, seed, values, 10, 0.1, 0.2)


def test_orderings_can_fail() -> None:
    family = FAMILIES["globe"]
    good = {"Identity, P_std, noise 0.2": 99.0, "Identity, P_std": 80.0}
    noisy = next(o.statement for o in family.orderings if o.statement.startswith("noise improves"))

    def decided(values: dict[str, float]) -> bool | None:
        runs = [fake(method, seed, value) for method, value in values.items() for seed in (0, 1)]
        return next(v.holds for v in verdicts(family, Summary(tuple(runs))) if v.statement == noisy)

    assert decided(good) is True
    assert decided({**good, "Identity, P_std": 98.0}) is False
    assert decided({"Identity, P_std": 98.0}) is None


def test_spread() -> None:
    assert str(Spread.of([1.0, 3.0])) == "2.00 ± 1.41"
    assert str(Spread.of([12.0])) == "12.0"
    assert Summary((fake("a", 0, 1.0), fake("a", 1, 3.0))).value("a", "accuracy").mean == 2
    with pytest.raises(KeyError):
        Summary(()).value("a", "accuracy")


def test_ranking_loss_is_zero_where_all_relevant_come_first() -> None:
    relevant = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    assert ranking_loss(torch.tensor([[2.0, 1.0, 3.0, 4.0]]), relevant) == 0
    assert ranking_loss(torch.tensor([[3.0, 1.0, 2.0, 4.0]]), relevant) > 0


@pytest.mark.parametrize(
    "method", [identity("norm", 0.5), other("Blackbox 3", idf.combinatorial.Blackbox(3.0), "norm", 0.5)]
)
def test_a_margin_is_there_in_training_only_and_can_be_switched_off(method: Method) -> None:
    applied = Applied(method, SubsetSelection(30, 3), seed=0)
    cost = 0.05 * torch.randn(20, 30, generator=torch.Generator().manual_seed(1))
    plain = SubsetSelection(30, 3)(cost)
    assert not torch.equal(applied(cost), plain)
    assert torch.equal(applied.eval()(cost), plain)
    applied.train().without_margin()
    assert torch.equal(applied(cost), plain)


def test_informed_margin_makes_the_true_solution_dearer() -> None:
    applied = Applied(identity("none", informed=4.0), KeypointMatching(4), seed=0)
    cost = 1 - torch.eye(4)[None]
    target = torch.eye(4)[None]
    assert not torch.equal(applied(cost, target), target)
    assert torch.equal(applied.eval()(cost, target), target)


def test_as_an_experiment_of_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    family = replace(FAMILIES["globe"], methods=FAMILIES["globe"].methods[:2])
    for name in list(FAMILIES):
        monkeypatch.delitem(FAMILIES, name)
    monkeypatch.setitem(FAMILIES, "globe", family)
    steps: list[tuple[int, int, str]] = []
    found = experiment("identity").run(Settings(quick=True), lambda *step: steps.append(step))
    assert [step[:2] for step in steps] == [(1, 2), (2, 2)]
    assert [table.name for table in found.tables] == ["identity-globe"]
    assert len(found.tables[0].rows) == 2
    assert found.claims == (), "none is made at tiny sizes"
    assert "Identity" in found.text()
    assert found.figures[0][0] == "collapse-globe"
    text = {
        text.get_text()
        for axes in found.figures[0][1]().axes
        for text in (axes.xaxis.label, axes.yaxis.label)
    }
    assert {"epoch", "mean |w|, test data\n(units of cost)"} <= text
