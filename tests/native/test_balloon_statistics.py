"""The balloon's statistics queue: the device holds a buffer, and gives it back to ask."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator

import pytest

from shared.virtio import balloon
from tests.support.balloon_plane import BASE, STATISTICS, BalloonPlane, entries
from tests.support.guest_ring import F_VERSION_1
from tests.support.ring_plane import lib

pytestmark = pytest.mark.native

Make = Callable[..., BalloonPlane]


@pytest.fixture
def make() -> Iterator[Make]:
    planes: list[BalloonPlane] = []

    def build(features: int = BASE) -> BalloonPlane:
        planes.append(BalloonPlane(features))
        return planes[-1]

    yield build
    for plane in planes:
        plane.close()


@pytest.fixture
def plane(make: Make) -> BalloonPlane:
    """The driver has primed the queue with a buffer."""
    plane = make()
    plane.start(STATISTICS)
    plane.chain(STATISTICS, entries((4, 1)), wait=False)
    return plane


def wait_told(plane: BalloonPlane) -> dict[int, int]:
    deadline = time.monotonic() + 10
    while not plane.notified():
        assert time.monotonic() < deadline, "nothing was told"
        time.sleep(0.001)  # between two looks at the condition
    told = plane.told()
    assert told is not None
    return told


def answer(plane: BalloonPlane, data: bytes, pieces: int = 1) -> dict[int, int]:
    """Ask; the driver gets its buffer and brings the next one."""
    assert plane.ask() == 0
    assert len(plane.rings[STATISTICS].wait_used(1)) == 1
    plane.chain(STATISTICS, data, pieces, wait=False)
    return wait_told(plane)


def test_statistics_come_when_asked_for(plane: BalloonPlane) -> None:
    assert answer(plane, entries((4, 1000), (5, 2000))) == {4: 1000, 5: 2000}
    assert answer(plane, entries((4, 900))) == {4: 900}
    assert plane.count("reports") == 2
    assert plane.rings[STATISTICS].take_used() == [], "the last one is held"


def test_what_the_first_buffer_holds_is_nobody_s(plane: BalloonPlane) -> None:
    """Linux before 4.11 primes the queue with zeroes; a worker that follows another one finds
    what was told already."""
    assert plane.told() is None
    assert not plane.notified()


def test_order_before_the_first_buffer(make: Make) -> None:
    plane = make()
    ring = plane.start(STATISTICS)
    assert plane.ask() == 0
    plane.chain(STATISTICS, entries((0, 0)), wait=False)
    ring.wait_used(1)  # it is given back at once
    plane.chain(STATISTICS, entries((6, 42)), wait=False)
    assert wait_told(plane) == {6: 42}


def test_orders_before_the_answer_are_one(plane: BalloonPlane) -> None:
    ring = plane.rings[STATISTICS]
    for _ in range(5):
        assert plane.ask() == 0
    assert len(ring.wait_used(1)) == 1
    plane.chain(STATISTICS, entries((1, 5)), wait=False)
    assert wait_told(plane) == {1: 5}
    assert ring.take_used() == []
    assert plane.count("reports") == 1


def test_only_one_buffer_is_held(plane: BalloonPlane) -> None:
    """A driver that adds more (5.5.6.3: at most one) is asked no faster."""
    for number in range(3):
        plane.chain(STATISTICS, entries((2, number)), wait=False)
    assert plane.ask() == 0
    assert wait_told(plane) == {2: 0}
    assert plane.count("reports") == 1


@pytest.mark.parametrize(("data", "told"), [
    (b"\0", {}),
    (entries((4, 7))[:9], {}),
    (entries((4, 7)) + b"\5", {4: 7}),
    (entries((16, 1), (0x7FFF, 2), (0xFFFF, 3), (9, 4)), {9: 4}),
    (entries((4, 1), (4, 2)), {4: 2}),
    (entries((4, (1 << 64) - 1)), {4: (1 << 64) - 1}),
    (entries(*((tag, tag + 1) for tag in range(16))), {tag: tag + 1 for tag in range(16)}),
    (entries(*[(99, 0)] * 63, (4, 7)), {4: 7}),
    (entries(*[(99, 0)] * 64, (4, 7)), {}),
    (entries(*[(99, 0)] * 100000), {}),
])
def test_buffers_of_hostile_drivers(plane: BalloonPlane, data: bytes,
                                    told: dict[int, int]) -> None:
    assert lib.SV_BALLOON_MAX_ENTRIES == 64 and len(balloon.STATISTICS) == lib.SV_BALLOON_TAGS
    assert answer(plane, data) == told
    assert answer(plane, entries((3, 3))) == {3: 3}


@pytest.mark.parametrize("pieces", [2, 3, 20])
def test_buffers_in_pieces(plane: BalloonPlane, pieces: int) -> None:
    assert answer(plane, entries((4, 0x123456789A), (5, 6)), pieces) == {4: 0x123456789A, 5: 6}


def test_a_buffer_to_be_written_tells_nothing(plane: BalloonPlane) -> None:
    assert plane.ask() == 0
    plane.rings[STATISTICS].wait_used(1)
    plane.buffers(STATISTICS, [(plane.memory.alloc(100), 100, True)], wait=False)
    assert wait_told(plane) == {}


# ---- stopping ----------------------------------------------------------------------------------


def test_the_held_buffer_survives_a_restart(plane: BalloonPlane) -> None:
    ring = plane.rings[STATISTICS]
    answer(plane, entries((4, 1)))
    assert plane.stop(STATISTICS) == 1, "the second buffer is available again"
    assert ring.take_used() == []
    plane.start(STATISTICS, ring=ring, base=1)
    assert answer(plane, entries((4, 2))) == {4: 2}


def test_a_successor_finds_it_by_the_used_index(make: Make, plane: BalloonPlane) -> None:
    """As after a crash: what was used is all that is known."""
    ring = plane.rings.pop(STATISTICS)
    answered = {4: 1}
    plane.rings[STATISTICS] = ring
    assert answer(plane, entries((4, 1))) == answered
    lib.sv_ring_stop(plane.device, STATISTICS)
    successor = BalloonPlane(BASE, plane.memory)
    try:
        successor.start(STATISTICS, ring=ring, base=ring.used_idx)
        assert not successor.notified(), "what it holds was told already"
        assert answer(successor, entries((4, 2))) == {4: 2}
    finally:
        lib.sv_ring_destroy(successor.device)


def test_an_order_under_way_outlives_a_stop(plane: BalloonPlane) -> None:
    ring = plane.rings[STATISTICS]
    assert plane.ask() == 0
    ring.wait_used(1)
    base = plane.stop(STATISTICS)
    plane.start(STATISTICS, ring=ring, base=base)
    plane.chain(STATISTICS, entries((4, 2)), wait=False)
    assert wait_told(plane) == {4: 2}


def test_a_reset_forgets_it(plane: BalloonPlane) -> None:
    ring = plane.rings[STATISTICS]
    assert plane.ask() == 0
    ring.wait_used(1)
    plane.stop(STATISTICS)
    assert lib.sv_ring_reset(plane.device) == 0
    assert lib.sv_ring_set_features(plane.device, BASE) == 0
    plane.start(STATISTICS)
    plane.chain(STATISTICS, entries((4, 2)), wait=False)
    assert answer(plane, entries((4, 3))) == {4: 3}


def test_who_has_no_queue_can_t_be_asked(make: Make) -> None:
    assert make().ask() == -errno.ENOTCONN  # not started
    plane = make(F_VERSION_1 | balloon.F_PAGE_REPORTING)
    plane.start(2)
    assert plane.ask() == -errno.ENOTCONN  # not negotiated
    broken = make()
    ring = broken.start(STATISTICS)
    ring.put_avail(5000)
    ring.publish()
    assert ring.wait_error()
    assert broken.ask() == -errno.ENOTCONN
