"""Rank-revealing linear algebra and flat vectors for the oracles: everything by singular values, in float64.

The first of the oracle files; next: sample.py.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

RANK_TOLERANCE = (
    1e-10  # of the largest singular value: what is below counts as a proved dependence (float64 only)
)


def pseudo_inverse(matrix: Tensor) -> Tensor:
    """The Moore-Penrose inverse, singular values below `RANK_TOLERANCE` of the largest counted as zero."""
    return torch.linalg.pinv(matrix, rtol=RANK_TOLERANCE)


def rank(matrix: Tensor) -> int:
    """The number of singular values above `RANK_TOLERANCE` of the largest."""
    return int(torch.linalg.matrix_rank(matrix, rtol=RANK_TOLERANCE)) if matrix.numel() else 0


def null_space(matrix: Tensor) -> Tensor:
    """An orthonormal basis (m, m - rank) of the null space of a matrix (p, m)."""
    if matrix.shape[0] == 0:
        return torch.eye(matrix.shape[1], dtype=matrix.dtype)
    return torch.linalg.svd(matrix, full_matrices=True)[2][rank(matrix) :].mT


def join(leaves: Sequence[Tensor]) -> Tensor:
    return torch.cat([leaf.reshape(-1) for leaf in leaves]) if leaves else torch.zeros(0, dtype=torch.float64)


def split(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    return [
        piece.reshape(leaf.shape)
        for piece, leaf in zip(flat.split([leaf.numel() for leaf in like]), like, strict=True)
    ]
