"""Optimal transport: the built-in with all its inputs, rectangular, shared marginals, gamma a Parameter or an
input.
"""

import torch
from torch import Tensor

from implicitdiff.problems import OptimalTransport
from tests.cases.base import SCHUR, Case, Draw, Sizes

SIZES = ((4, 3), (3, 3), (1, 3), (4, 1), (1, 1))


def costs_and_marginals(draw: Draw, sizes: Sizes) -> tuple[Tensor, ...]:
    """M (m, n), r (m,) and c (n,), both summing to one."""
    m, n = sizes
    return draw.normal(m, n), draw.mass(m), draw.mass(n)


def balanced(M: Tensor, r: Tensor, c: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    """r and c scaled to equal mass: the constraints can be met, whatever entry finite differences move."""
    return M, r / r.sum(-1, keepdim=True), c / c.sum(-1, keepdim=True), *rest


def _case(name: str, **changes: object) -> Case:
    fields: dict[str, object] = {
        "name": name,
        "make_problem": lambda: OptimalTransport(gamma=2.0),
        "inputs": costs_and_marginals,
        "sizes": SIZES,
        "hessian": "diagonal",
        "schur": "block",
        "solvers": SCHUR,
        "consistent": balanced,
        "dependent": True,
        "own_solver": True,
    }
    return Case(**(fields | changes))  # type: ignore[arg-type]


CASES = (
    _case("transport", notes="all m + n marginals declared, of rank m + n - 1"),
    _case(
        "transport-uniform",
        inputs=lambda draw, sizes: (draw.normal(*sizes),),
        consistent=None,
        notes="r and c left out",
    ),
    _case(
        "transport-shared-marginals",
        inputs=lambda draw, sizes: (
            draw.normal(*sizes),
            (r := draw.shared_positive(sizes[0])) / r.sum(),
            (c := draw.shared_positive(sizes[1])) / c.sum(),
        ),
        in_dims=(0, None, None),
        sizes=((4, 3), (3, 3)),
        notes="r and c shared: their gradients are sums over the batch, modulo (1_m, -1_n)",
    ),
    _case(
        "transport-gamma-parameter",
        make_problem=lambda: OptimalTransport(gamma=torch.nn.Parameter(torch.tensor(1.5))),
        sizes=((4, 3), (3, 3)),
        notes="gamma's gradient needs log P",
    ),
    _case(
        "transport-gamma-input",
        make_problem=lambda: OptimalTransport(gamma=None),
        inputs=lambda draw, sizes: (*costs_and_marginals(draw, sizes), 1.0 + draw.positive()),
        sizes=((4, 3), (3, 3)),
        notes="one gamma per sample",
    ),
)
