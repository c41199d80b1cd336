"""Kronecker products for the table of operators, and their dense twins, entry by entry."""

import numpy as np

from implicitdiff.operators import Kronecker
from tests.operator_draws import Draw, Twin, array, batched


def kronecker(shape: tuple[int, ...], axes: tuple[tuple[int, ...], ...], *, kind: str = "definite"):
    """Factors along groups of axes of `shape`, an identity along the others.

    `kind`: definite; skew (two skew factors, whose product is symmetric and indefinite); unsymmetric.
    """

    def build(draw: Draw) -> Twin:
        factors = []
        for group in axes:
            side = int(np.prod([shape[axis] for axis in group]))
            factor = draw.definite(side)
            if kind == "skew":
                square = draw.normal(side, side)
                factor = square - square.mT
            elif kind == "unsymmetric":
                factor = factor + 0.3 * draw.normal(side, side)
            factors.append(factor)
        arrays = batched(*(array(factor) for factor in factors))
        size, grid = int(np.prod(shape)), list(np.ndindex(*shape))
        twin = np.ones((arrays[0].shape[0], size, size))
        taken = {axis for group in axes for axis in group}
        for i, row in enumerate(grid):
            for j, column in enumerate(grid):
                twin[:, i, j] *= all(row[k] == column[k] for k in range(len(shape)) if k not in taken)
                for factor, group in zip(arrays, axes, strict=True):
                    sizes = [shape[k] for k in group]
                    places = [
                        int(np.ravel_multi_index([at[k] for k in group], sizes)) for at in (row, column)
                    ]
                    twin[:, i, j] *= factor[:, places[0], places[1]]
        return Kronecker(tuple(factors), shape, axes, symmetric=kind != "unsymmetric"), twin

    return build
