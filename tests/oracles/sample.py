"""One sample of a problem as functions of two flat vectors, and the dense matrices of Eqn. 3 by torch.func.

In: a Problem (its declared hooks only), a point, the inputs of one sample. Out: H, A, B, C, multipliers.
Next: dense.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev
from torch.utils._pytree import tree_flatten, tree_unflatten

from implicitdiff import Problem
from tests.oracles.linalg import join, pseudo_inverse, split


class _Hooks(nn.Module):
    """Makes a hook callable through `functional_call`: `Problem.forward` itself refuses to run."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.problem = problem

    def forward(self, hook: str, *args: Any) -> Any:
        return getattr(self.problem, hook)(*args)


@dataclass(frozen=True)
class Derivatives:
    """Eqn. 3's matrices of one sample over joined leaves: H (m, m), A (p, m), B (m, n), C (p, n)."""

    H: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    stationarity: Tensor  # (m,)  D_u L
    constraint: Tensor  # (p,)  h
    multipliers: Tensor  # (p,)


class Sample:
    """One sample as functions of two flat vectors, u (m,) and theta (n,) = (inputs, Parameters)."""

    def __init__(self, problem: Problem, u: Any, inputs: Sequence[Any]) -> None:
        self._hooks = _Hooks(problem)
        self._u_leaves, self._u_spec = tree_flatten(u)
        self._input_leaves, self._input_spec = tree_flatten(tuple(inputs))
        self._moving = [k for k, leaf in enumerate(self._input_leaves) if differentiable(leaf)]
        self._parameters = {f"problem.{name}": p.detach() for name, p in problem.named_parameters()}
        self.u = join(self._u_leaves)
        self._theta_leaves = [self._input_leaves[k] for k in self._moving] + list(self._parameters.values())
        self.theta = join(self._theta_leaves).to(self.u)
        self.constrained = problem.declares("equality")

    def _call(self, hook: str, u: Tensor, theta: Tensor) -> Any:
        leaves = list(self._input_leaves)
        pieces = split(theta, self._theta_leaves)
        for k in self._moving:
            leaves[k] = pieces.pop(0)
        parameters = dict(zip(self._parameters, pieces, strict=True))
        variables = tree_unflatten(split(u, self._u_leaves), self._u_spec)
        return functional_call(
            self._hooks, parameters, (hook, variables, *tree_unflatten(leaves, self._input_spec))
        )

    def objective(self, u: Tensor, theta: Tensor) -> Tensor:
        """f, a 0-dim tensor."""
        return self._call("objective", u, theta).reshape(())

    def equality(self, u: Tensor, theta: Tensor) -> Tensor:
        """h (p,), all outputs flattened and joined; p = 0 where the problem declares none."""
        if not self.constrained:
            return u.new_zeros(0)
        return join(tree_flatten(self._call("equality", u, theta))[0])

    def lagrangian(self, u: Tensor, lam: Tensor, theta: Tensor) -> Tensor:
        """L = f - lam'h."""
        value = self.objective(u, theta)
        return value - lam @ self.equality(u, theta) if self.constrained else value

    def hessian(self, u: Tensor, lam: Tensor) -> Tensor:
        """H = D_uu L (m, m)."""
        return jacrev(grad(self.lagrangian))(u, lam, self.theta)

    def constraint_jacobian(self, u: Tensor) -> Tensor:
        """A = D_u h (p, m)."""
        return jacrev(self.equality)(u, self.theta) if self.constrained else u.new_zeros(0, u.numel())

    def least_squares_multipliers(self, u: Tensor) -> Tensor:
        """The minimum-norm solution of A' lam = D_u f, by the pseudo-inverse (rank-revealing: A may have
        dependent rows).
        """
        return pseudo_inverse(self.constraint_jacobian(u).mT) @ grad(self.objective)(u, self.theta)

    def derivatives(self, u: Tensor, lam: Tensor | None = None) -> Derivatives:
        """All matrices of Eqn. 3 at (u, lam); without `lam`, at the least-squares multipliers."""
        lam = self.least_squares_multipliers(u) if lam is None else lam
        stationarity = grad(self.lagrangian)
        empty = u.new_zeros(0, self.theta.numel())
        return Derivatives(
            H=self.hessian(u, lam),
            A=self.constraint_jacobian(u),
            B=jacrev(stationarity, argnums=2)(u, lam, self.theta),
            C=jacrev(self.equality, argnums=1)(u, self.theta) if self.constrained else empty,
            stationarity=stationarity(u, lam, self.theta),
            constraint=self.equality(u, self.theta),
            multipliers=lam,
        )

    def unflatten(self, u: Tensor) -> Any:
        """A flat vector over the variables as their pytree."""
        return tree_unflatten(split(u, self._u_leaves), self._u_spec)

    def unflatten_gradient(self, theta: Tensor) -> tuple[list[Tensor | None], dict[str, Tensor]]:
        """A flat vector over theta as one tensor (or None) per input leaf, and one per Parameter."""
        pieces = split(theta, self._theta_leaves)
        leaves: list[Tensor | None] = [None] * len(self._input_leaves)
        for k in self._moving:
            leaves[k] = pieces.pop(0)
        return leaves, {
            name.removeprefix("problem."): p for name, p in zip(self._parameters, pieces, strict=True)
        }


def differentiable(leaf: Any) -> bool:
    """Whether a leaf of the inputs gets a gradient: floating tensors do, integers, numbers and None are
    constants.
    """
    return isinstance(leaf, Tensor) and leaf.is_floating_point()
