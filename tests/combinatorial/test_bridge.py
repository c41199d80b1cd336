"""The bridge: explain, check and compare of discrete layers, beside those of declared problems."""

from __future__ import annotations

import csv
import io
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import implicitdiff as idf
import implicitdiff.combinatorial as co
from implicitdiff.problems import RobustPooling


def row(report: idf.diagnostics.CheckReport, name: str) -> idf.diagnostics.CheckRow:
    return next(row for row in report.rows if row.name == name)


def costs(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1


def test_explain_names_estimator_projection_reason_and_calls() -> None:
    layer = co.DiscreteLayer(co.Assignment(), co.Identity(margin=co.Rademacher(0.2)))
    found = idf.explain(layer, costs(3, 4, 4))
    assert (found.solver, found.estimator, found.shape, found.batch) == ("Assignment", "Identity", (4, 4), 3)
    assert found.fixed == 7  # 4 + 4 sums, one of them implied by the others
    assert found.valid
    assert found.proved
    assert found.calls == (1, 0)
    text = str(found)
    for part in ("(I - A^+ A)", "proved", "Rademacher(a=0.2)", "3 for batch 3", "-P'(w)^T g", "7 of 16"):
        assert part in text
    assert "Rademacher" in found.to_html()
    assert "<w, y>" not in found.to_html(), "texts are escaped"
    assert found.to_latex().startswith(r"\begin{align*}")


def test_explain_says_that_a_projection_is_refused() -> None:
    layer = co.DiscreteLayer(co.GridShortestPath(5, 4), co.Identity("mean"))
    found = idf.explain(layer, costs(2, 5, 4))
    assert not found.valid
    assert "refused" in str(found)
    assert "refused" not in str(idf.explain(co.DiscreteLayer(co.TSP(5), co.Identity("mean")), costs(2, 10)))


def test_explain_says_that_a_projection_was_only_tested() -> None:
    def doubled(w: Tensor) -> Tensor:
        return 2 * w

    found = idf.explain(co.DiscreteLayer(co.TopK(2), co.Identity(doubled)), costs(2, 5))
    assert found.valid
    assert not found.proved
    assert "no proof" in str(found)
    assert "doubled" in str(found)


def test_explain_without_data() -> None:
    cost = torch.empty(7, 6, device="meta")
    found = idf.explain(co.DiscreteLayer(co.TopK(2), co.Blackbox(3.0)), cost)
    assert (found.batch, found.calls) == (7, (1, 1))
    assert "reverse; not linear in g" in found.modes


@pytest.mark.parametrize(
    "estimator",
    [
        co.Identity(),
        co.StraightThrough(0.5),
        co.Blackbox(2.0),
        co.LPGD(2.0),
        co.LPGD(2.0, side="left"),
        co.IMLE(2.0),
        co.IMLE(2.0, co.Gumbel(0.5), samples=3),
        co.AdaptiveIMLE(co.Gumbel(0.5), samples=2, central=True),
        co.Perturbed(0.5, 4),
    ],
    ids=repr,
)
def test_calls_that_are_announced_are_the_calls_that_are_counted(estimator: co.Estimator) -> None:
    layer = co.DiscreteLayer(co.TopK(2, sense="max"), estimator)
    cost = costs(3, 6).requires_grad_()
    layer(cost).backward(costs(3, 6, seed=1))
    assert estimator.calls is not None
    assert layer.solver_calls == 3 * sum(estimator.calls)
    assert estimator.formula.startswith("dl/dw = ")


@pytest.mark.parametrize(
    ("solver", "shape"),
    [
        (co.GridShortestPath(4, 5), (4, 5)),
        (co.Assignment(), (4, 4)),
        (co.TopK(2, sense="max"), (6,)),
        (co.Ranking(), (5,)),
        (co.TSP(5), (10,)),
        (co.Knapsack([2, 3, 4, 1], 5), (4,)),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
@pytest.mark.parametrize(
    "estimator",
    [co.Identity(), co.Blackbox(3.0), co.LPGD(2.0), co.StraightThrough(0.5)],
    ids=lambda e: e.name,
)
def test_check_passes(solver: co.Solver, shape: tuple[int, ...], estimator: co.Estimator) -> None:
    report = idf.check(co.DiscreteLayer(solver, estimator, domain="clamp"), costs(3, *shape))
    assert report.ok, str(report)
    assert row(report, "value's derivative").verdict.startswith("ok")


def test_check_finds_a_solver_that_is_not_exact() -> None:
    def second_best(cost: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(cost.argsort(1)[:, 1], cost.shape[1]).to(cost)

    report = idf.check(co.solver(second_best, cost_shape=(5,), equalities=torch.ones(5)), costs(4, 5))
    assert not report.ok
    assert row(report, "optimal among known").verdict.startswith("fail")
    assert row(report, "descent of a step").verdict.startswith("fail")


def test_check_finds_a_wrong_equality_and_a_wrong_projection() -> None:
    def cheap(cost: Tensor) -> Tensor:
        return (cost < 0.6).to(cost)

    report = idf.check(co.solver(cheap, cost_shape=(5,), equalities=torch.ones(5)), costs(4, 5))
    assert row(report, "declared equalities").verdict.startswith("fail")
    layer = co.DiscreteLayer(co.GridShortestPath(4, 5), co.Identity("mean"))
    assert row(idf.check(layer, costs(2, 4, 5)), "projection").verdict.startswith("fail")


def test_check_finds_a_gradient_that_is_not_its_formula() -> None:
    class Wrong(co.NoProjection):
        def pull(self, w: Tensor, g: Tensor) -> Tensor:
            return 2 * g

    report = idf.check(co.DiscreteLayer(co.TopK(2), co.Identity(Wrong())), costs(3, 5))
    assert row(report, "gradient by its formula").verdict.startswith("fail")


def test_check_reports_what_cannot_be_solved() -> None:
    layer = co.DiscreteLayer(co.GridShortestPath(3, 4), co.Identity())
    assert row(idf.check(layer, costs(2, 3, 4) - 1), "solve").verdict.startswith("fail")
    perturbed = co.DiscreteLayer(co.GridShortestPath(3, 4), co.Blackbox(20.0))
    report = idf.check(perturbed, costs(2, 3, 4))
    assert row(report, "backward").verdict.startswith("fail")


def test_check_leaves_the_layer_as_it_was() -> None:
    layer = co.DiscreteLayer(co.TopK(2), co.AdaptiveIMLE(co.Gumbel()))
    assert idf.check(layer, costs(3, 5)).ok
    assert layer.training
    assert layer.estimator.training
    assert layer.solver_calls == 0
    assert float(layer.estimator.alpha) == 1


def test_compare_counts_calls_and_measures_progress() -> None:
    layer = co.DiscreteLayer(co.GridShortestPath(5, 6), co.Identity())
    found = idf.compare(layer, costs(4, 5, 6), backwards=[co.Blackbox(2.0), co.Perturbed(0.3, 5)], rounds=2)
    assert [(r.estimator, r.calls) for r in found.rows] == [
        ("Identity", 1),
        ("Blackbox", 2),
        ("Perturbed", 5),
    ]
    assert found.rows[0].ratio == 1
    assert found.rows[0].cosine == pytest.approx(1)
    assert found.rows[0].progress is not None
    assert found.rows[0].progress > 0
    table = list(csv.DictReader(io.StringIO(found.to_csv())))
    assert [line["estimator"] for line in table] == ["Identity", "Blackbox", "Perturbed"]
    assert "fewest solver calls: Identity" in str(found)


def test_compare_has_one_of_each_kind_by_default_and_says_what_could_not_run() -> None:
    found = idf.compare(co.Assignment(), costs(3, 4, 4), rounds=1)
    assert {r.estimator for r in found.rows} == {
        "Identity", "Blackbox", "LPGD", "IMLE", "Perturbed", "StraightThrough"
    }  # fmt: skip
    wrong = idf.compare(co.GridShortestPath(4, 4), costs(2, 4, 4), backwards=[co.Identity("mean")], rounds=1)
    assert wrong.rows[1].seconds is None
    assert "ProjectionError" in wrong.rows[1].note


def test_what_the_bridge_refuses() -> None:
    cost = costs(2, 5)
    with pytest.raises(idf.InputError, match="one input"):
        idf.explain(co.TopK(2), cost, cost)
    with pytest.raises(idf.OptionError, match="in_dims"):
        idf.check(co.TopK(2), cost, in_dims=1)
    with pytest.raises(idf.OptionError, match="Blackbox"):
        idf.compare(co.TopK(2), cost, backwards=["dense"])
    with pytest.raises(idf.OptionError, match="sweep"):
        idf.compare(co.TopK(2), cost, sweep={"n": [1]})


def test_declared_problems_go_the_other_way_and_load_nothing() -> None:
    assert idf.explain(RobustPooling(), *RobustPooling().example()).hessian.kind == "low-rank-plus-diagonal"
    code = (
        "import sys, torch, implicitdiff as idf; from implicitdiff.problems import RobustPooling as R; "
        "idf.explain(R(), *R().example()); sys.exit('implicitdiff.combinatorial' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
