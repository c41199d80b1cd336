"""What one call does beside the algebra, counted exactly: operations, bytes and factorisations, never seconds.

A quadratic problem is factored once for its solution and all its derivatives; an ordinary backward pass is the emitted
code and a look at each verdict. What must not be taken for ordinary is here too.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import implicitdiff as idf
from implicitdiff.diagnostics.meter import measure
from implicitdiff.kkt.saddle import divided
from implicitdiff.layer.prepare import Options, prepare
from implicitdiff.problems import OptimalTransport, RobustPooling
from implicitdiff.status import Status, all_ok, is_all_ok
from implicitdiff.structured.plan import StructuredPlan
from implicitdiff.structured.quadratic import minimum
from tests.factor_count import count_factorisations
from tests.small_problems import draw


def numbers(*shape: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    return draw(*shape, seed=seed, scale=scale, shift=shift).detach()


class Program(idf.Problem):
    """minimise over u  u'Q u / 2 + q'u  s.t.  A u = b, with Q as it comes, symmetric or not"""

    def objective(self, u, Q, q, A, b):
        return 0.5 * u @ Q @ u + q @ u

    def equality(self, u, Q, q, A, b):
        return A @ u - b

    def init(self, Q, q, A, b):
        return torch.zeros_like(q)


class Concave(Program):
    """The same with -Q: where Q > 0, a minimum exists only on what the constraints leave."""

    def objective(self, u, Q, q, A, b):
        return q @ u - 0.5 * u @ Q @ u


class Kinked(idf.Problem):
    """minimise over u  |u - x|^2 / 2 + sum |u|: H = I almost everywhere, and D_u f is not affine."""

    def objective(self, u, x):
        return ((u - x) ** 2).sum() / 2 + u.abs().sum()

    def init(self, x):
        return x


class Projection(idf.Problem):
    """minimise over u  |u - x|^2 / 2  s.t.  a'u = 1, two blocks of constraints of slices"""

    def objective(self, u, x, a):
        return ((u - x) ** 2).sum() / 2

    def equality(self, u, x, a):
        return {"plane": a @ u - 1, "ends": u[1:] - u[:-1].sum()}

    def init(self, x, a):
        return x


class Softmax(idf.Problem):
    """minimise over u  sum_i u_i log u_i - x'u  s.t.  sum(u) = 1"""

    def objective(self, u, x):
        return (u * u.log()).sum() - x @ u

    def equality(self, u, x):
        return u.sum() - 1

    def init(self, x):
        return torch.full_like(x, 1 / x.shape[0])

    def solve(self, x):
        return torch.softmax(x, -1)


class Median(idf.Problem):
    """minimise over u  sum_j sqrt(|u - x_j|^2 + 1e-3)"""

    def objective(self, u, x):
        return torch.sqrt(((u[:, None] - x) ** 2).sum(0) + 1e-3).sum()

    def init(self, x):
        return x.mean(1)


def program(
    batch: int = 3, m: int = 7, p: int = 2, *, skew: float = 0.0, seed: int = 1
) -> tuple[Tensor, ...]:
    factor, skewed = numbers(batch, m, m, seed=seed), numbers(batch, m, m, seed=seed + 1)
    Q = factor @ factor.mT / m + torch.eye(m, dtype=torch.float64)
    Q = (Q + Q.mT) / 2 + skew * (skewed - skewed.mT)
    return (
        Q,
        numbers(batch, m, seed=seed + 2),
        numbers(batch, p, m, seed=seed + 3),
        numbers(batch, p, seed=seed + 4),
    )


def reference(Q: Tensor, q: Tensor, A: Tensor, b: Tensor) -> Tensor:
    """The solution by the dense KKT matrix."""
    H, p = (Q + Q.mT) / 2, A.shape[1]
    K = torch.cat([torch.cat([H, A.mT], 2), torch.cat([A, A.new_zeros(len(A), p, p)], 2)], 1)
    factor, pivots, _ = torch.linalg.lu_factor_ex(K)
    return torch.linalg.lu_solve(factor, pivots, torch.cat([-q, b], 1)[..., None])[:, : q.shape[1], 0]


def run(layer: idf.DeclarativeLayer, inputs: tuple[Tensor, ...]) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward pass, gradients for q and b."""
    leaves = tuple(x.clone().requires_grad_(x.dim() == 2) for x in inputs)
    asked = [x for x in leaves if x.requires_grad]

    def once() -> tuple[Tensor, ...]:
        u = layer(*leaves)
        return torch.autograd.grad(u, asked, torch.cos(torch.arange(u.numel()).reshape(u.shape)).to(u))

    return once


# ---------------------------------------------------------------- quadratic problems


@pytest.mark.parametrize("skew", [0.0, 0.3])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_quadratic_program_is_the_solution_of_one_linear_system(skew: float, batch: int) -> None:
    inputs = program(batch, skew=skew)
    kept = tuple(x.clone() for x in inputs)
    layer = idf.DeclarativeLayer(Program())
    found = layer.solve(*inputs)
    torch.testing.assert_close(found.u, reference(*inputs), rtol=1e-12, atol=1e-12)
    assert found.iterations.tolist() == [1] * batch
    leaves = tuple(x.clone().requires_grad_() for x in inputs)
    v = numbers(*found.u.shape, seed=9)
    ours = torch.autograd.grad(layer(*leaves), leaves, v)
    theirs = torch.autograd.grad(reference(*leaves), leaves, v)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    assert all(torch.equal(x, before) for x, before in zip(inputs, kept, strict=True)), (
        "an input was written to"
    )


def test_it_is_factored_once_for_the_solution_and_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    made = count_factorisations(monkeypatch)
    once = run(idf.DeclarativeLayer(Program()), program())
    once()
    made.clear()
    once()
    assert made == ["factor", "factor"]  # H and S


def test_forward_and_backward_of_a_quadratic_program_move_little() -> None:
    """A lean layer by hand has 17 operations; the bytes are those of 18 matrices like Q."""
    once = run(idf.DeclarativeLayer(Program()), program(8, 40, 15))
    once()
    _, found = measure(once)
    assert found.operations <= 73
    assert found.bytes <= 18 * 8 * 40 * 40 * 8


def test_what_is_not_proved_quadratic_is_not_solved_as_if_it_were() -> None:
    def plan_of(problem: idf.Problem, *inputs: Tensor) -> tuple[StructuredPlan, tuple[Tensor, ...]]:
        prepared = prepare(problem, inputs, Options())
        assert isinstance(prepared.plan, StructuredPlan)
        return prepared.plan, tuple(t.detach() for t in prepared.theta)

    x = numbers(2, 5, seed=3)
    with torch.no_grad():
        assert minimum(*plan_of(Program(), *program()), 3) is not None
        assert minimum(*plan_of(Kinked(), x), 2) is None, "a kink"
        assert minimum(*plan_of(Median(), x[..., None] * torch.ones(4)), 2) is None, "H depends on u"
        assert minimum(*plan_of(Concave(), *program()), 3) is None, "H is not positive definite"
    away = x + 4.0
    torch.testing.assert_close(idf.solve(Kinked(), away).u, away - 1.0, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("last", [0.0, -1.0])
def test_a_sample_without_a_definite_hessian_is_left_to_the_optimizer(last: float) -> None:
    """H of the second sample is singular or indefinite, K is not; the other samples keep their bits."""
    inputs = program(3, 4, 2)
    Q, A = inputs[0], inputs[2]
    layer = idf.DeclarativeLayer(Program())
    before = layer.solve(*inputs)
    Q[1] = torch.diag(torch.tensor([1.0, 2.0, 3.0, last], dtype=torch.float64))
    A[1] = torch.tensor([[0.0, 0.0, 0.0, 2.0], [1.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    found = layer.solve(*inputs)
    torch.testing.assert_close(found.u, reference(*inputs), rtol=1e-8, atol=1e-8)
    assert torch.equal(found.u[[0, 2]], before.u[[0, 2]])
    assert found.iterations[[0, 2]].tolist() == [1, 1]
    leaves = tuple(x.clone().requires_grad_() for x in inputs)
    v = numbers(*found.u.shape, seed=9)
    ours = torch.autograd.grad(layer(*leaves), leaves, v)
    theirs = torch.autograd.grad(reference(*leaves), leaves, v)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def test_digits_that_the_factorisation_loses_are_won_back() -> None:
    """One sample of three is badly conditioned: it alone is solved twice."""
    inputs = program(3, 6, 2)
    Q, q, A, _ = inputs
    scale = torch.logspace(0, -5, 6, dtype=torch.float64)
    Q[1] = scale[:, None] * Q[1] * scale
    found = idf.solve(Program(), *inputs)
    assert found.residual is not None
    assert float(found.residual.max()) < 1e-12
    u, H = found.u[1], Q[1]
    gradient = H @ u + q[1] - A[1].mT @ found.equality_multipliers[1]
    assert float(gradient.abs().max()) < 1e-10 * float(q[1].abs().max())


def test_slices_in_several_constraints() -> None:
    x, a = numbers(2, 3, seed=5), numbers(2, 3, seed=6)
    layer = idf.DeclarativeLayer(Projection())
    found = layer.solve(x, a)
    h = Projection().equality(found.u[1], x[1], a[1])
    assert all(float(value.abs().max()) < 1e-12 for value in h.values())
    assert torch.autograd.gradcheck(layer, (x.requires_grad_(), a.requires_grad_()))


# ---------------------------------------------------------------- ordinary backward passes

BACKWARDS = (
    (Median(), (numbers(4, 3, 5, seed=1),), 26),
    (Softmax(), (numbers(2, 9, seed=2),), 11),
    (RobustPooling("pseudo-huber", 16.0), (numbers(2, 40, 6, seed=3),), 32),
    (OptimalTransport(1.0), (numbers(1, 6, 7, seed=4).abs(),), 41),
)


@pytest.mark.parametrize(("problem", "inputs", "limit"), BACKWARDS, ids=lambda v: type(v).__name__)
def test_operations_of_a_backward_pass(problem: idf.Problem, inputs: tuple[Tensor, ...], limit: int) -> None:
    leaves = tuple(x.float().requires_grad_() for x in inputs)
    layer = idf.DeclarativeLayer(problem.float())
    u = layer(*leaves)
    v = numbers(*u.shape, seed=5).float()

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(u, leaves, v, retain_graph=True)

    backward()  # the first one probes
    _, found = measure(backward)
    assert found.operations <= limit


def test_the_verdict_that_all_is_well_is_one_tensor_and_stays_zero() -> None:
    status = all_ok(3, torch.device("cpu"))
    assert status is all_ok(3, torch.device("cpu"))
    assert is_all_ok(status)
    assert not is_all_ok(status.clone()), "another tensor has to be read"
    found = idf.solve(Softmax(), numbers(3, 5, seed=7))
    assert found.status is not None
    found.status.fill_(1)  # what a user is given is the user's own
    assert status.tolist() == [0, 0, 0]
    assert idf.solve(Softmax(), numbers(3, 5, seed=7)).status.tolist() == [0, 0, 0]


def test_an_answer_by_division_alone_is_judged_by_its_sum() -> None:
    assert is_all_ok(divided(0, torch.ones(3), torch.zeros(3, 2)))
    lost = divided(0, torch.tensor([1.0, torch.inf, 2.0]), torch.zeros(3, 2))
    assert lost.tolist() == [Status.OK, Status.SINGULAR, Status.OK]
    large = torch.full((2, 2), torch.finfo(torch.float32).max)
    assert divided(0, large).tolist() == [Status.OK, Status.OK], "the sum overflows, no term does"
