"""One call of a layer as its autograd functions see it: what is fixed, which tensors carry the batch, and how vmap
folds.

In: a plan and the tensors of a call. Out: a `Call` that may be passed through `autograd.Function.apply`, and the
folding of a vmapped axis into the batch. Next: `autograd/kkt.py` and `autograd/implicit.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from implicitdiff.autograd.options import PLAIN, KKTOptions
from implicitdiff.autograd.shared import SharedFactor
from implicitdiff.derivatives.equations import lagrangian_of
from implicitdiff.derivatives.factor import KKTFactor
from implicitdiff.derivatives.lagrangian import Lagrangian
from implicitdiff.plan import Plan, with_batched
from implicitdiff.records import Record
from implicitdiff.torch_private import is_view, without_autocast, without_saved_tensor_hooks

Leaves = tuple[Tensor, ...]


class Forward(Protocol):
    """The forward of a call."""

    def __call__(self, call: Call, theta: Leaves, start: Leaves | None) -> Solved:
        """Solve on plain tensors, from initial leaves or None."""

    def handle(self, call: Call) -> int:
        """The number of the call in `autograd.opaque.CALLS`."""


class Solved(Protocol):
    """What the forward of a call returns: leaves, and per sample (B,) status, iterations and residual."""

    @property
    def u(self) -> Leaves: ...
    @property
    def multipliers(self) -> Leaves | None: ...
    @property
    def status(self) -> Tensor: ...
    @property
    def iterations(self) -> Tensor: ...
    @property
    def residual(self) -> Tensor: ...
    @property
    def factor(self) -> KKTFactor | None: ...


@dataclass(frozen=True)
class Call:
    """Everything about one call that is not a differentiable tensor.

    Attributes:
        plan: the plan that the backward uses, for the flags `batched`.
        batched: for each theta, whether it carries the batch axis.
        batch: B.
        solve: the forward. It sees plain tensors only.
        on_failure: the policy for samples without a solution or without a derivative.
        name: the problem's class, for messages.
        backward, linear_solver: the layer's options, with which the plan was made.
        records: the records open at the forward; the backward may run in another thread.
        vjp: the hand-written gradient, (call, u, v, theta) -> one gradient per theta or None; None for the automatic
            one.
        kkt: what is done about K beside solving with it.
        factors: what the solves of this call share, also after folding.
    """

    plan: Plan
    batched: tuple[bool, ...]
    batch: int
    solve: Forward
    on_failure: str
    name: str
    backward: str = "auto"
    linear_solver: str = "auto"
    records: tuple[Record, ...] = ()
    vjp: Callable[[Call, Leaves, Leaves, Leaves], tuple[Tensor | None, ...]] | None = None
    kkt: KKTOptions = PLAIN
    factors: SharedFactor = field(default_factory=SharedFactor, compare=False, repr=False)

    @property
    def lagrangian(self) -> Lagrangian:
        """The differentiable functions of the call, for its flags."""
        return lagrangian_of(self.plan.trace, self.batched)

    @property
    def variables(self) -> int:
        """The number of leaves of u."""
        return self.lagrangian.variables

    @property
    def multipliers(self) -> int:
        """The number of leaves of lam."""
        return self.lagrangian.multipliers

    @property
    def square(self) -> bool:
        """Whether this is a system of equations, whose lam is 0 and does not move."""
        return bool(self.plan.trace.square)

    def handle(self) -> int:
        """The number that stands for the call in a recorded graph."""
        return self.solve.handle(self)

    def split_point(self, tensors: Sequence[Tensor]) -> tuple[Leaves, Leaves, Leaves]:
        """(u, lam, theta) from their concatenation."""
        first, second = self.variables, self.variables + self.multipliers
        return tuple(tensors[:first]), tuple(tensors[first:second]), tuple(tensors[second:])

    def folded(self, batched: tuple[bool, ...], batch: int) -> Call:
        """The same call after an outer axis went into the batch."""
        plan = with_batched(self.plan, batched, backward=self.backward, linear_solver=self.linear_solver)
        return replace(self, plan=plan, batched=batched, batch=batch)

    def fold_theta(
        self, theta: Sequence[Tensor], dims: Sequence[int | None], size: int
    ) -> tuple[Leaves, Call]:
        """Fold a vmapped axis of `size` V into the batch of theta: (V * B, ...).

        Batched tensors are folded (or repeated, if not vmapped); shared ones become batched if vmapped and stay shared
        otherwise.
        """
        flags = tuple(flag or dim is not None for flag, dim in zip(self.batched, dims, strict=True))
        folded = []
        for value, dim, was, now in zip(theta, dims, self.batched, flags, strict=True):
            if not now:
                folded.append(value)
            elif was:
                folded.append(fold(value, dim, size))
            else:
                lifted = value.movedim(_axis(dim), 0)[:, None]
                lifted = lifted.expand(size, self.batch, *lifted.shape[2:])
                folded.append(lifted.reshape(size * self.batch, *lifted.shape[2:]))
        return tuple(folded), self.folded(flags, size * self.batch)


def _axis(dim: int | None) -> int:
    return 0 if dim is None else dim


def fold(value: Tensor, dim: int | None, size: int, at: int = 0) -> Tensor:
    """A tensor whose batch axis is `at` (the vmapped axis not counted): (..., B, ...) with V at `dim`, as (..., V *
    B, ...).
    """
    if dim is None:
        lifted = value.unsqueeze(at).expand(*value.shape[:at], size, *value.shape[at:])
    else:
        lifted = value.movedim(dim, at)
    return lifted.reshape(*lifted.shape[:at], size * lifted.shape[at + 1], *lifted.shape[at + 2 :])


def unfold(value: Tensor, size: int, batch: int, at: int = 0) -> Tensor:
    """The inverse of `fold`: (..., V * B, ...) as (..., V, B, ...)."""
    return value.reshape(*value.shape[:at], size, batch, *value.shape[at + 1 :])


def floating(value: Tensor) -> bool:
    """Whether a tensor can have a derivative."""
    return value.is_floating_point()


def zeros_for(values: Sequence[Tensor | None], like: Sequence[Tensor]) -> Leaves:
    """None replaced by zeros."""
    return tuple(torch.zeros_like(b) if a is None else a for a, b in zip(values, like, strict=True))


def without(leaves: Sequence[Tensor], lost: Sequence[Tensor]) -> Leaves:
    """Leaves like u, (..., B, *shape), with 0 in the entries that do not move (see `Lagrangian.inside`)."""
    return tuple(torch.where(mask, 0.0, leaf) for leaf, mask in zip(leaves, lost, strict=True))


@contextlib.contextmanager
def undisturbed(like: Tensor) -> Iterator[None]:
    """Run the body in the dtypes of its tensors, and without hooks on what it saves.

    Inside an autocast region a matrix product of a backward pass would run in bfloat16; under checkpointing
    torch.func would refuse to run.
    """
    with without_autocast(like.device.type), without_saved_tensor_hooks():
        yield


def own(output: Tensor, held: set[int]) -> Tensor:
    """A contiguous tensor that is no view and shares no memory with `held`: autograd treats views of inputs, and
    views made inside a function, as special cases."""
    if is_view(output) or output.untyped_storage().data_ptr() in held:
        return output.clone(memory_format=torch.contiguous_format)
    return output.contiguous()
