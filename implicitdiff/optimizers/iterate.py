"""The points that an optimizer visits, flattened: (batch, m) variables and (batch, p) multipliers.

A `System` (a plan with its inputs) comes in and evaluates points and Newton steps; the leaves of the plan are
packed and unpacked here and nowhere else. Next: newton.py walks, restoration.py mends what a walk downhill
cannot.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol

import torch
from torch import Tensor

from implicitdiff.optimality import residuals_at
from implicitdiff.plan import Plan

Leaves = tuple[Tensor, ...]
Shapes = tuple[tuple[int, ...], ...]


def pack(leaves: Sequence[Tensor], batch: int, like: Tensor) -> Tensor:
    """Leaves (batch, *shape) side by side as one matrix (batch, total); no leaves: (batch, 0)."""
    if not leaves:
        return like.new_zeros((batch, 0))
    return torch.cat([leaf.reshape(batch, math.prod(leaf.shape[1:])) for leaf in leaves], dim=1)


def unpack(flat: Tensor, shapes: Shapes) -> Leaves:
    """The inverse of `pack`; leading axes before the last are kept, so (R, batch, m) works too."""
    pieces = torch.split(flat, [math.prod(shape) for shape in shapes], dim=-1) if shapes else ()
    return tuple(
        piece.reshape(*flat.shape[:-1], *shape).contiguous()
        for piece, shape in zip(pieces, shapes, strict=True)
    )


def largest(flat: Tensor) -> Tensor:
    """The largest absolute value in each row (B,); 0 for a row without entries."""
    return flat.abs().amax(1) if flat.shape[1] else flat.new_zeros(flat.shape[0])


def dot(left: Tensor, right: Tensor) -> Tensor:
    """Row by row inner products (B,)."""
    return (left * right).sum(1)


@dataclass(frozen=True)
class Point:
    """Where every sample stands. All tensors carry the batch axis first.

    Attributes:
        u: Variables (B, m).
        multipliers: lambda (B, p).
        value: Objective (B,).
        gradient: D_u L (B, m).
        constraint: h (B, p).
        residual: Relative residual (B,): the larger of |D_u L| and |h|, each over the terms that cancel in
            it.
        violation: The relative residual of h alone (B,).
        finite: Whether everything above is finite (B,).
    """

    u: Tensor
    multipliers: Tensor
    value: Tensor
    gradient: Tensor
    constraint: Tensor
    residual: Tensor
    violation: Tensor
    finite: Tensor

    def where(self, mask: Tensor, other: "Point") -> "Point":
        """This point where `mask` (B,) is true, `other` elsewhere; no arithmetic, so bits are kept."""
        chosen = {}
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            chosen[field.name] = torch.where(mask.reshape(-1, *([1] * (mine.dim() - 1))), mine, theirs)
        return Point(**chosen)

    @staticmethod
    def joined(points: Sequence["Point"]) -> "Point":
        """The points of several batches as one."""
        return Point(
            **{
                field.name: torch.cat([getattr(point, field.name) for point in points])
                for field in fields(Point)
            }
        )


@dataclass(frozen=True)
class Outcome:
    """Where an optimizer stopped.

    Attributes:
        point: The last point of every sample.
        iterations: Accepted steps (B,) int64.
    """

    point: Point
    iterations: Tensor


@dataclass(frozen=True)
class System:
    """One plan with its inputs: evaluates points and Newton steps in flat form."""

    plan: Plan
    theta: Leaves
    variable_shapes: Shapes
    constraint_shapes: Shapes

    @staticmethod
    def of(plan: Plan, theta: Sequence[Tensor]) -> "System":
        """The system of a plan; shapes are those of its trace."""
        equality = plan.trace.equality
        return System(
            plan,
            tuple(theta),
            tuple(tuple(placeholder.shape) for placeholder in plan.trace.variables),
            tuple(tuple(shape) for shape in equality.output_shapes) if equality is not None else (),
        )

    @property
    def constraints(self) -> int:
        """p, the number of constraints of one sample."""
        return sum(math.prod(shape) for shape in self.constraint_shapes)

    def sample(self, index: int) -> "System":
        """The system of one sample, a batch of one."""
        trace = self.plan.trace
        given = (*trace.inputs, *trace.tensors)
        theta = tuple(
            tensor[index : index + 1] if placeholder.batched else tensor
            for tensor, placeholder in zip(self.theta, given, strict=True)
        )
        return replace(self, theta=theta)

    def leaves(self, u: Tensor, multipliers: Tensor) -> tuple[Leaves, Leaves]:
        """Variables and multipliers as the plan takes them."""
        return unpack(u, self.variable_shapes), unpack(multipliers, self.constraint_shapes)

    def evaluate(self, u: Tensor, multipliers: Tensor) -> Point:
        """f, D_u L, h and the relative residuals at u (B, m), multipliers (B, p): two passes of the plan."""
        variables, lam = self.leaves(u, multipliers)
        value = self.plan.value(variables, self.theta)
        stationarity = self.plan.stationarity(variables, lam, self.theta)
        measured = residuals_at(stationarity, variables)
        gradient = pack(stationarity.gradient, u.shape[0], u)
        constraint = pack(stationarity.constraint, u.shape[0], u)
        everything = torch.cat([u, multipliers, value[:, None], gradient, constraint], dim=1)
        return Point(
            u,
            multipliers,
            value,
            gradient,
            constraint,
            measured.relative,
            measured.violation,
            torch.isfinite(everything).all(1),
        )

    def trial(self, u: Tensor, like: Point) -> Point:
        """f and D_u f at u, without constraints, at the least cost: one reverse pass.

        The residual is against the scale at `like`; `measured` gives the true one.
        """
        value, leaves = self.value_and_gradient(u)
        gradient = pack(leaves, u.shape[0], u)
        scale = largest(like.gradient) / like.residual
        finite = torch.isfinite(torch.cat([u, value[:, None], gradient], dim=1)).all(1)
        return replace(
            like, u=u, value=value, gradient=gradient, residual=largest(gradient) / scale, finite=finite
        )

    def value_and_gradient(self, u: Tensor) -> tuple[Tensor, Leaves]:
        """f (B,) and the leaves of D_u f."""
        return self.plan.value_and_gradient(unpack(u, self.variable_shapes), self.theta)

    def measured(self, point: Point, wanted: Tensor) -> Point:
        """The point with its true residual, in the wanted samples (B,); free of cost where nobody wants it."""
        if not bool(wanted.any()):
            return point
        residual = self.evaluate(point.u, point.multipliers).residual
        return replace(point, residual=torch.where(wanted, residual, point.residual))

    def with_linear_part(self, point: Point, wanted: Tensor) -> Point:
        """The point with H u among the terms that D_u L is held against, in the wanted samples (B,).

        A plan that sees 2 (u - x) as one term gives it no scale; the optimality rule then takes |H u|. Here it comes
        from a difference of gradients along u, less a tenth for the error of that, so that no H is formed: one pass
        of D_u L where some sample is wanted, nothing otherwise.
        """
        if not bool(wanted.any()):
            return point
        step = torch.finfo(point.u.dtype).eps ** (1 / 3)
        variables, lam = self.leaves(point.u + step * point.u, point.multipliers)
        ahead = pack(self.plan.stationarity(variables, lam, self.theta).gradient, point.u.shape[0], point.u)
        size = 0.9 * largest(ahead - point.gradient) / step
        against = largest(point.gradient) / torch.where(torch.isfinite(size), size, 0)
        residual = torch.maximum(point.violation, torch.minimum(point.residual, against))
        lower = wanted & (residual < point.residual)
        return replace(point, residual=torch.where(lower, residual, point.residual))

    def estimate_multipliers(self, u: Tensor) -> Tensor:
        """Least-squares multipliers, A'lambda = D_u f, as (B, p); 0 where they are not finite."""
        if not self.constraint_shapes:
            return u.new_zeros((u.shape[0], 0))
        estimate = pack(self.plan.multipliers(unpack(u, self.variable_shapes), self.theta), u.shape[0], u)
        return torch.where(torch.isfinite(estimate).all(1, keepdim=True), estimate, 0)

    def solve(
        self,
        point: Point,
        top: Tensor,
        bottom: Tensor,
        shift: Tensor | None,
        asked: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(w, s, status) with [[H + shift I, -A'], [-A, 0]] (w, s) = (top, bottom), everything flat.

        A matrix with a shift is another expression than one without, and its solution may differ in the last bits: a
        sample without a shift that stands beside one with a shift is solved without it. `asked` (B,) are the samples
        whose answer matters; None: all.
        """
        if shift is None:
            return self._solve(point, top, bottom, None)
        shifted = self._solve(point, top, bottom, shift)
        plain = shift == 0 if asked is None else (shift == 0) & asked
        if not bool(plain.any()):
            return shifted
        w, s, status = self._solve(point, top, bottom, None)
        return (
            torch.where(plain[:, None], w, shifted[0]),
            torch.where(plain[:, None], s, shifted[1]),
            torch.where(plain, status, shifted[2]),
        )

    def _solve(
        self, point: Point, top: Tensor, bottom: Tensor, shift: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        variables, lam = self.leaves(point.u, point.multipliers)
        w, s, status = self.plan.kkt_solve(
            variables,
            lam,
            self.theta,
            unpack(top[None], self.variable_shapes),
            unpack(bottom[None], self.constraint_shapes),
            shift=shift,
        )
        batch = point.u.shape[0]
        return (
            pack([leaf[0] for leaf in w], batch, point.u),
            pack([leaf[0] for leaf in s], batch, point.u),
            status,
        )


class Optimizer(Protocol):
    """What `optimizer=` of the layer takes; frozen, so that one may serve several layers and threads."""

    def minimize(self, system: System, start: Tensor, tol: float) -> Outcome:
        """Improve the start points (B, m), B > 0, until each is optimal within tol, or cannot be improved.

        No judgement is made here: the caller holds the points against the optimality rule.
        """
