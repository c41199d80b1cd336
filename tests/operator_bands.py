"""Rows of the table of operators that are banded matrices.

In: draws. Out: ``banded``, the builder of ``Banded`` operators and their twins. Next: operator_cases.py.
"""

import numpy as np
import torch
from torch import Tensor

from implicitdiff.operators import Banded
from tests.operator_draws import Draw, Twin, array


def symmetrised(bands: Tensor, width: int) -> Tensor:
    """Copy the upper half of the band onto the lower one; the diagonal blocks become their symmetric part."""
    bands = bands.clone()
    length = bands.shape[3]
    bands[:, :, width] = (bands[:, :, width] + bands[:, :, width].mT) / 2
    for d in range(1, min(width, length - 1) + 1):
        bands[:, :, width - d, d:] = bands[:, :, width + d, : length - d].mT
    return bands


def outside(length: int, lower: int, upper: int) -> Tensor:
    """Which entries (W, T) of a band lie outside the matrix."""
    columns = torch.arange(length) + torch.arange(-lower, upper + 1)[:, None]
    return (columns < 0) | (columns >= length)


def twin_of(operator: Banded) -> np.ndarray:
    """The dense matrix, entry by entry from the definition of ``bands``."""
    shape, values = operator.shape, array(operator.bands)
    inside = [a for a in range(len(shape)) if a != operator.band_axis and a not in operator.group_axes]

    def number(index: tuple[int, ...], axes: list[int] | tuple[int, ...]) -> int:
        place = 0
        for axis in axes:
            place = place * shape[axis] + index[axis]
        return place

    size = int(np.prod(shape))
    twin = np.zeros((len(values), size, size))
    for row in np.ndindex(*shape):
        for column in np.ndindex(*shape):
            k = column[operator.band_axis] - row[operator.band_axis] + operator.lower
            same = all(row[a] == column[a] for a in operator.group_axes)
            if same and 0 <= k < values.shape[2]:
                twin[:, number(row, range(len(shape))), number(column, range(len(shape)))] = values[
                    :,
                    number(row, operator.group_axes),
                    k,
                    row[operator.band_axis],
                    number(row, inside),
                    number(column, inside),
                ]
    return twin


def banded(
    shape: tuple[int, ...],
    axis: int,
    groups: tuple[int, ...],
    lower: int,
    upper: int,
    kind: str = "definite",
):
    """kind: "definite", "indefinite", "unsymmetric" or "singular" (differences: constants are the kernel of s = 1)."""

    def build(draw: Draw) -> Twin:
        inside = int(
            np.prod([shape[a] for a in range(len(shape)) if a != axis and a not in groups], dtype=int)
        )
        chains, width = int(np.prod([shape[a] for a in groups], dtype=int)), lower + 1 + upper
        if kind == "singular":
            weights = draw.positive(chains, shape[axis] - 1)
            bands = weights.new_zeros(len(weights), chains, width, shape[axis], 1, 1)
            bands[:, :, 1, :-1, 0, 0] += weights
            bands[:, :, 1, 1:, 0, 0] += weights
            bands[:, :, 2, :-1, 0, 0] = -weights
        else:
            bands = draw.normal(chains, width, shape[axis], inside, inside)
        if kind != "unsymmetric":
            bands = symmetrised(bands, lower)
        if kind == "definite":
            bands[:, :, lower] += 3.0 * (width * inside) ** 0.5 * torch.eye(inside, dtype=draw.dtype)
        # What lies outside is never read.
        bands[:, :, outside(shape[axis], lower, upper)] = torch.nan
        operator = Banded(bands, shape, axis, groups, lower, upper, symmetric=kind != "unsymmetric")
        return operator, twin_of(operator)

    return build
