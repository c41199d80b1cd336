"""Identity with projection: the solver as a negative identity in the backward pass.

In: costs and g = dl/dy. Out: -P'(w)^T g, without any further solver call. Next file to read: ``../projections.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from implicitdiff.combinatorial.base import Solver
from implicitdiff.combinatorial.estimator import Estimator, Pass, Saved
from implicitdiff.combinatorial.noise import Noise
from implicitdiff.combinatorial.projections import Projection, resolve


@dataclass(frozen=True)
class Identity(Estimator):
    """dl/dw = -P'(w)^T g (Sahoo et al., ICLR 2023, eq. 10 and 11); forward mode -P'(w) t.

    One solver call a sample and step. Forward: y(w) on the raw costs, so that the domain of the solver survives; in
    training with a margin y(P(w) + xi), whose scale is then relative to P. Where signs matter (grid paths, cuts) the
    linear part of P is left out of the forward, and the noise is multiplicative: y(w * (1 + xi)). That has no scale of
    its own, so that it asks for a margin but does not keep costs from shrinking: leave the projection in, or add noise
    with multiplicative=False and the layer's domain="clamp".

    Attributes:
        projection: "none", "mean", "norm", "std", "affine", "auto" (all declared equalities, then unit norm), a
            `Plane(a)` or other `Projection`, or a function of costs (B, *shape). What the solver's declarations do not
            prove is tested before its first use (`check_invariance`).
        margin: noise in training, for instance `Rademacher(0.2)`, or None.
        multiplicative: whether the margin multiplies; None: where the solver's domain is not "any".
    """

    projection: str | Projection | Callable[[Tensor], Tensor] = "auto"
    margin: Noise | None = None
    multiplicative: bool | None = None

    smooth = True

    @property
    def formula(self) -> str:
        """See `Estimator`."""
        return "dl/dw = -P'(w)^T g"

    @property
    def calls(self) -> tuple[int, int]:
        """See `Estimator`."""
        return (1, 0)

    def bind(self, solver: Solver) -> Projection:
        """The projection for this solver."""
        return resolve(self.projection, solver)

    def forward(self, run: Pass, w: Tensor) -> tuple[Tensor, ...]:
        """y(w), or y(P(w) + xi) in training with a margin."""
        oracle, projection = run.oracle, run.projection
        projection.check(w)
        if self.margin is None or not run.training:
            return (oracle(w),)
        base = projection.scaled(w) if oracle.solver.domain == "nonnegative" else projection(w)
        multiplies = oracle.keeps_signs if self.multiplicative is None else self.multiplicative
        if multiplies:
            return (oracle(base * self.margin.factor(w, run.generator), "costs with margin"),)
        return (oracle(base + self.margin.draw(w, run.generator), "costs with margin"),)

    def vjp(self, run: Pass, w: Tensor, y: Tensor, saved: Saved, g: Tensor) -> Tensor:
        """-P'(w)^T g."""
        return -run.projection.pull(w, g)

    def jvp(self, run: Pass, w: Tensor, y: Tensor, saved: Saved, t: Tensor) -> Tensor:
        """-P'(w) t."""
        return -run.projection.push(w, t)


__all__ = ["Identity"]
