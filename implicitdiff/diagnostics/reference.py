"""Diagnostics, the yardstick: Eqn. 3 in float64, dense, one sample after another.

In: the declared functions at a point (`declared.py`). Out: dense H and A, multipliers, the gradient of <v,
u>, and certificates for problems too large for that. No structure, no solver and no graph of the library
takes part. Used by `check.py` and `compare.py`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from implicitdiff.diagnostics.declared import Declared, floating, gradient, gradients, jacobian, unit_rows
from implicitdiff.torch_private import pytree

# Most variables and constraints of one sample for which the dense formula is tried: (m + p)^2 numbers each.
LIMIT = 3000


@dataclass(frozen=True)
class Matrices:
    """What one sample looks like at its point, dense and in float64.

    Attributes:
        hessian: H = D_uu L (m, m).
        jacobian: A = D_u h (p, m).
        slope: D_u f (m,).
        constraint: h (p,).
        multipliers: The minimum-norm least-squares solution of A' lam = D_u f (p,).
        null: Orthonormal basis of the left null space of A (p, k): how its rows depend on each other.
        singular_ratio: Smallest over largest singular value of A with its rows scaled to length one; 1 for
            p = 0.
        edge: Entries of u at the edge of the domain (m,), see `Declared.edge`.
    """

    hessian: Tensor
    jacobian: Tensor
    slope: Tensor
    constraint: Tensor
    multipliers: Tensor
    null: Tensor
    singular_ratio: float
    edge: Tensor

    @property
    def residual(self) -> Tensor:
        """D_u L = D_u f - A' lam (m,)."""
        return self.slope - self.jacobian.mT @ self.multipliers


@dataclass(frozen=True)
class Direction:
    """(w, s) and the multipliers lam of one sample: all that its input gradients depend on."""

    w: Tensor
    s: Tensor
    multipliers: Tensor


class Reference:
    """The dense truth at one point; matrices of a sample are made once."""

    def __init__(self, declared: Declared) -> None:
        self.declared = declared
        self._matrices: dict[int, Matrices] = {}

    @property
    def feasible(self) -> bool:
        """Whether one sample is small enough for dense matrices."""
        return self.declared.size + self.declared.constraints <= LIMIT

    def matrices(self, b: int) -> Matrices:
        """H, A and what follows from them for sample b. Cost: m + p backward passes, an SVD of A."""
        if b not in self._matrices:
            self._matrices[b] = self._assemble(b)
        return self._matrices[b]

    def _assemble(self, b: int) -> Matrices:
        edge = self.declared.edge(b)
        with torch.enable_grad():
            u = self.declared.point(b)
            constraint = self.declared.equality(b, u)
            rows = jacobian(constraint, u).masked_fill(edge, 0)
            slope = gradient(self.declared.objective(b, u), u).detach().masked_fill(edge, 0)
            multipliers = torch.linalg.pinv(rows.mT) @ slope
            lagrangian = self.declared.objective(b, u) - multipliers @ constraint
            hessian = jacobian(gradient(lagrangian, u, create_graph=True), u)
        # Variables at the edge are taken out of the system: a unit row and column.
        hessian = torch.where(
            edge[:, None] | edge, torch.diag_embed(edge.to(hessian)), (hessian + hessian.mT) / 2
        )
        null, ratio = _left_null_space(rows)
        return Matrices(hessian, rows, slope, constraint.detach(), multipliers, null, ratio, edge)

    def direction(self, b: int, v: Tensor) -> Direction:
        """(w, s) with K (w, s) = -(v, 0), K = [[H, -A'], [-A, 0]]; s of least norm where rows of A depend.

        NaN where K is singular.

        The dependent directions N get -N N' in the lower block: that leaves the solution of the consistent
        system as it is and makes N's = 0. Rows and columns are scaled to comparable size and one step of
        refinement follows, since H may span many orders of magnitude (1 / P in optimal transport).
        """
        d = self.matrices(b)
        p = d.jacobian.shape[0]
        upper = torch.cat([d.hessian, -d.jacobian.mT], 1)
        matrix = torch.cat([upper, torch.cat([-d.jacobian, -d.null @ d.null.mT], 1)])
        size = torch.cat([d.hessian.abs().amax(1), d.hessian.new_ones(p)])
        scale = torch.where(size > 0, size, 1).rsqrt()
        scaled = scale[:, None] * matrix * scale
        rhs = (scale * torch.cat([-v.masked_fill(d.edge, 0), v.new_zeros(p)]))[:, None]
        factors, pivots, info = torch.linalg.lu_factor_ex(scaled)
        if int(info):
            return Direction(torch.full_like(v, math.nan), v.new_full((p,), math.nan), d.multipliers)
        solution = torch.linalg.lu_solve(factors, pivots, rhs)
        solution = solution + torch.linalg.lu_solve(factors, pivots, rhs - scaled @ solution)
        w, s = (scale * solution[:, 0]).split([v.numel(), p])
        return Direction(w, s, d.multipliers)

    def vjp(self, cotangent: Any) -> list[Tensor]:
        """The gradient of <cotangent, u> for each member of `Declared.moving`, by the dense formula.

        Args:
            cotangent: A pytree like u.

        Returns:
            One tensor per member; for a shared input or a Parameter the sum over the batch. Cost: O((m +
            p)^3) for each sample.
        """
        v = self.declared.flat(cotangent)
        return self.pullback([self.direction(b, v[b]) for b in range(self.declared.batch)])

    def pullback(self, directions: Sequence[Direction]) -> list[Tensor]:
        """sum over samples of D_theta (<D_u L, w> - <h, s>), one tensor per member of `Declared.moving`."""
        with torch.enable_grad():
            total = self.declared.u.new_zeros(())
            for b, d in enumerate(directions):
                u = self.declared.point(b)
                h = self.declared.equality(b, u)
                lagrangian = self.declared.objective(b, u) - d.multipliers @ h
                total = total + gradient(lagrangian, u, create_graph=True) @ d.w - h @ d.s
            return gradients(total, self.declared.moving)

    def kkt_residual(self, directions: Sequence[Direction], cotangent: Any) -> float:
        """|K (w, s) + (v, 0)|_inf over the largest of the terms that cancel in it, without any matrix.

        It certifies (w, s) from elsewhere, for problems too large for `vjp`. Cost: four passes per sample.
        """
        v, worst = self.declared.flat(cotangent), 0.0
        for b, d in enumerate(directions):
            with torch.enable_grad():
                u, s = self.declared.point(b), d.s.clone().requires_grad_()
                h = self.declared.equality(b, u)
                lagrangian = self.declared.objective(b, u) - d.multipliers @ h
                product = gradient(gradient(lagrangian, u, create_graph=True) @ d.w, u)
                # A's as a function of s: its derivative along w is A w.
                pulled = gradient(h @ s, u, create_graph=True)
                moved = gradient(pulled @ d.w, s)
            terms = [product, pulled.detach(), v[b]]
            scale = max(float(term.abs().max()) for term in terms)
            gaps = torch.cat([terms[0] - terms[1] + terms[2], moved]).masked_fill(
                torch.cat([self.declared.edge(b), torch.zeros_like(moved, dtype=torch.bool)]), 0
            )
            worst = worse(worst, float(gaps.abs().max()) / scale if scale else 0.0)
        return worst

    def null_directions(self) -> Tensor:
        """Rows (k, n) over the joined `Declared.moving` along which a gradient is not determined: C'c, A'c =
        0.

        Dependent constraints can be met only by inputs that move along with each other, so gradients of those
        inputs are compared modulo these rows, and finite differences run orthogonally to them.
        """
        return self._dependences()[0]

    def consistency(self) -> list[Tensor]:
        """The least change of each member of `Declared.moving` that makes dependent constraints consistent.

        Inputs in float32 meet a dependence (equal totals of r and c) up to rounding only, which float64 sees.
        """
        rows, defects = self._dependences()
        change = -torch.linalg.pinv(rows, rtol=1e-9) @ defects
        pieces = change.split([leaf.numel() for leaf in self.declared.moving])
        return [piece.reshape(leaf.shape) for piece, leaf in zip(pieces, self.declared.moving, strict=True)]

    def _dependences(self) -> tuple[Tensor, Tensor]:
        """(rows C'c (k, n), defects c'h (k,)) for all c with A'c = 0 that the inputs move."""
        rows, defects = [], []
        for b in range(self.declared.batch):
            null = self.matrices(b).null if self.feasible else self._null_by_products(b)
            if not null.shape[1]:
                continue
            with torch.enable_grad():
                h = self.declared.equality(b, self.declared.point(b))
                # What some other combination of the constraints gives: below 1e-9 of that is rounding.
                some = torch.cos(torch.arange(h.numel(), dtype=h.dtype, device=h.device))
                usual = float(self._pulled_inputs(h @ some).abs().max())
                found = [(self._pulled_inputs(h @ c), (h @ c).detach()) for c in null.mT]
            kept = [pair for pair in found if float(pair[0].abs().max()) > 1e-9 * usual]
            rows += [row for row, _ in kept]
            defects += [defect for _, defect in kept]
        width = sum(leaf.numel() for leaf in self.declared.moving)
        if not rows:
            return self.declared.u.new_zeros(0, width), self.declared.u.new_zeros(0)
        return torch.stack(rows), torch.stack(defects)

    def _pulled_inputs(self, value: Tensor) -> Tensor:
        return torch.cat([g.reshape(-1) for g in gradients(value, self.declared.moving)])

    def _null_by_products(self, b: int) -> Tensor:
        """The left null space of A (p, k) from A A' (p, p), made by p products without A (p, m) in memory."""
        with torch.enable_grad():
            u = self.declared.point(b)
            h = self.declared.equality(b, u)
            along = torch.zeros_like(h).requires_grad_()
            pulled = gradient(h @ along, u, create_graph=True)
            rows = []
            for units in unit_rows(h, u.numel()) if h.numel() else ():
                (down,) = torch.autograd.grad(h, u, units, retain_graph=True, is_grads_batched=True)
                (up,) = torch.autograd.grad(pulled, along, down, retain_graph=True, is_grads_batched=True)
                rows.append(up)
        gram = torch.cat(rows) if rows else u.new_zeros(0, 0)
        length = gram.diagonal().clamp_min(1e-300).rsqrt()
        values, vectors = torch.linalg.eigh(length[:, None] * gram * length)
        basis = length[:, None] * vectors[:, values <= 1e-13 * h.numel()]
        return torch.linalg.qr(basis).Q if basis.shape[1] else basis


def polish(declared: Declared, steps: int = 20) -> tuple[Any, float]:
    """(u, last relative step): Newton's method on the KKT conditions from the given point, dense, in float64.

    It makes an approximate solution exact, so that finite differences measure the solution map and not a
    solver's tolerance. `declared.u` is left at the result. Cost: O((m + p)^3) per step and sample.
    """
    worst = 0.0
    for b in range(declared.batch):
        last = 0.0
        for _ in range(steps):
            here = Reference(declared)
            d = here.matrices(b)
            # Minimum-norm correction onto A du = -h first, then along the constraints.
            onto = -torch.linalg.pinv(d.jacobian) @ d.constraint
            step = onto + here.direction(b, d.residual + d.hessian @ onto).w
            if not bool(torch.isfinite(step).all()):
                return declared.tree(declared.u), float("inf")
            declared.u[b] += step.masked_fill(d.edge, 0)
            last = float(step.abs().max() / declared.u[b].abs().max().clamp_min(1e-300))
            if last < 1e-13:
                break
        worst = worse(worst, last)
    return declared.tree(declared.u), worst


def worse(first: float, second: float) -> float:
    """The larger of two errors; NaN if one of them is, which `max` would lose."""
    return math.nan if math.isnan(first) or math.isnan(second) else max(first, second)


def orthogonal_to(rows: Tensor, vector: Tensor) -> Tensor:
    """The part of a vector (n,) that is orthogonal to rows (k, n)."""
    if not rows.shape[0]:
        return vector
    return vector - torch.linalg.pinv(rows, rtol=1e-9) @ (rows @ vector)


def relative_error(found: Sequence[Tensor], truth: Sequence[Tensor], null: Tensor) -> float:
    """The largest |found - truth|_inf / |truth|_inf over the tensors, modulo the rows of `null` (k, n).

    A tensor whose truth is (almost) zero is measured against the largest of all. NaN where an entry is NaN.
    """
    gap = torch.cat([(f.detach().double() - t).reshape(-1) for f, t in zip(found, truth, strict=True)])
    gap = orthogonal_to(null, gap)
    floor = 1e-9 * max((float(t.abs().max()) for t in truth if t.numel()), default=0.0)
    errors = [
        part.abs().max() / (max(float(t.abs().max()), floor) or 1.0)
        for part, t in zip(gap.split([t.numel() for t in truth]), truth, strict=True)
        if t.numel()
    ]
    return float(torch.stack(errors).max()) if errors else 0.0


def _left_null_space(rows: Tensor) -> tuple[Tensor, float]:
    """(orthonormal basis (p, k) of {c: A'c = 0}, ratio of singular values with rows of length one)."""
    p = rows.shape[0]
    if p == 0:
        return rows.new_zeros(0, 0), 1.0
    length = torch.linalg.vector_norm(rows, dim=1)
    length = torch.where(length > 0, length, 1)[:, None]
    # The left factor is needed in full; the right one only where that comes for free.
    left, values, _ = torch.linalg.svd(rows / length, full_matrices=p > rows.shape[1])
    values = torch.cat([values, values.new_zeros(p - values.numel())])
    basis = left[:, values <= 1e-11 * max(float(values[0]), 1e-300)] / length
    orthonormal = torch.linalg.qr(basis).Q if basis.shape[1] else basis
    return orthonormal, float(values[-1] / values[0]) if float(values[0]) > 0 else 0.0


def made_consistent(inputs: Sequence[Any], reference: Reference) -> tuple[Any, ...]:
    """The inputs, moved by what float32 rounding made dependent constraints inconsistent by."""
    change = iter(reference.consistency())
    return tuple(pytree.tree_map(lambda leaf: leaf + next(change) if floating(leaf) else leaf, tuple(inputs)))
