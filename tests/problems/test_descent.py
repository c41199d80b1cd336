"""The descent behind RobustPooling where it is hard: flat stretches, steps to infinity, samples left over."""

import pytest
import torch
from torch import Tensor

from implicitdiff.problems import PENALTIES, descent

WELSCH = PENALTIES["welsch"]


def two_clusters(half_distance: float, batch: int = 1, left: int = 33) -> Tensor:
    """64 points in R^3 at two places, so many of them on the left (batch, 3, 64)."""
    x = torch.zeros(batch, 3, 64, dtype=torch.float64)
    x[:, 0, :left] = -half_distance
    x[:, 0, left:] = half_distance
    return x


def slope_at(x: Tensor, alpha: Tensor, u: Tensor) -> Tensor:
    def objective(u: Tensor) -> Tensor:
        return WELSCH.rho((u[..., None] - x).square().sum(-2), alpha).sum()

    return torch.func.grad(objective)(u)


def test_flat_stretch_with_negative_curvature_is_crossed_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    # Just wider apart than alpha: between the clusters is a low ridge, from which each reweighted step leads
    # away by two per cent more than the one before. H is indefinite there: plain Newton steps are of no use.
    monkeypatch.setattr(descent, "NEWTON_STEPS", 60)
    x, alpha = two_clusters(1.01, left=32), torch.ones(1, 1, dtype=torch.float64)
    start = torch.tensor([-1e-3, 0, 0], dtype=torch.float64)
    found = descent.descend(WELSCH, x, alpha, start[None, None])
    assert found.residual.max() <= descent.tightness(x)
    assert found.u[0, 0] < -0.05
    assert slope_at(x, alpha, found.u).abs().max() < 1e-10


def test_newton_step_to_infinity_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    # Where H is barely definite a Newton step leaves all points behind; there the gradient vanishes, but the
    # objective is at its largest.
    monkeypatch.setattr(descent, "REWEIGHTED_STEPS", 0)
    x, alpha = two_clusters(0.2), torch.ones(1, 1, dtype=torch.float64)
    for start in torch.linspace(1.0, 1.02, 41):
        starts = torch.zeros(1, 1, 3, dtype=torch.float64)
        starts[..., 0] = start
        found = descent.descend(WELSCH, x, alpha, starts)
        assert found.u.abs().max() < 0.3
        assert found.residual.max() <= descent.tightness(x)


def test_every_sample_of_a_mixed_batch_is_finished() -> None:
    # Samples that need a different number of steps, so that the batch is cut down again and again.
    distances = torch.tensor([0.0, 0.3, 0.9, 1.0, 1.01, 1.1, 2.0, 5.0], dtype=torch.float64)
    x = two_clusters(1.0, batch=8) * distances[:, None, None]
    starts = torch.randn(1, 8, 3, generator=torch.Generator().manual_seed(0)).double()
    alpha = torch.ones(8, 1, dtype=torch.float64)
    found = descent.descend(WELSCH, x, alpha, starts)
    assert found.residual.max() <= descent.tightness(x)
    for b in range(8):
        alone = descent.descend(WELSCH, x[b : b + 1], alpha[:1], starts[:, b : b + 1])
        torch.testing.assert_close(found.u[b], alone.u[0], rtol=1e-9, atol=1e-9)


def test_lowest_start_wins() -> None:
    x, alpha = two_clusters(5.0), torch.ones(1, 1, dtype=torch.float64)
    starts = torch.zeros(3, 1, 3, dtype=torch.float64)
    starts[0, 0, 0], starts[1, 0, 0], starts[2, 0, 0] = 4.5, -4.5, 0.0
    found = descent.descend(WELSCH, x, alpha, starts)
    assert found.u[0, 0] == pytest.approx(-5.0)  # the cluster with one point more
