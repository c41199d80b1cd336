"""cvxpylayers: a disciplined parametrised program in CVXPY, solved as a cone program on the CPU."""

import cvxpy
import torch
from cvxpylayers.torch import CvxpyLayer
from torch import Tensor

from benchmarks.work import Forward, Work


def layer(work: Work) -> Forward:
    """min |R u|^2 / 2 + q'u  s.t.  A u = b, with R'R = Q: its rules want the root of Q as the parameter."""
    _, m, p = work.size
    u = cvxpy.Variable(m)
    R, q = cvxpy.Parameter((m, m)), cvxpy.Parameter(m)
    A, b = cvxpy.Parameter((p, m)), cvxpy.Parameter(p)
    program = cvxpy.Problem(cvxpy.Minimize(0.5 * cvxpy.sum_squares(R @ u) + q @ u), [A @ u == b])
    solve = CvxpyLayer(program, parameters=[R, q, A, b], variables=[u])

    def forward(Q: Tensor, q: Tensor, A: Tensor, b: Tensor) -> Tensor:
        root = torch.linalg.cholesky_ex(Q).L.mT
        return solve(root, q, A, b)[0]

    return forward
