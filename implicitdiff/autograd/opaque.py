"""The steps of a call that look at values, as operators of torch's own registry, which no tracer looks into.

In: a `Call` and plain tensors; torch.compile, torch.export, make_fx, fake tensors and selective checkpointing are what
records them. Out: the tensors that the step returns, or their shapes alone while a graph is being recorded. Next:
`autograd/implicit.py`, `autograd/kkt.py` and `autograd/hand.py`, which each declare the steps they take.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from implicitdiff.autograd.call import Call, own
from implicitdiff.autograd.handles import Handles
from implicitdiff.torch_private import eager_context, is_recorded

Flags = Sequence[bool]


CALLS: Handles[Call] = Handles()
LIBRARY = torch.library.Library("implicitdiff", "DEF")


@dataclass(frozen=True)
class OpaqueStep:
    """torch.ops.implicitdiff.<name>, an operator that runs one step of a call on plain tensors.

    The operator takes (handle, batch, batched flags, needs, tensors), because a schema knows nothing else; handle is
    the number of the call in `CALLS`. Its outputs are contiguous and share no memory with its inputs, as
    torch.library demands.

    Attributes:
        name: of the operator.
        run: (call, needs, tensors) -> tensors.
        shapes: the same without data: empty tensors of the right shapes, dtypes and device.
    """

    name: str
    run: Callable[..., Sequence[Tensor]]
    shapes: Callable[..., Sequence[Tensor]]

    def __post_init__(self) -> None:
        LIBRARY.define(
            f"{self.name}(int handle, SymInt batch, bool[] flags, bool[] needs, Tensor[] tensors) -> Tensor[]",
            tags=torch.Tag.pt2_compliant_tag,
        )
        LIBRARY.impl(self.name, self._implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"implicitdiff::{self.name}", self._fake, lib=LIBRARY)

    def __call__(self, call: Call, needs: Flags, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The step; through the operator where something records, directly otherwise."""
        if not is_recorded(tensors):
            return tuple(self.run(call, needs, tensors))
        operator = getattr(torch.ops.implicitdiff, self.name)
        return tuple(operator(call.handle(), call.batch, call.batched, needs, tensors))

    def _implementation(
        self, handle: int, batch: int, flags: Flags, needs: Flags, tensors: Sequence[Tensor]
    ) -> list[Tensor]:
        with eager_context(), torch.no_grad():
            found = self.run(CALLS.value(handle).folded(tuple(flags), batch), needs, tensors)
        held = {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()}
        outputs = []
        for tensor in found:
            outputs.append(own(tensor, held))
            held.add(outputs[-1].untyped_storage().data_ptr())
        return outputs

    def _fake(
        self, handle: int, batch: int, flags: Flags, needs: Flags, tensors: Sequence[Tensor]
    ) -> list[Tensor]:
        call = CALLS.value(handle).folded(tuple(flags), batch)
        return list(self.shapes(call, needs, tensors))


def _captured(call: Call, _: Flags, __: Sequence[Tensor]) -> Sequence[Tensor]:
    return tuple(tensor.clone() for tensor in call.plan.trace.captured)


def _captured_shapes(call: Call, _: Flags, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return tuple(tensors[0].new_empty(t.shape, dtype=t.dtype) for t in call.plan.trace.captured)


CAPTURED = OpaqueStep("captured", _captured, _captured_shapes)
"""The tensors that the declared functions use without the problem holding them: no graph may hold them either. The one
tensor it is given says on which device."""
