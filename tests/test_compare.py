"""`compare`: right numbers in every column, and a row with a reason for each backward that cannot run."""

import csv
import dataclasses
import io
import sys

import pytest
import torch
from torch import Tensor

import implicitdiff as idf
from implicitdiff.diagnostics import Comparison, Row, compare
from implicitdiff.diagnostics.held import batch_first, held_at
from implicitdiff.layer import DeclarativeLayer
from implicitdiff.problems import OptimalTransport, RobustPooling
from tests.figure_checks import complaints
from tests.test_explain import Median, Portfolio

EVERY = ("auto", "hand", "dense", "matrix-free", "unrolled", "approximate")


def by_name(found: Comparison) -> dict[str, Row]:
    return {row.backward: row for row in found.rows}


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


@pytest.fixture(scope="module")
def pooling() -> Comparison:
    return compare(RobustPooling(), normal(2, 5, 12), backwards=EVERY, rounds=2)


def test_every_backward_has_its_row(pooling):
    assert tuple(row.backward for row in pooling.rows) == EVERY
    for row in pooling.rows:
        assert row.error < (1e-4 if row.backward == "unrolled" else 1e-9)
        assert row.exact
        assert row.seconds > 0
        assert min(row.peak, row.bytes, row.flops) > 0
        assert row.rounds == 2
        assert row.note == ""
    assert pooling.rows[0].ratio == 1
    assert by_name(pooling)["hand"].solver == ""
    assert by_name(pooling)["auto"].solver in ("cholesky", "woodbury", "lu")
    assert by_name(pooling)["auto"].peak < by_name(pooling)["dense"].peak
    assert pooling.reference == "the dense formula in float64"


def test_text_and_verdict(pooling):
    text = str(pooling)
    assert text.startswith("backward passes of RobustPooling")
    assert max(map(len, text.splitlines())) <= 110
    assert all(name in text for name in EVERY)
    for word in ("needs the least memory", "has the smallest error"):
        assert word in pooling.verdict
    assert "not the gradient" not in pooling.verdict


def test_csv(pooling, tmp_path):
    text = pooling.to_csv(tmp_path / "rows.csv")
    assert (tmp_path / "rows.csv").read_text() == text
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [row["backward"] for row in rows] == list(EVERY)
    assert float(rows[2]["error"]) == pooling.rows[2].error
    assert int(rows[2]["peak"]) == pooling.rows[2].peak


def test_plot(pooling, monkeypatch, tmp_path):
    assert complaints(pooling.plot(tmp_path / "plot.svg")) == []
    assert "</svg>" in (tmp_path / "plot.svg").read_text()
    assert [panel.get_xlabel() for panel in pooling.plot().axes] == [
        "time (s)",
        "peak memory (bytes)",
        "error (relative)",
    ]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(idf.ImplicitDiffError, match="pip install matplotlib"):
        pooling.plot()


def test_a_backward_that_cannot_run_says_why():
    found = by_name(compare(Median(), normal(2, 4, 6).float(), backwards=("hand", "auto"), rounds=1))
    assert found["hand"].seconds is None
    assert "vjp" in found["hand"].note
    assert found["auto"].ratio == 1
    text = str(compare(Median(), normal(2, 4, 6).float(), backwards=("hand",), rounds=1))
    assert "not run" in text
    assert "none of the backward passes could run" in text


class Weighted(RobustPooling):
    """Pooling with a Parameter, which the hand-written vjp knows nothing of."""

    def __init__(self) -> None:
        super().__init__(alpha=torch.nn.Parameter(torch.tensor(1.0, dtype=torch.float64)))


def test_a_parameter_makes_the_hand_written_pass_impossible():
    found = by_name(compare(Weighted(), normal(2, 4, 6), backwards=("auto", "hand"), rounds=1))
    assert found["auto"].error < 1e-9
    assert found["hand"].seconds is None
    assert "alpha" in found["hand"].note


def test_a_dense_pass_that_is_too_large_is_not_run():
    small = {"rounds": 1, "backwards": ("auto", "dense")}
    found = by_name(compare(Median(), normal(2, 4, 6).float(), memory_limit=100, **small))
    assert found["dense"].note == "not run: it needs 256 B or more; memory_limit is 100 B"
    found = by_name(compare(Median(), normal(2, 4, 6).float(), flop_limit=1000.0, **small))
    assert "flop_limit" in found["dense"].note
    assert found["auto"].seconds is not None


def test_a_wrong_gradient_is_named():
    Q = normal(4, 4)
    found = compare(
        Portfolio(),
        Q @ Q.mT + torch.eye(4),
        normal(3, 4),
        in_dims=(None, 0),
        backwards=("auto", "approximate"),
        rounds=1,
    )
    assert by_name(found)["approximate"].error > 1e-3
    assert not by_name(found)["approximate"].exact
    assert "not the gradient: approximate" in found.verdict
    assert found.verdict.startswith("auto is the fastest")


def test_an_input_that_the_hand_leaves_out_is_no_error_of_the_rest():
    problem = RobustPooling(alpha=None)
    found = by_name(
        compare(problem, *(x.double() for x in problem.example()), backwards=("hand", "auto"), rounds=1)
    )
    assert found["hand"].error < 1e-9
    assert "leaves out" in found["hand"].note
    assert found["auto"].error < 1e-9


def test_dependent_constraints_are_compared_modulo_what_they_leave_open():
    M, r, c = (leaf.double() for leaf in OptimalTransport().example())
    inputs = (M, r / r.sum(1, keepdim=True), c / c.sum(1, keepdim=True))
    problem = OptimalTransport(gamma=3.0).double()
    found = by_name(compare(problem, *inputs, backwards=("hand", "auto"), rounds=1))
    assert found["hand"].error < 1e-9
    assert found["auto"].error < 1e-9


def test_only_what_requires_a_gradient_gets_one():
    M, r, c = (leaf.double() for leaf in OptimalTransport().example())
    options = {"backwards": ("auto",), "rounds": 1}
    problem = OptimalTransport(gamma=3.0).double()
    everything = compare(problem, M, r / r.sum(1, keepdim=True), c / c.sum(1, keepdim=True), **options).rows[
        0
    ]
    r = (r / r.sum(1, keepdim=True)).requires_grad_()
    only_r = compare(problem, M, r, c / c.sum(1, keepdim=True), **options).rows[0]
    assert only_r.error < 1e-9
    assert only_r.bytes < everything.bytes


def test_a_cotangent_of_its_own():
    x = normal(2, 5, 12)
    one = compare(
        RobustPooling(), x, backwards=("auto",), cotangent=torch.ones(2, 5).double(), rounds=1
    ).rows[0]
    none = compare(
        RobustPooling(), x, backwards=("auto",), cotangent=torch.zeros(2, 5).double(), rounds=1
    ).rows[0]
    assert one.error < 1e-9
    assert none.error == 0


def test_one_sample():
    found = by_name(
        compare(RobustPooling(), normal(5, 12), in_dims=None, backwards=("hand", "auto"), rounds=1)
    )
    assert found["hand"].error < 1e-9
    assert found["auto"].error < 1e-9


def test_above_the_dense_limit_a_certified_solve_takes_the_place_of_the_formula(monkeypatch):
    monkeypatch.setattr("implicitdiff.diagnostics.reference.LIMIT", 10)
    M, r, c = (leaf.double() for leaf in OptimalTransport().example())
    inputs = (M, r / r.sum(1, keepdim=True), c / c.sum(1, keepdim=True))
    problem = OptimalTransport(gamma=3.0).double()
    found = compare(problem, *inputs, backwards=("hand", "auto", "approximate"), rounds=1)
    assert "KKT residual" in found.reference
    assert by_name(found)["hand"].error < 1e-9
    assert by_name(found)["auto"].error < 1e-9
    assert by_name(found)["approximate"].error > 1e-3


def test_a_sweep_has_rows_for_each_setting():
    found = compare(
        RobustPooling(),
        lambda n, m: (normal(2, m, n),),
        sweep={"n": [4, 9], "m": [3, 5]},
        backwards=("hand", "auto"),
        rounds=1,
    )
    assert [row.setting for row in found.rows[::2]] == [
        (("n", 4), ("m", 3)),
        (("n", 4), ("m", 5)),
        (("n", 9), ("m", 3)),
        (("n", 9), ("m", 5)),
    ]
    assert found.rows[6].bytes > found.rows[0].bytes
    assert len(found.verdict.splitlines()) == 4
    assert found.verdict.startswith("n = 4, m = 3: ")
    assert found.to_csv().startswith("n,m,backward,")
    assert "n = 9, m = 5" in str(found)
    # One line per backward and value of m.
    assert len(found.plot().axes[0].lines) == 4
    assert complaints(found.plot()) == []


def test_misuse_is_refused():
    with pytest.raises(idf.OptionError, match="backwards='guess'"):
        compare(RobustPooling(), normal(2, 3, 4), backwards=("guess",))
    with pytest.raises(idf.OptionError, match="empty"):
        compare(RobustPooling(), normal(2, 3, 4), backwards=())
    with pytest.raises(idf.OptionError, match="function"):
        compare(RobustPooling(), normal(2, 3, 4), sweep={"n": [1]})
    with pytest.raises(idf.OptionError, match="cotangent"):
        compare(RobustPooling(), lambda n: (normal(2, 3, n),), sweep={"n": [1]}, cotangent=normal(2, 3))


def test_the_problem_and_the_threads_are_left_alone():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    problem = Median()
    try:
        compare(problem, normal(2, 4, 6).float(), backwards=("auto",), rounds=1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert type(problem) is Median
    assert problem.eps.grad is None


def test_a_held_problem_starts_from_the_given_point():
    problem = Median()
    x = normal(2, 4, 6).float()
    solution = DeclarativeLayer(problem).solve(x)
    held = held_at(problem, batch_first(solution, unbatched=False))
    assert torch.equal(DeclarativeLayer(held)(x), solution.u)
    assert held.eps is problem.eps
    assert type(held).__name__ == "Median"
    assert type(held_at(problem, solution)) is type(held)


def test_a_sweep_over_the_example():
    told = []
    found = compare(
        RobustPooling(),
        sweep={"n": [4, 6]},
        backwards=("auto",),
        rounds=1,
        advance=lambda done, total, what: told.append((done, total, what)),
    )
    assert [row.setting for row in found.rows] == [(("n", 4),), (("n", 6),)]
    assert told == [(0, 2, "n = 4"), (1, 2, "n = 6")]
    assert found.rows[1].bytes > found.rows[0].bytes
    with pytest.raises(idf.OptionError, match="it takes batch, m, n"):
        compare(RobustPooling(), sweep={"k": [4]})


def test_without_inputs_the_example_is_taken():
    problem = RobustPooling()
    found = compare(problem, backwards=("auto",), rounds=1)
    assert (
        found.rows[0].bytes
        == compare(problem, *problem.example(), backwards=("auto",), rounds=1).rows[0].bytes
    )
    with pytest.raises(idf.ProblemDefinitionError, match="declares no example"):
        compare(Median(), backwards=("auto",))


def test_the_verdict_is_a_sentence_about_clear_differences():
    base = Row("hand", "", 1e-7, seconds=1.0, ratio=1.0, peak=10, bytes=1, flops=1, rounds=9)
    fast = Row("auto", "lu", 1e-8, 0.5, 0.5, 8, 1, 1, rounds=9, ratio_low=0.4, ratio_high=0.6)
    text = Comparison("P", (base, fast), "x").verdict
    assert text == (
        "auto is the fastest (0.5 of the time of hand, quartiles 0.4 to 0.6), needs the least memory (0.8 of the "
        "peak of hand) and has the smallest error (1e-08)"
    )
    close = dataclasses.replace(fast, ratio=0.98, ratio_low=0.9, ratio_high=1.1, peak=20)
    text = Comparison("P", (base, close), "x").verdict
    assert text.startswith("auto and hand take about the same time; hand needs the least memory; auto has")


def test_tables_fit_into_80_columns(pooling):
    text = pooling.text(80)
    assert max(map(len, text.splitlines())) <= 80
    assert "±" in text
    assert "±" not in pooling.text()
