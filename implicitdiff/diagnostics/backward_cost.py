"""Diagnostics, the price of one backward pass, found by running it under the meter: on shapes alone where
that is possible.

In: a plan and its bound inputs. Out: a frozen `BackwardCost`. Direct solvers do the same work for all data,
so meta tensors will do; an iterative one has to be run on numbers. Used by `explain.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from implicitdiff.diagnostics.held import Planned
from implicitdiff.diagnostics.meter import Measurement, measure
from implicitdiff.problem import Problem
from implicitdiff.pytrees import flatten
from implicitdiff.torch_private import HOST, TorchDispatchMode, is_fake, packet_of

ITERATIVE = frozenset(("cg", "schur-cg", "minres", "gmres"))


@dataclass(frozen=True)
class BackwardCost:
    """FLOPs, bytes moved and peak bytes of one backward pass for the whole batch, and how they were found."""

    flops: int
    bytes: int
    peak: int
    how: str


MADE_UP_BYTES = 2**26
"""Iterations are counted on random data where there is none, unless that would be more than this."""


def backward_cost(problem: Problem, planned: Planned) -> BackwardCost:
    """Count one `plan.vjp` with gradients for all floating inputs and the Parameters.

    Args:
        problem: The problem, for its `init`.
        planned: Its plan.

    Returns:
        BackwardCost. Cost: the dispatch of one backward without data; with an iterative solver one backward.
    """
    if planned.bound.batch == 0:
        return BackwardCost(0, 0, 0, "an empty batch costs nothing")
    iterative = planned.plan.analysis.solver in ITERATIVE
    made_up = sum(t.numel() * t.element_size() for t in planned.theta if is_fake(t))
    if not iterative or made_up > MADE_UP_BYTES:
        try:
            with _NoFailure():
                found = _run(planned, [torch.empty_like(t, device="meta") for t in planned.theta], _empty)
            how = (
                "counted from the shapes, without the iterations" if iterative else "counted from the shapes"
            )
            return BackwardCost(found.flops, found.bytes, found.peak, how)
        except (NotImplementedError, RuntimeError):
            # An operation whose result has a size that depends on values has no meta version; a constant that the
            # functions make has data, and some operations refuse to take it together with shapes alone.
            pass
    given = not any(is_fake(tensor) for tensor in planned.theta)
    home = next((tensor.device for tensor in planned.theta if not is_fake(tensor)), HOST)

    def make(like: Tensor) -> Tensor:
        return _synthetic(like, home)

    theta = [make(tensor) if is_fake(tensor) else tensor.detach() for tensor in planned.theta]
    start = _start(problem, planned) if given else None
    found = _run(planned, theta, make, start)
    what = "the given data, at the start point" if start is not None else "random data"
    why = (
        "iterations depend on the data" if iterative else "the pattern is data, and SciPy's part is not seen"
    )
    return BackwardCost(found.flops, found.bytes, found.peak, f"counted on {what}; {why}")


def _run(
    planned: Planned, theta: Sequence[Tensor], make: Any, start: Sequence[Tensor] | None = None
) -> Measurement:
    plan, batch = planned.plan, planned.bound.batch
    like = next(tensor for tensor in theta if tensor.is_floating_point())

    def leaves(shapes: Sequence[Sequence[int]], dtypes: Sequence[torch.dtype]) -> tuple[Tensor, ...]:
        return tuple(
            make(torch.empty((batch, *shape), dtype=dtype, device=like.device if like.is_meta else "meta"))
            for shape, dtype in zip(shapes, dtypes, strict=True)
        )

    variables = plan.trace.variables
    shapes, dtypes = [item.shape for item in variables], [item.dtype for item in variables]
    outputs = () if plan.trace.equality is None else plan.trace.equality.output_shapes
    u = leaves(shapes, dtypes) if start is None else tuple(start)
    lam, v = leaves(outputs, [dtypes[0]] * len(outputs)), leaves(shapes, dtypes)
    with torch.no_grad():
        plan.vjp(u, lam, tuple(theta), v, None, planned.needs)  # emits what is written on first use
        _, found = measure(plan.vjp, u, lam, tuple(theta), v, None, planned.needs)
    return found


def _empty(like: Tensor) -> Tensor:
    return torch.empty_like(like, device="meta")


def _synthetic(like: Tensor, device: torch.device) -> Tensor:
    """Numbers in [0.5, 1.5), the same for each shape: inside the domain of most objectives."""
    if not like.is_floating_point():
        return torch.zeros(like.shape, dtype=like.dtype, device=device)
    generator = torch.Generator().manual_seed(like.numel())
    draw = torch.rand(like.shape, generator=generator, dtype=torch.float64, device=generator.device)
    return draw.to(device, like.dtype) + 0.5


def _start(problem: Problem, planned: Planned) -> tuple[Tensor, ...] | None:
    """The problem's start point for each sample; None where it declares none."""
    if not problem.declares("init"):
        return None
    with torch.no_grad():
        samples = [flatten(problem.init(*planned.bound.sample(b)))[0] for b in range(planned.bound.batch)]
    return tuple(torch.stack(leaves) for leaves in zip(*samples, strict=True))


class _NoFailure(TorchDispatchMode):
    """Answers questions about the values of meta tensors as they are answered where nothing fails.

    What solvers ask is whether all of something are sound (yes), whether any sample is bad (no), and which
    ones (none).
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        on_meta = bool(args) and isinstance(args[0], Tensor) and args[0].is_meta
        if on_meta and func is torch.ops.aten._local_scalar_dense.default:
            sound = hasattr(args[0], "_all_are_sound")
            return torch.tensor(sound, dtype=args[0].dtype, device=HOST).item()
        if on_meta and func is torch.ops.aten.nonzero.default:
            return torch.empty((0, args[0].dim()), dtype=torch.int64, device="meta")
        result = func(*args, **(kwargs or {}))
        if on_meta and packet_of(func) is torch.ops.aten.all:
            result._all_are_sound = True
        return result
