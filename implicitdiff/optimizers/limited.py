"""Inequalities and bounds of a batch with numbers: where u stands against them, and the masks of an active set.

A plan on an active set (`graph/active.py`) and the tensors of a call come in; a `Limited` goes out, which evaluates
slacks, multipliers and their scales in flat form. Next: active_set.py, which decides what is active.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from implicitdiff.derivatives.lagrangian import Lagrangian, pullback
from implicitdiff.graph.degree import is_quadratic_program
from implicitdiff.graph.trace import Trace
from implicitdiff.optimizers.iterate import pack, unpack
from implicitdiff.optimizers.matrices import Matrices
from implicitdiff.plan import Plan, interior_plan

Leaves = tuple[Tensor, ...]
Shapes = tuple[tuple[int, ...], ...]


DENSE_VARIABLES = 600
"""Up to here a quadratic program keeps its matrices for all iterations, unless its H has structure to use."""


def takes_matrices(plan: Plan) -> bool:
    """Whether a problem is a quadratic program, by its operations, and small enough to keep its matrices."""
    m = sum(math.prod(variable.shape) for variable in plan.trace.variables)
    structured = plan.analysis.hessian.kind not in ("dense", "matrix-free", "zero")
    small = m <= (DENSE_VARIABLES // 4 if structured else DENSE_VARIABLES)
    return small and is_quadratic_program(plan.trace.origin)


@dataclass(frozen=True)
class Active:
    """An active set: entries of u on their lower or upper bound (B, m), rows of g that are 0 (B, q); bool."""

    low: Tensor
    high: Tensor
    rows: Tensor

    @property
    def fixed(self) -> Tensor:
        """Entries of u on a bound (B, m)."""
        return self.low | self.high

    def without(self, other: Active) -> Active:
        """This set without the members of another one."""
        return Active(self.low & ~other.low, self.high & ~other.high, self.rows & ~other.rows)

    def where(self, mask: Tensor, other: Active) -> Active:
        """This set in the samples of `mask` (B,), `other` elsewhere."""
        row = mask[:, None]
        return Active(
            torch.where(row, self.low, other.low),
            torch.where(row, self.high, other.high),
            torch.where(row, self.rows, other.rows),
        )

    def any(self) -> Tensor:
        """The samples (B,) in which something is active."""
        return self.low.any(1) | self.high.any(1) | self.rows.any(1)

    def count(self) -> Tensor:
        """How many constraints are active, (B,)."""
        return self.low.sum(1) + self.high.sum(1) + self.rows.sum(1)

    def same(self, other: Active) -> Tensor:
        """The samples (B,) in which both are equal."""
        changed = (self.low ^ other.low).any(1) | (self.high ^ other.high).any(1)
        return ~(changed | (self.rows ^ other.rows).any(1))


@dataclass(frozen=True)
class Declared:
    """A trace as it was declared, for the functions that read nothing else of a plan."""

    trace: Trace


@dataclass(frozen=True)
class Limited:
    """The limits of one call: bounds l <= u <= b and g(u) <= 0.

    Attributes:
        plan: the plan on an active set, for the flags of theta with its masks.
        theta: plain tensors, without masks.
        batch: B.
        made, made_bounds: the matrices of a quadratic program, and the bounds, where somebody has them already.
    """

    plan: Plan
    theta: Leaves
    batch: int
    made: Matrices | None = None
    made_bounds: tuple[Tensor, Tensor] | None = None

    @property
    def trace(self) -> Trace:
        """The declared functions."""
        return self.plan.trace.origin

    @cached_property
    def declared(self) -> Declared:
        """The trace as the hooks know it."""
        return Declared(self.trace)

    @cached_property
    def lagrangian(self) -> Lagrangian:
        """f - lam'h, without inequalities."""
        trace = self.trace
        return Lagrangian(trace, tuple(p.batched for p in (*trace.inputs, *trace.tensors)))

    @property
    def variable_shapes(self) -> Shapes:
        """The shapes of the leaves of u."""
        return tuple(tuple(p.shape) for p in self.plan.trace.variables)

    @property
    def row_shapes(self) -> Shapes:
        """The shapes of the leaves of g."""
        return () if self.trace.inequality is None else tuple(map(tuple, self.trace.inequality.output_shapes))

    @property
    def multiplier_shapes(self) -> Shapes:
        """The shapes of the leaves of (lam, mu)."""
        equality = self.plan.trace.equality
        return () if equality is None else tuple(map(tuple, equality.output_shapes))

    @property
    def equalities(self) -> int:
        """p, the entries of h."""
        return sum(map(math.prod, self.multiplier_shapes)) - sum(map(math.prod, self.row_shapes))

    @cached_property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """(lower, upper), (B, m), infinite where there is none."""
        if self.made_bounds is not None:
            return self.made_bounds
        trace, like = self.trace, self._like
        if trace.bounds is None:
            size = sum(map(math.prod, self.variable_shapes))
            return like.new_full((self.batch, size), -torch.inf), like.new_full((self.batch, size), torch.inf)
        u = tuple(like.new_zeros((self.batch, *shape)) for shape in self.variable_shapes)
        found = iter(self.lagrangian.mapped(trace.bounds, u, self.theta))
        sides: tuple[list[Tensor], list[Tensor]] = ([], [])
        for shape, there in zip(self.variable_shapes, trace.bounded, strict=True):
            for side, has, none in zip(sides, there, (-torch.inf, torch.inf), strict=True):
                whole = (self.batch, *shape)
                if not has:
                    side.append(like.new_full(whole, none))
                    continue
                value = next(found)
                lead = (1,) * (len(shape) - value.dim() + 1)
                side.append(value.reshape(self.batch, *lead, *value.shape[1:]).expand(whole))
        lower, upper = (pack(side, self.batch, like) for side in sides)
        return lower, upper

    @cached_property
    def _like(self) -> Tensor:
        dtype = self.plan.trace.variables[0].dtype
        return torch.empty(0, dtype=dtype, device=self.theta[0].device)

    def narrowed(self, keep: Tensor) -> Limited:
        """The limits of some samples, by their indices."""
        flags = self.lagrangian.batched
        theta = tuple(t[keep] if flag else t for t, flag in zip(self.theta, flags, strict=True))
        made = None if self.matrices is None else self.matrices.at(keep)
        lower, upper = self.bounds
        return Limited(self.plan, theta, len(keep), made, (lower[keep], upper[keep]))

    @cached_property
    def matrices(self) -> Matrices | None:
        """The matrices of a small quadratic program, None for other problems."""
        if self.made is not None or not takes_matrices(self.plan):
            return self.made
        like, batch = self._like, self.batch
        zero = tuple(like.new_zeros((batch, *shape)) for shape in self.variable_shapes)
        multipliers = tuple(like.new_zeros((batch, *shape)) for shape in self.multiplier_shapes)
        nothing = pack(zero, batch, like), pack(multipliers, batch, like)[:, self.equalities :]
        theta = self.interior_theta(*nothing)
        plan = interior_plan(self.plan)
        flags = tuple(p.batched for p in (*plan.trace.inputs, *plan.trace.tensors))
        lagrangian = Lagrangian(plan.trace, flags)
        return Matrices.of(plan, lagrangian, zero, multipliers, theta, self.equalities)

    def interior_theta(self, weight: Tensor, corner: Tensor) -> Leaves:
        """theta with the masks of `graph.active.interior_trace`: weights (B, m) on u, the corner (B, q) of g."""
        sides = self.trace.bounded or ((False, False),) * len(self.variable_shapes)
        pairs = zip(sides, unpack(weight, self.variable_shapes), strict=True)
        weights = (leaf for there, leaf in pairs if any(there))
        return (*self.theta, *weights, *unpack(corner, self.row_shapes))

    # ---------------------------------------------------------------- at a point

    def leaves(self, u: Tensor) -> Leaves:
        """u (B, m) as leaves."""
        return unpack(u, self.variable_shapes)

    def rows(self, u: Tensor) -> Tensor:
        """g(u), (B, q)."""
        if self.trace.inequality is None:
            return u.new_zeros((self.batch, 0))
        if self.matrices is not None:
            return self.matrices.constraints(u)[1]
        return pack(self.lagrangian.mapped(self.trace.inequality, self.leaves(u), self.theta), self.batch, u)

    def row_sizes(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """(size of each row of D_u g, size of the terms that cancel in each entry of g), (B, q).

        From two products: with a fixed pattern of signs, and with ones, of size 1 and of the size of u. Both are right
        to the order of magnitude, which is all that a tolerance needs.
        """
        if self.trace.inequality is None:
            return u.new_zeros((self.batch, 0)), u.new_zeros((self.batch, 0))
        if self.matrices is not None:
            return self.matrices.row_sizes(u)
        inequality, shapes = self.trace.inequality, self.row_shapes
        variables = self.leaves(u)
        zeros = tuple(u.new_zeros((self.batch, *shape)) for shape in shapes)
        _, pull = pullback(lambda *v: self.lagrangian.mapped(inequality, v, self.theta), variables)
        _, push = pullback(lambda *s: pull(s), zeros)
        pattern = torch.cos(1.0 + 2.399963 * torch.arange(u.shape[1], device=u.device, dtype=u.dtype))
        signs = torch.where(pattern > 0, 1.0, -1.0).to(u.dtype).expand(self.batch, -1)
        found = [u.new_zeros((self.batch, sum(map(math.prod, shapes))))] * 2
        for direction in (signs, torch.ones_like(u)):
            for place, step in enumerate((direction, direction * u)):
                pushed = pack(push(self.leaves(step)), self.batch, u).abs()
                found[place] = torch.maximum(found[place], torch.nan_to_num(pushed))
        slope, linear = found
        # a row whose entries cancel in both products counts as large as the others
        slope = torch.where(slope > 0, slope, slope.amax(1, keepdim=True))
        return slope, linear

    def gradient(self, u: Tensor, multipliers: Tensor) -> Tensor:
        """D_u (f - lam'h - mu'g), (B, m): at a minimum 0 for free entries, >= 0 on lower bounds, <= 0 on upper ones."""
        if self.matrices is not None:
            return torch.stack(self.matrices.terms(u, multipliers)).sum(0)
        shapes = self.multiplier_shapes
        leaves = unpack(multipliers, shapes)
        split = len(shapes) - len(self.row_shapes)
        variables = self.leaves(u)
        lagrangian = self.lagrangian
        found = pack(lagrangian.gradient(variables, leaves[:split], self.theta), self.batch, u)
        if self.trace.inequality is None:
            return found
        inequality = self.trace.inequality
        _, pull = pullback(lambda *v: lagrangian.mapped(inequality, v, self.theta), variables)
        return found - pack(pull(tuple(leaves[split:])), self.batch, u)

    def gradient_scale(self, u: Tensor) -> Tensor:
        """The largest of the terms that cancel in D_u f, (B,), its part linear in u among them: |H u|."""
        if self.matrices is not None:
            return self.matrices.gradient_scale(u).clamp(min=torch.finfo(u.dtype).tiny)
        variables = self.leaves(u)
        none = Active(
            torch.zeros_like(u, dtype=torch.bool),
            torch.zeros_like(u, dtype=torch.bool),
            torch.zeros(u.shape[0], sum(map(math.prod, self.row_shapes)), dtype=torch.bool, device=u.device),
        )
        zeros = tuple(u.new_zeros((self.batch, *shape)) for shape in self.multiplier_shapes)
        scale = self.plan.stationarity(variables, zeros, self.masked(none)).gradient_scale
        _, pull = pullback(lambda *v: self.lagrangian.objective_gradient(v, self.theta), variables)
        curved = pack(pull(variables), self.batch, u).abs().amax(1)
        scale = torch.maximum(torch.nan_to_num(scale), torch.nan_to_num(curved))
        return scale.clamp(min=torch.finfo(u.dtype).tiny)

    # ---------------------------------------------------------------- an active set

    def masks(self, active: Active) -> Leaves:
        """The masks of an active set in the order of `graph.active.active_trace`."""
        dtype = self.plan.trace.variables[0].dtype
        found: list[Tensor] = []
        sides = self.trace.bounded or ((False, False),) * len(self.variable_shapes)
        low, high = (unpack(mask, self.variable_shapes) for mask in (active.low, active.high))
        for there, down, up in zip(sides, low, high, strict=True):
            if any(there):
                found += [(~(down | up)).to(dtype), down, up]
        rows = unpack(active.rows, self.row_shapes)
        found += [row.to(dtype) for row in rows]
        found += [(~row).to(dtype) for row in rows]
        return tuple(found)

    def masked(self, active: Active) -> Leaves:
        """theta with the masks of an active set."""
        return (*self.theta, *self.masks(active))

    def multipliers(self, u: Tensor, active: Active) -> Tensor:
        """(lam, mu) of least squares on an active set, (B, p + q); 0 for rows that are off."""
        if not self.multiplier_shapes:
            return u.new_zeros((self.batch, 0))
        found = pack(self.plan.multipliers(self.leaves(u), self.masked(active)), self.batch, u)
        keep = torch.nn.functional.pad(active.rows, (self.equalities, 0), value=True)
        return torch.where(keep, found, 0.0)
