"""Active sets: ties, signs of multipliers, degenerate and infeasible programs, bounds and structure, values."""

from __future__ import annotations

import pytest
import torch

import implicitdiff as idf
from implicitdiff.autograd import implicit

F64 = torch.float64


class Positive(idf.Problem):
    """The projection to u >= 0."""

    def objective(self, u, q):
        return 0.5 * (u - q).square().sum()

    def bounds(self, q):
        return 0.0, None

    def init(self, q):
        return torch.ones_like(q)


class PositiveRow(Positive):
    """The same by an inequality."""

    bounds = idf.Problem.bounds

    def inequality(self, u, q):
        return -u


@pytest.mark.parametrize("problem", [Positive(), PositiveRow()])
@pytest.mark.parametrize(("tie", "expected"), [("inactive", 1.0), ("active", 0.0), ("average", 0.5)])
def test_a_tie_is_reported_and_resolved_as_asked(problem, tie: str, expected: float) -> None:
    """u = max(q, 0) has the derivatives 0 and 1 at q = 0; cvxpylayers#140 asks which of them a box has there."""
    q = torch.tensor([[0.0, -1.0, 2.0], [1.0, -2.0, 3.0]], dtype=F64, requires_grad=True)
    with idf.record() as log:
        solution = idf.solve(problem, q, tie=tie)
    assert solution.status.tolist() == [idf.Status.WEAKLY_ACTIVE, idf.Status.OK]
    assert [(event.kind, event.samples) for event in log] == [("WEAKLY_ACTIVE", (0,))]
    assert float(solution.margin[0]) < 1e-8
    assert float(solution.margin[1]) > 0.1
    (found,) = torch.autograd.grad(solution.u.sum(), q)
    truth = torch.tensor([[expected, 0.0, 1.0], [1.0, 0.0, 1.0]], dtype=F64)
    assert torch.allclose(found, truth, rtol=0, atol=1e-9)
    with pytest.raises(idf.OptionError, match="choose one of inactive, active, average"):
        idf.DeclarativeLayer(problem, tie="both")


@pytest.mark.parametrize("base", [Positive, PositiveRow])
def test_a_point_whose_multiplier_has_the_wrong_sign_is_refused(base) -> None:
    """ddn takes every constraint with g = 0 for active, whatever its multiplier says."""

    class Stuck(base):
        def solve(self, q):
            return torch.zeros_like(q)

    q = torch.tensor([[-1.0, -2.0], [-1.0, 1.0]], dtype=F64)
    with pytest.raises(idf.errors.NotOptimalError, match=r"sample 1 of 2.*wrong sign"):
        idf.solve(Stuck(), q)
    found = idf.solve(Stuck(), q[:1])
    assert found.status.tolist() == [idf.Status.OK]


def test_multipliers_are_recovered_where_solve_returns_u_alone() -> None:
    class Clamped(PositiveRow):
        def solve(self, q):
            return q.clamp(min=0.0)

    q = torch.tensor([[-1.0, 0.5], [2.0, -0.25]], dtype=F64, requires_grad=True)
    solution = idf.solve(Clamped(), q)
    assert torch.allclose(solution.inequality_multipliers, q.clamp(max=0.0), atol=1e-12)
    (found,) = torch.autograd.grad(solution.inequality_multipliers.sum(), q)
    assert torch.allclose(found, (q < 0).to(F64), atol=1e-12)
    bounds = idf.solve(Positive(), q).bound_multipliers
    assert torch.allclose(bounds[0], q.clamp(max=0.0), atol=1e-9)
    assert not bool(bounds[1].any())
    (found,) = torch.autograd.grad(bounds[0].sum(), q)
    assert torch.allclose(found, (q < 0).to(F64), atol=1e-9)


class Linear(idf.Problem):
    """A linear program over the simplex: its solution is a vertex."""

    def objective(self, u, c):
        return c @ u

    def equality(self, u, c):
        return u.sum() - 1

    def bounds(self, c):
        return 0.0, 1.0

    def init(self, c):
        return torch.full_like(c, 1 / len(c))


def test_the_vertex_of_a_linear_program_does_not_move_and_its_value_does() -> None:
    c = torch.tensor([[0.3, 0.1, 0.7], [2.0, 1.0, -1.0]], dtype=F64, requires_grad=True)
    solution = idf.solve(Linear(), c)
    truth = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=F64)
    assert torch.allclose(solution.u, truth, atol=1e-9)
    (rows,) = torch.autograd.grad(solution.u.square().sum(), c, retain_graph=True)
    assert not bool(rows.any())
    (slope,) = torch.autograd.grad(solution.value.sum(), c)
    assert torch.allclose(slope, truth, atol=1e-9)


def test_contradicting_inequalities_are_named() -> None:
    class Nowhere(Positive):
        def inequality(self, u, q):
            return u.sum() + 1

    with pytest.raises(idf.ImplicitDiffError) as error:
        idf.solve(Nowhere(), torch.zeros(2, 3, dtype=F64))
    assert isinstance(error.value, idf.errors.InfeasibleError | idf.errors.ConvergenceError)
    assert "samples 0, 1 of 2" in str(error.value)


def test_one_bad_sample_leaves_the_others() -> None:
    class Between(Positive):
        def inequality(self, u, q):
            return u.sum() - q.sum()

    q = torch.tensor([[1.0, -0.5], [-1.0, -1.0], [0.5, 0.2]], dtype=F64, requires_grad=True)
    with pytest.warns(idf.errors.OptimalityWarning):
        solution = idf.solve(Between(), q, on_failure="warn")
    assert solution.status[1] != idf.Status.OK
    alone = idf.solve(Between(), q[[0, 2]])
    assert torch.allclose(solution.u[[0, 2]], alone.u, atol=1e-10)
    masked = idf.solve(Between(), q, on_failure="nan")
    (found,) = torch.autograd.grad(masked.u[[0, 2]].sum(), q)
    (expected,) = torch.autograd.grad(alone.u.sum(), q)
    assert torch.allclose(found, expected, atol=1e-10)


class Ball(idf.Problem):
    """The projection to a ball whose radius is a Parameter: a nonlinear inequality."""

    def __init__(self) -> None:
        super().__init__()
        self.radius = torch.nn.Parameter(torch.tensor(1.0, dtype=F64))

    def objective(self, u, q):
        return (u - q).square().sum()

    def inequality(self, u, q):
        return u @ u - self.radius**2

    def init(self, q):
        return torch.zeros_like(q)


def test_the_projection_to_a_ball_with_a_trained_radius() -> None:
    q = torch.tensor([[0.3, 0.2, 0.1], [2.0, -1.0, 0.5]], dtype=F64, requires_grad=True)
    problem = Ball()
    solution = idf.solve(problem, q)
    norm = q.norm(dim=1, keepdim=True)
    truth = torch.where(norm > problem.radius, q * problem.radius / norm, q)
    assert torch.allclose(solution.u, truth, atol=1e-9)
    weights = torch.tensor([[1.0, 2.0, 3.0], [-1.0, 0.5, 2.0]], dtype=F64)
    found = torch.autograd.grad((solution.u * weights).sum(), (q, problem.radius))
    expected = torch.autograd.grad((truth * weights).sum(), (q, problem.radius))
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-8)


class Smooth(idf.Problem):
    """Differences of neighbours under bounds: a band."""

    def objective(self, u, x, high):
        return 0.5 * (u - x).square().sum() + 2.0 * (u[1:] - u[:-1]).square().sum()

    def bounds(self, x, high):
        return None, high

    def init(self, x, high):
        return x


class Squeezed(idf.Problem):
    """Robust pooling by the pseudo-Huber penalty, under bounds."""

    def objective(self, u, x, high):
        return torch.sqrt((u[:, None] - x).square().sum(0) + 1.0).sum()

    def bounds(self, x, high):
        return None, high

    def init(self, x, high):
        return x.mean(1)


@pytest.mark.parametrize(
    ("problem", "shape", "kind", "solver"),
    [
        (Smooth(), (3, 30), "banded", "tridiagonal"),
        (Squeezed(), (3, 6, 40), "low-rank-plus-diagonal", "cholesky"),
    ],
)
def test_bounds_keep_the_kind_of_a_hessian(problem, shape, kind: str, solver: str) -> None:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(*shape, generator=generator, dtype=F64, requires_grad=True)
    high = (0.1 * torch.rand(shape[:2], generator=generator, dtype=F64)).requires_grad_()
    report = idf.explain(problem, x, high)
    assert report.hessian.kind == kind
    assert report.solver in (solver, "woodbury", "cg", "cholesky")
    assert not report.fallbacks
    solution = idf.solve(problem, x, high)
    fixed = solution.u >= high - 1e-12
    assert fixed.any()
    assert not fixed.all()
    found = torch.autograd.grad(solution.u.pow(2).sum(), (x, high))
    dense = torch.autograd.grad(idf.solve(problem, x, high, backward="dense").u.pow(2).sum(), (x, high))
    for a, b in zip(found, dense, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-11)
    # a fixed entry follows its own bound, and pulls at the free ones
    step = 1e-6
    with torch.no_grad():
        ahead, behind = (idf.solve(problem, x, high + s * step).u.pow(2).sum() for s in (1, -1))
    assert abs(float((ahead - behind) / (2 * step)) - float(found[1].sum())) < 1e-6


def test_the_value_is_differentiated_without_a_solve(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.tensor([[0.4, -0.7, 1.2]], dtype=F64, requires_grad=True)
    solution = idf.solve(Positive(), q)

    def refused(*_: object) -> None:
        raise AssertionError("a solve")

    monkeypatch.setattr(implicit, "pull_back", refused)
    (found,) = torch.autograd.grad(solution.value.sum(), q)
    assert torch.allclose(found, q.clamp(max=0.0), atol=1e-9)


def test_values_have_second_derivatives() -> None:
    q = torch.tensor([[0.4, -0.7, 1.2]], dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: idf.solve(Positive(), x).value, q, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda x: idf.solve(Positive(), x).value, q)
