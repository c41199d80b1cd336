"""A prepared call, run: the solution with autograd's derivatives behind it.

In: a `Prepared`. Out: a `Solution`. Next: `layer/prepare.py` and `layer/unrolled.py`.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from implicitdiff.autograd.envelope import Envelope
from implicitdiff.layer.inequalities import apply_located, located, with_bound_multipliers
from implicitdiff.layer.prepare import Outputs, Prepared
from implicitdiff.layer.unrolled import run_unrolled
from implicitdiff.problem import Solution
from implicitdiff.torch_private import without_autocast


def run(prepared: Prepared, *, with_value: bool) -> Solution:
    """Solve, in the dtypes of the prepared inputs; the value costs one evaluation of the objective."""
    with without_autocast(prepared.bound.device.type):
        if prepared.options.backward == "unrolled":
            if prepared.plan.trace.limited:
                prepared = located(prepared)[0]  # a walk of equalities needs to know the active sets
            outputs = replace(run_unrolled(prepared), margin=prepared.margin)
        elif prepared.plan.trace.limited:
            outputs = apply_located(prepared)
            prepared = outputs.call or prepared
        else:
            outputs = prepared.apply()
        value = _value(prepared, outputs) if with_value and not prepared.problem.square else None
        solution = prepared.solution(outputs, value)
        if with_value and prepared.plan.trace.limited:
            return with_bound_multipliers(prepared, outputs, solution)
        return solution


def _value(prepared: Prepared, outputs: Outputs) -> Tensor:
    """The objective at u, (B,), differentiable by the envelope theorem, without a solve (see `Envelope`).

    Where another derivative of u was asked for (unrolled, approximate, by hand), the objective takes part in it.
    """
    if prepared.bound.batch == 0:
        return outputs.u[0].new_zeros(0)
    lagrangian = prepared.call().lagrangian
    if prepared.options.backward in ("unrolled", "approximate", "hand"):
        return lagrangian.objective(outputs.u, prepared.theta)
    found: Tensor = Envelope.apply(lagrangian, *outputs.u, *outputs.multipliers, *prepared.theta)
    return found
