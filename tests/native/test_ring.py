"""The engine for small devices, served by the simplest kind: virtio-rng on a pipe."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Iterator

import pytest

from tests.support.guest_ring import (
    F_EVENT_IDX,
    F_INDIRECT_DESC,
    F_VERSION_1,
    INDIRECT,
    NEXT,
    WRITE,
    GuestRing,
)
from tests.support.ring_plane import RingPlane, lib, rng_plane, threads, until

pytestmark = pytest.mark.native

SIZE = 16
ALL = F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """(read end, non-blocking; write end): the source."""
    out, into = os.pipe()
    os.set_blocking(out, False)
    yield out, into
    for fd in (out, into):
        os.close(fd)


@pytest.fixture
def plane(pipe: tuple[int, int]) -> Iterator[RingPlane]:
    plane = rng_plane(pipe[0], features=ALL)
    yield plane
    plane.close()


# ---- serving ---------------------------------------------------------------------------------

@pytest.mark.parametrize("features", [F_VERSION_1, F_VERSION_1 | F_EVENT_IDX, ALL])
def test_chains_are_served_in_turn(pipe: tuple[int, int], features: int) -> None:
    plane = rng_plane(pipe[0], features=features)
    try:
        guest = plane.start()
        for number in range(300):
            text = f"number {number}".encode()
            head, address = plane.offer(64)
            os.write(pipe[1], text)
            assert guest.wait_used(1) == [(head, len(text))]
            assert plane.memory.read(address, len(text)) == text
        counters = plane.counters[0].ring
        assert counters.chains == 300
        assert 0 < counters.calls <= 300
        assert plane.stop() == 300
    finally:
        plane.close()


def test_there_is_a_thread_while_a_queue_runs(plane: RingPlane) -> None:
    before = threads()
    guest = plane.start()
    assert threads() == before + 1
    plane.stop()
    until(lambda: threads() == before)
    plane.start(ring=guest)
    assert threads() == before + 1


def test_what_came_before_the_start_is_served(plane: RingPlane, pipe: tuple[int, int]) -> None:
    """Without a kick: it was lost with a predecessor."""
    os.write(pipe[1], b"one")
    plane.rings[0] = GuestRing(plane.memory, SIZE, ALL)
    plane.offer(16, kick=False)
    assert plane.start(ring=plane.rings[0]).wait_used(1)[0][1] == 3


def test_a_chain_that_waits_is_available_again_after_a_stop(plane: RingPlane,
                                                            pipe: tuple[int, int]) -> None:
    guest = plane.start()
    plane.offer(16)
    until(lambda: plane.counters[0].starved > 0)
    assert plane.stop() == 0
    assert guest.take_used() == []
    os.write(pipe[1], b"two")
    plane.start(ring=guest)
    assert guest.wait_used(1)[0][1] == 3


@pytest.mark.parametrize("features", [F_VERSION_1, ALL])
@pytest.mark.parametrize("waits", [False, True])
def test_a_stopped_queue_wants_kicks(pipe: tuple[int, int], features: int, waits: bool) -> None:
    """A successor need not ask for them before it waits for the first one."""
    plane = rng_plane(pipe[0], features=features)
    try:
        guest = plane.start()
        plane.offer(16)
        if waits:
            until(lambda: plane.counters[0].starved > 0)
        else:
            os.write(pipe[1], b"one")
            guest.wait_used(1)
        guest.avail_idx = plane.stop()
        assert guest.wants_kick()
    finally:
        plane.close()


def test_the_last_words_before_a_stop(plane: RingPlane, pipe: tuple[int, int]) -> None:
    """What was made available by then is served, whether the kick was heard or not."""
    guest = plane.start(size=SIZE)
    for number in range(3):
        os.write(pipe[1], b"%d" % number)
        plane.offer(1, kick=False)
    assert plane.stop() == 3
    assert len(guest.take_used()) == 3


def test_it_goes_on_from_any_index(plane: RingPlane, pipe: tuple[int, int]) -> None:
    """The index wraps around."""
    guest = GuestRing(plane.memory, SIZE, ALL)
    guest.avail_idx = guest.used_seen = 0xFFFE
    plane.memory.write(guest.used + 2, b"\xfe\xff")
    guest.set_avail_idx(guest.avail_idx)  # else what lies behind it would look available
    plane.start(ring=guest, base=0xFFFE)
    for _ in range(4):
        os.write(pipe[1], b"x")
        plane.offer(1)
        guest.wait_used(1)
    assert plane.stop() == 2


def test_another_call_descriptor(plane: RingPlane, pipe: tuple[int, int]) -> None:
    guest = plane.start()
    other = os.eventfd(0, os.EFD_NONBLOCK)
    plane.check(lib.sv_ring_set_call(plane.device, 0, other))
    os.write(pipe[1], b"x")
    plane.offer(1)
    guest.wait_used(1)
    until(lambda: plane.counters[0].ring.calls == 1)
    assert guest.calls() == 0
    assert os.eventfd_read(other) == 1
    plane.check(lib.sv_ring_set_call(plane.device, 0, -1))
    os.write(pipe[1], b"x")
    plane.offer(1)
    guest.wait_used(1)
    with pytest.raises(BlockingIOError):
        os.eventfd_read(other)
    os.close(other)
    assert lib.sv_ring_set_call(plane.device, 1, -1) == -errno.EINVAL


def test_rings_without_descriptors_are_looked_at(plane: RingPlane, pipe: tuple[int, int]) -> None:
    guest = plane.start(kick_fd=-1, call_fd=-1, err_fd=-1)
    for _ in range(3):
        os.write(pipe[1], b"x")
        plane.offer(1)
        guest.wait_used(1)


def test_a_kick_descriptor_that_is_always_ready(plane: RingPlane, pipe: tuple[int, int]) -> None:
    """Nobody spins on it, and the ring is served all the same."""
    out, into = os.pipe()
    os.close(into)
    guest = plane.start(kick_fd=out)
    for _ in range(3):
        os.write(pipe[1], b"x")
        plane.offer(1)
        guest.wait_used(1)
    assert plane.counters[0].ring.kicks <= 1
    plane.stop()
    os.close(out)


# ---- control calls ---------------------------------------------------------------------------

def test_what_needs_a_stopped_device(plane: RingPlane) -> None:
    plane.start(ring=GuestRing(plane.memory, SIZE, ALL))
    busy = -errno.EBUSY
    memory = plane.memory
    assert lib.sv_ring_add_region(plane.device, 0, 4096, 0, memory.fd) == busy
    assert lib.sv_ring_remove_region(plane.device, memory.base, memory.size) == busy
    assert lib.sv_ring_clear_regions(plane.device) == busy
    assert lib.sv_ring_set_features(plane.device, 0) == busy
    assert lib.sv_ring_reset(plane.device) == busy
    assert plane.try_start(0, plane.rings[0]) == busy
    plane.stop()
    assert plane.stop() == -errno.EINVAL
    plane.check(lib.sv_ring_reset(plane.device))
    plane.check(lib.sv_ring_remove_region(plane.device, memory.base, memory.size))
    assert plane.try_start(0, plane.rings[0]) == -errno.EINVAL  # outside guest memory


@pytest.mark.parametrize(("index", "fields"), [
    (1, {}), (64, {}), (0, {"size": 128}), (0, {"size": 0}), (0, {"size": 12}),
    (0, {"desc": 8}), (0, {"desc": 0}), (0, {"avail": 1}), (0, {"used": 2}),
    (0, {"used": 1 << 63}), (0, {"call_fd": 9999}), (0, {"err_fd": 9999})],
    ids=str)
def test_places_that_do_not_hold(plane: RingPlane, index: int, fields: dict[str, int]) -> None:
    guest = GuestRing(plane.memory, SIZE, ALL)
    before = threads()
    want = -errno.EBADF if {"call_fd", "err_fd"} & set(fields) else -errno.EINVAL
    assert plane.try_start(index, guest, **fields) == want
    assert threads() == before
    plane.start(ring=guest)


def test_a_flood_does_not_keep_control_calls_waiting(pipe: tuple[int, int]) -> None:
    """A driver that has always something more, on a source that has, too."""
    source = os.open("/dev/urandom", os.O_RDONLY | os.O_NONBLOCK)
    plane = rng_plane(source, features=F_VERSION_1)
    guest = GuestRing(plane.memory, SIZE)
    room = plane.memory.alloc(4096)
    for head in range(SIZE):
        guest.put_desc(head, room, 4096, WRITE, 0)
        guest.put_avail(head)
    ending = threading.Event()

    def flood() -> None:
        while not ending.is_set():
            guest.set_avail_idx(guest.used_idx + SIZE)
            os.eventfd_write(guest.kick_fd, 1)

    guest.set_avail_idx(SIZE)
    plane.start(ring=guest)
    thread = threading.Thread(target=flood)
    thread.start()
    worst = 0.0
    try:
        until(lambda: plane.counters[0].ring.chains > 1000)
        for _ in range(100):
            began = time.monotonic()
            assert plane.broken() is None
            base = plane.stop()
            assert base >= 0
            plane.start(ring=guest, base=base)
            worst = max(worst, time.monotonic() - began)
    finally:
        ending.set()
        thread.join()
        plane.close()
        os.close(source)
    assert worst < 2


# ---- drivers that break the rules ------------------------------------------------------------

def chain(guest: GuestRing, *descriptors: tuple[int, int, int, int]) -> None:
    for index, (address, length, flags, next_) in enumerate(descriptors):
        guest.put_desc(index, address, length, flags, next_)
    guest.put_avail(0)
    guest.publish()


def spoiled(name: str, guest: GuestRing) -> None:
    memory = guest.memory
    room = memory.alloc(4096)
    match name:
        case "next beyond":
            chain(guest, (room, 16, WRITE | NEXT, SIZE))
        case "loop":
            chain(guest, (room, 16, WRITE | NEXT, 1), (room, 16, WRITE | NEXT, 0))
        case "below memory":
            chain(guest, (memory.base - 16, 16, WRITE, 0))
        case "across the end":
            chain(guest, (memory.base + memory.size - 8, 16, WRITE, 0))
        case "wraps around":
            chain(guest, ((1 << 64) - 8, 16, WRITE, 0))
        case "huge length":
            chain(guest, (room, 0xFFFFFFFF, WRITE, 0))
        case "zero length":
            chain(guest, (room, 0, WRITE, 0))
        case "wrong direction":
            chain(guest, (room, 16, 0, 0))
        case "both directions":
            chain(guest, (room, 16, NEXT, 1), (room, 16, WRITE, 0))
        case "readable last":
            chain(guest, (room, 16, WRITE | NEXT, 1), (room, 16, 0, 0))
        case "indirect length":
            chain(guest, (room, 15, INDIRECT, 0))
        case "index ahead":
            guest.set_avail_idx(SIZE + 1)
            os.eventfd_write(guest.kick_fd, 1)
        case "head beyond":
            guest.put_avail(SIZE)
            guest.publish()


REASONS = {
    "next beyond": "next is beyond", "loop": "loops", "below memory": "outside guest memory",
    "across the end": "outside guest memory", "wraps around": "outside guest memory",
    "huge length": "outside guest memory", "zero length": "length zero",
    "wrong direction": "to be read", "both directions": "to be read",
    "readable last": "readable buffer follows", "indirect length": "multiple of 16",
    "index ahead": "runs ahead", "head beyond": "beyond the queue's size",
}


@pytest.mark.parametrize("name", REASONS)
def test_a_driver_that_breaks_the_rules(plane: RingPlane, pipe: tuple[int, int],
                                        name: str) -> None:
    os.write(pipe[1], b"x")
    guest = plane.start(size=SIZE)
    spoiled(name, guest)
    assert guest.wait_error(), "the error descriptor was not signalled"
    assert REASONS[name] in (plane.broken() or "")
    assert plane.counters[0].ring.broken == 1
    assert guest.take_used() == []
    guest.publish()  # nothing more is served, and nobody spins
    assert plane.stop() >= 0
    guest = plane.start(size=SIZE)  # it can be set up again
    assert plane.broken() is None
    assert plane.counters[0].ring.broken == 0
    plane.offer(1)
    guest.wait_used(1)
