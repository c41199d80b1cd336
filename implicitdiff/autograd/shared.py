"""One factorisation of K for all the solves of a call at the same point: what a derivative of a derivative needs.

In: a plan and a point. Out: the factorisation, kept until the call is gone or another point takes its place. Next:
`autograd/kkt.py`, which solves with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from implicitdiff.derivatives.factor import KKTFactor
from implicitdiff.plan import Plan
from implicitdiff.torch_private import is_fake, writes_to

Leaves = tuple[Tensor, ...]
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""An integer type of each size, to compare bits."""


@dataclass(frozen=True)
class _Kept:
    """A factorisation with the point that it belongs to; `versions` count the changes made to its tensors in place."""

    plan: Plan
    point: Leaves
    versions: tuple[int, ...]
    factor: KKTFactor


class SharedFactor:
    """The last factorisation that a call has made for a derivative, empty at first.

    A derivative that will be differentiated again solves with K(u, lam, theta) several times: for the tangent of u, for
    the cotangent, for the tangent of that. The point is the same, though torch may hand it over as other tensor
    objects. A factorisation is used again only where the plan is the same object and every tensor of the point is
    the same memory that nothing has written to since (its version counter), or has the same bits as such a tensor;
    whatever else comes (a moving point of an unrolled solver, another way to fold a vmapped axis) is factored anew.

    Autograd keeps the call, the call keeps this: so it lives as long as the graph. The tensors are kept detached, or
    the graph would keep itself alive. Reading and writing one attribute is all that threads share: the worst that
    can happen is that two of them factor.
    """

    __slots__ = ("_kept",)

    def __init__(self) -> None:
        self._kept: _Kept | None = None

    @property
    def empty(self) -> bool:
        """Whether there is nothing to be found."""
        return self._kept is None

    def find(self, plan: Plan, u: Leaves, lam: Leaves, theta: Leaves) -> KKTFactor | None:
        """The factorisation of this point, None if it is not there."""
        kept = self._kept
        if kept is None or kept.plan is not plan:
            return None
        versions = tuple(map(writes_to, kept.point))
        if versions != kept.versions:
            return None
        given = (*u, *lam, *theta)
        return kept.factor if all(map(_same, kept.point, given)) else None

    def at(self, plan: Plan, u: Leaves, lam: Leaves, theta: Leaves) -> KKTFactor | None:
        """The factorisation of this point, made and kept if it is not there; None where nothing can be kept.

        Tensors made under torch.inference_mode have no version counter, fake ones no memory.
        """
        point = (*u, *lam, *theta)
        if any(is_fake(tensor) or tensor.is_inference() for tensor in point):
            return None
        found = self.find(plan, u, lam, theta)
        if found is not None:
            return found
        self._kept = None  # its memory is free before the next one is made
        u, lam, theta = (tuple(leaf.detach() for leaf in leaves) for leaves in (u, lam, theta))
        versions = tuple(map(writes_to, (*u, *lam, *theta)))  # read first: a write in between is then seen
        factor = plan.kkt_factor(u, lam, theta)
        self._kept = _Kept(plan, (*u, *lam, *theta), versions, factor)
        return factor

    def keep(self, plan: Plan, u: Leaves, lam: Leaves, theta: Leaves, factor: KKTFactor) -> None:
        """Keep a factorisation of this point that was made on the way to it."""
        point = tuple(leaf.detach() for leaf in (*u, *lam, *theta))
        if not any(is_fake(tensor) or tensor.is_inference() for tensor in point):
            self._kept = _Kept(plan, point, tuple(map(writes_to, point)), factor)


def _same(kept: Tensor, given: Tensor) -> bool:
    """Whether two tensors are the same numbers: one memory, or equal bits (so 0.0 is not -0.0, and NaN is NaN)."""
    if kept.shape != given.shape or kept.dtype != given.dtype or kept.device != given.device:
        return False
    if kept.data_ptr() == given.data_ptr() and kept.stride() == given.stride():
        return True
    word = WORDS.get(kept.dtype.itemsize)
    return word is not None and torch.equal(kept.view(word), given.view(word))
