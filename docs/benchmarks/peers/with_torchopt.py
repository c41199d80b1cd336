"""torchopt: implicit differentiation of a stationarity condition, its system solved by conjugate gradients."""

import torch
import torchopt
from torch import Tensor

from benchmarks import byhand
from benchmarks.work import Forward, Work


def layer(work: Work) -> Forward:
    """The KKT conditions of a QP in (u, lam); the solution itself comes from the hand-written layer."""
    _, m, _ = work.size

    def conditions(z: Tensor, q: Tensor, b: Tensor, Q: Tensor, A: Tensor) -> Tensor:
        u, lam = z[:, :m], z[:, m:]
        stationary = (Q @ u[..., None] - A.mT @ lam[..., None])[..., 0] + q
        return torch.cat([stationary, b - (A @ u[..., None])[..., 0]], 1)

    # What is differentiated has to come first in its signature.
    @torchopt.diff.implicit.custom_root(
        conditions, argnums=(1, 2), solve=torchopt.linear_solve.solve_normal_cg()
    )
    def solved(start: Tensor, q: Tensor, b: Tensor, Q: Tensor, A: Tensor) -> Tensor:
        with torch.no_grad():
            u = byhand.QuadraticByHand.apply(Q, q, A, b)
            slope = Q @ u[..., None] + q[..., None]
            lam = torch.cholesky_solve(A @ slope, torch.linalg.cholesky_ex(A @ A.mT).L)
            return torch.cat([u, lam[..., 0]], 1)

    def forward(Q: Tensor, q: Tensor, A: Tensor, b: Tensor) -> Tensor:
        return solved(torch.zeros_like(q), q, b, Q, A)[:, :m]

    return forward
