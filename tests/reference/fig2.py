"""The paper's Fig. 2 and Table 1: the hand-written backward pass of robust vector pooling.

`v` in place of the misprinted `y_grad`, today's names of the torch functions, and nothing else changed: the
same operations in the same order, so the same memory. It must not be improved; benchmarks and tests are held
against it.
"""

import torch
from torch import Tensor


def kappa(penalty: str, z: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """(kappa_1, kappa_2) of Table 1 at z >= 0."""
    if penalty == "quadratic":
        return torch.ones_like(z), torch.zeros_like(z)
    if penalty == "pseudo-huber":
        t = 1 + (z / alpha) ** 2
        return t**-0.5, -1 / alpha**2 * t**-1.5
    if penalty == "huber":
        near = z <= alpha
        return torch.where(near, 1, alpha / z), torch.where(near, 0, -alpha / z**3)
    if penalty == "welsch":
        t = torch.exp(-(z**2) / (2 * alpha**2))
        return t / alpha**2, -t / alpha**4
    if penalty == "truncated-quadratic":
        return (z <= alpha).to(z.dtype), torch.zeros_like(z)
    raise ValueError(f"Table 1 has no penalty {penalty!r}")


def backward(x: Tensor, y: Tensor, v: Tensor, penalty: str, alpha: float) -> Tensor:
    """The gradient for x (b, m, n) from the cotangent v (b, m) of the solution y (b, m)."""
    b, m = x.shape[:2]
    y_minus_x = y.view(b, m, 1) - x.view(b, m, -1)
    z = torch.linalg.norm(y_minus_x, dim=1, keepdim=True) + 1.0e-9
    k1, k2 = kappa(penalty, z, alpha)

    if torch.all(k2 == 0.0):
        return (k1 * (v / k1.sum(dim=2)).view(b, m, 1)).reshape(x.shape)

    H = k1.sum(dim=2).view(b, 1, 1) * torch.eye(m, dtype=x.dtype).view(1, m, m) + torch.einsum(
        "bik,bjk->bij", y_minus_x, k2 * y_minus_x
    )
    L = torch.linalg.cholesky(H)
    w = torch.cholesky_solve(v.view(b, m, -1), L).view(b, m)
    u = torch.einsum("bi,bik->bk", w, k2 * y_minus_x)
    return (k1 * w.view(b, m, 1) + torch.einsum("bk,bik->bik", u, y_minus_x)).reshape(x.shape)
