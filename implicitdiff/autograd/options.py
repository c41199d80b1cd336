"""What may be done about the KKT system beside solving with it; nothing of it is on unless asked for.

In: the user's choice. Out: `KKTOptions`, which `DeclarativeLayer(kkt=...)` takes. Next: `autograd/careful.py`, which
does it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from implicitdiff.errors import OptionError


@dataclass(frozen=True)
class KKTOptions:
    """How the backward pass solves K (w, s) = -(v, 0), K = [[H, -A'], [-A, 0]], where the plain solve is not enough.

    Any of them takes the pass off the emitted code: it costs about twice as much then.

    Attributes:
        least_norm: minimisers that are not unique get the derivative of least norm, by K^+, in place of an error: the
            change of u orthogonal to the directions in which it is free, which `record()` names. Other samples keep
            theirs. First derivatives only.
        trust_region: rho >= 0; (H + rho I) takes the place of H in all samples, as for a solution found within a trust
            region (Toso et al., 2019). Biased by about rho |H^-1|, and said so by an event DAMPED in `record()`.
        refinements: the most steps of iterative refinement, taken in the samples whose residual |K z - r| is above
            sqrt(eps) |r|, and kept where they lower it.
        accumulate: torch.float64 for float32 problems: K is formed in float32, factored and solved in float64, up to
            1000 unknowns; beyond, nothing changes.
        damping: what on_failure="damp" adds to H, as shares of its size: tried one after the other, in the samples
            without an answer alone, until there is one.
    """

    least_norm: bool = False
    trust_region: float = 0.0
    refinements: int = 0
    accumulate: torch.dtype | None = None
    damping: tuple[float, ...] = (1e-8, 1e-6, 1e-4, 1e-2, 1.0)

    def __post_init__(self) -> None:
        if not 0 <= self.trust_region < float("inf"):
            raise OptionError(f"trust_region={self.trust_region!r}: give rho >= 0 of (H + rho I) w = v")
        if not (isinstance(self.refinements, int) and self.refinements >= 0):
            raise OptionError(f"refinements={self.refinements!r}: give a whole number, 0 for none")
        if self.accumulate not in (None, torch.float64):
            raise OptionError(
                f"accumulate={self.accumulate!r}: give torch.float64, or None for the inputs' own dtype"
            )
        if not self.damping or any(not share > 0 for share in self.damping):
            raise OptionError(
                f"damping={self.damping!r}: give positive shares of the size of H, the smallest first"
            )

    @property
    def plain(self) -> bool:
        """Whether the ordinary pass serves: nothing but `damping` differs from the defaults."""
        changed = self.least_norm or self.trust_region or self.refinements or self.accumulate is not None
        return not changed


PLAIN = KKTOptions()
