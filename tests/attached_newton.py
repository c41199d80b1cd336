"""A solution map that torch differentiates by itself: Newton steps attached to a known solution.

In: a declared problem, one sample, its solution as constants. Out: the same solution as a plain torch function of
the inputs and Parameters, with exact derivatives up to the third; nothing of the library's derivatives is used.
Next: `test_second_order.py` and `test_modes.py` hold the layer against it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, jacrev
from torch.utils._pytree import tree_leaves

import implicitdiff as idf

STEPS = 2  # k quadratic steps from the solution carry the derivatives up to order 2^k - 1


class Declared(torch.nn.Module):
    """What a problem declares, as one module: (f, the equalities joined in a vector)."""

    def __init__(self, problem: idf.Problem, dropped: int) -> None:
        super().__init__()
        self.problem = problem
        self.dropped = dropped

    def forward(self, u: Tensor, *inputs: Any) -> tuple[Tensor, Tensor]:
        value = self.problem.objective(u, *inputs)
        if not self.problem.declares("equality"):
            return value, u.new_zeros(0)
        h = torch.cat([leaf.reshape(-1) for leaf in tree_leaves(self.problem.equality(u, *inputs))])
        return value, h[: h.numel() - self.dropped]


class Attached:
    """(u, lam) of one sample as a function of inputs and Parameters: Newton's method on (D_u f - A'lam, h).

    Attributes:
        u: the solution that the steps start from, a constant.
        lam: its multipliers (p,), from A'lam = D_u f by least squares, constants too.
    """

    def __init__(
        self,
        problem: idf.Problem,
        u: Tensor,
        inputs: Sequence[Any],
        *,
        dropped: int = 0,
        frozen: bool = False,
    ) -> None:
        """Take the solution `u` of one sample.

        Args:
            problem: the declaration; u is one tensor.
            u: the solution at `inputs`.
            inputs: one sample.
            dropped: how many of the last equalities follow from the others.
            frozen: the multipliers stay constants and the constraints are ignored: u is the stationary point of
                L(., lam), which is what backward="approximate" differentiates.
        """
        self.module = Declared(problem, dropped)
        self.u, self.frozen = u.detach(), frozen
        inputs = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in inputs]
        with torch.no_grad():
            jacobian = jacrev(lambda v: self.module(v, *inputs)[1])(self.u).reshape(-1, u.numel())
            gradient = grad(lambda v: self.module(v, *inputs)[0])(self.u).reshape(-1)
            empty = gradient.new_zeros(0)
            self.lam = torch.linalg.pinv(jacobian.mT) @ gradient if jacobian.numel() else empty
        own = {name: value.detach() for name, value in problem.named_parameters()}
        off = self._residual(torch.cat([self.u.reshape(-1), self.lam]), inputs, own).abs().max()
        assert off < 1e-6, f"the truth starts {off:.1e} away from a solution"

    def __call__(self, inputs: Sequence[Any], parameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(u, lam), differentiable."""
        size = self.u.numel()
        free = size if self.frozen else size + len(self.lam)
        rest = self.lam if self.frozen else self.lam[:0]

        def residual(moving: Tensor) -> Tensor:
            return self._residual(torch.cat([moving, rest]), inputs, parameters)[:free]

        point = torch.cat([self.u.reshape(-1), self.lam])[:free]
        for _ in range(STEPS):
            point = point - torch.linalg.inv(jacrev(residual)(point)) @ residual(point)
        return point[:size].reshape(self.u.shape), torch.cat([point[size:], rest])

    def objective(self, u: Tensor, inputs: Sequence[Any], parameters: Mapping[str, Tensor]) -> Tensor:
        """The declared f at u, differentiable in all of them."""
        own = {f"problem.{name}": value for name, value in parameters.items()}
        return functional_call(self.module, own, (u, *inputs))[0]

    def _residual(self, point: Tensor, inputs: Sequence[Any], parameters: Mapping[str, Tensor]) -> Tensor:
        size = self.u.numel()
        own = {f"problem.{name}": value for name, value in parameters.items()}

        def lagrangian(flat: Tensor) -> tuple[Tensor, Tensor]:
            value, h = functional_call(self.module, own, (flat.reshape(self.u.shape), *inputs))
            return value - point[size:] @ h, h

        force, h = grad(lagrangian, has_aux=True)(point[:size])
        return torch.cat([force, h])
