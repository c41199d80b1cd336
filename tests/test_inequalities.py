"""Problems with inequalities and bounds: solutions, active sets, and derivatives of every kind against independent
oracles (a dense KKT system on the active set written out here, finite differences, closed forms)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import implicitdiff as idf

F64 = torch.float64


class Program(idf.Problem):
    """min u'(LL' + I/10)u/2 + q'u s.t. A u = b, G u <= h, low <= u"""

    def objective(self, u, L, q, A, b, G, h, low):
        return 0.5 * (L.T @ u).square().sum() + 0.05 * u @ u + q @ u

    def equality(self, u, L, q, A, b, G, h, low):
        return A @ u - b

    def inequality(self, u, L, q, A, b, G, h, low):
        return G @ u - h

    def bounds(self, L, q, A, b, G, h, low):
        return low, None

    def init(self, L, q, A, b, G, h, low):
        return torch.zeros_like(q)


def programs(batch: int, m: int, p: int, rows: int, seed: int = 0) -> list[Tensor]:
    """Feasible programs of which some constraints are active and others are not."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=F64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=F64)

    inside = normal(batch, m)
    L, A, G = normal(batch, m, m) / m**0.5, normal(batch, p, m), normal(batch, rows, m)
    b, h = (A @ inside[..., None])[..., 0], (G @ inside[..., None])[..., 0] + 0.3 * uniform(batch, rows)
    low = inside - 0.5 * uniform(batch, m)
    return [t.requires_grad_() for t in (L, normal(batch, m), A, b, G, h, low)]


def by_hand(u: Tensor, mu: Tensor, inputs: list[Tensor], v: Tensor) -> list[Tensor]:
    """The gradients of v'u for the batch, from the dense KKT system on the active set of each sample."""
    found = []
    for k in range(len(u)):
        x = [t[k].detach().requires_grad_() for t in inputs]
        L, q, A, b, G, h, low = x
        rows, fixed = mu[k] < 0, u[k] - low < 1e-9
        m = u.shape[1]
        E = torch.eye(m, dtype=F64)[fixed]
        J = torch.cat([A, G[rows], E])
        K = torch.zeros(m + len(J), m + len(J), dtype=F64)
        K[:m, :m], K[:m, m:], K[m:, :m] = L @ L.T + 0.1 * torch.eye(m, dtype=F64), J.T, J
        slope = L @ (L.T @ u[k]) + 0.1 * u[k] + q
        nu = torch.linalg.lstsq(J.T, -slope).solution
        z = torch.linalg.pinv(K.detach()) @ torch.cat([-v[k], torch.zeros(len(J), dtype=F64)])
        w, s = z[:m], z[m:]
        point, nu = u[k].detach(), nu.detach()
        residual = L @ (L.T @ point) + 0.1 * point + q + J.T @ nu
        held = torch.cat([A @ point - b, (G @ point - h)[rows], (point - low)[fixed]])
        found.append(torch.autograd.grad(residual @ w + held @ s, x))
    return [torch.stack(parts) for parts in zip(*found, strict=True)]


def relative(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest error of an input over the size of its gradient."""
    return max(
        float((a - b).abs().max() / b.abs().max().clamp(min=1e-12))
        for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("backward", ["auto", "dense", "matrix-free"])
def test_random_programs_have_the_gradient_of_their_active_set(backward: str) -> None:
    inputs = programs(17, 7, 2, 4)
    solution = idf.DeclarativeLayer(Program(), backward=backward).solve(*inputs)
    u, mu = solution.u, solution.inequality_multipliers
    v = torch.sin(torch.arange(u.numel(), dtype=F64)).reshape(u.shape)
    found = torch.autograd.grad((u * v).sum(), inputs)
    fixed = (u - inputs[-1] < 1e-9).sum(1)
    assert (mu <= 0).all()
    assert (mu < 0).any()
    assert (mu == 0).any()
    assert (fixed > 0).any()
    assert len(fixed.unique()) > 2
    assert relative(found, by_hand(u.detach(), mu.detach(), inputs, v)) < 1e-9


def test_gradients_agree_with_differences_of_solutions() -> None:
    inputs = programs(5, 6, 1, 3, seed=3)
    layer = idf.DeclarativeLayer(Program())
    torch.manual_seed(0)
    tangents = [torch.randn_like(t) for t in inputs]
    found = torch.autograd.grad(layer(*inputs).pow(3).sum(), inputs)
    step = 1e-6
    with torch.no_grad():
        ahead, behind = (
            layer(*[a + sign * step * b for a, b in zip(inputs, tangents, strict=True)]).pow(3).sum(1)
            for sign in (1, -1)
        )
    expected = (ahead - behind) / (2 * step)
    along = sum((a * b).flatten(1).sum(1) for a, b in zip(found, tangents, strict=True))
    assert torch.allclose(along, expected, rtol=1e-6, atol=1e-7)


class Box(idf.Problem):
    """The projection to a box."""

    def objective(self, u, q, low, high):
        return 0.5 * (u - q).square().sum()

    def bounds(self, q, low, high):
        return low, high

    def init(self, q, low, high):
        return torch.zeros_like(q)


def test_a_box_is_a_clamp_to_second_order_in_every_mode() -> None:
    torch.manual_seed(1)
    q = torch.tensor([[0.2, -2.0, 1.7], [0.9, -0.1, -1.1]], dtype=F64, requires_grad=True)
    low = (-0.5 - torch.rand(2, 3, dtype=F64)).requires_grad_()
    high = (0.3 + torch.rand(3, dtype=F64)).requires_grad_()
    layer = idf.DeclarativeLayer(Box(), in_dims=(0, 0, None))
    u, expected = layer(q, low, high), q.clamp(low, high)
    assert torch.allclose(u, expected, rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(layer, (q, low, high), check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda *x: layer(*x).pow(3), (q[:1], low[:1], high), fast_mode=True)
    one = idf.DeclarativeLayer(Box(), in_dims=None)
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        rows = torch.func.vmap(transform(one), in_dims=(0, 0, None))(q, low, high)
        clamp = torch.func.vmap(torch.func.jacrev(lambda a, b, c: a.clamp(b, c)), in_dims=(0, 0, None))
        assert torch.allclose(rows, clamp(q, low, high), atol=1e-12)


def test_active_sets_in_a_compiled_graph() -> None:
    torch.manual_seed(2)
    inputs = (torch.randn(4, 3, dtype=F64), -torch.rand(4, 3, dtype=F64), torch.rand(3, dtype=F64))
    leaves = tuple(t.requires_grad_() for t in inputs)
    layer = idf.DeclarativeLayer(Box(), in_dims=(0, 0, None))
    compiled = torch.compile(lambda *x: layer(*x).pow(3).sum(), backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(compiled(*leaves), leaves)
    clamped = leaves[0].clamp(leaves[1], leaves[2])
    expected = torch.autograd.grad(clamped.pow(3).sum(), leaves)
    for mine, true in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-10, atol=1e-12)


def test_the_kind_of_a_hessian_survives_its_bounds() -> None:
    q = torch.randn(2, 5, dtype=F64)
    report = idf.explain(Box(), q, q - 1, q + 1)
    assert report.hessian.kind == "diagonal"
    assert report.solver == "divide"
    assert "InteriorPoint" in report.forward
    assert not report.fallbacks


def test_an_inactive_inequality_changes_no_bit_of_a_gradient() -> None:
    """jkitchin/pounce#73: a slack constraint that is kept as an equality gives a wrong gradient and no error."""

    class Slack(Box):
        def inequality(self, u, q, low, high):
            return u - 100.0 - q.square()

    torch.manual_seed(2)
    q = torch.randn(4, 3, dtype=F64, requires_grad=True)
    low, high = torch.full_like(q, -0.4), torch.full_like(q, 0.6)
    plain = torch.autograd.grad(idf.DeclarativeLayer(Box())(q, low, high).pow(2).sum(), q)[0]
    slack = torch.autograd.grad(idf.DeclarativeLayer(Slack())(q, low, high).pow(2).sum(), q)[0]
    assert torch.allclose(plain, slack, rtol=0, atol=1e-14)
    assert (plain == 0).any()


def test_two_hundred_programs_in_one_batch() -> None:
    inputs = programs(200, 6, 2, 5, seed=7)
    solution = idf.solve(Program(), *inputs)
    assert not bool(solution.status.any())
    v = torch.cos(torch.arange(solution.u.numel(), dtype=F64)).reshape(solution.u.shape)
    found = torch.autograd.grad((solution.u * v).sum(), inputs)
    expected = by_hand(solution.u.detach(), solution.inequality_multipliers.detach(), inputs, v)
    assert relative(found, expected) < 1e-6


def test_check_and_compare_take_active_sets_for_equalities() -> None:
    inputs = [t.detach() for t in programs(2, 5, 1, 2, seed=1)]
    report = idf.check(Program(), *inputs)
    assert report.ok, str(report)
    names = [row.name for row in report.rows]
    assert "multiplier signs" in names
    assert "strict complementarity" in names
    rows = idf.compare(Program(), *inputs, backwards=("auto", "dense")).rows
    assert all(row.error < 1e-9 for row in rows)


def test_jacobians_and_eqn_3_on_the_active_set() -> None:
    inputs = [t.detach() for t in programs(2, 5, 1, 2, seed=1)]
    u = idf.solve(Program(), *inputs).u
    rows = idf.jacobian(Program(), *inputs)
    one = idf.DeclarativeLayer(Program(), in_dims=None)
    for k in range(2):
        sample = [t[k] for t in inputs]
        truth = torch.func.jacfwd(one, argnums=tuple(range(7)))(*sample)
        for found, expected in zip(rows, truth, strict=True):
            assert torch.allclose(found[k], expected, atol=1e-10)
        d = idf.derivatives(Program(), u[k], *sample)
        H = torch.linalg.inv(d.H)
        literal = H @ d.A.T @ torch.linalg.inv(d.A @ H @ d.A.T) @ (d.A @ H @ d.B - d.C) - H @ d.B
        joined = torch.cat([found[k].reshape(5, -1) for found in rows], 1)
        assert torch.allclose(literal, joined, atol=1e-9)
