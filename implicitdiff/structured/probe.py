"""The two products with K that a claimed structure is tested by: one by the forms, one by automatic differentiation.

In: the recipes of a plan and its dense twin. Out: `Probe`, asked once for each plan. Next file: `plan.py`.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from implicitdiff.derivatives.autodiff import AutodiffPlan
from implicitdiff.errors import StructureMismatchWarning
from implicitdiff.structure.probe import direction
from implicitdiff.structured.arguments import Leaves
from implicitdiff.structured.outputs import Recipes
from implicitdiff.structured.writer import Writer


def warn_of_a_contradiction(kind: str) -> None:
    """What is said where the two products differ."""
    warnings.warn(
        f"the structure found ({kind}) contradicts a product by automatic differentiation; the dense path is taken "
        "instead. Please report this as a bug, with the problem.",
        StructureMismatchWarning,
        stacklevel=3,
    )


@dataclass(frozen=True)
class Probe:
    """What is needed for both products."""

    recipes: Recipes
    writer: Writer
    dense: AutodiffPlan

    def __call__(self, u: Leaves, lam: Leaves, theta: Leaves) -> tuple[Leaves, Leaves]:
        """K z for the first sample and a fixed z: by the forms, and by automatic differentiation."""
        one_u, one_lam = tuple(t[:1] for t in u), tuple(t[:1] for t in lam)
        if self.recipes.declared.constraints and not lam:
            one_lam = tuple(u[0].new_zeros(1, *shape) for shape in self.recipes.declared.output_shapes)
        one_theta = tuple(
            t[:1] if leaf.placeholder.batched else t
            for t, leaf in zip(theta, self.recipes.declared.theta, strict=True)
        )
        w = tuple(direction(t, 1.0 + k) for k, t in enumerate(one_u))
        s = tuple(direction(t, 2.0 + k) for k, t in enumerate(one_lam))
        stacked = self.recipes.arguments.sides(
            "rhs_u", "rhs_h", tuple(t[None] for t in w), tuple(t[None] for t in s)
        )
        function = self.writer.function("probe", "kkt_product", "K (rhs_u, rhs_h)", self.recipes.kkt_product)
        out = function({**self.recipes.arguments.point(one_u, one_lam, one_theta), **stacked})
        on_u = tuple(x.expand(1, 1, *x.shape[2:]).reshape(t.shape) for x, t in zip(out, one_u, strict=False))
        on_h = tuple(t[0] for t in self.recipes.arguments.joined(out[len(one_u) :], 2))
        product_u, product_h = self.dense.lagrangian.kkt_product(one_u, one_lam, one_theta, w, s)
        return (*on_u, *on_h), (*product_u, *product_h)
