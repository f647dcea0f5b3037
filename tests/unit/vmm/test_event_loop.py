"""The event loop: descriptors, timers, calls from other threads, handlers that fail."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from functools import partial

import pytest

from vmm.event_loop import READ, WRITE, EventLoop


@pytest.fixture
def loop() -> Iterator[EventLoop]:
    result = EventLoop()
    yield result
    result.close()


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for fd in ends:
        os.close(fd)


def test_a_ready_descriptor(loop: EventLoop, pipe: tuple[int, int]) -> None:
    seen: list[int] = []
    loop.add(pipe[0], READ, seen.append)
    loop.run_once(0)
    assert seen == []
    os.write(pipe[1], b"x")
    loop.run_once(1)
    loop.run_once(1)
    assert seen == [READ, READ]  # level triggered
    loop.remove(pipe[0])
    loop.run_once(0)
    assert len(seen) == 2


def test_other_events(loop: EventLoop, pipe: tuple[int, int]) -> None:
    seen: list[int] = []
    loop.add(pipe[1], 0, seen.append)
    loop.run_once(0)
    loop.modify(pipe[1], WRITE)
    loop.run_once(1)
    assert seen == [WRITE]


def test_unknown_descriptors_are_forgotten_quietly(loop: EventLoop) -> None:
    loop.remove(12345)


def test_a_handler_may_remove_the_next_one(loop: EventLoop) -> None:
    """Both are ready in the same round; the second is never called after its removal."""
    pipes = [os.pipe(), os.pipe()]
    called: list[int] = []

    def remove_other(me: int) -> None:
        called.append(me)
        loop.remove(pipes[1 - me][0])

    for number, (reader, writer) in enumerate(pipes):
        os.write(writer, b"x")
        loop.add(reader, READ, lambda events, number=number: remove_other(number))
    loop.run_once(1)
    assert len(called) == 1
    for ends in pipes:
        loop.remove(ends[0])
        for fd in ends:
            os.close(fd)


def test_timers_run_in_order_of_time(loop: EventLoop) -> None:
    order: list[str] = []
    now = time.monotonic()
    loop.call_at(now + 0.002, lambda: order.append("later"))
    loop.call_at(now + 0.001, lambda: order.append("sooner"))
    loop.call_at(now + 0.001, lambda: order.append("cancelled")).cancel()
    loop.call_at(now + 0.003, loop.stop)
    loop.run()
    assert order == ["sooner", "later"]
    assert time.monotonic() - now >= 0.003


def test_a_timer_set_by_a_timer(loop: EventLoop) -> None:
    order: list[str] = []

    def first() -> None:
        order.append("first")
        loop.call_later(0, second)

    def second() -> None:
        order.append("second")
        loop.stop()

    loop.call_later(0, first)
    loop.run()
    assert order == ["first", "second"]


def test_a_cancelled_timer_is_harmless_to_cancel_again(loop: EventLoop) -> None:
    done: list[int] = []
    timer = loop.call_later(0, lambda: done.append(1))
    loop.run_once(0)
    timer.cancel()
    timer.cancel()
    loop.run_once(0)
    assert done == [1]


def test_calls_from_another_thread(loop: EventLoop) -> None:
    main, seen = threading.get_ident(), []

    def call() -> None:
        for number in range(1000):
            loop.call_soon(lambda number=number: seen.append((number, threading.get_ident())))
        loop.call_soon(loop.stop)

    thread = threading.Thread(target=call)
    thread.start()
    loop.run()
    thread.join(10)
    assert seen == [(number, main) for number in range(1000)]


def test_a_call_that_calls_does_not_starve_descriptors(loop: EventLoop,
                                                       pipe: tuple[int, int]) -> None:
    def again() -> None:
        loop.call_soon(again)

    os.write(pipe[1], b"x")
    loop.add(pipe[0], READ, lambda events: loop.stop())
    again()
    loop.run()


def test_stop_from_another_thread(loop: EventLoop) -> None:
    started = threading.Event()
    loop.call_soon(started.set)

    def stop() -> None:
        assert started.wait(10)
        loop.stop()

    thread = threading.Thread(target=stop)
    thread.start()
    loop.run()
    thread.join(10)


def test_a_handler_that_fails_does_not_end_the_others(loop: EventLoop,
                                                      pipe: tuple[int, int]) -> None:
    failures: list[BaseException] = []
    seen: list[str] = []
    loop.on_exception = failures.append

    def fail(*_: object) -> None:
        raise ValueError("defect")

    os.write(pipe[1], b"x")
    loop.add(pipe[0], READ, fail)
    loop.call_later(0, fail)
    loop.call_later(0, lambda: seen.append("timer"))
    loop.call_soon(fail)
    loop.call_soon(lambda: seen.append("call"))
    loop.run_once(1)
    assert len(failures) == 3 and seen == ["timer", "call"]


def test_without_a_listener_failures_are_raised(loop: EventLoop) -> None:
    def fail() -> None:
        raise ValueError("defect")

    loop.call_soon(fail)
    with pytest.raises(ValueError, match="defect"):
        loop.run_once(0)


def test_what_is_told_of_a_descriptor_isn_t_told_to_the_next_with_its_number(
        loop: EventLoop) -> None:
    """One handler closes another one's descriptor, and opens something else."""
    seen: list[str] = []
    pairs = [os.pipe() for _ in range(2)]
    idle = os.pipe()
    reused: list[int] = []

    def replace(other: int, events: int) -> None:
        if reused:
            return
        loop.remove(other)
        os.dup2(idle[0], other)
        reused.append(other)
        loop.add(other, READ, lambda events: seen.append("stale" if not told else "new"))

    told: list[int] = []
    for (reader, writer), (other, _) in zip(pairs, reversed(pairs), strict=True):
        loop.add(reader, READ, partial(replace, other))
        os.write(writer, b"x")
    loop.run_once(1)
    assert reused and seen == []
    loop.remove(next(reader for reader, _ in pairs if reader not in reused))
    told.append(os.write(idle[1], b"x"))
    loop.run_once(1)
    assert seen == ["new"]
    for fd in (*pairs[0], *pairs[1], *idle):
        os.close(fd)
