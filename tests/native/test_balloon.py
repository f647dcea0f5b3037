"""The balloon's data plane: what goes back to the host, and what a hostile driver gets."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import struct
from collections.abc import Callable, Iterator

import pytest

from shared.virtio import balloon
from tests.support.balloon_plane import (
    BASE,
    DEFLATE,
    INFLATE,
    PAGE,
    REPORTING,
    BalloonPlane,
    blocks,
)
from tests.support.guest_ring import GuestMemory
from tests.support.ring_plane import lib

pytestmark = pytest.mark.native

MIB = 1 << 20
F_SEAL_FUTURE_WRITE = 0x10  # linux/fcntl.h: no holes any more either
Make = Callable[..., BalloonPlane]


@pytest.fixture
def make() -> Iterator[Make]:
    planes: list[BalloonPlane] = []

    def build(features: int = BASE, size: int = 16 * MIB) -> BalloonPlane:
        planes.append(BalloonPlane(features, GuestMemory(size)))
        for index in (INFLATE, DEFLATE):
            planes[-1].start(index)
        return planes[-1]

    yield build
    for plane in planes:
        plane.close()


# ---- inflate -----------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["up", "down", "shuffled"])
@pytest.mark.parametrize("pieces", [1, 3, 7])
def test_inflated_pages_go_back_to_the_host(make: Make, order: str, pieces: int) -> None:
    """The whole file has fewer blocks, so every process's mapping has lost them."""
    plane = make()
    at = plane.memory.alloc(PAGE * 258)
    data = plane.fill(at, 258)
    first = at // PAGE + 1
    pfns = list(range(first, first + 256))
    if order == "down":
        pfns.reverse()
    elif order == "shuffled":
        random.Random(1).shuffle(pfns)
    plane.pfns(INFLATE, pfns[:1])  # makes the pages of ring and buffer
    before = blocks(plane.memory)
    plane.pfns(INFLATE, pfns, pieces)
    assert before - blocks(plane.memory) == 255 * PAGE
    assert plane.count("inflated_pages") == 257
    assert plane.count("removals") == 2, "adjacent pages go at once"
    assert plane.count("removed_bytes") == 257 * PAGE
    # What is touched again is there again, with zeroes; the neighbours were not touched.
    assert plane.memory.read(at, PAGE) == data[:PAGE]
    assert plane.memory.read(at + PAGE, 256 * PAGE) == bytes(256 * PAGE)
    assert plane.memory.read(at + 257 * PAGE, PAGE) == data[-PAGE:]
    plane.memory.write(at + PAGE, data[:256 * PAGE])
    assert plane.memory.read(at + PAGE, 256 * PAGE) == data[:256 * PAGE]
    assert plane.count("refused_pages") == plane.count("failed_bytes") == 0


def test_pages_that_are_not_adjacent_go_one_by_one(make: Make) -> None:
    plane = make()
    at = plane.memory.alloc(PAGE * 64)
    data = plane.fill(at, 64)
    plane.pfns(INFLATE, [at // PAGE + i for i in range(0, 64, 2)])
    for i in range(64):
        expected = data[i * PAGE:(i + 1) * PAGE] if i % 2 else bytes(PAGE)
        assert plane.memory.read(at + i * PAGE, PAGE) == expected
    assert plane.count("removals") == 32


def test_a_page_named_twice_counts_once(make: Make) -> None:
    plane = make()
    at = plane.memory.alloc(PAGE * 8)
    plane.fill(at, 8)
    pfn = at // PAGE
    plane.pfns(INFLATE, [pfn, pfn, pfn + 1, pfn, pfn + 1])
    assert plane.count("inflated_pages") == 2
    plane.pfns(INFLATE, [pfn])  # in another chain: it has gone already
    assert plane.count("removals") == 2
    assert plane.count("refused_pages") == 0


def test_pages_outside_memory_are_refused_and_the_others_taken(make: Make) -> None:
    plane = make()
    memory = plane.memory
    at = memory.alloc(PAGE * 2)
    plane.fill(at, 2)
    outside = [0, memory.base // PAGE - 1, (memory.base + memory.size) // PAGE, 0x7FFFFFFF,
               0xFFFFFFFF]
    plane.pfns(INFLATE, [*outside, at // PAGE, at // PAGE + 1])
    assert plane.count("refused_pages") == len(outside)
    assert plane.count("inflated_pages") == 2
    assert memory.read(at, 2 * PAGE) == bytes(2 * PAGE)
    assert plane.broken(INFLATE) is None


def test_a_run_goes_over_the_end_of_memory(make: Make) -> None:
    plane = make()
    end = plane.memory.base + plane.memory.size
    plane.fill(end - 3 * PAGE, 3)
    plane.pfns(INFLATE, [end // PAGE - 3 + i for i in range(6)])
    assert plane.count("inflated_pages") == plane.count("refused_pages") == 3
    assert plane.memory.read(end - 3 * PAGE, 3 * PAGE) == bytes(3 * PAGE)


def test_a_run_goes_from_one_region_into_the_next(make: Make) -> None:
    plane = make()
    for index in (INFLATE, DEFLATE):
        plane.stop(index)
    memory = plane.memory
    other = GuestMemory(MIB, memory.base + memory.size)
    try:
        plane.check(lib.sv_ring_add_region(plane.device, other.base, other.size, 0, other.fd))
        plane.start(INFLATE)
        plane.fill(other.base - PAGE, 1)
        other.fill(other.base, PAGE, 1)
        plane.pfns(INFLATE, [other.base // PAGE - 1, other.base // PAGE])
        assert memory.read(other.base - PAGE, PAGE) == bytes(PAGE)
        assert other.read(other.base, PAGE) == bytes(PAGE)
        assert blocks(other) == PAGE  # the one that was just read is there again
        assert plane.count("removals") == 2
    finally:
        other.close()


def test_pages_cut_by_their_region_are_refused(make: Make) -> None:
    """A region whose file or guest address leaves pages of the balloon that are none here."""
    plane = make()
    for index in (INFLATE, DEFLATE):
        plane.stop(index)
    other = GuestMemory(MIB, 0x40000000)
    cases = ((0x40000000, PAGE + 100, 0), (0x50000000, PAGE, 512), (0x60000200, 2 * PAGE, 0))
    try:
        other.fill(other.base, MIB, 7)
        for address, size, offset in cases:
            plane.check(lib.sv_ring_add_region(plane.device, address, size, offset, other.fd))
        plane.start(INFLATE)
        plane.pfns(INFLATE, [0x40001, 0x50000, 0x60000, 0x60001, 0x60002])
        assert plane.count("refused_pages") == 5
        assert other.read(other.base, MIB) == bytes([7]) * MIB
        plane.pfns(INFLATE, [0x40000])
        assert other.read(other.base, MIB) == bytes(PAGE) + bytes([7]) * (MIB - PAGE)
    finally:
        other.close()


@pytest.mark.parametrize("length", [1, 2, 3, 5, 4 * 256 + 3])
def test_a_number_cut_short_is_refused(make: Make, length: int) -> None:
    plane = make()
    at = plane.memory.alloc(PAGE * 300)
    data = struct.pack("<257I", *(at // PAGE + i for i in range(257)))[:length]
    plane.chain(INFLATE, data)
    assert plane.count("refused_pages") == 1
    assert plane.count("inflated_pages") == length // 4


def test_a_chain_with_too_many_numbers_is_cut(make: Make) -> None:
    """Descriptors may name the same buffer again and again, as long as there are any."""
    plane = make()
    plane.stop(INFLATE)
    ring = plane.start(INFLATE, size=128)
    buffer = plane.memory.alloc(4 * MIB)
    pages = plane.memory.alloc(PAGE * 64)
    first = pages // PAGE
    plane.memory.write(buffer, struct.pack("<64I", *range(first, first + 64)) * (4 * MIB // 256))
    ring.add([(buffer, 4 * MIB, False)] * 100)
    ring.publish()
    ring.wait_used(1)
    assert plane.count("refused_pages") == 100 * MIB - lib.SV_BALLOON_MAX_PFNS
    # 1024 numbers are looked at together.
    assert plane.count("inflated_pages") == lib.SV_BALLOON_MAX_PFNS // 1024 * 64
    assert plane.count("removals") == lib.SV_BALLOON_MAX_PFNS // 1024


def test_numbers_in_pages_that_they_name(make: Make) -> None:
    """What was read once isn't read again; what goes before it was read reads as page 0."""
    plane = make()
    at = plane.memory.alloc(PAGE * 4)
    plane.memory.write(at, struct.pack("<4096I", *([at // PAGE] * 4096)))
    plane.buffers(INFLATE, [(at, PAGE * 4, False)])
    assert plane.memory.read(at, PAGE) == bytes(PAGE)
    assert plane.broken(INFLATE) is None


def test_buffers_to_be_written_are_left_alone(make: Make) -> None:
    plane = make()
    at = plane.memory.alloc(PAGE * 2)
    data = plane.fill(at, 2)
    plane.buffers(INFLATE, [(at, PAGE, True)])
    plane.buffers(DEFLATE, [(at, PAGE, True)])
    assert plane.memory.read(at, 2 * PAGE) == data
    assert plane.count("inflated_pages") == plane.count("deflated_pages") == 0


def test_a_host_that_takes_no_pages_is_told_of_once(make: Make) -> None:
    plane = make()
    for index in (INFLATE, DEFLATE):
        plane.stop(index)
    fd = os.memfd_create("sealed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 8 * PAGE)
    os.pwrite(fd, b"x" * 8 * PAGE, 0)
    plane.check(lib.sv_ring_add_region(plane.device, 0x40000000, 8 * PAGE, 0, fd))
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, F_SEAL_FUTURE_WRITE)
    plane.start(INFLATE)
    for _ in range(3):
        plane.pfns(INFLATE, [0x40000, 0x40001])
    assert plane.count("failed_bytes") == 6 * PAGE
    assert plane.count("removed_bytes") == 0
    assert plane.notified()
    assert plane.news().error == errno.EPERM
    assert not plane.notified() and plane.news().error == 0
    assert os.pread(fd, 8 * PAGE, 0) == b"x" * 8 * PAGE
    os.close(fd)


# ---- deflate -----------------------------------------------------------------------------------


def test_deflate_takes_nothing(make: Make) -> None:
    plane = make()
    at = plane.memory.alloc(PAGE * 8)
    data = plane.fill(at, 8)
    plane.pfns(DEFLATE, [at // PAGE + i for i in range(8)] + [0, 1])
    assert plane.memory.read(at, 8 * PAGE) == data
    assert (plane.count("deflated_pages"), plane.count("refused_pages")) == (8, 2)
    assert plane.count("removals") == 0


# ---- reporting ---------------------------------------------------------------------------------


def test_reported_ranges_go_back_to_the_host(make: Make) -> None:
    plane = make()
    plane.start(REPORTING)
    at = plane.memory.alloc(PAGE * 64)
    data = plane.fill(at, 64)
    plane.buffers(REPORTING, [(at, 1, True)])  # makes the pages of the ring
    before = blocks(plane.memory)
    plane.buffers(REPORTING, [(at, 8 * PAGE, True), (at + 16 * PAGE, 16 * PAGE, True)])
    assert before - blocks(plane.memory) == 24 * PAGE
    for page in range(64):
        gone = page < 8 or 16 <= page < 32
        expected = bytes(PAGE) if gone else data[page * PAGE:(page + 1) * PAGE]
        assert plane.memory.read(at + page * PAGE, PAGE) == expected
    assert (plane.count("reported_pages"), plane.count("removals")) == (24, 2)


@pytest.mark.parametrize(("start", "length", "gone"), [
    (1, 2 * PAGE, (1, 2)), (0, PAGE - 1, (0, 0)), (0, PAGE + 1, (0, 1)), (4095, 2, (0, 0)),
    (4095, PAGE + 1, (1, 2)), (1, 1, (0, 0)), (2048, 3 * PAGE, (1, 3))])
def test_only_whole_pages_of_a_range_go(make: Make, start: int, length: int,
                                        gone: tuple[int, int]) -> None:
    plane = make()
    plane.start(REPORTING)
    at = plane.memory.alloc(PAGE * 8)
    data = bytearray(plane.fill(at, 8))
    plane.buffers(REPORTING, [(at + start, length, True)])
    data[gone[0] * PAGE:gone[1] * PAGE] = bytes((gone[1] - gone[0]) * PAGE)
    assert plane.memory.read(at, 8 * PAGE) == bytes(data)


def test_a_giant_range_goes_in_pieces(make: Make) -> None:
    """Between two pieces the other queues are served."""
    plane = make(size=512 * MIB)
    plane.start(REPORTING)
    at = plane.memory.alloc(300 * MIB)
    plane.memory.write(at, b"first")
    plane.memory.write(at + 299 * MIB, b"last")
    plane.buffers(REPORTING, [(at, 300 * MIB, True), (at, 100 * MIB, True)])
    assert plane.memory.read(at, 5) + plane.memory.read(at + 299 * MIB, 4) == bytes(9)
    assert plane.count("removed_bytes") == 400 * MIB
    assert plane.count("removals") == 5 + 3  # of 64 MiB at most
    assert plane.count("reported_pages") == 400 * MIB // PAGE


def test_a_range_outside_memory_breaks_the_queue_alone(make: Make) -> None:
    plane = make()
    plane.start(REPORTING)
    plane.buffers(REPORTING, [(plane.memory.base + plane.memory.size - PAGE, 2 * PAGE, True)],
                  wait=False)
    assert plane.rings[REPORTING].wait_error()
    assert plane.broken(REPORTING) == "a buffer outside guest memory"
    at = plane.memory.alloc(PAGE)
    plane.pfns(INFLATE, [at // PAGE])
    assert plane.count("inflated_pages") == 1


def test_what_was_not_reported_stays(make: Make) -> None:
    """Buffers for the device to read are no ranges."""
    plane = make()
    plane.start(REPORTING)
    at = plane.memory.alloc(PAGE * 4)
    data = plane.fill(at, 4)
    plane.buffers(REPORTING, [(at, PAGE, False), (at + PAGE, PAGE, False)])
    assert plane.memory.read(at, 4 * PAGE) == data
    plane.buffers(REPORTING, [(at, PAGE, False), (at + PAGE, PAGE, True)])
    assert plane.memory.read(at, 4 * PAGE) == data[:PAGE] + bytes(PAGE) + data[2 * PAGE:]


def test_who_keeps_all_answers() -> None:
    """In place of a worker that was given up."""
    plane = BalloonPlane(keep=True)
    for index in (INFLATE, DEFLATE, REPORTING):
        plane.start(index)
    at = plane.memory.alloc(PAGE * 4)
    data = plane.fill(at, 4)
    plane.pfns(INFLATE, [at // PAGE, at // PAGE + 1])
    plane.pfns(DEFLATE, [at // PAGE])
    plane.buffers(REPORTING, [(at, 300 * PAGE, True)])
    assert plane.memory.read(at, 4 * PAGE) == data
    assert plane.count("removals") == plane.count("removed_bytes") == 0
    plane.close()


# ---- which queue is which ----------------------------------------------------------------------


@pytest.mark.parametrize(("features", "index", "serves"), [
    (balloon.F_PAGE_REPORTING, 2, True), (balloon.F_PAGE_REPORTING, 3, False),
    (balloon.F_PAGE_REPORTING, 4, True), (0, 2, False), (0, 3, False), (0, 4, False),
    (balloon.F_STATS_VQ, 3, False), (balloon.F_STATS_VQ, 4, False),
    (balloon.F_STATS_VQ | balloon.F_PAGE_REPORTING, 3, True),
    (balloon.F_STATS_VQ | balloon.F_PAGE_REPORTING, 4, True)])
def test_queues_follow_the_features(make: Make, features: int, index: int, serves: bool) -> None:
    """Linux leaves no gap, the specification has reporting at 4 (5.5.2)."""
    plane = make(balloon.F_VERSION_1 | features)
    plane.start(index)
    at = plane.memory.alloc(PAGE)
    data = plane.fill(at, 1)
    plane.buffers(index, [(at, PAGE, True)], wait=serves)
    if serves:
        assert plane.memory.read(at, PAGE) == bytes(PAGE)
    else:
        assert plane.rings[index].wait_error()
        assert plane.broken(index) == "a queue that was not negotiated"
        assert plane.memory.read(at, PAGE) == data


# ---- stopping ----------------------------------------------------------------------------------


def test_a_long_chain_does_not_hold_up_a_stop(make: Make) -> None:
    """What isn't done counts as available again, and is done again."""
    plane = make()
    buffer, page = plane.memory.alloc(4 * MIB), plane.memory.alloc(PAGE)
    plane.memory.write(buffer, struct.pack("<2I", 0, page // PAGE) * (MIB // 2))
    plane.buffers(INFLATE, [(buffer, 4 * MIB, False)], wait=False)
    base = plane.stop(INFLATE)
    ring = plane.rings[INFLATE]
    assert base in (0, 1)
    done = len(ring.take_used())
    assert base == done
    plane.start(INFLATE, ring=ring, base=base)
    if not done:
        ring.wait_used(1)
    assert plane.stop(INFLATE) == 1


def test_bad_sizes_are_refused() -> None:
    from tests.support.ring_plane import ffi

    counters = ffi.new("struct sv_balloon_counters[]", balloon.QUEUES)
    error = ffi.new("int *")
    for size in (0, 1025):
        assert lib.sv_balloon_create(False, size, counters, error) == ffi.NULL
        assert error[0] == -errno.EINVAL


def test_nothing_is_left_open() -> None:
    before = os.listdir("/proc/self/fd")
    plane = BalloonPlane()
    plane.start(INFLATE)
    plane.close()
    assert len(os.listdir("/proc/self/fd")) == len(before)
