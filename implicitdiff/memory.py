"""How large a matrix may be before it is not formed: the limit, which users can set.

Comes in: a number of bytes. Goes out: the limit that plans are made with. Next: ``kkt/route.py`` and ``plan.py``,
which ask for it.
"""

from __future__ import annotations

from types import TracebackType

from implicitdiff.errors import OptionError

DEFAULT = 2**31
_limit = DEFAULT


class set_memory_limit:
    """Do not form the matrix of one sample where it would take more than this many bytes; 2 GiB at the start.

    A function and a context manager, as ``torch.set_grad_enabled``. Matrices above the limit are known by their
    products alone, and the systems solved by iteration: slower, and exact to its tolerance. Structures that need no
    such matrix are not concerned. The limit is that of one sample, since the batch is not known when a plan is made,
    and of the whole process; a plan keeps the one that it was made with. A solver named by ``linear_solver=`` is
    taken at its word.

    Example:
        >>> idf.set_memory_limit(2**28)             # from here on
        >>> with idf.set_memory_limit(2**20):       # or for a while
        ...     print(idf.explain(problem, x))      # says in .rejected what the limit has ruled out
    """

    def __init__(self, limit: int) -> None:
        """Set the limit now; leaving a ``with`` block puts the one before back.

        Args:
            limit: bytes, positive.

        Raises:
            OptionError: it is no positive whole number.
        """
        global _limit
        if not isinstance(limit, int) or isinstance(limit, bool) or limit <= 0:
            raise OptionError(
                f"a memory limit is a positive whole number of bytes, not {limit!r}: for example 2**30"
            )
        self._before, _limit = _limit, limit

    def __enter__(self) -> None:
        """The limit is set already."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Put the former limit back."""
        global _limit
        _limit = self._before


def memory_limit() -> int:
    """The limit in bytes."""
    return _limit


def over_limit(name: str, size: int, itemsize: int) -> str:
    """Why a square matrix is not formed, as a sentence; "" where it may be.

    Args:
        name: what it is called.
        size: its rows.
        itemsize: bytes of one number.
    """
    needed = size * size * itemsize
    if needed <= _limit:
        return ""
    return f"{name}, {size} x {size}, would take {_in_words(needed)} a sample; the memory limit is {_in_words(_limit)}"


def _in_words(count: int) -> str:
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if count >= 2**power:
            return f"{count / 2**power:.1f} {unit}"
    return f"{count} bytes"
