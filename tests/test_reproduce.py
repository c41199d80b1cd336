"""The experiments at small sizes: complete tables, right gradients, figures fit for print, claims that can fail."""

import csv
import dataclasses
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import implicitdiff as idf
from implicitdiff import reproduce
from implicitdiff.cli import main
from implicitdiff.problems import OptimalTransport, RobustPooling
from implicitdiff.reproduce import (
    Claim,
    Experiment,
    Findings,
    Settings,
    Table,
    fig1,
    fig3,
    fig3_claims,
    operations,
    registry,
    table1,
    transport_methods,
)
from implicitdiff.reproduce.base import nobody
from implicitdiff.reproduce.measuring import Method, costs, one_quiet_thread
from tests.figure_checks import complaints
from tests.reference import fig2

NAMES = ("fig1", "fig3", "table1", "operations")


@pytest.fixture(scope="module")
def found() -> dict[str, Findings]:
    """Every experiment, once."""
    return {name: reproduce.experiment(name).run(Settings(quick=True, rounds=1), nobody) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_tables_are_complete_and_texts_fit_80_columns(name: str, found: dict[str, Findings]) -> None:
    text = found[name].text(80)
    assert max(map(len, text.splitlines())) <= 80
    for table in found[name].tables:
        assert table.rows
        assert all(len(table.cells(row)) == len(table.header) for row in table.rows)
        assert set(table.right) <= set(table.header)
        assert (table.title in text) is table.printed
    assert all(claim.evidence in " ".join(text.split()) for claim in found[name].claims)


@pytest.mark.parametrize("name", NAMES)
def test_figures_are_fit_for_print(name: str, found: dict[str, Findings]) -> None:
    for _, draw in found[name].figures:
        assert complaints(draw()) == []


def test_figures_of_full_sizes_are_fit_for_print(found: dict[str, Findings]) -> None:
    from implicitdiff.reproduce import fig1_plot, fig3_plot

    first = [row for row in found["fig1"].tables[1].rows if row.n == 9]
    sizes = (16, 64, 256, 1024, 4096, 16384)
    assert complaints(fig1_plot.draw([dataclasses.replace(row, n=n) for n in sizes for row in first])) == []
    size, count = (found["fig3"].tables[k].rows[:7] for k in (0, 1))
    rows = [dataclasses.replace(row, n=n) for n in (25, 50, 100, 200, 300, 500, 750, 1000) for row in size]
    counts = (1, 2, 3, 4, 5, 6, 8, 10, 20, 50)
    rows += [dataclasses.replace(row, iterations=k, forward_peak=k * 10**7) for k in counts for row in count]
    for passes in ("both passes", "backward"):
        assert complaints(fig3_plot.costs(rows, passes)) == []


def test_figures_that_are_not_fit_are_told() -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3, 2))
    axes = figure.subplots()
    axes.plot([1, 2], [1, 2], "o-", color="red")
    axes.plot([1, 2], [2, 1], "o-", color="red")
    axes.text(1.5, 1.5, "some words", fontsize=5)
    axes.text(1.5, 1.5, "other words", fontsize=8)
    axes.set_xlabel("length")
    told = " ".join(complaints(figure))
    for word in ("cm wide", "5.0 pt", "overlaps", "no unit", "look the same", "colour red"):
        assert word in told


def test_files_are_written(found: dict[str, Findings], tmp_path: Path) -> None:
    paths = reproduce.write(found["fig3"], tmp_path / "new")
    assert {path.suffix for path in paths} == {".csv", ".svg", ".pdf", ".png", ".md"}
    assert all(path.stat().st_size > 0 for path in paths)
    with (tmp_path / "new" / "fig3-size.csv").open() as source:
        rows = list(csv.DictReader(source))
    assert len(rows) == len(found["fig3"].tables[0].rows)
    assert float(rows[0]["backward"]) == found["fig3"].tables[0].rows[0].backward
    report = (tmp_path / "new" / "report.md").read_text(encoding="utf-8")
    assert "](fig3-backward.svg)" in report
    twice = [reproduce.write(found["table1"], tmp_path / name) for name in ("one", "two")]
    for one, two in zip(*twice, strict=True):
        assert one.suffix == ".png" or one.read_bytes() == two.read_bytes(), one.name


def test_tables_are_written_without_matplotlib(
    found: dict[str, Findings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(idf.ImplicitDiffError, match="pip install matplotlib"):
        reproduce.write(found["fig1"], tmp_path)
    assert (tmp_path / "fig1.csv").is_file()


# Fig. 1


def test_fig1_measures_right_gradients(found: dict[str, Findings]) -> None:
    rows = found["fig1"].tables[1].rows
    assert {row.penalty for row in rows} == {
        "quadratic",
        "pseudo-huber",
        "huber",
        "welsch",
        "truncated-quadratic",
    }
    for row in rows:
        exact = row.method != "diagonal of H"
        assert row.cosine == pytest.approx(1, abs=1e-9 if exact else 0.05)
        assert row.norm == pytest.approx(1, abs=1e-4 if exact else 0.1)
        assert 0 < row.backward_low <= row.backward <= row.backward_high
    # With two branches in use, no two penalties are the same.
    assert len({row.backward_peak for row in rows if row.method == "ours" and row.n == 25}) >= 4


def test_the_diagonal_of_the_hessian_is_its_diagonal() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    u, v = x.mean(2), torch.randn(2, 3, generator=generator, dtype=torch.float64)
    problem = RobustPooling("pseudo-huber", 0.7).double()
    given = fig1.diagonal(problem, u, v, x)
    for b in range(2):
        found = idf.derivatives(problem, u[b], x[b])
        w = v[b] / found.H.diagonal()
        assert torch.allclose(given[b].flatten(), -(w @ found.B_by_input["x"]))


# Fig. 3


def test_fig3_methods_agree_at_a_converged_plan() -> None:
    M, r, c, v = fig3.problem(7, dtype=torch.float64)
    with one_quiet_thread():
        _, gradients = costs(transport_methods.methods(M, r, c, v, 2.0, 40), 1)
    exact = (
        OptimalTransport(2.0).double().vjp(transport_methods.sinkhorn_in_place(M, r, c, 2.0, 40), v, M, r, c)
    )
    for name in transport_methods.NAMES:
        found = gradients[name]
        error = float((found[0] - exact[0]).abs().max() / exact[0].abs().max())
        if name in ("approximate", "diagonal of S"):
            assert error > 1e-2
            continue
        assert error < 1e-8, name
        # Gradients for r and c are defined up to a multiple of (1, -1).
        ours, theirs = (torch.cat([g[1][0], g[2][0]]) for g in (found, exact))
        null = torch.cat([torch.ones(7), -torch.ones(7)]).double() / math.sqrt(14)
        gap = ours - theirs
        assert (gap - (gap @ null) * null).abs().max() < 1e-8, name


def test_three_sinkhorns_are_one() -> None:
    M, r, c, _ = fig3.problem(6, dtype=torch.float64)
    plans = [f(M, r, c, 4.0, 3) for f in (transport_methods.sinkhorn, transport_methods.sinkhorn_in_place,
                                           transport_methods.sinkhorn_scaled)]  # fmt: skip
    assert torch.allclose(plans[0], plans[1], rtol=1e-13, atol=0)
    assert torch.allclose(plans[0], plans[2], rtol=1e-13, atol=0)


def test_unrolled_memory_grows_with_the_iterations_and_implicit_does_not(found: dict[str, Findings]) -> None:
    rows = {(row.method, row.iterations): row for row in found["fig3"].tables[1].rows}
    assert rows["unrolled", 6].peak > 1.8 * rows["unrolled", 1].peak
    for name in ("block inverse", "full inverse", "ours", "approximate"):
        assert rows[name, 6].peak == rows[name, 1].peak


def test_claims_about_fig3_can_fail(found: dict[str, Findings]) -> None:
    rows = [row for table in found["fig3"].tables[:2] for row in table.rows]
    near = found["fig3"].tables[2].rows

    def changed(method: str, **values: Any) -> list[bool]:
        other = [dataclasses.replace(row, **values) if row.method == method else row for row in rows]
        return [claim.holds for claim in fig3_claims.claims(other, near)]

    assert changed("full inverse", backward=10.0)[0]
    assert not changed("full inverse", backward=1e-9)[0]
    assert not changed("unrolled", forward=10.0)[1]
    assert changed("unrolled", forward_peak=10**9)[2:4] == [True, True]
    assert changed("unrolled", forward_peak=0, backward_peak=0)[2:4] == [False, False]
    assert not changed("ours", backward_peak=10**9)[4]
    assert not changed("ours", backward=10.0)[5]
    close = [dataclasses.replace(row, iterations=2, cosine=0.99, norm=1.0) for row in near]
    assert all(claim.holds for claim in fig3_claims.claims(rows, close)[6:])
    far = [dataclasses.replace(row, iterations=2, cosine=0.5) for row in near]
    assert not any(claim.holds for claim in fig3_claims.claims(rows, far)[6:])


# Table 1


def test_table1_is_derived_and_agrees(found: dict[str, Findings]) -> None:
    rows = found["table1"].tables[0].rows
    assert [row.penalty for row in rows] == list(table1.CLOSED)
    assert all(max(row.difference1, row.difference2) < 1e-14 for row in rows)
    assert {row.penalty: row.kind for row in rows}["truncated-quadratic"] == "scaled-identity"
    assert found["table1"].claims[0].holds
    wrong = table1.derived(RobustPooling("welsch", 1.4).double(), 1.0)
    right = table1.CLOSED["welsch"].kappa1(torch.tensor([1.0], dtype=torch.float64), 1.5)
    assert abs(wrong[0] - float(right)) > 1e-2


@pytest.mark.parametrize("penalty", table1.CLOSED)
def test_closed_forms_are_those_of_the_reference(penalty: str) -> None:
    z = torch.tensor([0.2, 1.1, 1.9, 5.0], dtype=torch.float64)
    kappa1, kappa2 = fig2.kappa(penalty, z, 1.5)
    assert torch.allclose(table1.CLOSED[penalty].kappa1(z, 1.5), kappa1, rtol=1e-13)
    assert torch.allclose(table1.CLOSED[penalty].kappa2(z, 1.5), kappa2, rtol=1e-13)


# Operations


def test_every_operation_is_named_with_its_line() -> None:
    found = operations.run(Settings())
    rows = found.tables[0].rows
    assert len(rows) == 12
    assert all(row.right for row in rows), [row for row in rows if not row.right]
    assert found.claims[0].holds
    assert [row.outcome for row in rows if row.operation == "branch on a value"] == ["ControlFlowError"]
    assert not dataclasses.replace(rows[0], line="outside.py:1").right
    assert not dataclasses.replace(rows[0], error=1e-3).right


# Identity


def test_the_identity_experiments_are_one_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from implicitdiff.experiments.identity import reproduce as whole
    from implicitdiff.reproduce import identity

    family = whole.FAMILIES["retrieval"]
    small = {"retrieval": dataclasses.replace(family, methods=family.methods[:2])}
    monkeypatch.setattr(identity, "FAMILIES", small)
    monkeypatch.setattr(whole, "FAMILIES", small)
    told: list[tuple[int, int]] = []
    result = reproduce.experiment("identity").run(
        Settings(quick=True), lambda done, total, what: told.append((done, total))
    )
    assert told[-1] == (2, 2)
    assert [row.method for row in result.tables[0].rows] == [method.name for method in family.methods[:2]]
    names = {path.name for path in reproduce.write(result, tmp_path)}
    assert {"identity.csv", "retrieval.csv", "results.md", "report.md"} <= names
    assert max(map(len, result.text(80).splitlines())) <= 80


# Registry and command


@pytest.fixture
def registered() -> Iterator[None]:
    """Whatever a test registers is forgotten."""
    before = dict(registry._REGISTERED)
    yield
    registry._REGISTERED.clear()
    registry._REGISTERED.update(before)


@pytest.mark.usefixtures("registered")
def test_another_module_can_plug_in_an_experiment(tmp_path: Path) -> None:
    @dataclasses.dataclass(frozen=True)
    class Row:
        value: float

    def run(settings: Settings, advance: reproduce.base.Advance) -> Findings:
        advance(0, 1, "the only step")
        table = Table("values", "Values", (Row(1.5),), ("value",), lambda row: (str(row.value),))
        return Findings("A title", "About it.", (table,), (Claim("It is so", True, "seen"),))

    mine = Experiment("mine", "one of mine", run)
    reproduce.register(mine)
    reproduce.register(mine)
    assert reproduce.names()["mine"] == "one of mine"
    with pytest.raises(idf.OptionError, match="already"):
        reproduce.register(Experiment("mine", "another", run))
    with pytest.raises(idf.OptionError, match="already"):
        reproduce.register(Experiment("fig1", "another", run))
    result = CliRunner().invoke(main, ["reproduce", "mine", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "yes  It is so: seen." in result.output
    assert (tmp_path / "mine" / "values.csv").read_text() == "value\n1.5\n"


def test_command_as_json(tmp_path: Path) -> None:
    words = ["reproduce", "table1", "operations", "--quick", "--out", str(tmp_path), "--json"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert list(found) == ["table1", "operations"]
    assert found["table1"]["claims"][0]["holds"] is True
    assert len(found["operations"]["tables"]["operations"]) == 12
    assert all(Path(path).is_file() for name in found for path in found[name]["files"])


def test_command_refuses(tmp_path: Path) -> None:
    assert CliRunner().invoke(main, ["reproduce", "nothing"]).exit_code == 2
    assert CliRunner().invoke(main, ["reproduce"]).exit_code == 2
    blocked = tmp_path / "file"
    blocked.write_text("")
    result = CliRunner().invoke(main, ["reproduce", "operations", "--quick", "--out", str(blocked / "under")])
    assert result.exit_code == 3
    assert "cannot write into" in " ".join(result.output.split())


def test_measuring_counts_inputs_and_what_the_forward_keeps() -> None:
    x = torch.ones(1000)
    method = Method("m", lambda: x * 2, lambda state: (state * 3,), (x,))
    cost = costs([method], 1)[0]["m"]
    assert cost.forward_peak == 8000
    assert cost.backward_peak == 12000
    assert cost.peak == 12000
    assert cost.seconds == cost.forward + cost.backward
