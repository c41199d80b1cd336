"""No tensor larger than the data lives in a structured backward pass, and the same text is emitted by every process."""

import pytest
import torch

import implicitdiff as idf
from implicitdiff.diagnostics import measure
from implicitdiff.problems import OptimalTransport, RobustPooling
from tests.cases import BY_NAME


def largest_entries(problem: idf.Problem, *inputs: torch.Tensor) -> int:
    """Entries of the largest tensor alive in one backward pass, the first one (which also probes) left out."""
    inputs = tuple(t.requires_grad_() for t in inputs)
    u = idf.DeclarativeLayer(problem)(*inputs)
    cotangent = torch.randn(u.shape, generator=torch.Generator().manual_seed(0), dtype=u.dtype)
    torch.autograd.grad(u, inputs, cotangent, retain_graph=True)
    _, found = measure(torch.autograd.grad, u, inputs, cotangent)
    return found.largest


@pytest.mark.parametrize("penalty", ["quadratic", "pseudo-huber", "huber", "welsch"])
def test_pooling_holds_nothing_larger_than_the_points(penalty: str) -> None:
    x = torch.randn(2, 128, 1024, generator=torch.Generator().manual_seed(1))
    assert largest_entries(RobustPooling(penalty, 16.0), x) <= x.numel()


def test_transport_holds_nothing_larger_than_the_plan() -> None:
    generator = torch.Generator().manual_seed(2)
    cost = torch.rand(2, 300, 400, generator=generator)
    r, c = torch.rand(2, 300, generator=generator) + 0.1, torch.rand(2, 400, generator=generator) + 0.1
    r, c = r / r.sum(1, keepdim=True), c / c.sum(1, keepdim=True)
    assert largest_entries(OptimalTransport(5.0), cost, r, c) <= cost.numel()


def test_woodbury_holds_no_matrix_of_the_variables() -> None:
    """m = 512, n = 8: with a solver of k x k systems nothing has m x m entries."""
    x = torch.randn(1, 512, 8, generator=torch.Generator().manual_seed(3))
    assert idf.explain(RobustPooling(), x).solver == "woodbury"
    assert largest_entries(RobustPooling(), x) <= x.numel()


def test_an_arrow_costs_what_its_border_does() -> None:
    """H of (p, q) is diagonal in p: no matrix of p's size, and twice the work for twice the entries."""
    problem = BY_NAME["arrow"].problem()
    found = {}
    for size in (1000, 2000):
        shapes = torch.empty(1, size, device="meta"), torch.empty(1, size, 3, device="meta")
        found[size] = idf.explain(problem, *shapes)
        assert (found[size].hessian.kind, found[size].solver) == ("block", "schur")
    assert found[2000].flops < 2.01 * found[1000].flops
    assert found[2000].peak < 2.01 * found[1000].peak
