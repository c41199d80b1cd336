"""The record of failures: what it collects, how records nest, and that threads do not see each other's."""

import asyncio
import contextvars
import threading

import pytest

from implicitdiff.records import Event, emit, open_records, record


def test_nothing_happens_without_a_record() -> None:
    assert open_records() == ()
    event = emit("NOT_OPTIMAL", "forward", [3], "sample 3 of 4: ...")
    assert event == Event("NOT_OPTIMAL", "forward", (3,), "sample 3 of 4: ...")


def test_events_come_in_order_and_stay_readable() -> None:
    with record() as log:
        emit("DAMPED", "backward", (0, 2), "first")
        emit("FALLBACK", "plan", (), "second")
    emit("DAMPED", "backward", (1,), "too late")
    assert [event.message for event in log] == ["first", "second"]
    assert len(log) == 2
    assert str(log) == "backward: DAMPED: first\nplan: FALLBACK: second"
    assert [event.message for event in log.of_sample(2)] == ["first", "second"]
    assert [event.message for event in log.of_sample(1)] == ["second"]


def test_an_empty_record_says_so() -> None:
    with record() as log:
        pass
    assert str(log) == "no events"
    assert log.events == ()


def test_records_nest() -> None:
    with record() as outer:
        emit("DAMPED", "backward", (0,), "a")
        with record() as inner:
            emit("DAMPED", "backward", (0,), "b")
        emit("DAMPED", "backward", (0,), "c")
    assert [event.message for event in outer] == ["a", "b", "c"]
    assert [event.message for event in inner] == ["b"]
    assert open_records() == ()


def test_an_exception_closes_the_record_and_keeps_its_events() -> None:
    def fails() -> None:
        emit("NOT_OPTIMAL", "forward", (1,), "seen")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), record() as log:
        fails()
    assert [event.message for event in log] == ["seen"]
    assert open_records() == ()


def test_a_snapshot_of_the_tuple_does_not_grow() -> None:
    with record() as log:
        emit("DAMPED", "backward", (0,), "a")
        before = log.events
        emit("DAMPED", "backward", (0,), "b")
    assert [event.message for event in before] == ["a"]


def test_threads_are_apart() -> None:
    logs: dict[int, list[str]] = {}
    barrier = threading.Barrier(4)

    def work(number: int) -> None:
        with record() as log:
            barrier.wait()
            for step in range(50):
                emit("DAMPED", "backward", (number,), f"{number}-{step}")
            barrier.wait()
        logs[number] = [event.message for event in log]

    with record() as main:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert main.events == ()
    assert logs == {number: [f"{number}-{step}" for step in range(50)] for number in range(4)}


def test_a_backward_in_another_thread_reaches_the_record_of_its_forward() -> None:
    with record() as log:
        known = open_records()
        thread = threading.Thread(target=lambda: emit("SINGULAR", "backward", (2,), "there", into=known))
        thread.start()
        thread.join()
        emit("SINGULAR", "backward", (2,), "here", into=known)  # the same record is not served twice
    assert [event.message for event in log] == ["there", "here"]


def test_many_threads_may_write_to_one_record() -> None:
    with record() as log:
        known = open_records()

        def work() -> None:
            for _ in range(200):
                emit("DAMPED", "backward", (0,), "x", into=known)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(log) == 800


def test_a_copied_context_does_not_see_later_records() -> None:
    with record() as outer:
        context = contextvars.copy_context()
        with record() as inner:
            context.run(emit, "DAMPED", "backward", (0,), "copied")
    assert [event.message for event in outer] == ["copied"]
    assert inner.events == ()


def test_tasks_keep_their_records_apart() -> None:
    async def work(name: str) -> list[str]:
        with record() as log:
            await asyncio.sleep(0)
            emit("DAMPED", "backward", (0,), name)
            await asyncio.sleep(0)
        return [event.message for event in log]

    async def both() -> list[list[str]]:
        return list(await asyncio.gather(work("a"), work("b")))

    assert asyncio.run(both()) == [["a"], ["b"]]
