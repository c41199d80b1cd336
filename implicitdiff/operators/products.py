"""The two batched contractions from which operators and solvers are made.

In: matrices (B or 1, p, q) and vectors (..., B or 1, q). Out: products that never repeat a shared matrix
for each sample or each right-hand side. Next file: any operator, for instance ``low_rank.py``.
"""

import torch
from torch import Tensor

from implicitdiff.operators.base import common_batch


def batched_matvec(matrix: Tensor, vector: Tensor) -> Tensor:
    """Return matrix @ vector for each sample and each leading index of the vector.

    The vector stands on the left of the transposed matrix: on a CPU that is up to twice as fast as a matrix
    times a one-column matrix. Plain broadcasting would copy the matrix once per leading index.

    Args:
        matrix: (B or 1, p, q)
        vector: (..., B or 1, q)

    Returns:
        (..., B, p); cost 2 p q flops for each vector.
    """
    if matrix.shape[0] == 1:
        return vector @ matrix[0].mT
    batch, rows, _ = matrix.shape
    lead = vector.shape[:-2]
    if not lead:
        return (vector[:, None, :] @ matrix.mT)[:, 0]
    stacked = vector.expand(*lead, batch, -1).flatten(0, -3).movedim(0, 1)
    return (stacked @ matrix.mT).movedim(1, 0).reshape(*lead, batch, rows)


def rows_times(rows: Tensor, matrix: Tensor) -> Tensor:
    """Return rows @ matrix for rows (B, R, p) and a matrix (B or 1, p, q), never repeated for the samples.

    ``bmm`` takes a third of the time of ``matmul`` where the matrices are small.
    """
    if matrix.shape[0] == rows.shape[0]:
        return torch.bmm(rows, matrix)
    return torch.matmul(rows, matrix[0])


def weighted_product(
    left: Tensor, weights: Tensor, right: Tensor, *, out: Tensor | None = None, alpha: float = 1.0
) -> Tensor:
    """Return left diag(weights) right', or add ``alpha`` times it to ``out`` in place.

    The only temporary is a scaled copy of the smaller factor. It has no more entries than what exists anyway,
    also where the factor is shared by the batch and the weights are not: then the batch is worked off in
    pieces. A single weight a sample scales the product instead.

    Args:
        left: (B or 1, p, k)
        weights: (B or 1, k), or (B or 1, 1) for a multiple of the identity.
        right: (B or 1, q, k)
        out: (B, p, q), with the full batch of the operands; it is changed in place.
        alpha: the factor of the product when ``out`` is given.

    Returns:
        (B, p, q); cost 2 p q k flops a sample.
    """
    batch = common_batch(left, weights, right) if out is None else out.shape[0]
    rows, inner, columns = left.shape[-2], left.shape[-1], right.shape[-2]
    if weights.shape[1] == 1:
        product = (torch.bmm if left.shape[0] == right.shape[0] else torch.matmul)(left, right.mT)
        if out is not None:
            return out.addcmul_(product, weights[:, :, None], value=alpha)
        return (
            product.mul_(weights[:, :, None]) if product.shape[0] == batch else product * weights[:, :, None]
        )
    beta = 1.0
    if out is None:
        beta, alpha = 0.0, 1.0
        out = torch.empty(batch, rows, columns, dtype=left.dtype, device=left.device)
    left_is_smaller = rows <= columns
    smaller, other = (left, right) if left_is_smaller else (right, left)
    step = batch
    if smaller.shape[0] == 1 < weights.shape[0]:
        one_copy = max(1, smaller.shape[1] * inner)
        # As many samples at a time as fit into what is there in any case: the result, or the weights.
        step = max(1, max(out.numel(), weights.numel()) // one_copy)
    for start in range(0, batch, max(1, step)):
        piece = out[start : start + step]
        scaled = _part(smaller, start, step) * _part(weights, start, step)[:, None, :]
        plain = _part(other, start, step)
        first, second = (scaled, plain) if left_is_smaller else (plain, scaled)
        shape = (piece.shape[0], -1, -1)
        piece.baddbmm_(first.expand(shape), second.expand(shape).mT, beta=beta, alpha=alpha)
    return out


def _part(tensor: Tensor, start: int, step: int) -> Tensor:
    """Return the samples from ``start`` on, ``step`` of them; a shared tensor as it is."""
    return tensor if tensor.shape[0] == 1 else tensor[start : start + step]
