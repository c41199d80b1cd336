"""Projections P of the costs that leave the solver's answer alone, y(w) = y(P(w)), and their derivatives.

In: costs (B, *shape) and cotangents. Out: P(w), P'(w)^T g and P'(w) t, as torch operations that can be differentiated
again. Which P is valid for which solver is the business of ``invariance.py``; ``estimators/identity.py`` uses them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from implicitdiff.combinatorial.base import Sense, Solver
from implicitdiff.combinatorial.checks import name_samples
from implicitdiff.errors import InputError, OptionError
from implicitdiff.torch_private import HOST, without_saved_tensor_hooks

NAMES = ("none", "mean", "norm", "std", "affine", "auto")


class Projection(ABC):
    """P, for batches (B, *shape). A sample is flattened: |w| and <a, w> run over all of its entries."""

    @property
    def formula(self) -> str:
        """P(w), in one line, for reports."""
        return type(self).__name__

    @abstractmethod
    def __call__(self, w: Tensor) -> Tensor:
        """P(w)."""

    @abstractmethod
    def pull(self, w: Tensor, g: Tensor) -> Tensor:
        """P'(w)^T g."""

    def push(self, w: Tensor, t: Tensor) -> Tensor:
        """P'(w) t; the Jacobians of all projections given by name are symmetric."""
        return self.pull(w, t)

    def linear(self, w: Tensor) -> Tensor:
        """The part of P that is linear: P without the division by the norm."""
        return self(w)

    def scaled(self, w: Tensor) -> Tensor:
        """The part of P that keeps signs: the division by the norm without the linear part."""
        return w

    def check(self, w: Tensor) -> None:
        """Raise InputError where P has no value or no derivative; most have both everywhere."""
        return None

    def normals(self, solver: Solver, shape: tuple[int, ...]) -> np.ndarray | None:
        """The directions that the linear part takes out, as rows; None where P is not known well enough to say."""
        return np.zeros((0, int(np.prod(shape))))


class NoProjection(Projection):
    """P(w) = w."""

    @property
    def formula(self) -> str:
        """P(w), in one line."""
        return "w"

    def __call__(self, w: Tensor) -> Tensor:
        return w

    def pull(self, w: Tensor, g: Tensor) -> Tensor:
        """g."""
        return g


class Mean(Projection):
    """P(w) = w - mean(w) 1; valid if all y have the same sum."""

    @property
    def formula(self) -> str:
        """P(w), in one line."""
        return "w - mean(w) 1"

    def __call__(self, w: Tensor) -> Tensor:
        flat = w.flatten(1)
        return (flat - flat.mean(1, keepdim=True)).reshape(w.shape)

    def pull(self, w: Tensor, g: Tensor) -> Tensor:
        """g - mean(g) 1."""
        return self(g)

    def normals(self, solver: Solver, shape: tuple[int, ...]) -> np.ndarray | None:
        """1 / sqrt(n)."""
        size = int(np.prod(shape))
        return np.full((1, size), 1 / np.sqrt(size))


class Plane(Projection):
    """P(w) = w - <a, w> a with |a| = 1 (a is normalised here); valid if <a, y> is the same for all y.

    Args:
        a: the normal, of the shape of one sample's cost.

    Raises:
        InputError: a is zero or not finite.
    """

    @property
    def formula(self) -> str:
        """P(w), in one line."""
        return "w - <a, w> a"

    def __init__(self, a: Tensor | Sequence[float]) -> None:
        normal = torch.as_tensor(a, dtype=torch.float64, device=HOST)
        size = torch.linalg.vector_norm(normal)
        if not torch.isfinite(size) or size == 0:
            raise InputError("the normal of Plane is zero or not finite")
        self.a = normal / size

    def __call__(self, w: Tensor) -> Tensor:
        if w.shape[1:] != self.a.shape:
            raise InputError(
                f"the normal of Plane has shape {tuple(self.a.shape)}, the costs of one sample {tuple(w.shape[1:])}"
            )
        a = self.a.to(w).flatten()
        flat = w.flatten(1)
        return (flat - (flat * a).sum(1, keepdim=True) * a).reshape(w.shape)

    def pull(self, w: Tensor, g: Tensor) -> Tensor:
        """(I - a a^T) g."""
        return self(g)

    def normals(self, solver: Solver, shape: tuple[int, ...]) -> np.ndarray | None:
        """a."""
        return self.a.numpy().reshape(1, -1)


class Affine(Projection):
    """P(w) = (I - A^+ A) w, with A the equalities A y = b that the solver declares for all its solutions.

    The plane projection for a whole set of normals: the orthogonal projection onto lin(Y - Y) if A holds all
    equalities, e.g. double centring for assignments, removal of node potentials for flows.
    """

    @property
    def formula(self) -> str:
        """P(w), in one line."""
        return "(I - A^+ A) w"

    def __init__(self, solver: Solver) -> None:
        self.solver = solver

    def __call__(self, w: Tensor) -> Tensor:
        return self.solver.without_normals(w)

    def pull(self, w: Tensor, g: Tensor) -> Tensor:
        """(I - A^+ A) g."""
        return self.solver.without_normals(g)

    def normals(self, solver: Solver, shape: tuple[int, ...]) -> np.ndarray | None:
        """The declared ones of its own solver."""
        return self.solver.row_space(shape)


class Norm(Projection):
    """P(w) = u / |u| with u = L(w), L linear (the identity, mean, plane or affine); with L = mean it is called std.

    P' = (I - uu^T / |u|^2) L / |u|, which is symmetric, since u lies in the range of the orthogonal projector L. A step
    along the gradient is orthogonal to u, so that plain gradient descent on w never makes it shorter.

    Args:
        inner: L.
        eps: with eps > 0 it is u / sqrt(|u|^2 + eps^2), which has a derivative at 0; with 0, u = 0 is an error.
    """

    @property
    def formula(self) -> str:
        """P(w), in one line."""
        return "w / |w|" if isinstance(self.inner, NoProjection) else f"u / |u|, u = {self.inner.formula}"

    def __init__(self, inner: Projection | None = None, eps: float = 0.0) -> None:
        if isinstance(inner, Norm | Custom):
            raise OptionError("Norm is applied to a linear projection: none, mean, plane or affine")
        if not eps >= 0:
            raise OptionError(f"eps={eps} of Norm: expected a number >= 0")
        self.inner = NoProjection() if inner is None else inner
        self.eps = eps

    def _split(self, w: Tensor) -> tuple[Tensor, Tensor]:
        u = self.inner(w).flatten(1)
        size = torch.linalg.vector_norm(u, dim=1, keepdim=True)
        return u, size if self.eps == 0 else (size * size + self.eps**2).sqrt()

    def __call__(self, w: Tensor) -> Tensor:
        u, size = self._split(w)
        return (u / size).reshape(w.shape)

    def pull(self, w: Tensor, g: Tensor) -> Tensor:
        """L (g - u <u, g> / |u|^2) / |u|."""
        u, size = self._split(w)
        flat = self.inner(g).flatten(1)
        along = (u * flat).sum(1, keepdim=True)
        # In place on what was just made: fresh memory is what costs time here.
        return (u * (along / size / -size)).add_(flat).div_(size).reshape(g.shape)

    def linear(self, w: Tensor) -> Tensor:
        """L(w)."""
        return self.inner(w)

    def scaled(self, w: Tensor) -> Tensor:
        """w / |L(w)|."""
        _, size = self._split(w)
        return (w.flatten(1) / size).reshape(w.shape)

    def check(self, w: Tensor) -> None:
        """Name the samples whose u is zero, or so small beside w that it is rounding."""
        if self.eps > 0:
            return
        u = self.inner(w)
        size = torch.linalg.vector_norm(u.flatten(1), dim=1)
        if u is w:
            bad = size == 0
        else:
            bad = size <= 8 * torch.finfo(w.dtype).eps * torch.linalg.vector_norm(w.flatten(1), dim=1)
        if bad.any():
            raise InputError(
                f"the projected costs are zero in {name_samples(bad)} of {len(w)}, where the projection to unit norm "
                "has no derivative: add a margin, or use Norm(..., eps=...)"
            )

    def normals(self, solver: Solver, shape: tuple[int, ...]) -> np.ndarray | None:
        """Those of L: a positive factor changes no argmin."""
        return self.inner.normals(solver, shape)


class Custom(Projection):
    """A function of costs (B, *shape) as a projection; its derivatives are torch's.

    Args:
        function: made of torch operations; samples must not mix.
        sign: -1 if the function is written for the costs of a maximisation.
    """

    @property
    def formula(self) -> str:
        """P(w), in one line."""
        return str(getattr(self.function, "__name__", type(self.function).__name__))

    def __init__(self, function: Callable[[Tensor], Tensor], sign: int = 1) -> None:
        self.function = function
        self.sign = sign

    def __call__(self, w: Tensor) -> Tensor:
        return self.sign * self.function(self.sign * w)

    def pull(self, w: Tensor, g: Tensor) -> Tensor:
        """By torch.func.vjp."""
        with without_saved_tensor_hooks():
            (pulled,) = torch.func.vjp(self, w)[1](g)
        return pulled

    def push(self, w: Tensor, t: Tensor) -> Tensor:
        """The transpose of `pull`, by a second vjp: torch's forward mode does not nest in a jvp rule."""
        with without_saved_tensor_hooks():
            (pushed,) = torch.func.vjp(lambda g: self.pull(w, g), torch.zeros_like(w))[1](t)
        return pushed

    def normals(self, solver: Solver, shape: tuple[int, ...]) -> np.ndarray | None:
        """Unknown."""
        return None


def resolve(
    projection: str | Projection | Callable[[Tensor], Tensor], solver: Solver, sense: Sense | None = None
) -> Projection:
    """The projection that a name, an object or a function stands for, for one solver.

    Args:
        projection: "none", "mean", "norm", "std", "affine", "auto" (affine if the solver declares equalities, then
            norm), a `Projection`, or a function of costs (B, *shape).
        solver: whose costs are projected.
        sense: that of the costs that a function expects; by default the solver's.

    Raises:
        OptionError: an unknown name.
    """
    if isinstance(projection, Projection):
        return projection
    if callable(projection):
        return Custom(projection, -1 if (sense or solver.sense) == "max" else 1)
    named: dict[str, Callable[[], Projection]] = {
        "none": NoProjection,
        "mean": Mean,
        "norm": Norm,
        "std": lambda: Norm(Mean()),
        "affine": lambda: Affine(solver),
        "auto": lambda: Norm(Affine(solver)),
    }
    if projection not in named:
        raise OptionError(
            f"projection={projection!r}: one of {', '.join(NAMES)}, a Projection, or a function"
        )
    return named[projection]()


__all__ = [
    "Affine",
    "Custom",
    "Mean",
    "NoProjection",
    "Norm",
    "Plane",
    "Projection",
    "resolve",
]
