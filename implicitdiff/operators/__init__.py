"""Structured matrices: what a Hessian, a constraint Jacobian product or a Schur complement is.

In: tensors with the batch axis first. Out: the kinds of the contract, each a frozen dataclass with matvec,
transpose and to_dense. The package ``solvers`` inverts them. Start reading at ``base.py``.
"""

from implicitdiff.operators.autodiff import Autodiff
from implicitdiff.operators.banded import Banded
from implicitdiff.operators.base import LinearOperator
from implicitdiff.operators.block import Block
from implicitdiff.operators.block_diagonal import BlockDiagonal
from implicitdiff.operators.dense import Dense
from implicitdiff.operators.diagonal import Diagonal
from implicitdiff.operators.general import general
from implicitdiff.operators.grouped_low_rank import GroupedLowRank
from implicitdiff.operators.kronecker import Kronecker
from implicitdiff.operators.low_rank import LowRankPlusDiagonal
from implicitdiff.operators.low_rank_update import LowRankUpdate
from implicitdiff.operators.matrix_free import MatrixFree
from implicitdiff.operators.samples import select_samples
from implicitdiff.operators.scaled_identity import ScaledIdentity
from implicitdiff.operators.sparse import Sparse
from implicitdiff.operators.sum import Sum, simplified
from implicitdiff.operators.zero import Zero

__all__ = [
    "Autodiff",
    "Banded",
    "Block",
    "BlockDiagonal",
    "Dense",
    "Diagonal",
    "GroupedLowRank",
    "Kronecker",
    "LinearOperator",
    "LowRankPlusDiagonal",
    "LowRankUpdate",
    "MatrixFree",
    "ScaledIdentity",
    "Sparse",
    "Sum",
    "Zero",
    "general",
    "select_samples",
    "simplified",
]
