"""Taking samples out of a batched operator: a fallback redoes only the samples that need it.

In: an operator and sample numbers. Out: the operator of those samples. Next: the package ``solvers``.
"""

import dataclasses
from functools import singledispatch

from torch import Tensor

from implicitdiff.operators.base import LinearOperator
from implicitdiff.operators.block import Block
from implicitdiff.operators.kronecker import Kronecker
from implicitdiff.operators.low_rank_update import LowRankUpdate
from implicitdiff.operators.matrix_free import MatrixFree
from implicitdiff.operators.sparse import Sparse
from implicitdiff.operators.zero import Zero


@singledispatch
def select_samples(operator: LinearOperator, samples: Tensor) -> LinearOperator:
    """Return the operator of the samples numbered by ``samples`` (an index tensor).

    Shared parameters (batch axis 1) stay shared; a batch of 1 is returned as it is.
    """
    # Every kind that is registered by no function of its own keeps the batch first in all its tensors.
    changes = {
        field.name: value[samples]
        for field in dataclasses.fields(operator)  # type: ignore[arg-type]
        if isinstance(value := getattr(operator, field.name), Tensor) and value.shape[0] != 1
    }
    return dataclasses.replace(operator, **changes) if changes else operator  # type: ignore[type-var]


@select_samples.register
def _select_zero(operator: Zero, samples: Tensor) -> Zero:
    return operator if operator.batch == 1 else dataclasses.replace(operator, batch=len(samples))


@select_samples.register
def _select_block(operator: Block, samples: Tensor) -> Block:
    def pick(block: Tensor | LinearOperator | None) -> Tensor | LinearOperator | None:
        if isinstance(block, LinearOperator):
            return select_samples(block, samples)
        return block if block is None or block.shape[0] == 1 else block[samples]

    return dataclasses.replace(operator, blocks=tuple(tuple(map(pick, row)) for row in operator.blocks))


@select_samples.register
def _select_sparse(operator: Sparse, samples: Tensor) -> Sparse:
    values = operator.values if operator.values.shape[0] == 1 else operator.values[samples]
    if len(operator.patterns) == 1:
        return dataclasses.replace(operator, values=values)
    patterns = tuple(operator.patterns[b] for b in samples.tolist())
    widest = max((len(p) for p in patterns), default=0)
    return dataclasses.replace(operator, values=values[:, :widest], patterns=patterns)


@select_samples.register
def _select_update(operator: LowRankUpdate, samples: Tensor) -> LowRankUpdate:
    def pick(factor: Tensor) -> Tensor:
        return factor if factor.shape[0] == 1 else factor[samples]

    return dataclasses.replace(
        operator,
        base=select_samples(operator.base, samples),
        left=pick(operator.left),
        weights=pick(operator.weights),
        right=None if operator.right is None else pick(operator.right),
    )


@select_samples.register
def _select_kronecker(operator: Kronecker, samples: Tensor) -> Kronecker:
    factors = tuple(f if f.shape[0] == 1 else f[samples] for f in operator.factors)
    return dataclasses.replace(operator, factors=factors)


@select_samples.register
def _select_matrix_free(operator: MatrixFree, samples: Tensor) -> MatrixFree:
    if operator.batch == 1:
        return operator

    def restricted(product):  # type: ignore[no-untyped-def]
        def of_some(vector: Tensor) -> Tensor:
            # The product only knows whole batches: the other samples get the zero vector.
            whole = vector.new_zeros(*vector.shape[:-2], operator.batch, operator.size)
            whole[..., samples, :] = vector
            return product(whole)[..., samples, :]

        return None if product is None else of_some

    return dataclasses.replace(
        operator,
        product=restricted(operator.product),
        transposed_product=restricted(operator.transposed_product),
        batch=len(samples),
    )
