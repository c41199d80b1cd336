"""The paper's Fig. 4: the hand-written backward pass of optimal transport, by block inverse.

Mended where the printed code lost lines: `-=` in both updates of dJdM, the gradients for r and c, and `vHAt1`
spelled one way. Nothing else is changed. It must not be improved; benchmarks and tests are held against it.
"""

import torch
from torch import Tensor


def backward(
    M: Tensor, r: Tensor, c: Tensor, P: Tensor, dJdP: Tensor, gamma: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients for M (b, m, n), r (b, m), c (b, n) from the cotangent dJdP of the plan P (b, m, n)."""
    b, m = M.shape[:2]

    # initialize backward gradients (-v^T H^{-1} B with v = dJdP and B = I)
    dJdM = -1.0 * gamma * P * dJdP

    # compute [vHAt1, vHAt2] = v^T H^{-1} A^T as two blocks
    vHAt1, vHAt2 = dJdM[:, 1:m].sum(dim=2), dJdM.sum(dim=1)

    # compute [v1, v2] = -v^T H^{-1} A^T (A H^{-1} A^T)^{-1} by block inverse
    PdivC = P[:, 1:m] / c.view(b, 1, -1)
    block_11 = torch.linalg.cholesky(
        torch.diag_embed(r[:, 1:m]) - torch.einsum("bij,bkj->bik", P[:, 1:m], PdivC)
    )
    block_12 = torch.cholesky_solve(PdivC, block_11)
    block_22 = torch.diag_embed(1 / c) + torch.einsum("bji,bjk->bik", block_12, PdivC)
    v1 = torch.cholesky_solve(vHAt1.view(b, m - 1, 1), block_11).view(b, m - 1) - torch.einsum(
        "bi,bji->bj", vHAt2, block_12
    )
    v2 = torch.einsum("bi,bij->bj", vHAt2, block_22) - torch.einsum("bi,bij->bj", vHAt1, block_12)

    # compute v^T H^{-1} A^T (A H^{-1} A^T)^{-1} A H^{-1} B - v^T H^{-1} B
    dJdM[:, 1:m] -= v1.view(b, m - 1, 1) * P[:, 1:m]
    dJdM -= v2.view(b, 1, -1) * P

    # compute -v^T H^{-1} A^T (A H^{-1} A^T)^{-1} C for r and c
    dJdr = torch.zeros_like(r)
    dJdr[:, 1:m] = -v1 / gamma
    dJdc = -v2 / gamma

    return dJdM, dJdr, dJdc
