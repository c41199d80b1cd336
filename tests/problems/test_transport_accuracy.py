"""The structured gradient of a transport plan in float32, against the dense formula in float64 at the same plan.

At a large gamma a plan is close to a vertex: the gradient is a small difference of large multipliers. Tolerance: the
contract's 1e-4.
"""

import pytest
import torch
from torch import Tensor

from implicitdiff.diagnostics import explain
from implicitdiff.inputs import bind
from implicitdiff.plan import plan_for
from implicitdiff.problems import OptimalTransport
from implicitdiff.pytrees import flatten
from implicitdiff.status import Status


def gradient(
    backward: str, gamma: float, P: Tensor, v: Tensor, inputs: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    """The gradient for the costs at P, by the structured plan or the dense one (torch.func, K as one matrix)."""
    problem = OptimalTransport(gamma).to(P.dtype)
    bound = bind(problem, inputs, 0)
    plan = plan_for(problem, bound, *flatten(P[0]), backward=backward)
    assert plan.analysis.solver == {"auto": "schur", "dense": "lu"}[backward]
    theta = tuple(t.detach() for t in plan.trace.theta(bound))
    lam = tuple(torch.zeros_like(t) for t in inputs[1:])
    grads, status = plan.vjp((P,), lam, theta, (v,), None, (True, False, False, False))
    # The dense plan sees dependent constraints, and cannot tell that they are so everywhere.
    assert set(status.tolist()) <= {Status.OK, Status.NOT_REGULAR}
    assert grads[0] is not None
    return grads[0]


@pytest.mark.parametrize("gamma", [1.0, 10.0, 100.0, 300.0])
@pytest.mark.parametrize(("m", "n"), [(5, 6), (12, 9)])
def test_float32_gradient_at_every_gamma(m: int, n: int, gamma: float) -> None:
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        cost = torch.rand(1, m, n, generator=generator)
        r, c = (torch.rand(1, size, generator=generator) + 0.1 for size in (m, n))
        r, c = r / r.sum(1, keepdim=True), c / c.sum(1, keepdim=True)
        P = OptimalTransport(gamma).solve(cost, r, c).u
        v = torch.randn(1, m, n, generator=generator)
        found = gradient("auto", gamma, P, v, (cost, r, c))
        expected = gradient("dense", gamma, P.double(), v.double(), (cost.double(), r.double(), c.double()))
        # a gradient that is itself below float32's rounding of gamma P v has no relative error to speak of
        size = max(float(expected.abs().max()), 1e-7 * gamma * float((P * v).abs().max()))
        assert float((found - expected).abs().max()) <= 1e-4 * size, (seed, size)


def test_the_cost_report_does_not_include_the_refinement() -> None:
    """Without data nothing cancels: the report counts the plain route."""
    assert "cancelled" in explain(OptimalTransport(5.0), torch.rand(2, 30, 40)).code
