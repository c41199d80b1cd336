"""The references are as lean as the authors' code, and so are the `vjp` of the built-in problems.

Measured on the authors' package: 8.2 MiB at batch 1, m = 128, n = 4096 for Fig. 2 and 6.7 MiB at 500 x 500
for Fig. 4, both float32. A leaner "reference" would make every ratio against it look better than it is, a
fatter one worse.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from implicitdiff.diagnostics.meter import measure
from implicitdiff.problems import OptimalTransport, RobustPooling
from tests.reference import fig2, fig4

POOLING_MIB = 8.2
TRANSPORT_MIB = 6.7


def peak_mib(fn: Callable[[], Any]) -> float:
    with torch.no_grad():
        return measure(fn)[1].peak / 2**20


@pytest.fixture
def pooling() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 128, 4096, generator=generator)
    return x, x.mean(2), torch.randn(1, 128, generator=generator)


@pytest.fixture
def plan() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    M = torch.rand(1, 500, 500, generator=generator)
    P = torch.rand(1, 500, 500, generator=generator) / 500**2
    return M, P.sum(2), P.sum(1), P, torch.randn(1, 500, 500, generator=generator)


def test_fig2(pooling: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    x, y, v = pooling
    assert peak_mib(lambda: fig2.backward(x, y, v, "pseudo-huber", 16.0)) == pytest.approx(
        POOLING_MIB, rel=0.03
    )


def test_vjp_of_robust_pooling(pooling: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    x, y, v = pooling
    problem = RobustPooling("pseudo-huber", alpha=16.0)
    assert peak_mib(lambda: problem.vjp(y, v, x)) == pytest.approx(POOLING_MIB, rel=0.03)


def test_fig4(plan: tuple[torch.Tensor, ...]) -> None:
    M, r, c, P, v = plan
    assert peak_mib(lambda: fig4.backward(M, r, c, P, v, 10.0)) == pytest.approx(TRANSPORT_MIB, rel=0.03)


def test_vjp_of_optimal_transport(plan: tuple[torch.Tensor, ...]) -> None:
    M, r, c, P, v = plan
    problem = OptimalTransport(gamma=10.0)
    assert peak_mib(lambda: problem.vjp(P, v, M, r, c)) == pytest.approx(TRANSPORT_MIB, rel=0.03)
