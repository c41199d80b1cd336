"""Points at which a problem with equality constraints has no derivative, or not that of a minimum: saddles and kinks.

A saddle has its derivative and is said to be one; a kink has one-sided derivatives only, which the report shows.
"""

import re

import pytest
import torch

import implicitdiff as idf

DOUBLE = torch.float64
backwards = pytest.mark.parametrize("backward", ["auto", "dense"])


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


# Saddles


class Saddle(idf.Problem):
    """-u_0 u_1 + x_0 u_0 + x_1 u_1  s.t.  u_0 - u_1 = x_2: a maximum along the constraint, which solve gives."""

    def objective(self, u, x):
        return -u[0] * u[1] + x[:2] @ u

    def equality(self, u, x):
        return u[0] - u[1] - x[2]

    def solve(self, x):
        x = x.detach()
        u_1 = (x[:, 0] + x[:, 1] - x[:, 2]) / 2
        return torch.stack([u_1 + x[:, 2], u_1], 1)

    def init(self, x):
        return torch.zeros_like(x[:2])


@backwards
def test_a_saddle_has_its_derivative_and_is_said_to_be_one(backward: str) -> None:
    x = normal(3, 3).requires_grad_()
    v = normal(3, 2, seed=4)
    truth = torch.autograd.grad(torch.stack([x.sum(1), x[:, 0] + x[:, 1] - x[:, 2]], 1) / 2, x, v)[0]
    for create_graph in (False, True):
        with idf.record() as log:
            u = idf.DeclarativeLayer(Saddle(), backward=backward)(x)
            found = torch.autograd.grad(u, x, v, create_graph=create_graph)[0]
        torch.testing.assert_close(found, truth)
        assert [(event.kind, event.where, event.samples) for event in log] == [
            ("INDEFINITE", "backward", (0, 1, 2))
        ]
        assert "not a strict minimum" in str(log)
    second = next(row for row in idf.check(Saddle(), x).rows if row.name == "second order")
    assert second.verdict.startswith("fail")


# Kinks


class Cross(idf.Problem):
    """The point of the two axes nearest to x: u_0 u_1 = 0. At x = 0 u is (x_0, 0) or (0, x_1), whichever is longer."""

    def objective(self, u, x):
        return ((u - x) ** 2).sum()

    def equality(self, u, x):
        return u[0] * u[1]

    def init(self, x):
        return x

    def solve(self, x):
        x = x.detach()
        return torch.where(x.abs() == x.abs().amax(1, keepdim=True), x, 0.0)


@backwards
def test_a_kink_is_not_regular_and_the_report_has_both_sides(backward: str) -> None:
    x = torch.zeros(1, 2, dtype=DOUBLE, requires_grad=True)
    layer = idf.DeclarativeLayer(Cross(), backward=backward)
    with pytest.raises(idf.SingularError, match="kink"), idf.record() as log:
        layer(x).sum().backward()
    assert [(event.kind, event.samples) for event in log] == [("NOT_REGULAR", (0,))]
    rows = [row for row in idf.check(Cross(), x).rows if row.name.startswith("one-sided")]
    assert len(rows) == 1
    assert "NOT_REGULAR" in rows[0].verdict
    # Along d both sides move by the longer of its entries: <v, u(x + t d)> = |t| s with s of either sign of t.
    numbers = re.findall(r"-?\d[\d.e-]*", rows[0].verdict)
    below, above = float(numbers[0]), float(numbers[1])
    assert below == pytest.approx(above, rel=1e-2)  # u is odd along a line through the kink
    assert above != 0


@backwards
@pytest.mark.parametrize(("policy", "value"), [("nan", torch.nan), ("zero", 0.0)])
def test_a_kink_beside_regular_samples(policy: str, value: float, backward: str) -> None:
    x = torch.tensor([[0.5, 0.2], [0.0, 0.0], [-0.1, 0.9]], dtype=DOUBLE, requires_grad=True)
    u = idf.DeclarativeLayer(Cross(), backward=backward, on_failure=policy)(x)
    found = torch.autograd.grad(u.sum(), x)[0]
    expected = torch.tensor([[1.0, 0.0], [value, value], [0.0, 1.0]], dtype=DOUBLE)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9, equal_nan=True)


class Touching(idf.Problem):
    """Two circles that touch in (1, 0) where x_0 = 2, and meet in two points where x_0 < 2."""

    def objective(self, u, x):
        return (u[1] - x[1]) ** 2

    def equality(self, u, x):
        first = u.square().sum() - 1
        return first, first - 2 * x[0] * u[0] + x[0] ** 2

    def init(self, x):
        return x

    def solve(self, x):
        x = x.detach()
        height = (1 - (x[:, 0] / 2) ** 2).clamp(min=0).sqrt()
        return torch.stack([x[:, 0] / 2, height], 1)


@backwards
def test_circles_that_touch_are_not_regular(backward: str) -> None:
    """Beside it u = (x_0 / 2, sqrt(1 - x_0^2 / 4)) has a derivative, at x_0 = 2 an infinite one."""
    x = torch.tensor([[2.0, 0.0], [1.2, 0.4]], dtype=DOUBLE, requires_grad=True)
    layer = idf.DeclarativeLayer(Touching(), backward=backward, on_failure="nan")
    with idf.record() as log:
        found = torch.autograd.grad(layer(x)[:, 1].sum(), x)[0]
    assert [(event.kind, event.samples) for event in log] == [("NOT_REGULAR", (0,))]
    assert found[0].isnan().all()
    torch.testing.assert_close(found[1], torch.tensor([-0.375, 0.0], dtype=DOUBLE), rtol=1e-9, atol=1e-9)
