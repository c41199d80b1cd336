"""Comparing gradients: a relative error that NaN cannot slip through, and the same modulo a null space.

Gradients of inputs in dependent constraints (r and c of optimal transport) are defined modulo
`gradient_null_vectors`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.oracles.linalg import RANK_TOLERANCE, join, split


def relative_error(actual: Tensor, expected: Tensor, floor: float = 1e-3) -> float:
    """max |actual - expected| / max(max |expected|, floor): the floor keeps a gradient of zero from dividing
    by zero.
    """
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    if expected.numel() == 0:
        return 0.0
    error = float((actual - expected).abs().max()) / max(float(expected.abs().max()), floor)
    return error if error == error else float("inf")  # NaN must not pass as "not greater than the tolerance"


def compare_modulo(
    actual: Sequence[Tensor], expected: Sequence[Tensor], null_vectors: Sequence[Sequence[Tensor]] = ()
) -> float:
    """The largest relative error over leaves after the components along `null_vectors` have been removed from
    both.
    """
    assert len(actual) == len(expected), f"{len(actual)} gradients instead of {len(expected)}"
    for k, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.shape == e.shape, f"gradient {k} has shape {tuple(a.shape)} instead of {tuple(e.shape)}"
    if null_vectors:
        basis, singular, _ = torch.linalg.svd(
            torch.stack([join(n) for n in null_vectors], 1), full_matrices=False
        )
        basis = basis[:, singular > RANK_TOLERANCE * singular.max()]
        actual, expected = (
            split(flat - basis @ (basis.mT @ flat), like)
            for like in (actual, expected)
            for flat in [join(like)]
        )
    return max((relative_error(a, e) for a, e in zip(actual, expected, strict=True)), default=0.0)
