"""Samples without a solution, under on_failure="nan" or "zero": how a derivative passes them by.

In: the status of each sample. Out: a point where every sample is sound, and the marks on the derivative afterwards,
all in tensor operations so that it works under every transform. Next: `autograd/implicit.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from implicitdiff.autograd.call import Call, Leaves
from implicitdiff.failures import failed


@dataclass(frozen=True)
class Masks:
    """Which samples of a call failed, and what the policy makes of them.

    A failed sample takes the place of a sound one (the donor) while the derivative is computed, because NaN in its u
    would reach everything that sums over the batch; its cotangent is 0 there. Afterwards its own derivative is
    marked: NaN under "nan" wherever its cotangent was not 0, and so is the gradient of a shared tensor, which is a
    sum over the samples; 0 under "zero", where the sum runs over the sound samples.

    Attributes:
        call: the call.
        failed: (B,) bool; None for the policies that leave failed samples as they are.
    """

    call: Call
    failed: Tensor | None

    @staticmethod
    def of(call: Call, status: Tensor) -> Masks:
        """The masks of a finished forward."""
        return Masks(call, failed(status) if call.on_failure in ("nan", "zero") else None)

    def any_failed(self) -> bool:
        """Whether any sample needs a mask; reads a value, so for plain tensors only."""
        return self.failed is not None and bool(self.failed.any())

    def all_failed(self) -> bool:
        """Whether no sample is sound; reads a value, so for plain tensors only."""
        return self.failed is not None and bool(self.failed.all())

    def sound(self, u: Leaves, lam: Leaves, theta: Leaves) -> tuple[Leaves, Leaves, Leaves]:
        """The point with a sound sample in place of each failed one."""
        if self.failed is None:
            return u, lam, theta
        donor = self.failed.to(torch.int8).argmin().reshape(1)

        def mend(value: Tensor, batched: bool) -> Tensor:
            if not batched:
                return value
            given = value.detach().index_select(0, donor).expand_as(value)
            return torch.where(self._along(value), given, value)

        flags = self.call.batched
        return (
            tuple(mend(leaf, True) for leaf in u),
            tuple(mend(leaf, True) for leaf in lam),
            tuple(mend(value, flag) for value, flag in zip(theta, flags, strict=True)),
        )

    def silence(self, leaves: Sequence[Tensor]) -> Leaves:
        """Cotangents or right-hand sides with 0 in the failed samples."""
        if self.failed is None:
            return tuple(leaves)
        return tuple(torch.where(self._along(leaf), 0.0, leaf) for leaf in leaves)

    def mark(self, leaves: Sequence[Tensor]) -> Leaves:
        """Tangents of u and lam with the policy's value in the failed samples."""
        if self.failed is None:
            return tuple(leaves)
        return tuple(torch.where(self._along(leaf), self._value(), leaf) for leaf in leaves)

    def spoil(
        self, grads: Sequence[Tensor | None], cotangents: Sequence[Tensor]
    ) -> tuple[Tensor | None, ...]:
        """Gradients in theta with the policy's mark."""
        if self.failed is None:
            return tuple(grads)
        loud = self.failed & _loud(cotangents)

        def mark(grad: Tensor | None, batched: bool) -> Tensor | None:
            if grad is None:
                return None
            if batched:
                return torch.where(_along(loud, grad), self._value(), grad)
            return grad + torch.where(loud.any(), self._value(), 0.0).to(grad.dtype)

        return tuple(mark(grad, flag) for grad, flag in zip(grads, self.call.batched, strict=True))

    def nothing(
        self, theta: Leaves, cotangents: Sequence[Tensor], needs: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        """The gradients when no sample is sound."""
        zeros = [torch.zeros_like(value) if need else None for value, need in zip(theta, needs, strict=True)]
        return self.spoil(zeros, cotangents)

    def _value(self) -> float:
        return torch.nan if self.call.on_failure == "nan" else 0.0

    def _along(self, value: Tensor) -> Tensor:
        if self.failed is None:
            raise AssertionError("no mask")
        return _along(self.failed, value)


def kept(
    bad: Tensor, mended: Sequence[Tensor | None], found: Sequence[Tensor | None], batched: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients of the first pass where a sample was sound, those of the second in the samples `bad` (B,).

    So a sample keeps its bits whatever the others are. The gradient of a shared tensor is a sum over all samples.
    """
    return tuple(
        torch.where(_along(bad, a), a, b) if own and a is not None and b is not None else a
        for a, b, own in zip(mended, found, batched, strict=True)
    )


def _along(mask: Tensor | None, value: Tensor) -> Tensor:
    if mask is None:
        raise AssertionError("no mask")
    return mask.reshape(-1, *(1,) * (value.dim() - 1))


def _loud(cotangents: Sequence[Tensor]) -> Tensor:
    """(B,) where some cotangent is not exactly 0."""
    flags = [(leaf != 0).reshape(leaf.shape[0], -1).any(1) for leaf in cotangents]
    return torch.stack(flags).any(0)
