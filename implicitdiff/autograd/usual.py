"""The backward pass of an ordinary call, with nothing around the emitted code: what runs a million times in training.

In: what a call saved, and cotangents. Out: gradients in theta, or None where anything is out of the ordinary; then
`autograd/implicit.py` takes the general way from the start. Next: nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from implicitdiff.autograd.call import Call, undisturbed
from implicitdiff.autograd.kkt import unusable
from implicitdiff.autograd.regularity import settled
from implicitdiff.failures import any_failed
from implicitdiff.records import open_records
from implicitdiff.status import is_all_ok
from implicitdiff.structured.plan import StructuredPlan
from implicitdiff.torch_private import only_eager


def usual_gradients(
    call: Call, saved: Sequence[Tensor], cotangents: Sequence[Tensor | None], needs: Sequence[bool]
) -> tuple[Tensor | None, ...] | None:
    """The gradients in theta, None for those not needed.

    Every question is asked that the general way asks, each in one look at what was prepared: nothing differentiates
    this derivative, transforms or records it, no autocast, no sample failed under a policy that masks it, only u has
    a cotangent, no record is open, `KKTOptions` ask for nothing, the structure has been probed, every sample's solve
    has an answer.
    Nothing is written to but what the emitted code makes, so that the general way may start over.

    Args:
        call: the call.
        saved: u, lam, status and theta, as `ImplicitFunction.setup_context` saves them.
        cotangents: of u, lam, status, iterations and residual; None where there is none.
        needs: which theta need a gradient.

    Returns:
        None where one answer is not the usual one.
    """
    plan = call.plan
    if not isinstance(plan, StructuredPlan) or not plan.probed or call.vjp is not None:
        return None
    if not call.kkt.plain:
        return None
    if not call.batch or call.records or open_records():
        return None
    first = len(plan.declared.variables)
    second = first + len(plan.declared.output_shapes)
    v_u: list[Tensor] = []
    for place, cotangent in enumerate(cotangents[:second]):
        if (cotangent is None) is (place < first):
            return None
        if cotangent is not None:
            v_u.append(cotangent)
    if not only_eager(saved[0], v_u):
        return None
    if call.on_failure in ("nan", "zero") and any_failed(saved[second]):
        return None
    u, lam, theta = tuple(saved[:first]), tuple(saved[first:second]), tuple(saved[second + 1 :])
    factor = None if call.factors.empty else call.factors.find(plan, u, lam, theta)
    found, status = plan.vjp(u, lam, theta, tuple(v_u), None, needs, factor)
    if is_all_ok(status):
        return found
    bad = unusable(status)
    if bool(bad.any()):
        with undisturbed(u[0]):
            bad = unusable(settled(call, status, u, theta))
    return None if bool(bad.any()) else found
