"""A prepared call, run: the solution with autograd's derivatives behind it.

In: a `Prepared`. Out: a `Solution`. Next: `layer/prepare.py` and `layer/unrolled.py`.
"""

from __future__ import annotations

from implicitdiff.layer.prepare import Prepared
from implicitdiff.layer.unrolled import run_unrolled
from implicitdiff.problem import Solution
from implicitdiff.torch_private import without_autocast


def run(prepared: Prepared, *, with_value: bool) -> Solution:
    """Solve, in the dtypes of the prepared inputs; the value costs one evaluation of the objective."""
    with without_autocast(prepared.bound.device.type):
        outputs = run_unrolled(prepared) if prepared.options.backward == "unrolled" else prepared.apply()
        value = prepared.value(outputs.u) if with_value and not prepared.problem.square else None
        return prepared.solution(outputs, value)
