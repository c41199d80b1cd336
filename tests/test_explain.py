"""`explain`: the fields of the contract, the report, and the cost it claims for one backward pass."""

import dataclasses
import sys

import pytest
import torch
from torch import Tensor

import implicitdiff as idf
from implicitdiff.diagnostics import Explanation, explain, measure
from implicitdiff.diagnostics.held import plan_of
from implicitdiff.diagnostics.plots import pattern
from implicitdiff.layer import DeclarativeLayer
from implicitdiff.problems import OptimalTransport, RobustPooling
from implicitdiff.structure.report import MatrixReport

SOLVERS = (
    "divide block-cholesky woodbury cholesky lu ldl banded-cholesky tridiagonal kronecker schur cg schur-cg "
    "minres gmres sparse-lu"
).split()


class Median(idf.Problem):
    """minimise over u  sum_j sqrt(|u - x_j|^2 + eps)

    More lines follow.
    """

    def __init__(self, eps: float = 1e-3) -> None:
        super().__init__()
        self.eps = torch.nn.Parameter(torch.tensor(eps))

    def objective(self, u: Tensor, x: Tensor) -> Tensor:
        return torch.sqrt(((u[:, None] - x) ** 2).sum(0) + self.eps).sum()

    def init(self, x: Tensor) -> Tensor:
        return x.mean(1)


class Portfolio(idf.Problem):
    """minimise over u  u'Q u / 2 - mu'u   s.t.  sum(u) = 1 & more < than_that"""

    def objective(self, u: Tensor, Q: Tensor, mu: Tensor) -> Tensor:
        return 0.5 * u @ Q @ u - mu @ u

    def equality(self, u: Tensor, Q: Tensor, mu: Tensor) -> Tensor:
        return u.sum() - 1

    def init(self, Q: Tensor, mu: Tensor) -> Tensor:
        return torch.full_like(mu, 1 / len(mu))


def portfolio() -> Explanation:
    return explain(Portfolio(), torch.eye(5), torch.ones(3, 5), in_dims=(None, 0))


def transport() -> Explanation:
    return explain(OptimalTransport(gamma=5.0), *OptimalTransport().example())


def test_the_fields_of_the_contract():
    found = explain(Median(), torch.randn(4, 6, 3))
    assert found.hessian.kind == "low-rank-plus-diagonal"
    assert found.hessian.shape == (6, 6)
    assert found.hessian.reason
    assert found.constraint_jacobian.kind == "zero"
    assert found.schur is None
    assert found.solver in SOLVERS
    assert all(solver in SOLVERS and reason for solver, reason in found.rejected)
    assert found.fallbacks == ()
    assert min(found.flops, found.bytes, found.peak) > 0
    compile(found.code, "emitted", "exec")
    assert "def " in found.code
    assert (found.problem, found.batch, found.dtype) == ("Median", 4, "float32")
    assert found.summary == "minimise over u sum_j sqrt(|u - x_j|^2 + eps)"
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.solver = "lu"


def test_constraints_are_explained():
    found = transport()
    assert (found.hessian.kind, found.schur.kind, found.solver) == ("diagonal", "block", "schur")
    assert (found.constraint_jacobian.shape, found.schur.shape) == ((10, 24), (10, 10))
    assert len(found.dependent) == 1
    assert found.dependent[0] in " ".join(str(found).split()) or "dependence" in str(found)
    flags = [item.batched for item in portfolio().inputs]
    assert flags == [False, True]
    assert "shared" in str(portfolio())


@pytest.mark.parametrize(
    ("problem", "inputs", "in_dims"),
    [
        (Median(), (torch.randn(4, 6, 3),), 0),
        (Median(), (torch.randn(6, 3),), None),
        (Portfolio(), (torch.eye(5), torch.ones(3, 5)), (None, 0)),
        (RobustPooling("welsch"), (torch.randn(2, 8, 20),), 0),
        (OptimalTransport(gamma=5.0), OptimalTransport().example(), 0),
    ],
)
def test_shapes_without_data_give_the_same_explanation(problem, inputs, in_dims):
    without = tuple(leaf.to("meta") for leaf in inputs)
    assert explain(problem, *without, in_dims=in_dims) == explain(problem, *inputs, in_dims=in_dims)


@pytest.mark.parametrize(
    ("problem", "inputs"),
    [
        (Median(), (torch.randn(4, 6, 3),)),
        (Median(), (torch.randn(2, 3, 9),)),
        (RobustPooling("quadratic"), (torch.randn(2, 3, 9),)),
        (OptimalTransport(gamma=5.0), OptimalTransport().example()),
    ],
)
def test_the_cost_from_shapes_is_that_of_a_real_backward(problem, inputs):
    found = explain(problem, *inputs)
    planned = plan_of(problem, inputs, 0)
    with torch.no_grad():
        solved = DeclarativeLayer(problem).solve(*inputs)
        lam = () if solved.equality_multipliers is None else tuple(solved.equality_multipliers)
        arguments = ((solved.u,), lam, planned.theta, (torch.ones_like(solved.u),), None, planned.needs)
        planned.plan.vjp(*arguments)  # the first call with data tests the structure once
        _, real = measure(planned.plan.vjp, *arguments)
    # Constants that live on the CPU are moved to the meta device, which is a copy of a few bytes more.
    # A second look at pivots depends on the data: a few operations on as many numbers as there are constraints.
    assert found.flops == pytest.approx(real.flops, abs=20 * found.constraint_jacobian.shape[0])
    assert found.bytes == pytest.approx(real.bytes, abs=100 + 200 * found.constraint_jacobian.shape[0])
    assert found.peak == pytest.approx(real.peak, abs=100)
    assert found.measured == "counted from the shapes"


def test_cost_grows_with_the_batch_and_an_empty_one_costs_nothing():
    one, eight = (explain(Median(), torch.randn(batch, 6, 3)) for batch in (1, 8))
    assert one.flops * 8 == pytest.approx(eight.flops, rel=0.2)
    assert explain(Median(), torch.randn(0, 6, 3)).peak == 0


def test_an_iterative_solver_is_counted_on_numbers(monkeypatch):
    x = torch.randn(4, 6, 3)
    direct = explain(Median(), x)
    monkeypatch.setattr("implicitdiff.diagnostics.backward_cost.ITERATIVE", {direct.solver})
    on_data, without = explain(Median(), x), explain(Median(), x.to("meta"))
    assert "the given data, at the start point" in on_data.measured
    assert "random data" in without.measured
    assert direct.flops == on_data.flops == without.flops


class Sorted(idf.Problem):
    """minimise over u  sum (sort(u) - x)^2"""

    def objective(self, u: Tensor, x: Tensor) -> Tensor:
        return ((torch.sort(u).values - x) ** 2).sum()

    def init(self, x: Tensor) -> Tensor:
        return x + 0.1 * x.sum()


def test_a_fallback_names_the_operation_the_line_and_the_reason():
    found = explain(Sorted(), torch.randn(2, 4))
    assert len(found.fallbacks) >= 1
    operation, line, reason = found.fallbacks[0]
    assert "sort" in operation
    assert "test_explain.py" in line
    assert "torch.sort(u)" in line
    assert reason
    assert found.hessian.kind == "dense"
    assert operation in str(found)


def test_the_report_is_plain_narrow_and_the_same_every_time():
    text = str(portfolio())
    assert text == str(portfolio())
    assert (
        text.splitlines()[0]
        == "Portfolio: minimise over u u'Q u / 2 - mu'u s.t. sum(u) = 1 & more < than_that"
    )
    assert max(map(len, text.splitlines())) <= 110
    assert "\x1b" not in text
    assert all(line == line.rstrip() for line in text.splitlines())
    for part in (
        "H = D_uu L",
        "A = D_u h",
        "S = A H^-1 A'",
        "solver",
        "one backward",
        "FLOPs",
        "m = 5 variables",
    ):
        assert part in text
    assert "S = A" not in str(explain(Median(), torch.randn(4, 6, 3)))


def test_the_report_does_not_depend_on_the_terminal(monkeypatch):
    text = str(portfolio())
    for name, value in (("COLUMNS", "20"), ("FORCE_COLOR", "1"), ("TERM", "dumb"), ("NO_COLOR", "1")):
        monkeypatch.setenv(name, value)
        assert str(portfolio()) == text


def test_latex_is_balanced_and_escaped():
    text = portfolio().to_latex()
    assert text.startswith("\\begin{align*}")
    assert text.endswith("\\end{align*}")
    assert text.count("{") == text.count("}")
    assert text.count(r"\begin{") == text.count(r"\end{")
    assert r"A^\top" in text
    assert text.count(r"\parbox") >= 3, "reasons stand below their equations, in lines that fit the page"
    alone = explain(Median(), torch.randn(4, 6, 3)).to_latex()
    assert r"D + U C U^\top" in alone
    assert r"A^\top" not in alone


def test_plot_has_one_panel_per_matrix():
    assert [panel.get_title().split(":")[0] for panel in transport().plot().axes] == ["H", "A", "S"]
    assert len(explain(Median(), torch.randn(4, 6, 3)).plot().axes) == 1


def test_plot_without_matplotlib_says_what_to_install(monkeypatch):
    found = portfolio()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(idf.ImplicitDiffError, match="pip install matplotlib"):
        found.plot()


@pytest.mark.parametrize(
    ("kind", "full", "partial"),
    [
        ("zero", 0, 0),
        ("diagonal", 6, 0),
        ("low-rank-plus-diagonal", 6, 30),
        ("dense", 36, 0),
        ("banded", 16, 0),
    ],
)
def test_pattern_of_a_kind(kind, full, partial):
    cells = [cell for row in pattern(MatrixReport(kind, (6, 6), "")) for cell in row]
    assert (cells.count(2), cells.count(1)) == (full, partial)


def test_what_is_no_problem_is_refused():
    with pytest.raises(idf.ProblemDefinitionError):
        explain(torch.nn.Linear(2, 2), torch.ones(2, 2))
    with pytest.raises(idf.InputError):
        explain(Median())
