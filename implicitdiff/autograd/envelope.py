"""The optimal value as a function of theta: its derivative is that of the Lagrangian at a fixed solution.

In: the functions of a call and a solution with its multipliers. Out: f at the solution, differentiable to any order;
the first derivative takes no solve. Next: `layer/prepare.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from implicitdiff.derivatives.lagrangian import Lagrangian, Leaves


class Envelope(torch.autograd.Function):
    """V(theta) = f(u(theta), theta) for samples whose u is optimal: dV/dtheta = D_theta (f - lam'h)(u, lam, theta).

    Since D_u L = 0 and h = 0 at the solution, u and lam get no cotangent from V. They are saved as they are, moving, so
    that derivatives of the derivative see them move, and solve for that. Inequalities and bounds are in f and h of a
    problem on its active set.

    Apply to (lagrangian, *u, *lam, *theta); the result is (B,).
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(lagrangian: Lagrangian, *tensors: Tensor) -> Tensor:
        """f of each sample."""
        u, _, theta = _parts(lagrangian, tensors)
        return lagrangian.objective(u, theta)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the point."""
        ctx.lagrangian = inputs[0]
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        """sum of v D_theta L, at fixed u and lam."""
        lagrangian: Lagrangian = ctx.lagrangian
        u, lam, theta = _parts(lagrangian, ctx.saved_tensors)
        skipped = 1 + len(u) + len(lam)
        active = [i for i, need in enumerate(ctx.needs_input_grad[skipped:]) if need]
        if not active:
            return (None,) * (skipped + len(theta))

        def weighted(*values: Tensor) -> Tensor:
            moved = list(theta)
            for index, value in zip(active, values, strict=True):
                moved[index] = value
            return (v * _each(lagrangian, u, lam, tuple(moved))).sum()

        grads = torch.func.grad(weighted, argnums=tuple(range(len(active))))(*[theta[i] for i in active])
        found = dict(zip(active, grads, strict=True))
        return (*(None,) * skipped, *(found.get(index) for index in range(len(theta))))

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Tensor:
        """<D_theta L, theta'>, by transposing the reverse derivative: no forward mode inside forward mode."""
        lagrangian: Lagrangian = ctx.lagrangian
        u, lam, theta = _parts(lagrangian, ctx.saved_tensors)
        moved = tangents[len(u) + len(lam) :]
        active = [
            i for i, tangent in enumerate(moved) if tangent is not None and theta[i].is_floating_point()
        ]
        ones = torch.ones_like(lagrangian.objective(u, theta))
        if not active:
            return torch.zeros_like(ones)

        def paired(v: Tensor) -> Tensor:
            def weighted(*values: Tensor) -> Tensor:
                changed = list(theta)
                for index, value in zip(active, values, strict=True):
                    changed[index] = value
                return (v * _each(lagrangian, u, lam, tuple(changed))).sum()

            grads = torch.func.grad(weighted, argnums=tuple(range(len(active))))(*[theta[i] for i in active])
            terms = [(g * moved[i]).sum() for g, i in zip(grads, active, strict=True)]
            return torch.stack(terms).sum()

        found: Tensor = torch.func.grad(paired)(ones)
        return found


def _each(lagrangian: Lagrangian, u: Leaves, lam: Leaves, theta: Leaves) -> Tensor:
    """f - lam'h of each sample, (B,)."""
    value = lagrangian.objective(u, theta)
    for multiplier, h in zip(lam, lagrangian.constraints(u, theta), strict=True):
        value = value - (multiplier * h).reshape(len(value), -1).sum(1)
    return value


def _parts(lagrangian: Lagrangian, tensors: Any) -> tuple[Leaves, Leaves, Leaves]:
    first, second = lagrangian.variables, lagrangian.variables + lagrangian.multipliers
    return tuple(tensors[:first]), tuple(tensors[first:second]), tuple(tensors[second:])
