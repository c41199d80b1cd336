"""Experiments, entropic transport in seven ways: Sinkhorn unrolled twice, and five backward passes at its plan.

In: costs and marginals. Out: `Method`s that fig3.py measures. All forward passes do the same number of Sinkhorn
iterations; none is iterated to the end, as in the paper.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

import implicitdiff as idf
from implicitdiff.problems import OptimalTransport
from implicitdiff.reproduce.measuring import Method

NAMES = (
    "unrolled",
    "unrolled, scaling form",
    "full inverse",
    "block inverse",
    "ours",
    "approximate",
    "diagonal of S",
)
Gradients = tuple[Tensor, Tensor, Tensor]


def sinkhorn(M: Tensor, r: Tensor, c: Tensor, gamma: float, iterations: int) -> Tensor:
    """Rows and columns normalised in turn, a new matrix each time: what autograd unrolls in the paper (Cuturi 2013)."""
    P = torch.exp(-gamma * (M - M.detach().amin((1, 2), keepdim=True)))
    for _ in range(iterations):
        P = P * (r / P.sum(2))[:, :, None]
        P = P * (c / P.sum(1))[:, None]
    return P


def sinkhorn_in_place(M: Tensor, r: Tensor, c: Tensor, gamma: float, iterations: int) -> Tensor:
    """The same without autograd, in one matrix: the forward pass of the implicit methods."""
    with torch.no_grad():
        P = (M - M.amin((1, 2), keepdim=True)).mul_(-gamma).exp_()
        for _ in range(iterations):
            P *= (r / P.sum(2))[:, :, None]
            P *= (c / P.sum(1))[:, None]
        return P


def sinkhorn_scaled(M: Tensor, r: Tensor, c: Tensor, gamma: float, iterations: int) -> Tensor:
    """The same with the kernel kept once: autograd saves vectors, the strong competitor of implicit differentiation."""
    K = torch.exp(-gamma * (M - M.detach().amin((1, 2), keepdim=True)))
    column = torch.ones_like(c)
    for _ in range(iterations):
        row = r / (K @ column[:, :, None])[:, :, 0]
        column = c / (row[:, None] @ K)[:, 0]
    return row[:, :, None] * K * column[:, None]


class FixedSinkhorn(OptimalTransport):
    """Optimal transport, solved by a fixed number of Sinkhorn iterations."""

    def __init__(self, gamma: float, iterations: int) -> None:
        super().__init__(gamma)
        self.gamma_value, self.iterations = gamma, iterations

    def solve(self, M: Tensor, *rest: Tensor) -> idf.Solution:
        """The plan with its multipliers, which are read off one row and one column of log P + gamma M."""
        r, c = rest[:2]
        P = sinkhorn_in_place(M, r, c, self.gamma_value, self.iterations)
        rows = P[:, :, 0].log() + self.gamma_value * M[:, :, 0]
        columns = P[:, 0].log() + self.gamma_value * M[:, 0] - rows[:, :1]
        multipliers = (rows - r.log() + 1) / self.gamma_value, (columns - c.log()) / self.gamma_value
        return idf.Solution(P, equality_multipliers=multipliers)


def approximate(P: Tensor, v: Tensor, r: Tensor, c: Tensor, gamma: float) -> Gradients:
    """-v'H^-1 B, the constraints ignored: line 6 of the paper's Fig. 4 and no more."""
    return -gamma * P * v, torch.zeros_like(r), torch.zeros_like(c)


def full_inverse(P: Tensor, v: Tensor, r: Tensor, c: Tensor, gamma: float) -> Gradients:
    """Eqn. 3 with the inverse of all of A H^-1 A' (m + n - 1 rows), Eqn. 18."""
    grad, along_r, along_c = _start(P, v, gamma)
    m = P.shape[1] - 1
    schur = P.new_zeros(P.shape[0], m + c.shape[1], m + c.shape[1])
    schur[:, :m, :m] = torch.diag_embed(r[:, 1:])
    schur[:, :m, m:] = P[:, 1:]
    schur[:, m:, :m] = P[:, 1:].mT
    schur[:, m:, m:] = torch.diag_embed(c)
    inverse, _ = torch.linalg.inv_ex(schur)
    z = (inverse @ torch.cat([along_r, along_c], 1)[:, :, None])[:, :, 0]
    return _finish(grad, P, r, z[:, :m], z[:, m:], gamma)


def diagonal_schur(P: Tensor, v: Tensor, r: Tensor, c: Tensor, gamma: float) -> Gradients:
    """Eqn. 3 with A H^-1 A' replaced by its diagonal, gamma diag(r, c)."""
    grad, along_r, along_c = _start(P, v, gamma)
    return _finish(grad, P, r, along_r / r[:, 1:], along_c / c, gamma)


def _start(P: Tensor, v: Tensor, gamma: float) -> Gradients:
    grad = -gamma * P * v
    return grad, grad[:, 1:].sum(2), grad.sum(1)


def _finish(grad: Tensor, P: Tensor, r: Tensor, v1: Tensor, v2: Tensor, gamma: float) -> Gradients:
    grad[:, 1:] -= v1[:, :, None] * P[:, 1:]
    grad -= v2[:, None] * P
    grad_r = torch.zeros_like(r)
    grad_r[:, 1:] = -v1 / gamma
    return grad, grad_r, -v2 / gamma


def methods(M: Tensor, r: Tensor, c: Tensor, v: Tensor, gamma: float, iterations: int) -> list[Method]:
    """All seven, in the order of NAMES; gradients for M, r and c."""
    held = (M, r, c, v)
    leaves = tuple(x.detach().clone().requires_grad_() for x in (M, r, c))

    def by_autograd(solve: Callable[..., Tensor]) -> Method:
        return Method(
            "", lambda: solve(*leaves), lambda P: torch.autograd.grad(P, leaves, v, retain_graph=True), held
        )

    def by_formula(formula: Callable[..., Gradients]) -> Method:
        return Method(
            "",
            lambda: sinkhorn_in_place(M, r, c, gamma, iterations),
            lambda P: formula(P, v, r, c, gamma),
            held,
        )

    def block_inverse(P: Tensor, v: Tensor, r: Tensor, c: Tensor, gamma: float) -> Gradients:
        found = OptimalTransport(gamma).vjp(P, v, M, r, c)
        assert isinstance(found, tuple)
        grad_M, grad_r, grad_c = found
        assert grad_M is not None
        assert grad_r is not None
        assert grad_c is not None
        return grad_M, grad_r, grad_c

    # A plan after few iterations is no solution yet; its gradient is measured all the same, as the paper does.
    layer = idf.DeclarativeLayer(FixedSinkhorn(gamma, iterations), optimality_tol=math.inf)
    made = (
        by_autograd(lambda M, r, c: sinkhorn(M, r, c, gamma, iterations)),
        by_autograd(lambda M, r, c: sinkhorn_scaled(M, r, c, gamma, iterations)),
        by_formula(full_inverse),
        by_formula(block_inverse),
        by_autograd(layer),
        by_formula(approximate),
        by_formula(diagonal_schur),
    )
    return [Method(name, m.forward, m.backward, m.held) for name, m in zip(NAMES, made, strict=True)]
