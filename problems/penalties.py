"""The penalties of robust pooling, each as one function rho(s, alpha) of the squared residual s = z^2.

Nothing here is a derivative: kappa_1 = 2 rho' and kappa_2 = 4 rho'' of the paper's Table 1 come out of rho by
automatic differentiation, and since rho is a function of z^2 nothing divides by z = 0. Used by
`robust_pooling.py`, next.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from implicitdiff.errors import OptionError

Rho: TypeAlias = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Penalty:
    """A penalty phi(z; alpha) = rho(z^2, alpha), applied entry by entry.

    Attributes:
        name: The name under which `RobustPooling` knows it.
        rho: The penalty as a function of the squared residual s, any shape, and of alpha, which broadcasts to
            s.
        convex: Whether sum_j phi(|u - x_j|) is convex in u; if not, pooling tries several starts.
        concave: Whether rho is concave in s, so that a reweighted mean never raises the objective.
    """

    name: str
    rho: Rho
    convex: bool
    concave: bool


def quadratic(s: Tensor, alpha: Tensor) -> Tensor:
    """s / 2, whatever alpha is: its minimiser is the mean."""
    return 0.5 * s


def pseudo_huber(s: Tensor, alpha: Tensor) -> Tensor:
    """alpha^2 (sqrt(1 + s / alpha^2) - 1)."""
    return alpha**2 * (torch.sqrt(1 + s / alpha**2) - 1)


def huber(s: Tensor, alpha: Tensor) -> Tensor:
    """s / 2 where sqrt(s) <= alpha, and alpha (sqrt(s) - alpha / 2) beyond."""
    near = s <= alpha**2
    # The square root sees alpha^2 in place of a small s: at s = 0 its infinite slope, times the zero that
    # where() passes to the branch not taken, would be NaN.
    far = torch.where(near, alpha**2, s)
    return torch.where(near, 0.5 * s, alpha * (torch.sqrt(far) - 0.5 * alpha))


def welsch(s: Tensor, alpha: Tensor) -> Tensor:
    """1 - exp(-s / (2 alpha^2))."""
    return 1 - torch.exp(-0.5 * s / alpha**2)


def truncated_quadratic(s: Tensor, alpha: Tensor) -> Tensor:
    """s / 2 where sqrt(s) <= alpha, and alpha^2 / 2 beyond."""
    return 0.5 * torch.where(s <= alpha**2, s, alpha**2)


PENALTIES: dict[str, Penalty] = {
    penalty.name: penalty
    for penalty in (
        Penalty("quadratic", quadratic, convex=True, concave=True),
        Penalty("pseudo-huber", pseudo_huber, convex=True, concave=True),
        Penalty("huber", huber, convex=True, concave=True),
        Penalty("welsch", welsch, convex=False, concave=True),
        Penalty("truncated-quadratic", truncated_quadratic, convex=False, concave=True),
    )
}


def find_penalty(penalty: str | Rho) -> Penalty:
    """The penalty of that name, or the given function of (s, alpha), about which nothing is assumed.

    Raises:
        OptionError: If the name is unknown, or the penalty is neither a name nor a function.
    """
    if isinstance(penalty, str):
        if penalty not in PENALTIES:
            raise OptionError(
                f"unknown penalty {penalty!r}: choose one of {', '.join(PENALTIES)}, "
                "or pass a function rho(s, alpha) of the squared residual"
            )
        return PENALTIES[penalty]
    if not callable(penalty):
        raise OptionError(
            f"penalty must be a name or a function rho(s, alpha) of the squared residual, not {penalty!r}"
        )
    return Penalty(getattr(penalty, "__name__", type(penalty).__name__), penalty, convex=False, concave=False)


def slopes(rho: Rho, s: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """(rho'(s), rho''(s)) entry by entry, by automatic differentiation; differentiable again if gradients are
    on.

    Args:
        rho: A penalty that works entry by entry, so that the gradient of its sum is its slope.
        s: Squared residuals, any shape.
        alpha: Broadcasts to s.
    """
    keep = torch.is_grad_enabled() and (s.requires_grad or alpha.requires_grad)
    with torch.enable_grad():
        point = s if keep and s.requires_grad else s.detach().requires_grad_()
        (first,) = torch.autograd.grad(
            rho(point, alpha).sum(), point, create_graph=True, materialize_grads=True
        )
        if not first.requires_grad:  # rho is piecewise linear in s
            return first, torch.zeros_like(first)
        (second,) = torch.autograd.grad(first.sum(), point, create_graph=keep, materialize_grads=True)
    return (first, second) if keep else (first.detach(), second)


def slope(rho: Rho, s: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """(rho(s), rho'(s)) entry by entry, as `slopes`."""
    keep = torch.is_grad_enabled() and (s.requires_grad or alpha.requires_grad)
    with torch.enable_grad():
        point = s if keep and s.requires_grad else s.detach().requires_grad_()
        value = rho(point, alpha)
        (first,) = torch.autograd.grad(value.sum(), point, create_graph=keep, materialize_grads=True)
    return (value, first) if keep else (value.detach(), first)
