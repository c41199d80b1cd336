"""The traced problem for a whole batch, and every contraction of its derivatives that automatic differentiation gives.

In: the one-sample functions of `graph.trace.Trace` and, for each tensor of theta, whether it carries the batch axis.
Out: plain functions of (u, lam, theta), written only with torch.func, so that they may be differentiated to any
order, in reverse and forward mode, and vmapped. Next: `derivatives/autodiff.py` (the dense plan), `autograd.py`
(second derivatives).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from implicitdiff.graph.trace import Trace, TracedFunction

Leaves = tuple[Tensor, ...]
Given = Sequence[Tensor]


@dataclass(frozen=True)
class Lagrangian:
    """L(u, lam, theta) = f - lam'h of a batch of B samples, and contractions of its derivatives.

    Everywhere u are the leaves of the variables (B, *shape), lam those of the multipliers, theta the inputs and the
    tensors of the problem in the order of `trace.placeholders`. The pair z = (w, s) has the shapes of (u, lam).

    With F = (D_u L, -h), K = dF/d(u, lam) = [[H, -A'], [-A, 0]] is symmetric, so one scalar,
    `pairing` = <F, z>, generates everything: its gradient in (u, lam) is K z, that in theta is the input gradient.

    Attributes:
        trace: the traced functions of one sample.
        batched: for each theta, whether it has a batch axis; the others are shared by all samples.
    """

    trace: Trace
    batched: tuple[bool, ...]

    @property
    def variables(self) -> int:
        """The number of leaves of u."""
        return len(self.trace.variables)

    @property
    def multipliers(self) -> int:
        """The number of leaves of lam (0 without constraints)."""
        return 0 if self.trace.equality is None else len(self.trace.equality.output_shapes)

    def mapped(self, function: TracedFunction, u: Given, theta: Given) -> Any:
        """A function of one sample for the whole batch, (B, *shape)."""
        dims = (0,) * len(u) + tuple(0 if flag else None for flag in self.batched)
        return torch.func.vmap(function.module, in_dims=dims, randomness="error")(*u, *theta)

    def objective(self, u: Given, theta: Given) -> Tensor:
        """f of every sample, (B,)."""
        return self.mapped(self.trace.objective, u, theta)

    def constraints(self, u: Given, theta: Given) -> Leaves:
        """The leaves of h, each (B, *shape); empty without constraints."""
        if self.trace.equality is None:
            return ()
        return tuple(self.mapped(self.trace.equality, u, theta))

    def corner(self, theta: Given, like: Tensor) -> Leaves | None:
        """The diagonal D of K's corner as leaves like lam (B, *shape); None where it is 0 (see `graph/active.py`)."""
        if not any(index is not None for index in self.trace.corner):
            return None
        assert self.trace.equality is not None
        return tuple(
            like.new_zeros((like.shape[0], *shape)) if index is None else theta[index - self.variables]
            for index, shape in zip(self.trace.corner, self.trace.equality.output_shapes, strict=True)
        )

    def total(self, u: Given, lam: Given, theta: Given) -> Tensor:
        """f - lam'h summed over the batch: its derivatives in batched tensors are those of each sample."""
        value = self.objective(u, theta).sum()
        for multiplier, h in zip(lam, self.constraints(u, theta), strict=True):
            value = value - (multiplier * h).sum()
        return value

    def gradient(self, u: Given, lam: Given, theta: Given) -> Leaves:
        """D_u L, with the shapes of u."""
        return gradient_of(lambda *v: self.total(v, lam, theta), u)

    def inside(self, u: Given, lam: Given, theta: Given) -> tuple[Leaves, Leaves]:
        """u moved off the edge of the domain, and the masks of the entries moved.

        An entry of u that underflowed to 0 where D_u L is not finite there (u log u) is set to the smallest positive
        number, by an addition, so that derivatives in u pass.
        """
        gradient = self.gradient(u, lam, theta)
        lost = tuple((leaf == 0) & ~torch.isfinite(g) for leaf, g in zip(u, gradient, strict=True))
        moved = [
            leaf + mask.to(leaf.dtype) * torch.finfo(leaf.dtype).tiny
            for leaf, mask in zip(u, lost, strict=True)
        ]
        return tuple(moved), lost

    def objective_gradient(self, u: Given, theta: Given) -> Leaves:
        """D_u f, with the shapes of u."""
        return gradient_of(lambda *v: self.objective(v, theta).sum(), u)

    def constraint_pullback(self, u: Given, theta: Given, s: Given) -> Leaves:
        """A's, with the shapes of u."""

        def weighted(*v: Tensor) -> Tensor:
            return sum_of_products(self.constraints(v, theta), s)

        return gradient_of(weighted, u)

    def pairing(self, u: Given, lam: Given, theta: Given, w: Given, s: Given) -> Tensor:
        """<F, z> = <D_u L, w> - <h, s>, summed over the batch."""
        value = sum_of_products(self.gradient(u, lam, theta), w)
        if s:
            value = value - sum_of_products(self.constraints(u, theta), s)
        return value

    def pull_inputs(
        self, u: Given, lam: Given, theta: Given, w: Given, s: Given, needs: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        """F_theta' z: the gradient in theta of <D_u L, w> - <h, s>; None where not needed."""
        active = [index for index, need in enumerate(needs) if need]
        grads = gradient_of(
            lambda *values: self.pairing(u, lam, replaced(theta, active, values), w, s),
            [theta[i] for i in active],
        )
        found = dict(zip(active, grads, strict=True))
        return tuple(found.get(index) for index in range(len(theta)))

    def kkt_product(self, u: Given, lam: Given, theta: Given, w: Given, s: Given) -> tuple[Leaves, Leaves]:
        """K z = (H w - A's, -A w - D s)."""
        split = len(u)
        both = gradient_of(lambda *v: self.pairing(v[:split], v[split:], theta, w, s), (*u, *lam))
        corner = self.corner(theta, u[0])
        if corner is None:
            return both[:split], both[split:]
        return both[:split], tuple(b - d * x for b, d, x in zip(both[split:], corner, s, strict=True))

    def kkt_form(
        self, u: Given, lam: Given, theta: Given, q: tuple[Leaves, Leaves], z: tuple[Leaves, Leaves]
    ) -> Tensor:
        """q'K z, summed over the batch and over the leading axis R of right-hand sides of q and z, (R, B, *shape)."""

        def one(q_u: Leaves, q_h: Leaves, z_u: Leaves, z_h: Leaves) -> Tensor:
            product_u, product_h = self.kkt_product(u, lam, theta, z_u, z_h)
            return sum_of_products((*product_u, *product_h), (*q_u, *q_h))

        return torch.func.vmap(one)(*q, *z).sum()

    def input_tangent(
        self, u: Given, lam: Given, theta: Given, tangents: Sequence[Tensor | None]
    ) -> tuple[Leaves, Leaves]:
        """F_theta theta', with the shapes of (u, lam); None is a zero tangent.

        By transposing the pullback twice, never by torch.func.jvp: this runs inside an autograd.Function's `jvp`, where
        a nested forward mode raises.
        """
        active = [index for index, tangent in enumerate(tangents) if tangent is not None]
        split = len(u)

        def paired(*z: Tensor) -> Tensor:
            pulled = gradient_of(
                lambda *values: self.pairing(u, lam, replaced(theta, active, values), z[:split], z[split:]),
                [theta[i] for i in active],
            )
            return sum_of_products(pulled, [t for t in tangents if t is not None])

        both = gradient_of(paired, [torch.zeros_like(leaf) for leaf in (*u, *lam)])
        return both[:split], both[split:]

    def kkt_tangent(
        self, u: Given, lam: Given, theta: Given, z: tuple[Leaves, Leaves], tangents: Sequence[Tensor | None]
    ) -> tuple[Leaves, Leaves]:
        """K' z, (R, B, *shape): K's derivative along the tangents of (u, lam, theta) in this order, applied to z."""
        split, end = len(u), len(u) + len(lam)
        point = (*u, *lam, *theta)
        active = [index for index, tangent in enumerate(tangents) if tangent is not None]

        def paired(*q: Tensor) -> Tensor:
            def form(*values: Tensor) -> Tensor:
                moved = replaced(point, active, values)
                return self.kkt_form(moved[:split], moved[split:end], moved[end:], (q[:split], q[split:]), z)

            pulled = gradient_of(form, [point[i] for i in active])
            return sum_of_products(pulled, [t for t in tangents if t is not None])

        both = gradient_of(paired, [torch.zeros_like(leaf) for leaf in (*z[0], *z[1])])
        return both[:split], both[split:]


def sum_of_products(left: Given, right: Given) -> Tensor:
    """The inner product of two tuples of leaves, 0-dim."""
    terms = [(a * b).sum() for a, b in zip(left, right, strict=True)]
    return torch.stack(terms).sum() if len(terms) > 1 else terms[0]


def pullback(function: Callable[..., Any], at: Given) -> tuple[Any, Callable[..., Leaves]]:
    """function(*at), and the map from cotangents of its value to cotangents of `at`."""
    result: Any = torch.func.vjp(function, *at)
    return result[0], result[1]


def gradient_of(function: Callable[..., Tensor], at: Given) -> Leaves:
    """The gradient of a scalar function of all leaves `at` (a function that does not depend on one gives zeros)."""
    return torch.func.grad(function, argnums=tuple(range(len(at))))(*at) if at else ()


def replaced(theta: Given, at: Sequence[int], values: Given) -> list[Tensor]:
    changed = list(theta)
    for index, value in zip(at, values, strict=True):
        changed[index] = value
    return changed
