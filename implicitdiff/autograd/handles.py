"""Calls by number: how a recorded graph, which can hold no Python object, names the call it belongs to.

In: a problem and a function that makes the call. Out: an int, and the call again. Next: `autograd/opaque.py`, whose
operators take the number.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from implicitdiff.errors import StaleGraphError

Value = TypeVar("Value")


@dataclass(frozen=True, eq=False)
class Handles(Generic[Value]):
    """Numbers for what can be made from an owner, which is held weakly: its numbers go with it."""

    _makers: dict[int, Callable[[], Value]] = field(default_factory=dict)
    _known: weakref.WeakKeyDictionary[object, dict[Hashable, int]] = field(
        default_factory=weakref.WeakKeyDictionary
    )
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    def number(self, owner: object, key: Hashable, make: Callable[[], Value]) -> int:
        """The number of `key`; given out at the first request, together with what makes the value.

        `make` must not hold the owner, or neither would ever be freed.
        """
        with self._lock:
            numbers = self._known.get(owner)
            if numbers is None:
                numbers = self._known[owner] = {}
                weakref.finalize(owner, _forget, self._makers, numbers)
            if key not in numbers:
                numbers[key] = next(self._numbers)
                self._makers[numbers[key]] = make
            return numbers[key]

    def value(self, number: int) -> Value:
        """What the number stands for.

        Raises:
            StaleGraphError: the owner is gone, or belongs to another process.
        """
        make = self._makers.get(number)
        if make is None:
            raise StaleGraphError(
                f"this graph calls layer number {number}, which does not exist in this process: a compiled or exported "
                "graph works as long as its layer lives, and in the process that made it; keep a reference to "
                "the layer, or compile or export it again here"
            )
        return make()


def _forget(makers: dict[int, Any], numbers: dict[Hashable, int]) -> None:
    for number in numbers.values():
        makers.pop(number, None)
