"""The engine for small devices, served by the simplest kind: virtio-rng on a pipe."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support.guest_ring import F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1
from tests.support.ring_plane import RingPlane, lib

pytestmark = pytest.mark.native

Make = Callable[..., RingPlane]


@pytest.fixture
def source() -> Iterator[tuple[int, int]]:
    """A pipe: (read end, non-blocking; write end)."""
    out, into = os.pipe()
    os.set_blocking(out, False)
    yield out, into
    for fd in (out, into):
        os.close(fd)


@pytest.fixture
def make(source: tuple[int, int]) -> Iterator[Make]:
    planes: list[RingPlane] = []

    def build(fd: int = -1, max_bytes: int = 0, period: int = 0, size: int = 64,
              **options: Any) -> RingPlane:
        planes.append(RingPlane(
            lambda counters, error: lib.sv_rng_create(source[0] if fd < 0 else fd, max_bytes,
                                                      period, size, counters, error),
            "struct sv_rng_counters", **options))
        return planes[-1]

    yield build
    for plane in planes:
        plane.close()


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def until(condition: Callable[[], bool], limit: float = 10.0) -> None:
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.002)  # between two looks at the condition


@pytest.mark.parametrize("features", [F_VERSION_1, F_VERSION_1 | F_EVENT_IDX,
                                      F_VERSION_1 | F_EVENT_IDX | F_INDIRECT_DESC])
def test_requests_are_served_in_turn(make: Make, source: tuple[int, int], features: int) -> None:
    plane = make(features=features)
    ring = plane.start()
    for number in range(300):
        text = f"number {number}".encode()
        os.write(source[1], text)
        head, address = plane.offer(64)
        assert ring.wait_used(1) == [(head, len(text))]
        assert plane.memory.read(address, len(text)) == text
    counters = plane.counters[0].ring
    assert counters.chains == 300
    assert counters.calls <= 300
    assert plane.stop() == 300


def test_there_is_a_thread_while_a_queue_runs(make: Make) -> None:
    plane = make()
    before = threads()
    plane.start()
    assert threads() == before + 1
    plane.stop()
    until(lambda: threads() == before)
    plane.start(ring=plane.rings[0])
    assert threads() == before + 1
