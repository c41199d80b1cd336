"""A call of a problem with inequalities or bounds, in two steps: find the active sets, then differentiate on them.

In: a `Prepared` whose plan is one on an active set. Out: the same with the masks among its tensors and the solution in
the place of a solver. The first step has no derivative (active sets are constant where they have one), the second is
that of equality constraints. Next: `optimizers/limited_forward.py` and `autograd/implicit.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from implicitdiff.autograd import Call, ImplicitFunction
from implicitdiff.autograd.call import fold, own, undisturbed, unfold
from implicitdiff.autograd.opaque import Flags, OpaqueStep
from implicitdiff.derivatives.factor import KKTFactor
from implicitdiff.derivatives.lagrangian import Lagrangian, sum_of_products
from implicitdiff.failures import filled
from implicitdiff.inputs import check_finite
from implicitdiff.layer.prepare import Forward, Leaves, Outputs, Prepared
from implicitdiff.optimizers.limited_forward import Located, solve_limited
from implicitdiff.plan import with_batched
from implicitdiff.problem import Solution
from implicitdiff.pytrees import unflatten

EXTRAS = 4  # status, iterations, residual, margin


@dataclass(frozen=True)
class Known:
    """The forward of the second step: the solution is what it starts from, (u, lam and mu, status, ...)."""

    first: Forward

    def __call__(self, call: Call, theta: Leaves, start: Leaves | None) -> Solved:
        """The leaves handed over, in their roles."""
        assert start is not None
        split = call.variables + call.multipliers
        status, iterations, residual = start[split:]
        u, multipliers = tuple(start[: call.variables]), tuple(start[call.variables : split])
        return Solved(u, multipliers, status, iterations, residual)

    def handle(self, call: Call) -> int:
        """The number of the call; see `Forward.handle`."""
        return self.first.number(call, "known", Known)


@dataclass(frozen=True)
class Solved:
    """See `autograd.call.Solved`."""

    u: Leaves
    multipliers: Leaves
    status: Tensor
    iterations: Tensor
    residual: Tensor
    factor: KKTFactor | None = None


@dataclass(frozen=True)
class SearchCall(Call):
    """A call of the first step: theta, and `batched`, are those without masks."""

    def folded(self, batched: tuple[bool, ...], batch: int) -> SearchCall:
        """The same call after an outer axis went into the batch."""
        flags = (*batched, *(True,) * len(self.plan.trace.masks))
        plan = with_batched(self.plan, flags, backward=self.backward, linear_solver=self.linear_solver)
        return replace(self, plan=plan, batched=batched, batch=batch)

    def search(self, theta: Leaves, start: Leaves | None) -> Located:
        """Solve on plain tensors and find the active sets."""
        forward = self.solve
        assert isinstance(forward, Forward)
        forward.refuse_stale()
        bound, options = forward.bound, forward.options
        if not bound.checked:
            count = len(bound.names)
            check_finite(bound.names, theta[:count], self.batched[:count])
        found = solve_limited(
            forward.problem,
            self.plan,
            bound,
            theta,
            init=start,
            optimizer=options.optimizer,
            tol=options.optimality_tol,
            on_failure=options.on_failure,
            tie=options.tie,
        )
        return replace(
            found,
            u=filled(found.u, found.failed, options.on_failure),
            multipliers=filled(found.multipliers, found.failed, options.on_failure),
        )

    def handle(self) -> int:
        """The number of the call."""
        forward = self.solve
        assert isinstance(forward, Forward)
        return forward.number(self, "search", lambda again: again)


class Search(torch.autograd.Function):
    """(u, lam and mu, masks, masks with ties in, status, iterations, residual, margin) of theta, without derivatives.

    Apply to (call, *theta, *start). It is a Function so that the transforms of torch.func hand it plain tensors.
    """

    @staticmethod
    def forward(call: SearchCall, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run the solver."""
        return SEARCH(call, (), tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Nothing is kept."""
        ctx.count = len(output)
        ctx.inputs = len(inputs)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> tuple[None, ...]:
        """Active sets do not move."""
        return (None,) * ctx.inputs

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> tuple[None, ...]:
        """Active sets do not move."""
        return (None,) * ctx.count

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], call: SearchCall, *tensors: Tensor
    ) -> tuple[Any, Any]:
        """Fold the vmapped axis into the batch and apply again."""
        size, count = info.batch_size, len(call.batched)
        theta, inner = call.fold_theta(tensors[:count], in_dims[1 : 1 + count], size)
        start = [
            fold(value, dim, size) for value, dim in zip(tensors[count:], in_dims[1 + count :], strict=True)
        ]
        outputs = Search.apply(inner, *theta, *start)
        return tuple(unfold(output, size, call.batch) for output in outputs), (0,) * len(outputs)


def _search(call: SearchCall, _: Flags, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    count = len(call.batched)
    theta, start = tuple(tensors[:count]), tuple(tensors[count:])
    with undisturbed(theta[0]):
        found = call.search(theta, start or None)
    held = {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()}
    outputs = (
        *found.u,
        *found.multipliers,
        *found.masks,
        *(mask.clone() for mask in found.closed),
        found.status,
        found.iterations,
        found.residual,
        found.margin,
    )
    return tuple(own(output, held) for output in outputs)


def _search_shapes(call: SearchCall, _: Flags, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    like, trace = tensors[0], call.plan.trace
    dtype = trace.variables[0].dtype
    shapes = () if trace.equality is None else trace.equality.output_shapes

    def empty(shape: Sequence[int], kind: torch.dtype) -> Tensor:
        return like.new_empty((call.batch, *shape), dtype=kind)

    return (
        *(empty(leaf.shape, leaf.dtype) for leaf in trace.variables),
        *(empty(shape, dtype) for shape in shapes),
        *(empty(mask.shape, mask.dtype) for mask in (*trace.masks, *trace.masks)),
        *(empty((), kind) for kind in (torch.int8, torch.int64, dtype, dtype)),
    )


SEARCH = OpaqueStep("search", _search, _search_shapes)


def located(prepared: Prepared) -> tuple[Prepared, ...]:
    """The call on its active sets: with the solution in place of a solver, once more for the other side of ties.

    Returns:
        One prepared call; under tie="average" two, whose outputs are to be averaged.
    """
    call = search_call(prepared)
    count = len(call.batched)
    found = Search.apply(call, *prepared.theta[:count], *(prepared.start or ()))
    masks = len(prepared.plan.trace.masks)
    solution = len(found) - 2 * masks - EXTRAS
    known = (*found[:solution], *found[-EXTRAS:-1])
    sides = [found[solution : solution + masks]]
    if prepared.options.tie == "average":
        sides.append(found[solution + masks : solution + 2 * masks])
    return tuple(
        replace(prepared, theta=(*prepared.theta[:count], *side), known=known, margin=found[-1])
        for side in sides
    )


def search_call(prepared: Prepared) -> SearchCall:
    """The call of the first step."""
    call = prepared.call()
    masks = len(prepared.plan.trace.masks)
    flags = prepared.batched[: len(prepared.batched) - masks]
    return SearchCall(
        plan=prepared.forward_plan,
        batched=flags,
        batch=call.batch,
        solve=prepared.forward(),
        on_failure=call.on_failure,
        name=call.name,
        backward="auto" if call.backward == "approximate" else call.backward,
        linear_solver=call.linear_solver,
        records=call.records,
    )


def with_bound_multipliers(prepared: Prepared, outputs: Outputs, solution: Solution) -> Solution:
    """The solution with the multipliers of the bounds, differentiable, and the margin.

    With L = f - lam'h - mu'g as declared: -D_u L on lower bounds, D_u L on upper ones.
    """
    side, trace = outputs.call or prepared, prepared.plan.trace.origin
    solution = replace(solution, margin=None if outputs.margin is None else side.back(outputs.margin))
    if trace.bounds is None or side.known is None:
        return solution
    count = len(trace.placeholders) - len(trace.variables)
    theta, masks = side.theta[:count], iter(side.theta[count:])
    lagrangian = Lagrangian(trace, side.batched[:count])
    equalities = 0 if trace.equality is None else len(trace.equality.output_shapes)

    def total(*u: Tensor) -> Tensor:
        value = lagrangian.total(u, outputs.multipliers[:equalities], theta)
        if trace.inequality is not None:
            rows = lagrangian.mapped(trace.inequality, u, theta)
            value = value - sum_of_products(outputs.multipliers[equalities:], rows)
        return value

    left = torch.func.grad(total, argnums=tuple(range(len(outputs.u))))(*outputs.u)
    lower, upper = [], []
    for slope, there in zip(left, trace.bounded, strict=True):
        low = high = torch.zeros_like(slope, dtype=torch.bool)
        if any(there):
            _, low, high = next(masks), next(masks), next(masks)
        lower.append(side.back(torch.where(low, -slope, 0.0)))
        upper.append(side.back(torch.where(high, slope, 0.0)))
    spec = trace.variable_spec
    return replace(solution, bound_multipliers=(unflatten(lower, spec), unflatten(upper, spec)))


def known_call(side: Prepared) -> Call:
    """The call of the second step, for a prepared call with its masks."""
    return replace(side.call(), solve=Known(side.forward()))


def apply_located(prepared: Prepared) -> Outputs:
    """Run a call through autograd's function on its active sets; the average over both sides of ties."""
    found = []
    for side in located(prepared):
        assert side.known is not None
        outputs = ImplicitFunction.apply(known_call(side), *side.theta, *side.known)
        count = len(prepared.plan.trace.variables)
        u, lam = tuple(outputs[:count]), tuple(outputs[count:-3])
        status, iterations, residual = outputs[-3:]
        found.append(Outputs(u, lam, status, iterations, residual, margin=side.margin, call=side))
    if len(found) == 1:
        return found[0]
    first, second = found
    return replace(
        first,
        u=tuple(_mean(a, b) for a, b in zip(first.u, second.u, strict=True)),
        multipliers=tuple(_mean(a, b) for a, b in zip(first.multipliers, second.multipliers, strict=True)),
    )


def _mean(first: Tensor, second: Tensor) -> Tensor:
    """The first value, with the mean of both derivatives: the values are the same."""
    return 0.5 * first + 0.5 * second
