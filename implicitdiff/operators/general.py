"""An operator without the promise of symmetry, and its transpose: the Jacobian of a system of equations.

In: an operator as the emitted code builds it. Out: the same matrix, stated as not symmetric. Next file: ``base.py``.
"""

from dataclasses import fields, replace

from implicitdiff.operators.base import LinearOperator
from implicitdiff.operators.block import Block


def general(operator: LinearOperator, *, transpose: bool = False) -> LinearOperator:
    """Return the operator as one that need not be symmetric, or its transpose.

    Kinds whose symmetry follows from their parameters (diagonal, low rank with one factor) stay as they are.

    Args:
        operator: any operator.
        transpose: whether to transpose it.
    """
    if isinstance(operator, Block):
        number = range(len(operator.sizes))
        grid = tuple(
            tuple(general(operator.corners[i]) if i == j else operator.blocks[i][j] for j in number)
            for i in number
        )
        operator = Block(grid, operator.sizes, symmetric=False)
    elif any(field.name == "symmetric" for field in fields(operator)):  # type: ignore[arg-type]
        operator = replace(operator, symmetric=False)  # type: ignore[type-var]
    return operator.transpose() if transpose else operator
