"""The Hessian of a function by automatic differentiation: the terms of a sum that nobody has derived by hand.

In: a scalar function and a point. Out: ``Autodiff``, known by its products. Next file: ``sum.py``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from implicitdiff.errors import StructureError
from implicitdiff.operators.base import LinearOperator
from implicitdiff.pytrees import flatten, unflatten


@dataclass(frozen=True, eq=False)
class Autodiff(LinearOperator):
    """D_uu function(u), its products by one forward and one reverse pass each.

    Attributes:
        function: a scalar function of one sample's variable, in torch operations.
        point: the variable, a tensor or a pytree of tensors; its entries in order are those of the flat vector.
    """

    function: Callable[[Any], Tensor]
    point: Any
    kind: ClassVar[str] = "autodiff"

    def __post_init__(self) -> None:
        leaves = flatten(self.point)[0]
        if not callable(self.function) or not leaves or not all(isinstance(x, Tensor) for x in leaves):
            raise StructureError(
                f"{self.kind}: expected a function and the variable of one sample, got "
                f"{type(self.function).__name__} and {type(self.point).__name__}."
            )

    @property
    def size(self) -> int:
        """m."""
        return sum(leaf.numel() for leaf in flatten(self.point)[0])

    @property
    def batch(self) -> int:
        """1: one sample."""
        return 1

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the point."""
        first: Tensor = flatten(self.point)[0][0]
        return first.dtype

    @property
    def device(self) -> torch.device:
        """The device of the point."""
        first: Tensor = flatten(self.point)[0][0]
        return first.device

    def matvec(self, vector: Tensor) -> Tensor:
        """Return the product (..., 1, m)."""
        leaves, spec = flatten(self.point)
        sizes = [leaf.numel() for leaf in leaves]

        def value(*parts: Tensor) -> Tensor:
            return self.function(unflatten(parts, spec))

        pull: Any = torch.func.vjp(torch.func.grad(value, argnums=tuple(range(len(leaves)))), *leaves)[1]

        def product(row: Tensor) -> Tensor:
            parts = [part.reshape(leaf.shape) for part, leaf in zip(row.split(sizes), leaves, strict=True)]
            return torch.cat([image.reshape(-1) for image in pull(tuple(parts))])

        if vector.dim() == 1:
            return product(vector)
        rows = vector.reshape(-1, self.size)
        return torch.func.vmap(product)(rows).reshape(vector.shape)

    def transpose(self) -> "Autodiff":
        """Return the operator itself."""
        return self

    def to_dense(self) -> Tensor:
        """Return (1, m, m): m products."""
        unit = torch.eye(self.size, dtype=self.dtype, device=self.device)
        return self.matvec(unit[:, None])[:, 0][None]
