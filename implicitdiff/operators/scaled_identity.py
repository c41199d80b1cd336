"""A multiple of the identity: the Hessian of a sum of squared distances.

In: one number a sample. Out: ``ScaledIdentity``. Next file: ``diagonal.py``.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from implicitdiff.operators.base import StoredOperator, check_parameters


@dataclass(frozen=True, eq=False)
class ScaledIdentity(StoredOperator):
    """scale * I.

    Attributes:
        scale: (B,) or (1,)
        size: m.
    """

    scale: Tensor
    size: int
    kind: ClassVar[str] = "scaled-identity"

    def __post_init__(self) -> None:
        check_parameters(self.kind, {"scale": (self.scale, ())})

    def parameters(self) -> tuple[Tensor, ...]:
        """Return (scale,)."""
        return (self.scale,)

    def matvec(self, vector: Tensor) -> Tensor:
        """Return scale * vector, (..., B, m); m flops a vector."""
        return self.scale[:, None] * vector

    def transpose(self) -> "ScaledIdentity":
        """Return the operator itself."""
        return self

    def to_dense(self) -> Tensor:
        """Return (B, m, m)."""
        return torch.diag_embed(self.scale[:, None].expand(-1, self.size))
