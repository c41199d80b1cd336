"""The plain way for the samples that are sound, the careful way for the others, in one factorisation.

In: a factorisation that was made as if all were well, and which samples were. Out: ``plain_first``, ``Mixed``. What a
sound sample gets is the plain way's answer bit for bit, whatever the other samples are. Next file: ``woodbury.py``.
"""

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from implicitdiff.operators import LinearOperator, select_samples
from implicitdiff.solvers.base import Factorization


class PlainFactorization(Factorization):
    """A factorisation made as if all were well.

    Attributes:
        sound: (B,) bool, where all was well indeed; None where it was in all samples.
    """

    sound: Tensor | None = None


class Mixed(Factorization):
    """Both ways, each for its own samples.

    Attributes:
        cancelled: (B,) bool where some sample lost digits, else False.
    """

    def __init__(self, plain: Factorization, careful: Factorization, samples: Tensor) -> None:
        """Put them together.

        Args:
            plain: of the whole batch; what it makes of ``samples`` is not looked at.
            careful: of the samples numbered by ``samples`` alone.
            samples: (n,), int64.
        """
        self._plain, self._careful, self._samples = plain, careful, samples
        lost = spread(careful.cancelled, samples, plain.status)
        # where the careful way says that no digits were lost, it is right
        self.cancelled = lost if plain.cancelled is False else plain.cancelled | lost
        self._merge_status()

    def _merge_status(self) -> None:
        plain = self._plain.status
        self.status = plain.index_fill(0, self._samples, 0).index_copy(
            0, self._samples, self._careful.status.expand(len(self._samples))
        )

    @cached_property
    def definite(self) -> Tensor | None:  # type: ignore[override]
        """Where both say so, (B,); None where one of them cannot tell."""
        plain, careful = self._plain.definite, self._careful.definite
        if plain is None or careful is None:
            return None
        return plain.index_copy(0, self._samples, careful.expand(len(self._samples)))

    def solve(self, rhs: Tensor) -> Tensor:
        """Return the solution (..., B, m)."""
        rhs = rhs.expand(*rhs.shape[:-2], self.status.shape[0], rhs.shape[-1])
        answer = self._plain.solve(rhs)
        own = self._careful.solve(rhs[..., self._samples, :])
        self._merge_status()  # iterations know theirs after the solve
        return answer.index_copy(-2, self._samples, own)


def plain_first(
    plain: PlainFactorization, operator: LinearOperator, careful: Callable[[LinearOperator], Factorization]
) -> Factorization:
    """Return the plain factorisation where all samples are sound, else one that treats each by its own merits.

    Args:
        plain: of ``operator``.
        operator: the matrix.
        careful: factors some samples of it.
    """
    if plain.sound is None:
        return plain
    others = (~plain.sound).nonzero()[:, 0]
    if len(others) == operator.batch:
        return careful(operator)
    return Mixed(plain, careful(select_samples(operator, others)), others)


def spread(flags: "Tensor | bool", samples: Tensor, like: Tensor) -> "Tensor | bool":
    """Return flags (n,) or one flag of ``samples`` as flags (B,) of the batch of ``like``; False where none is set."""
    if flags is False:
        return False
    whole = torch.zeros_like(like, dtype=torch.bool)
    whole[samples] = flags
    return whole
