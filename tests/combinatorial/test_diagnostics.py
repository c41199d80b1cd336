"""What is warned about, and what the diagnostics of a layer name."""

import warnings

import pytest
import torch
from torch import Tensor

import implicitdiff.combinatorial as co
from implicitdiff import (
    LossGradientWarning,
)

GRID = co.GridShortestPath(3, 3)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_loss_that_does_not_vanish_at_its_target() -> None:
    target = co.TopK(2)(draw(0, 3, 5))
    with pytest.warns(LossGradientWarning, match="does not vanish at the target"):
        assert not co.check_loss(lambda y: (y * (1 - target) + (1 - y) * target).sum(1), target)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert co.check_loss(lambda y: (y - target).square().sum(1), target)
        assert co.check_loss(lambda y: (y - target).abs().sum(), target)
        assert co.check_loss(lambda y: (y - target).square().sum(), target.long())


def train(decay: float, steps: int = 200) -> co.Diagnostics:
    """Costs trained to given solutions, beside a decay that pulls them all to zero."""
    layer = co.DiscreteLayer(co.TopK(2), co.Identity("none"))
    target = co.TopK(2)(draw(2, 20, 6))
    w = draw(1, 20, 6).requires_grad_()
    optimiser = torch.optim.SGD([w], lr=0.05)
    for _ in range(steps):
        optimiser.zero_grad()
        ((layer(w) - target).square().sum() + decay * w.square().sum()).backward()
        optimiser.step()
    return layer.diagnostics()


def test_cost_collapse_is_named() -> None:
    collapsed = train(decay=1.0)
    assert collapsed.collapsed
    assert "cost collapse" in str(collapsed)
    assert collapsed.cost_norm < 0.05 * collapsed.largest_cost_norm
    kept = train(decay=0.0)
    assert not kept.collapsed
    assert "cost collapse" not in str(kept)


def test_diagnostics_by_hand() -> None:
    layer = co.DiscreteLayer(co.TopK(2), co.Identity("mean"))
    w = draw(1, 4, 6).requires_grad_()
    g = draw(2, 4, 6)
    g[1] = 0
    before = layer.diagnostics()
    assert before.solver_calls == 0
    layer(w).backward(g)
    found = layer.diagnostics()
    centred = w.detach() - w.detach().mean(1, keepdim=True)
    assert found.cost_norm == pytest.approx(float(centred.norm(dim=1).mean()))
    assert found.zero_gradients == 0.25
    projected = g - g.mean(1, keepdim=True)
    cosine = torch.nn.functional.cosine_similarity(g[[0, 2, 3]], projected[[0, 2, 3]]).mean()
    assert found.cosine == pytest.approx(float(cosine))
    assert found.solver_calls == 4
    assert found.verdict == "ok"
    layer.zero_grad()
    layer(w).backward(torch.zeros_like(w))
    assert "all gradients are zero" in layer.diagnostics().verdict
    layer.reset_diagnostics()
    assert layer.solver_calls == 0


def test_most_costs_at_the_boundary_is_named() -> None:
    layer = co.DiscreteLayer(GRID, co.Identity("norm"), domain="clamp")
    layer(-torch.rand(4, 3, 3) - 0.1)
    assert "boundary" in layer.diagnostics().verdict
