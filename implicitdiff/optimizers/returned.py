"""What a user's hook returned, checked against the trace before anything is computed with it.

The return value of `solve` or `init`, or a warm start, comes in; detached leaves of the right shapes, or a
SolutionError that names what was expected and what came, go out. Next: forward.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from implicitdiff.errors import SolutionError
from implicitdiff.graph.trace import Trace
from implicitdiff.problem import Solution
from implicitdiff.pytrees import flatten_like, leaf_names, unflatten
from implicitdiff.status import Status

Leaves = tuple[Tensor, ...]


class Declares(Protocol):
    """A plan, of which only the trace counts; for a problem with inequalities the trace as it was declared."""

    @property
    def trace(self) -> Trace: ...


@dataclass(frozen=True)
class Proposal:
    """What `solve` returned, checked: leaves (B, *shape) and, where given, tensors (B,)."""

    u: Leaves
    multipliers: Leaves | None
    status: Tensor | None
    iterations: Tensor | None
    rows: Leaves | None = None
    """The multipliers of the inequalities."""


def checked_solution(what: str, plan: Declares, found: Any, batch: int, device: torch.device) -> Proposal:
    """The return value of `solve`: u, or a Solution.

    Args:
        what: The hook, for messages: "solve of Portfolio".
        plan: For the structure, shapes and dtypes.
        found: What the hook returned.
        batch: B.
        device: That of the inputs.

    Raises:
        SolutionError: Wrong structure, shape, dtype, device, or something that is no tensor.
    """
    solution = found if isinstance(found, Solution) else Solution(found)
    u = checked_leaves(what, plan, solution.u, batch, device)
    lam, mu = (
        _multipliers(what, plan.trace, kind, given, batch, u[0])
        for kind, given in (
            ("equality", solution.equality_multipliers),
            ("inequality", solution.inequality_multipliers),
        )
    )
    status = _per_sample(what, "status", solution.status, batch, device)
    if status is not None and not bool(((status >= 0) & (status < len(Status))).all()):
        raise SolutionError(f"{what}: status holds {status.tolist()}, expected values of implicitdiff.Status")
    iterations = _per_sample(what, "iterations", solution.iterations, batch, device)
    return Proposal(
        u,
        lam,
        None if status is None else status.to(torch.int8),
        None if iterations is None else iterations.to(torch.int64),
        mu,
    )


def _multipliers(what: str, trace: Trace, kind: str, given: Any, batch: int, like: Tensor) -> Leaves | None:
    """The multipliers of one kind of constraints, None if none were returned."""
    if given is None:
        return None
    function, spec = getattr(trace, kind), getattr(trace, f"{kind}_spec")
    if function is None or spec is None:
        raise SolutionError(
            f"{what} returned {kind}_multipliers, but the problem declares no {kind}: leave them out"
        )
    tree = flatten_like(given, spec, f"{kind}_multipliers of {what}")
    names = leaf_names(spec, f"{kind}_multipliers")
    return tuple(
        _tensor(what, name, leaf, (batch, *shape), like.dtype, like.device)
        for name, leaf, shape in zip(names, tree, function.output_shapes, strict=True)
    )


def checked_leaves(what: str, plan: Declares, tree: Any, batch: int | None, device: torch.device) -> Leaves:
    """The leaves of u, (B, *shape), or (*shape) of one sample where `batch` is None.

    Raises:
        SolutionError: Wrong structure, shape, dtype, device, or something that is no tensor.
    """
    lead = () if batch is None else (batch,)
    variables = plan.trace.variables
    leaves = flatten_like(tree, plan.trace.variable_spec, what)
    names = leaf_names(plan.trace.variable_spec, "u")
    return tuple(
        _tensor(what, name, leaf, (*lead, *variable.shape), variable.dtype, device)
        for name, leaf, variable in zip(names, leaves, variables, strict=True)
    )


def _tensor(
    what: str, name: str, value: Any, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    if not isinstance(value, Tensor):
        raise SolutionError(
            f"{what}: {name} is a {type(value).__name__}, expected a tensor: use torch.as_tensor"
        )
    if tuple(value.shape) != shape:
        remedy = " (the batch axis comes first)" if tuple(value.shape) == shape[1:] else ""
        raise SolutionError(f"{what}: {name} has shape {tuple(value.shape)}, expected {shape}{remedy}")
    if value.dtype != dtype:
        raise SolutionError(
            f"{what}: {name} has dtype {value.dtype}, expected {dtype}: convert it with .to({dtype})"
        )
    if value.device != device:
        raise SolutionError(
            f"{what}: {name} is on {value.device}, expected {device}: move it with .to({str(device)!r})"
        )
    return value.detach()


def _per_sample(what: str, name: str, value: Any, batch: int, device: torch.device) -> Tensor | None:
    """Status or iterations: one integer per sample."""
    if value is None:
        return None
    if not isinstance(value, Tensor) or value.is_floating_point() or value.is_complex():
        kind = str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
        raise SolutionError(f"{what}: {name} is a {kind}, expected an integer tensor of shape ({batch},)")
    return _tensor(what, name, value, (batch,), value.dtype, device)


def check_start(
    plan: Declares, leaves: Sequence[Tensor], batch: int, device: torch.device, what: str
) -> Leaves:
    """The leaves of a start as they are, if they fit the variables.

    Raises:
        SolutionError: Wrong number, shape, dtype or device.
    """
    if len(leaves) != len(plan.trace.variables):
        raise SolutionError(
            f"{what} has {len(leaves)} leaves, expected {len(plan.trace.variables)}, one per variable"
        )
    return checked_leaves(what, plan, unflatten(tuple(leaves), plan.trace.variable_spec), batch, device)


def joined(parts: Sequence[Proposal]) -> Proposal:
    """The proposals of single samples as one; an entry that one of them lacks is None."""

    def join(values: Sequence[Tensor | None]) -> Tensor | None:
        known = [value for value in values if value is not None]
        return torch.cat(known) if len(known) == len(parts) else None

    multipliers = [part.multipliers for part in parts if part.multipliers is not None]
    rows = [part.rows for part in parts if part.rows is not None]
    return Proposal(
        tuple(torch.cat(leaves) for leaves in zip(*(part.u for part in parts), strict=True)),
        tuple(torch.cat(leaves) for leaves in zip(*multipliers, strict=True))
        if len(multipliers) == len(parts)
        else None,
        join([part.status for part in parts]),
        join([part.iterations for part in parts]),
        tuple(torch.cat(leaves) for leaves in zip(*rows, strict=True)) if len(rows) == len(parts) else None,
    )
