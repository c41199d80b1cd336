"""What went wrong, where and for which samples: the record that a user may open around any part of a program.

Every stage that meets a failure, damps a step or falls back calls `emit`; `record()` collects what is emitted
while it is open. Nothing here raises or warns: that is the policy's work (optimality.py for the forward).
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class Event:
    """One thing that happened in one call.

    Attributes:
        kind: What happened: the name of a `Status` ("NOT_OPTIMAL", "DAMPED", ...) or "FALLBACK".
        where: The stage: "forward", "backward" or "plan".
        samples: Indices in the batch of the samples concerned; empty where the whole call is meant.
        message: The one line that a warning or an error of the same event carries.
    """

    kind: str
    where: str
    samples: tuple[int, ...]
    message: str


class Record:
    """The events collected so far, oldest first; several threads may add to one record."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._lock = threading.Lock()

    @property
    def events(self) -> tuple[Event, ...]:
        """All events so far, as a tuple that later events do not change."""
        with self._lock:
            return tuple(self._events)

    def of_sample(self, sample: int) -> tuple[Event, ...]:
        """The events that concern one sample; those that concern a whole call are among them."""
        return tuple(event for event in self.events if not event.samples or sample in event.samples)

    def add(self, event: Event) -> None:
        """Append one event."""
        with self._lock:
            self._events.append(event)

    def __len__(self) -> int:
        return len(self.events)

    def __iter__(self) -> Iterator[Event]:
        return iter(self.events)

    def __str__(self) -> str:
        lines = [f"{event.where}: {event.kind}: {event.message}" for event in self.events]
        return "\n".join(lines) if lines else "no events"


# A tuple, not a list: a context copied into another thread must not see records opened later in this one.
_OPEN: ContextVar[tuple[Record, ...]] = ContextVar("implicitdiff_open_records", default=())


@contextmanager
def record() -> Iterator[Record]:
    """Collect failures, damping and fallbacks of forward and backward passes, per sample.

    Records nest: an event goes to every record that is open. A record belongs to the thread that opened it
    (more exactly to its context, so that tasks of asyncio inherit it); calls in other threads are not seen.
    Warnings are issued as ever.

    Example:
        >>> with implicitdiff.record() as log:
        ...     u = layer(x)
        >>> [(event.kind, event.samples) for event in log]

    Yields:
        The `Record`, which stays readable after the block.
    """
    opened = Record()
    token = _OPEN.set((*_OPEN.get(), opened))
    try:
        yield opened
    finally:
        _OPEN.reset(token)


def open_records() -> tuple[Record, ...]:
    """The records open here. A forward keeps them for its backward, which may run in another thread."""
    return _OPEN.get()


def emit(
    kind: str, where: str, samples: Sequence[int], message: str, into: tuple[Record, ...] | None = None
) -> Event:
    """Send one event to every open record; free of cost where none is open.

    Args:
        kind: See `Event`.
        where: See `Event`.
        samples: Indices of the samples concerned.
        message: One line.
        into: The records of the forward pass (`open_records`); they get the event too, each record once.

    Returns:
        The event.
    """
    event = Event(kind, where, tuple(samples), message)
    targets = _OPEN.get()
    for target in (
        *targets,
        *(known for known in into or () if not any(known is other for other in targets)),
    ):
        target.add(event)
    return event
