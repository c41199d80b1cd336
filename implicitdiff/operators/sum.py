"""A sum of operators, each with its own structure: structure for some terms, automatic differentiation for the rest.

In: operators of the same size. Out: ``Sum``, and ``simplified``, the one operator of a single kind that it equals,
where there is one. Next file: ``autodiff.py``.
"""

from dataclasses import dataclass, replace
from functools import reduce
from typing import ClassVar

import torch
from torch import Tensor

from implicitdiff.errors import StructureError
from implicitdiff.operators.autodiff import Autodiff
from implicitdiff.operators.banded import Banded
from implicitdiff.operators.base import LinearOperator
from implicitdiff.operators.block_diagonal import BlockDiagonal
from implicitdiff.operators.dense import Dense
from implicitdiff.operators.diagonal import Diagonal
from implicitdiff.operators.low_rank import LowRankPlusDiagonal
from implicitdiff.operators.matrix_free import MatrixFree
from implicitdiff.operators.scaled_identity import ScaledIdentity
from implicitdiff.operators.zero import Zero


@dataclass(frozen=True, eq=False)
class Sum(LinearOperator):
    """The sum of its terms.

    Attributes:
        terms: operators of one size and dtype, each of batch B or 1; sums among them are allowed.
    """

    terms: tuple[LinearOperator, ...]
    kind: ClassVar[str] = "sum"

    def __post_init__(self) -> None:
        terms = tuple(self.terms)
        if not terms or not all(isinstance(term, LinearOperator) for term in terms):
            raise StructureError(f"{self.kind}: terms must be operators, at least one, got {self.terms!r}.")
        object.__setattr__(self, "terms", terms)
        sizes, batches = {term.size for term in terms}, {term.batch for term in terms} - {1}
        if len(sizes) > 1 or len(batches) > 1 or len({term.dtype for term in terms}) > 1:
            shown = ", ".join(f"{t.kind} of size {t.size}, batch {t.batch}, {t.dtype}" for t in terms)
            raise StructureError(f"{self.kind}: the terms do not fit together: {shown}.")

    @property
    def size(self) -> int:
        """m."""
        return self.terms[0].size

    @property
    def batch(self) -> int:
        """B, or 1 where every term is shared."""
        return max(term.batch for term in self.terms) if all(t.batch for t in self.terms) else 0

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the terms."""
        return self.terms[0].dtype

    @property
    def device(self) -> torch.device:
        """The device of the terms."""
        return self.terms[0].device

    @property
    def symmetric(self) -> bool:
        """True where every term is symmetric."""
        return all(term.symmetric for term in self.terms)

    def matvec(self, vector: Tensor) -> Tensor:
        """Return the sum of the products, (..., B, m)."""
        return reduce(torch.add, [term.matvec(vector) for term in self.terms])

    def transpose(self) -> "Sum":
        """Return the sum of the transposed terms."""
        return Sum(tuple(term.transpose() for term in self.terms))

    def to_dense(self) -> Tensor:
        """Return (B, m, m)."""
        return reduce(torch.add, [term.to_dense() for term in self.terms])


def simplified(operator: LinearOperator, *, write_out: bool = False) -> LinearOperator:
    """Return the operator as one of a single kind, where its terms make one; itself otherwise.

    Diagonals go into what else is there; factors of low rank stand side by side; bands of the same chains and blocks of
    the same axes are added; with a dense term everything is written out. What no kind covers (bands beside low rank) is
    written out too, if none of the terms is known by its products alone.

    Args:
        operator: any operator.
        write_out: whether terms known by their products may be written out as well: m products each.
    """
    if not isinstance(operator, Sum):
        return Dense(operator.to_dense()) if write_out and _by_products(operator) else operator
    terms = [term for term in _flattened(operator) if not isinstance(term, Zero)]
    if not terms:
        return operator.terms[0]
    free = [term for term in terms if _by_products(term)]
    if free and not write_out:
        rest = [term for term in terms if not _by_products(term)]
        if not rest:
            return Sum(tuple(free)) if len(free) > 1 else free[0]
        return Sum((simplified(Sum(tuple(rest))), *free))
    plain = [term for term in terms if isinstance(term, ScaledIdentity | Diagonal)]
    others = [term for term in terms if not isinstance(term, ScaledIdentity | Diagonal)]
    diagonal = reduce(torch.add, [_entries(term) for term in plain]) if plain else None
    if not others:
        assert diagonal is not None
        return Diagonal(diagonal.expand(diagonal.shape[0], operator.size))
    found = _added(others, diagonal)
    return found if found is not None else Dense(operator.to_dense(), symmetric=operator.symmetric)


def _flattened(operator: LinearOperator) -> list[LinearOperator]:
    if not isinstance(operator, Sum):
        return [operator]
    return [term for part in operator.terms for term in _flattened(part)]


def _by_products(operator: LinearOperator) -> bool:
    return isinstance(operator, MatrixFree | Autodiff)


def _entries(operator: LinearOperator) -> Tensor:
    if isinstance(operator, ScaledIdentity):
        return operator.scale[:, None]
    assert isinstance(operator, Diagonal)
    return operator.diagonal


def _added(terms: list[LinearOperator], diagonal: Tensor | None) -> LinearOperator | None:
    """The terms of one kind with the diagonal as one operator of that kind; None where there is none."""
    low_rank = [term for term in terms if isinstance(term, LowRankPlusDiagonal)]
    if len(low_rank) == len(terms):
        return _side_by_side(low_rank, diagonal)
    banded = [term for term in terms if isinstance(term, Banded)]
    if len(banded) == len(terms):
        return _added_bands(banded, diagonal)
    blocks = [term for term in terms if isinstance(term, BlockDiagonal)]
    if len(blocks) == len(terms) and len({(b.shape, b.block_axes) for b in blocks}) == 1:
        return _added_blocks(blocks, diagonal)
    if diagonal is None and len(terms) == 1:
        return terms[0]
    return None


def _side_by_side(terms: list[LowRankPlusDiagonal], diagonal: Tensor | None) -> LowRankPlusDiagonal:
    parts = [term.diagonal for term in terms] + ([] if diagonal is None else [diagonal])
    batch = max(tensor.shape[0] for term in terms for tensor in term.parameters())

    def beside(factors: list[Tensor]) -> Tensor:
        own = max(factor.shape[0] for factor in factors)
        return torch.cat([factor.expand(own, *factor.shape[1:]) for factor in factors], dim=-1)

    total = reduce(torch.add, parts)
    left, weights = beside([term.left for term in terms]), beside([term.weights for term in terms])
    right = None
    if any(term.right is not None for term in terms):
        right = beside([term.right_factor for term in terms])
    assert batch >= 1
    return LowRankPlusDiagonal(total, left, weights, right)


def _added_bands(terms: list[Banded], diagonal: Tensor | None) -> Banded | None:
    """Bands along the same axis of the same chains, padded to the widest."""
    first = terms[0]
    if len({(term.shape, term.band_axis, term.group_axes) for term in terms}) > 1:
        return None
    lower, upper = max(term.lower for term in terms), max(term.upper for term in terms)
    padded = [
        torch.nn.functional.pad(term.bands, (0, 0, 0, 0, 0, 0, lower - term.lower, upper - term.upper))
        for term in terms
    ]
    bands = reduce(torch.add, padded)
    if diagonal is not None:
        entries = first.split(diagonal.expand(diagonal.shape[0], first.size))
        if entries.shape[0] > bands.shape[0]:
            bands = bands.expand(entries.shape[0], *bands.shape[1:])
        bands = bands.clone()
        bands[:, :, lower].diagonal(dim1=-2, dim2=-1).add_(entries)
    symmetric = all(term.symmetric for term in terms)
    return replace(first, bands=bands, lower=lower, upper=upper, symmetric=symmetric)


def _added_blocks(terms: list[BlockDiagonal], diagonal: Tensor | None) -> BlockDiagonal:
    first, blocks = terms[0], reduce(torch.add, [term.blocks for term in terms])
    if diagonal is not None:
        entries = first.split(diagonal.expand(diagonal.shape[0], first.size))
        blocks = blocks + torch.diag_embed(entries)
    return replace(first, blocks=blocks, symmetric=all(term.symmetric for term in terms))
