"""A plan that shares no code with the library's: autograd on one sample, in a Python loop over samples.

A sample's numbers therefore cannot depend on its neighbours, which is what the tests of the optimizers need.
`flags` says which inputs are batched; the KKT matrix is inverted by its pseudo-inverse, `shifts` records the
calls.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from implicitdiff.inputs import Bound, bind
from implicitdiff.problem import Problem
from implicitdiff.status import Status

Shapes = tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class PlaceholderDouble:
    shape: tuple[int, ...]
    dtype: torch.dtype
    batched: bool = True


@dataclasses.dataclass(frozen=True)
class EqualityDouble:
    output_shapes: Shapes


@dataclasses.dataclass(frozen=True)
class TraceDouble:
    variables: tuple[PlaceholderDouble, ...]
    inputs: tuple[PlaceholderDouble, ...]
    tensors: tuple[PlaceholderDouble, ...]
    equality: EqualityDouble | None
    variable_spec: Any
    equality_spec: Any
    square: str = ""
    limited: bool = False
    inequality: None = None
    inequality_spec: None = None


@dataclasses.dataclass(frozen=True)
class StationarityDouble:
    gradient: tuple[Tensor, ...]
    gradient_scale: Tensor
    constraint: tuple[Tensor, ...]
    constraint_scale: Tensor


@dataclasses.dataclass(frozen=True)
class OperatorDouble:
    matrix: Tensor
    kind: str = "dense"

    def matvec(self, x: Tensor) -> Tensor:
        return (self.matrix @ x[..., None])[..., 0]

    def to_dense(self) -> Tensor:
        return self.matrix


@dataclasses.dataclass(frozen=True)
class Derivatives:
    """f, D_u f, D_uu f, h, A and D_uu of each constraint at one point of one sample."""

    f: Tensor
    slope: Tensor
    curvature: Tensor
    h: Tensor
    jacobian: Tensor
    curvatures: list[Tensor]

    def lagrangian_hessian(self, nu: Tensor) -> Tensor:
        total = self.curvature
        for multiplier, curvature in zip(nu, self.curvatures, strict=True):
            total = total - multiplier * curvature
        return total


def _jacobian(values: Tensor, z: Tensor) -> Tensor:
    """Rows d values_i / dz, differentiable, one backward pass each; 0 where there is no dependence."""
    rows = []
    for value in values:
        row = None
        if value.requires_grad:
            (row,) = torch.autograd.grad(value, z, create_graph=True, allow_unused=True)
        rows.append(torch.zeros_like(z) if row is None else row)
    return torch.stack(rows) if rows else z.new_zeros((0, len(z)))


class PlanDouble:
    """The plan of objective(u, *theta) s.t. equality(u, *theta) = 0.

    u and the constraints are tuples of leaves, or one bare leaf. The batch may be solved sample by sample:
    nothing is shared.

    Scales: |D_u f|, |A'| |lambda| and |H| |u| for D_u L (what cancels in a gradient that is linear in u), and
    |A| |u| and |h| for h.
    """

    def __init__(
        self,
        objective: Callable[..., Tensor],
        equality: Callable[..., Any] | None,
        variables: Any,
        theta: Sequence[Tensor],
        flags: Sequence[bool],
        tensors: int = 0,
    ) -> None:
        """`variables`: an example of u of one sample; the last `tensors` of theta are no arguments."""
        leaves, spec = pytree.tree_flatten(variables)
        self.objective, self.equality = objective, equality
        self.flags, self.tensors, self.spec = tuple(flags), tensors, spec
        self.variable_shapes: Shapes = tuple(tuple(leaf.shape) for leaf in leaves)
        self.constraint_shapes: Shapes = ()
        equality_spec = None
        if equality is not None:
            values, equality_spec = pytree.tree_flatten(equality(variables, *self._sample(theta, 0)))
            self.constraint_shapes = tuple(tuple(value.shape) for value in values)
        given = [
            PlaceholderDouble(tuple(t.shape[1:] if flag else t.shape), t.dtype, flag)
            for t, flag in zip(theta, flags, strict=True)
        ]
        inputs = len(given) - tensors
        self.trace = TraceDouble(
            tuple(PlaceholderDouble(tuple(leaf.shape), leaf.dtype) for leaf in leaves),
            tuple(given[:inputs]),
            tuple(given[inputs:]),
            None if equality is None else EqualityDouble(self.constraint_shapes),
            spec,
            equality_spec,
        )
        self.needs_multipliers = True
        self.shifts: list[Tensor | None] = []
        self._known: dict[bytes, Derivatives] = {}

    @property
    def m(self) -> int:
        return sum(math.prod(shape) for shape in self.variable_shapes)

    def _split(self, flat: Tensor, shapes: Shapes) -> tuple[Tensor, ...]:
        pieces = torch.split(flat, [math.prod(shape) for shape in shapes])
        return tuple(piece.reshape(shape) for piece, shape in zip(pieces, shapes, strict=True))

    def _f(self, u: Tensor, theta: Sequence[Tensor]) -> Tensor:
        return self.objective(self._tree(u), *theta)

    def _tree(self, u: Tensor) -> Any:
        return pytree.tree_unflatten(list(self._split(u, self.variable_shapes)), self.spec)

    def _h(self, u: Tensor, theta: Sequence[Tensor]) -> Tensor:
        if self.equality is None:
            return u.new_zeros(0)
        return torch.cat(
            [leaf.reshape(-1) for leaf in pytree.tree_leaves(self.equality(self._tree(u), *theta))]
        )

    def _sample(self, theta: Sequence[Tensor], index: int) -> list[Tensor]:
        own = len(theta) - self.tensors
        return [t[index] if f else t for t, f in zip(theta[:own], self.flags[:own], strict=True)]

    def _each(self, leaves: Sequence[Tensor], theta: Sequence[Tensor]) -> list[tuple[Tensor, list[Tensor]]]:
        batch = leaves[0].shape[0]
        flat = torch.cat([leaf.reshape(batch, -1) for leaf in leaves], dim=1)
        return [(flat[i].clone(), self._sample(theta, i)) for i in range(batch)]

    def _multipliers(self, lam: Sequence[Tensor], index: int, like: Tensor) -> Tensor:
        return torch.cat([leaf[index].reshape(-1) for leaf in lam]) if lam else like.new_zeros(0)

    def _at(self, u: Tensor, theta: list[Tensor]) -> Derivatives:
        key = b"|".join(tensor.detach().numpy().tobytes() for tensor in (u, *theta))
        if key not in self._known:
            with torch.enable_grad():
                z = u.detach().clone().requires_grad_()
                f, h = self._f(z, theta), self._h(z, theta)
                slope, jacobian = _jacobian(f[None], z)[0], _jacobian(h, z)
                curvatures = [_jacobian(row, z).detach() for row in (slope, *jacobian)]
            self._known[key] = Derivatives(
                f.detach(), slope.detach(), curvatures[0], h.detach(), jacobian.detach(), curvatures[1:]
            )
        return self._known[key]

    def value(self, u: Sequence[Tensor], theta: Sequence[Tensor]) -> Tensor:
        return torch.stack([self._at(z, t).f for z, t in self._each(u, theta)])

    def value_and_gradient(
        self,
        u: Sequence[Tensor],
        theta: Sequence[Tensor],
        lam: Sequence[Tensor] = (),
        penalty: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        values, gradients = [], []
        for index, (z, t) in enumerate(self._each(u, theta)):
            nu, at = self._multipliers(lam, index, z), self._at(z, t)
            value, pull = at.f, nu
            if penalty is not None:
                value = value - nu @ at.h + 0.5 * penalty[index] * at.h @ at.h
                pull = nu - penalty[index] * at.h
            values.append(value)
            gradients.append(at.slope - at.jacobian.mT @ pull)
        return torch.stack(values), self._leaves(gradients, self.variable_shapes)

    def stationarity(
        self, u: Sequence[Tensor], lam: Sequence[Tensor], theta: Sequence[Tensor]
    ) -> StationarityDouble:
        gradients, scales, constraints, constraint_scales = [], [], [], []
        for index, (z, t) in enumerate(self._each(u, theta)):
            nu, at = self._multipliers(lam, index, z), self._at(z, t)
            gradients.append(at.slope - at.jacobian.mT @ nu)
            hessian = at.lagrangian_hessian(nu)
            terms = torch.cat([at.slope.abs(), at.jacobian.mT.abs() @ nu.abs(), hessian.abs() @ z.abs()])
            terms = terms[torch.isfinite(terms)]
            scales.append(terms.max() if len(terms) else z.new_zeros(()))
            constraints.append(at.h)
            size = torch.maximum(at.jacobian.abs() @ z.abs(), at.h.abs())
            constraint_scales.append(size.max() if len(size) else z.new_zeros(()))
        return StationarityDouble(
            self._leaves(gradients, self.variable_shapes),
            torch.stack(scales),
            self._leaves(constraints, self.constraint_shapes),
            torch.stack(constraint_scales),
        )

    def _leaves(self, rows: list[Tensor], shapes: Shapes) -> tuple[Tensor, ...]:
        if not shapes:
            return ()
        return tuple(
            torch.stack(leaf) for leaf in zip(*(self._split(row, shapes) for row in rows), strict=True)
        )

    def multipliers(self, u: Sequence[Tensor], theta: Sequence[Tensor]) -> tuple[Tensor, ...]:
        rows = []
        for z, t in self._each(u, theta):
            at = self._at(z, t)
            good = bool(torch.isfinite(at.jacobian).all())
            rows.append(torch.linalg.pinv(at.jacobian.mT) @ at.slope if good else at.h * torch.nan)
        return self._leaves(rows, self.constraint_shapes)

    def constraint_jacobian(self, u: Sequence[Tensor], theta: Sequence[Tensor]) -> Tensor:
        return torch.stack([self._at(z, t).jacobian for z, t in self._each(u, theta)])

    def hessian(self, u: Sequence[Tensor], lam: Sequence[Tensor], theta: Sequence[Tensor]) -> OperatorDouble:
        points = enumerate(self._each(u, theta))
        rows = [self._at(z, t).lagrangian_hessian(self._multipliers(lam, i, z)) for i, (z, t) in points]
        return OperatorDouble(torch.stack(rows))

    def kkt_solve(
        self,
        u: Sequence[Tensor],
        lam: Sequence[Tensor],
        theta: Sequence[Tensor],
        rhs_u: Sequence[Tensor],
        rhs_h: Sequence[Tensor],
        shift: Tensor | None = None,
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
        self.shifts.append(shift)
        tops, bottoms, status = [], [], []
        for index, (z, t) in enumerate(self._each(u, theta)):
            at = self._at(z, t)
            hessian, jacobian = at.lagrangian_hessian(self._multipliers(lam, index, z)), at.jacobian
            if shift is not None:
                hessian = hessian + shift[index] * torch.eye(self.m, dtype=z.dtype)
            p = jacobian.shape[0]
            matrix = torch.cat(
                [torch.cat([hessian, -jacobian.mT], 1), torch.cat([-jacobian, z.new_zeros(p, p)], 1)]
            )
            rhs = torch.cat([leaf[0, index].reshape(-1) for leaf in (*rhs_u, *rhs_h)])
            finite = bool(torch.isfinite(matrix).all())
            solved, singular = self._inverse_times(matrix, rhs) if finite else (rhs * torch.nan, False)
            tops.append(solved[: self.m])
            bottoms.append(solved[self.m :])
            status.append(Status.SINGULAR if singular else Status.OK if finite else Status.NONFINITE)
        w, s = self._leaves(tops, self.variable_shapes), self._leaves(bottoms, self.constraint_shapes)
        codes = torch.tensor([int(code) for code in status], dtype=torch.int8)
        return tuple(leaf[None] for leaf in w), tuple(leaf[None] for leaf in s), codes

    def _inverse_times(self, matrix: Tensor, rhs: Tensor) -> tuple[Tensor, bool]:
        """K^-1 rhs, or K^+ rhs for a singular K; whether u is then not determined."""
        scale = matrix.abs().amax(0).clamp_min(1e-300).rsqrt()
        scaled = scale[:, None] * matrix * scale
        if int(torch.linalg.matrix_rank(scaled, hermitian=True)) == len(rhs):
            factor, pivots, _ = torch.linalg.lu_factor_ex(scaled)
            return scale * torch.linalg.lu_solve(factor, pivots, (scale * rhs)[:, None])[:, 0], False
        lacks = int(torch.linalg.matrix_rank(matrix[:, : self.m])) < self.m
        return torch.linalg.pinv(matrix, hermitian=True) @ rhs, lacks


def double_of(
    problem: Problem, *inputs: Tensor, in_dims: Any = 0, u: Any = None
) -> tuple[PlanDouble, Bound, tuple[Tensor, ...]]:
    """(plan, bound, theta) of one call; `u` is an example of one sample for problems without `init`."""
    bound = bind(problem, inputs, in_dims)
    variables = problem.init(*bound.sample(0)) if u is None else u
    theta = tuple(tensor.detach() for tensor in (*bound.leaves, *bound.tensors))
    plan = PlanDouble(
        lambda v, *leaves: problem.objective(v, *bound.unflatten(leaves)),
        (lambda v, *leaves: problem.equality(v, *bound.unflatten(leaves)))
        if problem.declares("equality")
        else None,
        pytree.tree_map(lambda leaf: leaf.detach(), variables),
        theta,
        (*bound.batched, *(False for _ in bound.tensors)),
        tensors=len(bound.tensors),
    )
    return plan, bound, theta
