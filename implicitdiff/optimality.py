"""Is a point a solution? The rule, held against every sample on its own.

A plan, a point and multipliers come in; a `Check` (residuals and a Status per sample) goes out. Next:
failures.py, which turns it into an error, a warning or a mask, as `on_failure` says.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from implicitdiff.errors import OptionError
from implicitdiff.plan import Plan, Stationarity
from implicitdiff.pytrees import leaf_names
from implicitdiff.status import Status

# A and its singular values are formed only to name infeasible samples, and not beyond this many entries.
_DENSE_LIMIT = 1 << 25
_CLASHES_NAMED = 6


@dataclass(frozen=True)
class Residuals:
    """How far from stationary each sample is; every field has shape (B,).

    Attributes:
        gradient: |D_u L|_inf.
        gradient_scale: The largest of the terms that cancel in it.
        constraint: |h|_inf; 0 without constraints.
        constraint_scale: The largest of the terms that cancel in it.
        leaf: Index of the constraint leaf where |h| is largest (int64); None where there is only one.
        ratio: What `relative` is, where it has been computed already.
    """

    gradient: Tensor
    gradient_scale: Tensor
    constraint: Tensor
    constraint_scale: Tensor
    leaf: Tensor | None
    ratio: Tensor | None = None

    @property
    def violation(self) -> Tensor:
        """|h|_inf over its scale (B,); 0 where h is exactly 0."""
        return _relative(self.constraint, self.constraint_scale)

    @property
    def stationarity(self) -> Tensor:
        """|D_u L|_inf over its scale (B,); 0 where D_u L is exactly 0."""
        return _relative(self.gradient, self.gradient_scale)

    @property
    def relative(self) -> Tensor:
        """The larger of the two relative residuals (B,): optimal means <= tol."""
        return torch.maximum(self.stationarity, self.violation) if self.ratio is None else self.ratio

    def pick(self, mask: Tensor, other: "Residuals") -> "Residuals":
        """These residuals where the mask (B,) is true, `other` elsewhere."""
        return Residuals(
            torch.where(mask, self.gradient, other.gradient),
            torch.where(mask, self.gradient_scale, other.gradient_scale),
            torch.where(mask, self.constraint, other.constraint),
            torch.where(mask, self.constraint_scale, other.constraint_scale),
            None if self.leaf is None or other.leaf is None else torch.where(mask, self.leaf, other.leaf),
        )


@dataclass(frozen=True)
class Check:
    """The verdict on a batch.

    Attributes:
        residuals: of each sample.
        status: Status per sample (B,) int8.
        tol: what they were held to.
        names: of the constraint leaves; () where all are met.
        clash: which constraints contradict each other in the first infeasible sample; "" where none does.
        all_ok: that every status is OK; where it is False, they have to be read.
    """

    residuals: Residuals
    status: Tensor
    tol: float
    names: tuple[str, ...] = ()
    clash: str = ""
    all_ok: bool = False
    square: bool = False
    """Whether h is the residual of a system of equations."""


def _relative(size: Tensor, scale: Tensor) -> Tensor:
    # 0 / 0 is a perfect zero. An infinite or undefined scale would make the rule true of anything: it counts
    # as 0.
    scale = torch.where(torch.isfinite(scale), scale, 0)
    return torch.where(size == 0, size, size / scale)


def _largest(leaf: Tensor) -> Tensor:
    if leaf.dim() == 1:
        return leaf.abs()
    if not leaf.numel():
        return leaf.new_zeros(leaf.shape[0])
    return leaf.abs().amax(tuple(range(1, leaf.dim())))


def tolerance(dtype: torch.dtype, override: float | None = None) -> float:
    """The relative tolerance of the optimality rule: sqrt(eps) of the dtype unless overridden.

    Raises:
        OptionError: The override is not a positive number.
    """
    if override is None:
        return float(torch.finfo(dtype).eps ** 0.5)
    if not override > 0:
        raise OptionError(
            f"optimality_tol must be a positive number, got {override!r}; None means sqrt(eps) of the dtype"
        )
    return float(override)


def residuals_at(stationarity: Stationarity, variables: Sequence[Tensor]) -> Residuals:
    """Largest entries of D_u L and h with the scales that the plan gives; no entry is left out.

    Args:
        stationarity: What `plan.stationarity` returned.
        variables: Leaves (B, *shape); only their batch size and dtype are read.

    Returns:
        Residuals; NaN where an entry is NaN.
    """
    zero = variables[0].new_zeros(variables[0].shape[0])
    gradient = _stack_largest(stationarity.gradient, zero)
    constraint = _stack_largest(stationarity.constraint, zero)
    return Residuals(
        gradient.amax(0),
        stationarity.gradient_scale,
        constraint.amax(0),
        stationarity.constraint_scale if stationarity.constraint else zero,
        constraint.argmax(0) if len(constraint) > 1 else None,
    )


def _stack_largest(leaves: Sequence[Tensor], zero: Tensor) -> Tensor:
    return torch.stack([_largest(leaf) for leaf in leaves]) if leaves else zero[None]


def measure(
    plan: Plan,
    variables: Sequence[Tensor],
    multipliers: Sequence[Tensor],
    theta: Sequence[Tensor],
    found: Stationarity | None = None,
) -> Residuals:
    """The residuals of a finished solution.

    An entry of u that underflowed to 0 where the gradient is not finite (u log u at 0) leaves the check: it
    is at the edge of the domain and no point of this dtype is nearer to the solution. The rest is then
    measured with that entry set to the smallest positive number, so that the scales are finite too.

    Args:
        plan: The plan.
        variables: Leaves (B, *shape).
        multipliers: Leaves (B, *shape), () without constraints.
        theta: Inputs and tensors, as the plan takes them.
        found: What `plan.stationarity` gave at this point, if it was asked already.

    Returns:
        Residuals. Cost: one pass of `plan.stationarity`, two if entries underflowed.
    """
    if found is None:
        found = plan.stationarity(tuple(variables), tuple(multipliers), tuple(theta))
    plain = residuals_at(found, variables)
    lost = [(u == 0) & ~torch.isfinite(g) for u, g in zip(variables, found.gradient, strict=True)]
    if not any(bool(mask.any()) for mask in lost):
        return plain
    touched = torch.stack([mask.reshape(mask.shape[0], -1).any(1) for mask in lost]).any(0)
    inside = tuple(
        u.masked_fill(mask, torch.finfo(u.dtype).tiny) for u, mask in zip(variables, lost, strict=True)
    )
    again = plan.stationarity(inside, tuple(multipliers), tuple(theta))
    kept = tuple(g.masked_fill(mask, 0) for g, mask in zip(again.gradient, lost, strict=True))
    # The scale of the point itself where the plan could give one: that of the substitute has the terms of the
    # entries that left the check.
    known = torch.isfinite(found.gradient_scale) & (found.gradient_scale > 0)
    scale = torch.where(known, found.gradient_scale, again.gradient_scale)
    mended = Stationarity(kept, scale, again.constraint, again.constraint_scale)
    return residuals_at(mended, variables).pick(touched, plain)


def check(
    plan: Plan,
    variables: Sequence[Tensor],
    multipliers: Sequence[Tensor],
    theta: Sequence[Tensor],
    tol: float,
    found: Stationarity | None = None,
) -> Check:
    """Hold a solution to the rule |D_u L|_inf <= tol * (largest term that cancels in it), |h|_inf likewise.

    Args:
        plan: The plan.
        variables: Leaves (B, *shape).
        multipliers: Leaves (B, *shape), () without constraints.
        theta: Inputs and tensors, as the plan takes them.
        tol: The relative tolerance, see `tolerance`.
        found: What `plan.stationarity` gave at this point, if it was asked already.

    Returns:
        Check with OK, NOT_OPTIMAL, INFEASIBLE (the violation cannot be removed to first order: contradicting
        constraints) or NONFINITE for each sample. A is formed only if some sample violates its constraints.
    """
    if found is None:
        found = plan.stationarity(tuple(variables), tuple(multipliers), tuple(theta))
    settled = settle(found, variables, multipliers, tol)
    if settled is not None:
        return settled
    residuals = measure(plan, variables, multipliers, theta, found)
    if not plan.trace.square and not bool((residuals.relative <= tol).all()):
        residuals = _with_linear_part(plan, residuals, variables, multipliers, theta, tol)
    status = torch.full_like(residuals.gradient, Status.NOT_OPTIMAL, dtype=torch.int8)
    status[residuals.relative <= tol] = Status.OK
    violated = residuals.violation > tol
    names: tuple[str, ...] = ()
    clash = ""
    if bool(violated.any()):
        names = constraint_names(plan)
        rest = None if plan.trace.square else irreducible_part(plan, variables, theta, tol)
        if rest is not None:
            infeasible = violated & rest.any(1)
            status[infeasible] = Status.INFEASIBLE
            clash = (
                clashing(plan, names, rest[infeasible.to(torch.int8).argmax()]) if infeasible.any() else ""
            )
    finite = torch.stack([torch.isfinite(_largest(leaf)) for leaf in (*variables, *multipliers)]).all(0)
    status[~finite | ~torch.isfinite(residuals.gradient + residuals.constraint)] = Status.NONFINITE
    return Check(residuals, status, tol, names, clash, square=bool(plan.trace.square))


def constraint_names(plan: Plan) -> tuple[str, ...]:
    """`equality`, or `equality['sum']`, `equality[1]`, ... where it returns several leaves."""
    spec = plan.trace.equality_spec
    return () if spec is None else leaf_names(spec, "equality")


def clashing(plan: Plan, names: Sequence[str], rows: Tensor) -> str:
    """The constraints of one sample that `rows` (p,) bool marks, by name: `equality['a'][0], equality['b']`."""
    found, start = [], 0
    for name, shape in zip(names, _equality_shapes(plan), strict=True):
        size = torch.Size(shape).numel()
        marked = rows[start : start + size].nonzero()[:, 0].tolist()
        start += size
        if len(marked) == size:
            found += [name if size == 1 else f"{name} (all {size})"]
        else:
            places = [tuple(int(k) for k in np.unravel_index(i, shape)) for i in marked]
            found += [f"{name}[{', '.join(map(str, place))}]" for place in places]
    more = f" and {len(found) - _CLASHES_NAMED} more" if len(found) > _CLASHES_NAMED else ""
    return ", ".join(found[:_CLASHES_NAMED]) + more


def settle(
    found: Stationarity, variables: Sequence[Tensor], multipliers: Sequence[Tensor], tol: float
) -> Check | None:
    """The verdict where every sample is optimal at the first look: all OK. None where one has to look again.

    One maximum over the batch is read for each question; a NaN or an infinity anywhere makes its answer no. So does
    0 / 0, a residual and a scale that are both 0.

    Args:
        found: What `plan.stationarity` returned.
        variables: Leaves (B, *shape).
        multipliers: Leaves (B, *shape).
        tol: The relative tolerance.
    """
    gradient, scale = _over_leaves(found.gradient), found.gradient_scale
    ratio, scales, constraint, leaf = gradient / scale, scale, None, None
    if found.constraint:
        sizes = [_largest(h) for h in found.constraint]
        constraint = sizes[0]
        if len(sizes) > 1:
            constraint, leaf = torch.stack(sizes).max(0)
        ratio = torch.maximum(ratio, constraint / found.constraint_scale)
        scales = torch.maximum(scales, found.constraint_scale)
    sums = (leaf.sum() for leaf in (*variables, *multipliers))
    largest, bound, *totals = torch.stack([ratio.amax(), scales.amax(), *sums]).tolist()
    if not (largest <= tol and bound < math.inf and all(map(math.isfinite, totals))):
        return None
    status = torch.zeros_like(ratio, dtype=torch.int8)
    if constraint is None:
        constraint = torch.zeros_like(ratio)
    within = found.constraint_scale if found.constraint else constraint
    return Check(Residuals(gradient, scale, constraint, within, leaf, ratio), status, tol, all_ok=True)


def _over_leaves(leaves: Sequence[Tensor]) -> Tensor:
    """The largest absolute value of each sample, (B,)."""
    if len(leaves) == 1:
        return _largest(leaves[0])
    return torch.stack([_largest(leaf) for leaf in leaves]).amax(0)


def _with_linear_part(
    plan: Plan,
    residuals: Residuals,
    variables: Sequence[Tensor],
    multipliers: Sequence[Tensor],
    theta: Sequence[Tensor],
    tol: float,
) -> Residuals:
    """Residuals in which H u counts as a term of D_u L, in the samples that fail without it.

    A plan that sees 2 (u - x) as one term gives it no scale to be small against; its part linear in u, which
    cancels against the rest, is H u.
    """
    operator = plan.hessian(tuple(variables), tuple(multipliers), tuple(theta))
    linear = operator.matvec(torch.cat([leaf.reshape(leaf.shape[0], -1) for leaf in variables], dim=1))
    size = _largest(linear)
    larger = (residuals.relative > tol) & torch.isfinite(size) & (size > residuals.gradient_scale)
    return replace(residuals, gradient_scale=torch.where(larger, size, residuals.gradient_scale))


def irreducible(plan: Plan, variables: Sequence[Tensor], theta: Sequence[Tensor], tol: float) -> Tensor:
    """Where no step can remove the violation of the constraints, to first order (B,) bool; see `irreducible_part`."""
    rest = irreducible_part(plan, variables, theta, tol)
    batch = variables[0].shape[0]
    return torch.zeros(batch, dtype=torch.bool, device=variables[0].device) if rest is None else rest.any(1)


def irreducible_part(
    plan: Plan, variables: Sequence[Tensor], theta: Sequence[Tensor], tol: float
) -> Tensor | None:
    """Which constraints keep a violation that no step removes, to first order (B, p) bool.

    |(I - A A^+) h| is the smallest |h + A d| over all steps d, so for linear constraints this proves that
    they contradict each other. Singular values so small that only a step of 1e5 (1 + |u|) would use them
    count as zero, which covers nonlinear constraints at the point nearest to feasible (|u|^2 + 1 = 0 near u =
    0).

    Args:
        plan: The plan.
        variables: Leaves (B, *shape).
        theta: Inputs and tensors.
        tol: The tolerance of the rule.

    Returns:
        bool (B, p): the entries above the tolerance in what remains, all of them within a factor of 1e3 of the largest;
        None beyond 2^25 entries of A, where nothing is computed. Cost: one dense A and its SVD.
    """
    zero = tuple(u.new_zeros((u.shape[0], *shape)) for u in variables[:1] for shape in _equality_shapes(plan))
    found = plan.stationarity(tuple(variables), zero, tuple(theta))
    h = torch.cat([leaf.reshape(leaf.shape[0], -1) for leaf in found.constraint], dim=1)
    if h.shape[0] * h.shape[1] * sum(u[0].numel() for u in variables) > _DENSE_LIMIT:
        return None
    jacobian = plan.constraint_jacobian(tuple(variables), tuple(theta))
    usable = torch.isfinite(jacobian).all(2).all(1) & torch.isfinite(h).all(1)
    jacobian = torch.where(
        usable[:, None, None], jacobian, 0
    )  # the SVD of a batch raises if one matrix has a NaN
    left, values, _ = torch.linalg.svd(jacobian, full_matrices=False)
    reach = 1 + torch.stack([_largest(u) for u in variables]).amax(0)
    size = h.abs().amax(1)
    eps = torch.finfo(h.dtype).eps
    smallest = torch.maximum(values.amax(1) * eps * max(jacobian.shape[1:]), 1e-5 * size / reach)
    left = left * (values > smallest[:, None])[:, None, :]
    rest = (h - (left @ (left.mT @ h[..., None]))[..., 0]).abs()
    beyond = usable & (_relative(rest.amax(1), found.constraint_scale) > tol)
    return beyond[:, None] & (rest > 1e-3 * rest.amax(1, keepdim=True))


def _equality_shapes(plan: Plan) -> tuple[tuple[int, ...], ...]:
    return tuple(plan.trace.equality.output_shapes) if plan.trace.equality is not None else ()
