"""Samples without a solution or without a derivative: what each policy makes of them."""

import warnings

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.func import grad, jacfwd, jacrev, jvp, vmap

import implicitdiff as idf
from implicitdiff.layer import DeclarativeLayer
from tests.small_problems import draw

backwards = pytest.mark.parametrize("backward", ["auto", "dense"])


class Flat(idf.Problem):
    """minimise (x_0 (u_0 - x_1))^2 + (u_1 - x_1)^2: where x_0 = 0, u_0 may be anything."""

    def objective(self, u, x):
        return (x[0] * (u[0] - x[1])) ** 2 + (u[1] - x[1]) ** 2

    def init(self, x):
        return torch.zeros_like(x)

    def solve(self, x):
        return x[:, 1:].detach().expand(-1, 2).clone()


@backwards
def test_a_solution_that_is_not_unique_has_no_derivative(backward: str) -> None:
    x = torch.tensor([[1.0, 2.0], [0.0, 3.0]], dtype=torch.float64, requires_grad=True)
    layer = DeclarativeLayer(Flat(), backward=backward)
    with pytest.raises(idf.SingularError, match="sample 1 of 2"):
        layer(x).sum().backward()
    # A sample that nobody asks about is no failure.
    found = torch.autograd.grad(layer(x)[0].sum(), x)[0]
    torch.testing.assert_close(found, torch.tensor([[0.0, 2.0], [0.0, 0.0]], dtype=torch.float64))


def test_an_iteration_that_does_not_converge_has_its_own_name() -> None:
    """u_0 may be anything, but is asked for: no w has K w = -v."""
    x = torch.tensor([[1.0, 2.0], [0.0, 3.0]], dtype=torch.float64, requires_grad=True)
    with pytest.raises(idf.ConvergenceError, match="sample 1 of 2"):
        DeclarativeLayer(Flat(), backward="matrix-free")(x).sum().backward()


@backwards
@pytest.mark.parametrize(("policy", "value"), [("nan", torch.nan), ("zero", 0.0)])
def test_a_singular_sample_under_the_policies_leaves_the_others_alone(
    backward: str, policy: str, value: float
) -> None:
    x = torch.tensor([[1.0, 2.0], [0.0, 3.0]], dtype=torch.float64, requires_grad=True)
    layer = DeclarativeLayer(Flat(), backward=backward, on_failure=policy)
    for create_graph in (False, True):
        found = torch.autograd.grad(layer(x).sum(), x, create_graph=create_graph)[0].detach()
        torch.testing.assert_close(found[0], torch.tensor([0.0, 2.0], dtype=torch.float64))
        torch.testing.assert_close(found[1], torch.full((2,), value, dtype=torch.float64), equal_nan=True)


@backwards
def test_damping_is_announced_and_recorded(backward: str) -> None:
    x = torch.tensor([[1.0, 2.0], [0.0, 3.0]], dtype=torch.float64, requires_grad=True)
    layer = DeclarativeLayer(Flat(), backward=backward, on_failure="damp")
    with idf.records.record() as log:
        u = layer(x)
        with pytest.warns(idf.OptimalityWarning, match="sample 1 of 2"):
            found = torch.autograd.grad(u.sum(), x)[0]
    torch.testing.assert_close(found[0], torch.tensor([0.0, 2.0], dtype=torch.float64))
    torch.testing.assert_close(found[1], torch.tensor([0.0, 1.0], dtype=torch.float64), rtol=1e-6, atol=1e-6)
    assert [(event.kind, event.where, event.samples) for event in log] == [("DAMPED", "backward", (1,))]


class Wrong(idf.Problem):
    """A solve that is right but for samples with a negative first input, where it returns NaN or something
    else.
    """

    def __init__(self, bad: float) -> None:
        super().__init__()
        self.bad = bad
        self.weight = torch.nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def objective(self, u, x):
        return self.weight * (u**2).sum() / 2 + (u**4).sum() / 4 - x @ u

    def init(self, x):
        return torch.zeros_like(x)

    def solve(self, x):
        u = torch.zeros_like(x)
        for _ in range(60):
            u = u - (self.weight * u + u**3 - x) / (self.weight + 3 * u**2)
        return torch.where(x[:, :1] < 0, self.bad, u)


@backwards
@pytest.mark.parametrize("bad", [torch.nan, 5.0])
@pytest.mark.parametrize(("policy", "value"), [("nan", torch.nan), ("zero", 0.0)])
def test_failed_samples_under_the_policies(backward: str, bad: float, policy: str, value: float) -> None:
    data = torch.tensor([[1.0, 0.5], [-1.0, 0.3], [0.4, 0.9]], dtype=torch.float64)
    layer = DeclarativeLayer(Wrong(bad), backward=backward, on_failure=policy)
    sound = DeclarativeLayer(Wrong(bad), backward=backward)
    x, good = data.clone().requires_grad_(), data[[0, 2]].clone().requires_grad_()
    expected = torch.autograd.grad((sound(good) ** 2).sum(), (good, sound.problem.weight))
    u = layer(x)
    assert (u[1].isnan() if policy == "nan" else u[1] == 0).all()
    for create_graph in (False, True):
        # All samples are asked for: the failed one is marked, the others are as if it were not there.
        found = torch.autograd.grad((u**2).sum() + u.sum() * 0, (x, layer.problem.weight), retain_graph=True,
                                    create_graph=create_graph)  # fmt: skip
        torch.testing.assert_close(found[0][[0, 2]], expected[0])
        if policy == "nan":
            assert found[0][1].isnan().all()
            assert found[1].isnan()
        else:
            assert (found[0][1] == 0).all()
            torch.testing.assert_close(found[1], expected[1])
        # The failed one is masked away by the caller: nothing of it is left.
        masked = torch.autograd.grad((u[[0, 2]] ** 2).sum(), (x, layer.problem.weight), retain_graph=True,
                                     create_graph=create_graph)  # fmt: skip
        torch.testing.assert_close(masked[0][[0, 2]], expected[0])
        assert (masked[0][1] == 0).all()
        torch.testing.assert_close(masked[1], expected[1])
    tangent = jvp(lambda x: layer(x), (data,), (torch.ones_like(data),))[1]
    assert (tangent[1].isnan() if policy == "nan" else tangent[1] == 0).all()
    torch.testing.assert_close(
        tangent[[0, 2]], jvp(lambda x: sound(x), (data[[0, 2]],), (torch.ones(2, 2).double(),))[1]
    )


def test_all_samples_failed() -> None:
    x = torch.tensor([[-1.0, 0.3]], dtype=torch.float64, requires_grad=True)
    layer = DeclarativeLayer(Wrong(torch.nan), on_failure="zero")
    found = torch.autograd.grad(layer(x).sum(), (x, layer.problem.weight))
    assert (found[0] == 0).all()
    assert found[1] == 0


def test_failure_under_vmap_of_grad_has_a_name() -> None:
    data = torch.tensor([[1.0, 0.5], [-1.0, 0.3]], dtype=torch.float64)
    layer = DeclarativeLayer(Wrong(5.0), in_dims=None)
    with pytest.raises(idf.NotOptimalError, match="sample 1 of 2"):
        vmap(grad(lambda x: layer(x).sum()))(data)


class Entropic(idf.Problem):
    """minimise x'u + sum u (log u - 1) / g  s.t.  sum(u) = 1: the softmax of -g x, where entries underflow."""

    def objective(self, u, x, g):
        return x @ u + (u * (u.log() - 1)).sum() / g

    def equality(self, u, x, g):
        return u.sum() - 1

    def init(self, x, g):
        return torch.full_like(x, 1 / len(x))

    def solve(self, x, g):
        scaled = -g[:, None] * x
        return idf.Solution(torch.softmax(scaled, 1), equality_multipliers=-torch.logsumexp(scaled, 1) / g)


@backwards
def test_entries_that_underflow_have_no_derivative_and_spoil_none(backward: str) -> None:
    x = torch.tensor(
        [[0.0, 1e-4, 0.5, 0.9], [0.3, 0.3, 0.30002, 0.9]], dtype=torch.float64, requires_grad=True
    )
    g = torch.tensor([1e4, 2e4], dtype=torch.float64, requires_grad=True)
    layer = DeclarativeLayer(Entropic(), backward=backward)
    weight = draw(2, 4, seed=1).detach()

    def plain(x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        return torch.softmax(-g[:, None] * x, 1)

    zero = layer(x, g) == 0
    assert (zero.sum(1) == torch.tensor([2, 1])).all()
    expected = torch.autograd.grad((plain(x, g) * weight).sum(), (x, g))
    for create_graph in (False, True):
        found = torch.autograd.grad((layer(x, g) * weight).sum(), (x, g), create_graph=create_graph)
        torch.testing.assert_close(found[0].detach(), expected[0], rtol=1e-9, atol=1e-7)
        torch.testing.assert_close(found[1].detach(), expected[1], rtol=1e-9, atol=1e-12)
        assert (found[0].detach()[zero].abs() < 1e-290).all()
    point, direction = (x.detach(), g.detach()), (weight, torch.tensor([3.0, -2.0], dtype=torch.float64))
    torch.testing.assert_close(jvp(layer, point, direction)[1], jvp(plain, point, direction)[1])

    def curvature(function, outer):
        return outer(grad(lambda x, g: (function(x, g) * weight).sum()))(*point)

    for outer in (jacrev, jacfwd):
        torch.testing.assert_close(curvature(layer, outer), curvature(plain, outer), rtol=1e-8, atol=1e-3)


def test_gradients_of_dependent_constraints_are_of_minimum_norm() -> None:
    """r of a transport-like table with both marginals: (1, -1) is a null vector, the gradient is orthogonal
    to it.
    """

    class Table(idf.Problem):
        def objective(self, u, x, r, c):
            return ((u - x) ** 2 / 2 + (u - x) ** 4).sum()

        def equality(self, u, x, r, c):
            return u.sum(1) - r, u.sum(0) - c

        def init(self, x, r, c):
            return r[:, None] * c

    x = draw(2, 2, 3, seed=3, scale=0.1)
    r = torch.tensor([[0.4, 0.6], [0.5, 0.5]], dtype=torch.float64, requires_grad=True)
    c = torch.tensor([[0.2, 0.3, 0.5], [0.1, 0.6, 0.3]], dtype=torch.float64, requires_grad=True)
    layer = DeclarativeLayer(Table(), backward="dense")
    weight = draw(2, 2, 3, seed=5).detach()
    for create_graph in (False, True):
        found = torch.autograd.grad((layer(x, r, c) * weight).sum(), (r, c), create_graph=create_graph)
        torch.testing.assert_close(found[0].sum(1), found[1].sum(1), rtol=1e-10, atol=1e-12)
    assert gradcheck(
        lambda x, r, c: layer(x, r / r.sum(1, True), c / c.sum(1, True)),
        (x, r, c),
        check_forward_ad=True,
        fast_mode=True,
    )


class QuarticOrSquare(idf.Problem):
    """minimise over u  sum_i scale (u_i - x_i)^4 + (1 - scale) (u_i - x_i)^2: no curvature at u = x if scale is 1."""

    def objective(self, u: Tensor, x: Tensor, scale: Tensor) -> Tensor:
        return scale * ((u - x) ** 4).sum() + (1 - scale) * ((u - x) ** 2).sum()

    def init(self, x: Tensor, scale: Tensor) -> Tensor:
        return x.clone()


def test_a_diagonal_hessian_with_a_zero_is_singular() -> None:
    """Nothing is factored there, so that only the answer can tell."""
    x = torch.tensor([[0.3, -1.2], [0.7, 0.1], [2.0, -0.4]], dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    assert idf.explain(QuarticOrSquare(), x, scale).solver == "divide"
    found = {}
    for policy in ("nan", "zero", "damp"):
        layer = idf.DeclarativeLayer(QuarticOrSquare(), on_failure=policy)
        with warnings.catch_warnings(), idf.record() as log:
            warnings.simplefilter("ignore", idf.OptimalityWarning)
            (found[policy],) = torch.autograd.grad((layer(x, scale) ** 2).sum(), x)
        assert [(event.kind, event.samples) for event in log] == [
            ("DAMPED" if policy == "damp" else "SINGULAR", (1,))
        ]
        assert torch.equal(found[policy][[0, 2]], 2 * x.detach()[[0, 2]])
    assert found["nan"][1].isnan().all()
    assert (found["zero"][1] == 0).all()
    layer = idf.DeclarativeLayer(QuarticOrSquare())
    with pytest.raises(idf.SingularError, match="sample 1 of 3"):
        layer(x, scale).sum().backward()
    with pytest.raises(idf.SingularError, match="sample 1 of 3"):
        torch.func.jacrev(lambda x: layer(x, scale))(x.detach())
    only_others = torch.tensor([[1.0, 2.0], [0.0, 0.0], [3.0, 4.0]], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(layer(x, scale), x, only_others)
    assert torch.equal(gradient, only_others)


class HalfConstrained(idf.Problem):
    """minimise |a|^2 / 2 - x'a + sum q b^2 / 2 - z'b s.t. sum(a) = 1; where q is 0, b may be anything.

    Nothing is factored: H is diagonal and S one number, which knows nothing of b.
    """

    def objective(self, u, x, z, q):
        a, b = u
        return a.square().sum() / 2 - (x * a).sum() + (q * b * b).sum() / 2 - (z * b).sum()

    def equality(self, u, x, z, q):
        return u[0].sum() - 1

    def solve(self, x, z, q):
        flat = q == 0
        return x - (x.sum(1, keepdim=True) - 1) / x.shape[1], torch.where(
            flat, 0.0, z / torch.where(flat, 1.0, q)
        )

    def init(self, x, z, q):
        return x.clone(), z.clone()


@pytest.mark.parametrize("weighted", [0, 1])
def test_a_division_that_the_constraints_do_not_see(weighted):
    x, z = draw(2, 3, seed=1).detach(), draw(2, 2, seed=2).detach()
    q = draw(2, 2, seed=3).detach().abs() + 1
    q[1, 0] = z[1, 0] = 0
    x, z = x.requires_grad_(), z.requires_grad_()
    layer = DeclarativeLayer(HalfConstrained(), on_failure="nan")
    with idf.record() as log:
        loss = (layer(x, z, q)[weighted] * torch.arange(1, 3 + (weighted == 0))).sum()
        found = torch.autograd.grad(loss, (x, z))
    assert {event.kind for event in log} == {"SINGULAR"}
    assert all(torch.isfinite(g[0]).all() and g[1].isnan().all() for g in found)
