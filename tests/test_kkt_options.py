"""What may be done about K beside solving with it: least norm, damping, a trust region, refinement, float64 inside."""

import re
import warnings

import pytest
import torch
from torch import Tensor
from torch.func import jacfwd, jacrev

import implicitdiff as idf
from implicitdiff.derivatives.autodiff import AutodiffPlan

DOUBLE = torch.float64
backwards = pytest.mark.parametrize("backward", ["auto", "dense"])


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE).to(dtype)


class Loose(idf.Problem):
    """minimise (c'u - x_0^2)^2 + (x_1 (u_2 - x_2))^2: u is free across c, and u_2 too where x_1 = 0."""

    def objective(self, u, x, c):
        return (c @ u[:2] - x[0] ** 2) ** 2 + (x[1] * (u[2] - x[2])) ** 2

    def init(self, x, c):
        return torch.zeros_like(x)


def loose_inputs(batch: int = 3) -> tuple[Tensor, Tensor]:
    x = normal(batch, 3)
    x[0, 1] = 0.0
    return x, torch.tensor([0.6, -0.8], dtype=DOUBLE)


def loose_gradient(x: Tensor, c: Tensor, v: Tensor) -> Tensor:
    """Du = (c 2 x_0 / |c|^2, 0, 0) in the first two, (0, 0, 1) in the last unless it is free."""
    first = 2 * x[:, 0] * (v[:, :2] @ c) / (c @ c)
    last = torch.where(x[:, 1] == 0, 0.0, v[:, 2])
    return torch.stack([first, torch.zeros_like(first), last], 1)


@backwards
@pytest.mark.parametrize("batch", [1, 3])
def test_minimisers_that_are_not_unique_by_least_norm(batch: int, backward: str) -> None:
    x, c = loose_inputs(batch)
    x.requires_grad_()
    v = normal(batch, 3, seed=1)
    with pytest.raises(idf.SingularError, match=r"KKTOptions\(least_norm=True\)"):
        torch.autograd.grad(idf.DeclarativeLayer(Loose(), in_dims=(0, None), backward=backward)(x, c), x, v)
    layer = idf.DeclarativeLayer(
        Loose(), in_dims=(0, None), backward=backward, kkt=idf.KKTOptions(least_norm=True)
    )
    with idf.record() as log:
        (found,) = torch.autograd.grad(layer(x, c), x, v)
    torch.testing.assert_close(found, loose_gradient(x.detach(), c, v), rtol=1e-8, atol=1e-9)
    events = [event for event in log if event.kind == "SINGULAR"]
    assert [event.samples for event in events] == [tuple(range(batch))]
    assert "2 null directions" in events[0].message  # of the first sample, where u_2 is free as well
    assert re.search(r"flattest in u\[0\], u\[1\], u\[2\]", events[0].message)


def test_least_norm_in_both_modes_and_no_second_derivative() -> None:
    x, c = loose_inputs()
    layer = idf.DeclarativeLayer(Loose(), in_dims=None, kkt=idf.KKTOptions(least_norm=True))
    rows, columns = jacrev(layer)(x[1], c), jacfwd(layer)(x[1], c)
    expected = torch.stack([loose_gradient(x[1:2], c, e[None])[0] for e in torch.eye(3, dtype=DOUBLE)])
    torch.testing.assert_close(rows, expected, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(columns, expected, rtol=1e-8, atol=1e-9)
    one = x[1].clone().requires_grad_()
    (first,) = torch.autograd.grad(layer(one, c).square().sum(), one, create_graph=True)
    with pytest.raises(idf.NotSupportedYetError, match="least_norm"):
        torch.autograd.grad(first.sum(), one)


@backwards
def test_regular_samples_keep_their_derivative(backward: str) -> None:
    """u_2 in the objective with x_1 = 1 in all but one sample, and a plane that fixes the rest."""

    class Plane(Loose):
        def equality(self, u, x, c):
            return c[0] * u[1] + c[1] * u[0]

    x, c = loose_inputs()
    plain = idf.DeclarativeLayer(Plane(), in_dims=(0, None), backward=backward, on_failure="zero")
    least = idf.DeclarativeLayer(
        Plane(), in_dims=(0, None), backward=backward, kkt=idf.KKTOptions(least_norm=True)
    )
    found = []
    for layer in (plain, least):
        leaf = x.clone().requires_grad_()
        found.append(torch.autograd.grad(layer(leaf, c), leaf, normal(3, 3, seed=1))[0])
    torch.testing.assert_close(found[0][1:], found[1][1:], rtol=1e-10, atol=1e-12)
    assert (found[0][0] == 0).all()
    assert found[1][0].abs().max() > 0.1


@backwards
def test_damping_is_relative_escalates_and_is_reported_once(backward: str) -> None:
    x, c = loose_inputs()
    x.requires_grad_()
    v = normal(3, 3, seed=1)
    layer = idf.DeclarativeLayer(Loose(), in_dims=(0, None), backward=backward, on_failure="damp")
    u = layer(x, c)
    with warnings.catch_warnings(record=True) as caught, idf.record() as log:
        warnings.simplefilter("always")
        (found,) = torch.autograd.grad(u, x, v)
    truth = loose_gradient(x.detach(), c, v)
    # Damping leaves the part along the free directions out, so the limit is the derivative of least norm.
    torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-4)
    assert len(caught) == 1
    (event,) = [event for event in log if event.kind == "DAMPED"]
    assert event.samples == (0, 1, 2)
    for words in (
        r"damped by 1e-08 of its size",
        r"condition number",
        r"null directions",
        r"u\[0\], u\[1\], u\[2\]",
    ):
        assert re.search(words, event.message), words
    heavy = idf.KKTOptions(damping=(0.5,))
    layer = idf.DeclarativeLayer(Loose(), in_dims=(0, None), backward=backward, on_failure="damp", kkt=heavy)
    with pytest.warns(idf.OptimalityWarning, match="damped by 5e-01"):
        (more,) = torch.autograd.grad(layer(x, c), x, v)
    assert (more - truth).abs().max() > 1e-2


class Ridge(idf.Problem):
    """minimise |a u - y|^2 / 2 + s |u|^2 / 2: H = a'a + s I."""

    def objective(self, u, a, y, s):
        return 0.5 * (a @ u - y).square().sum() + 0.5 * s * u.square().sum()

    def init(self, a, y, s):
        return torch.zeros_like(a[0])


@backwards
def test_a_trust_region_solves_with_h_plus_rho(backward: str) -> None:
    """du/dy = (H + rho I)^-1 a', in both modes and with the second derivative in y, which is 0."""
    a, y, s = normal(2, 5, 3), normal(2, 5, seed=1), torch.tensor(0.1, dtype=DOUBLE)
    rho = 0.3
    layer = idf.DeclarativeLayer(
        Ridge(), in_dims=(0, 0, None), backward=backward, kkt=idf.KKTOptions(trust_region=rho)
    )
    v = normal(2, 3, seed=2)
    leaf = y.clone().requires_grad_()
    with idf.record() as log:
        (found,) = torch.autograd.grad(layer(a, leaf, s), leaf, v)
    matrix = a.mT @ a + (s + rho) * torch.eye(3, dtype=DOUBLE)
    expected = (a @ torch.linalg.inv(matrix) @ v[:, :, None])[:, :, 0]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    assert [(event.kind, event.samples) for event in log] == [("DAMPED", (0, 1))]
    assert "trust_region" in str(log)


class Stiff(idf.Problem):
    """minimise |a u - y|^2 / 2 + 1e-3 |u|^2 / 2 with columns of a that are nearly equal: K is ill-conditioned."""

    def objective(self, u, a, y):
        return 0.5 * (a @ u - y).square().sum() + 0.5e-3 * u.square().sum()

    def init(self, a, y):
        return torch.zeros_like(a[0])


def stiff_inputs() -> tuple[Tensor, Tensor]:
    a = normal(2, 6, 1) + 3e-3 * normal(2, 6, 4, seed=1)
    return a, normal(2, 6, seed=2)


def stiff_error(options: idf.KKTOptions | None) -> float:
    """The error of a float32 gradient in y against (H^-1 a')' v in float64, with H as float32 forms it."""
    a, y = (t.float() for t in stiff_inputs())
    hessian = (a.mT @ a + 1e-3 * torch.eye(4)).double()
    v = torch.linalg.solve_triangular(torch.eye(4), normal(2, 4, 1, seed=3).float(), upper=False)[:, :, 0]
    leaf = y.clone().requires_grad_()
    layer = idf.DeclarativeLayer(Stiff(), backward="dense", kkt=options, on_failure="warn")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", idf.OptimalityWarning)
        (found,) = torch.autograd.grad(layer(a, leaf), leaf, v)
    truth = (a.double() @ torch.linalg.inv(hessian) @ v.double()[:, :, None])[:, :, 0]
    return float((found - truth).abs().max() / truth.abs().max())


def test_float64_inside_gains_digits() -> None:
    plain = stiff_error(None)
    assert plain > 1e-5
    assert stiff_error(idf.KKTOptions(accumulate=DOUBLE)) < 0.3 * plain


def test_a_poor_residual_is_refined(monkeypatch: pytest.MonkeyPatch) -> None:
    """A solver that is off by a hundredth in the second sample: each refinement divides the error by a hundred."""
    exact = AutodiffPlan.kkt_solve

    def poor(self, u, lam, theta, rhs_u, rhs_h, shift=None):  # type: ignore[no-untyped-def]
        w, s, status = exact(self, u, lam, theta, rhs_u, rhs_h, shift)
        return (torch.cat([w[0][:, :1], 1.01 * w[0][:, 1:]], 1),), s, status

    a, y, s = normal(2, 5, 3), normal(2, 5, seed=1), torch.tensor(0.1, dtype=DOUBLE)
    v, errors = normal(2, 3, seed=2), []
    expected = (a @ torch.linalg.inv(a.mT @ a + s * torch.eye(3, dtype=DOUBLE)) @ v[:, :, None])[:, :, 0]
    for count in (0, 1, 2, 9):
        leaf = y.clone().requires_grad_()
        options = idf.KKTOptions(refinements=count, least_norm=True)
        u = idf.DeclarativeLayer(Ridge(), in_dims=(0, 0, None), backward="dense", kkt=options)(a, leaf, s)
        with monkeypatch.context() as patched:
            patched.setattr(AutodiffPlan, "kkt_solve", poor)
            (found,) = torch.autograd.grad(u, leaf, v)
        assert (found[0] - expected[0]).abs().max() < 1e-12
        errors.append(float((found[1] - expected[1]).abs().max() / expected[1].abs().max()))
    assert errors[0] == pytest.approx(1e-2, rel=1e-3)
    assert errors[1] == pytest.approx(1e-4, rel=1e-2)
    assert errors[2] == pytest.approx(1e-6, rel=1e-2)
    assert 0 < errors[3] < 1.5e-8  # no further than where the residual is good


@backwards
def test_refinement_leaves_good_solves_alone(backward: str) -> None:
    a, y, s = normal(2, 5, 3), normal(2, 5, seed=1), torch.tensor(0.1, dtype=DOUBLE)
    found = []
    for options in (None, idf.KKTOptions(refinements=2), idf.KKTOptions(accumulate=DOUBLE)):
        leaf = y.clone().requires_grad_()
        layer = idf.DeclarativeLayer(Ridge(), in_dims=(0, 0, None), backward=backward, kkt=options)
        found.append(torch.autograd.grad(layer(a, leaf, s), leaf, normal(2, 3, seed=2))[0])
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(found[2], found[0], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"trust_region": -1.0}, "trust_region"),
        ({"refinements": -1}, "refinements"),
        ({"accumulate": torch.float16}, "float64"),
        ({"damping": ()}, "damping"),
        ({"damping": (0.0,)}, "damping"),
    ],
)
def test_options_are_checked(options: dict, words: str) -> None:
    with pytest.raises(idf.OptionError, match=words):
        idf.KKTOptions(**options)
    with pytest.raises(idf.OptionError, match="KKTOptions"):
        idf.DeclarativeLayer(Ridge(), kkt="least-norm")  # type: ignore[arg-type]


class Halfspace(idf.Problem):
    """minimise (u_0 + u_1 - x_0)^2  s.t.  u_0 <= x_1: where that is not active u is free along (1, -1)."""

    def objective(self, u, x):
        return (u.sum() - x[0]) ** 2

    def inequality(self, u, x):
        return u[0] - x[1]

    def init(self, x):
        return torch.zeros_like(x)

    def solve(self, x):
        x = x.detach()
        u_0 = torch.minimum(x[:, 0] / 2, x[:, 1])
        return torch.stack([u_0, x[:, 0] - u_0], 1)


def test_least_norm_beside_an_inequality_that_is_not_active() -> None:
    x = torch.tensor([[0.2, 3.0], [1.4, 2.0]], dtype=DOUBLE, requires_grad=True)
    layer = idf.DeclarativeLayer(Halfspace(), kkt=idf.KKTOptions(least_norm=True))
    (found,) = torch.autograd.grad(layer(x)[:, 0].sum(), x)
    torch.testing.assert_close(found, torch.tensor([[0.5, 0.0], [0.5, 0.0]], dtype=DOUBLE))
