"""Hostile and odd virtqueues (virtio 1.2, 2.7): a wrong field breaks the queue, nothing else."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.capabilities import require
from tests.support.guest_ring import (
    F_EVENT_IDX,
    F_INDIRECT_DESC,
    F_VERSION_1,
    FLUSH,
    IN,
    INDIRECT,
    NEXT,
    OK,
    UNSET,
    WRITE,
    BlkRequest,
    GuestRing,
)
from tests.support.plane import Plane, lib

pytestmark = pytest.mark.native

SIZE = 16
ALL = F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX


@pytest.fixture
def plane(tmp_path: Path) -> Iterator[Plane]:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(64 << 10))
    plane = Plane(str(path), "threads", queues=2)
    yield plane
    plane.close()


def start(plane: Plane, features: int = ALL) -> GuestRing:
    return plane.start(0, SIZE, features)


def offer(ring: GuestRing, head: int = 0) -> None:
    ring.put_avail(head)
    ring.publish()


def expect_broken(plane: Plane, ring: GuestRing, reason: str) -> None:
    assert ring.wait_error(), "the error descriptor was not signalled"
    assert reason in (plane.broken() or "")
    assert plane.counters[0].broken == 1
    assert ring.take_used() == []


def put_request(ring: GuestRing) -> BlkRequest:
    """An honest read in descriptors 0 (header), 1 (data), 2 (status), for tests to spoil."""
    request = BlkRequest(ring.memory, IN, 0, room=512)
    for i, (address, length, writable) in enumerate(request.buffers):
        ring.put_desc(i, address, length, (WRITE if writable else 0) | (NEXT if i < 2 else 0),
                      i + 1 if i < 2 else 0)
    return request


def spoil_next_beyond(ring: GuestRing, request: BlkRequest) -> None:
    ring.put_desc(1, request.data_at, 512, WRITE | NEXT, SIZE)


def spoil_loop(ring: GuestRing, request: BlkRequest) -> None:
    ring.put_desc(2, request.status_at, 1, WRITE | NEXT, 1)


def spoil_self_loop(ring: GuestRing, request: BlkRequest) -> None:
    ring.put_desc(0, request.header, 16, NEXT, 0)


def spoil_address_below(ring: GuestRing, request: BlkRequest) -> None:
    ring.put_desc(1, ring.memory.base - 4096, 512, WRITE | NEXT, 2)


def spoil_address_beyond(ring: GuestRing, request: BlkRequest) -> None:
    ring.put_desc(1, ring.memory.base + ring.memory.size, 512, WRITE | NEXT, 2)


def spoil_crosses_end(ring: GuestRing, request: BlkRequest) -> None:
    ring.put_desc(1, ring.memory.base + ring.memory.size - 256, 512, WRITE | NEXT, 2)


def spoil_address_wraps(ring: GuestRing, request: BlkRequest) -> None:
    ring.put_desc(1, (1 << 64) - 256, 512, WRITE | NEXT, 2)


def spoil_huge_length(ring: GuestRing, request: BlkRequest) -> None:
    ring.put_desc(1, request.data_at, 0xFFFFFFFF, WRITE | NEXT, 2)


def spoil_zero_length(ring: GuestRing, request: BlkRequest) -> None:
    ring.put_desc(1, request.data_at, 0, WRITE | NEXT, 2)


def spoil_direction(ring: GuestRing, request: BlkRequest) -> None:
    ring.put_desc(0, request.data_at, 512, WRITE | NEXT, 1)
    ring.put_desc(1, request.header, 16, NEXT, 2)


def spoil_no_status(ring: GuestRing, request: BlkRequest) -> None:
    ring.put_desc(0, request.header, 16, 0, 0)


def spoil_indirect_next(ring: GuestRing, request: BlkRequest) -> None:
    ring.put_desc(0, ring.desc, 48, INDIRECT | NEXT, 1)


@pytest.mark.parametrize(("spoil", "reason"), [
    (spoil_next_beyond, "next is beyond"),
    (spoil_loop, "loops"),
    (spoil_self_loop, "loops"),
    (spoil_address_below, "outside guest memory"),
    (spoil_address_beyond, "outside guest memory"),
    (spoil_crosses_end, "outside guest memory"),
    (spoil_address_wraps, "outside guest memory"),
    (spoil_huge_length, "outside guest memory"),
    (spoil_zero_length, "length zero"),
    (spoil_direction, "follows a writable"),
    (spoil_indirect_next, "with a next one"),
])
def test_bad_descriptor_breaks_the_queue(
        plane: Plane, spoil: Callable[[GuestRing, BlkRequest], None], reason: str) -> None:
    ring = start(plane)
    request = put_request(ring)
    spoil(ring, request)
    offer(ring)
    expect_broken(plane, ring, reason)
    assert request.status == UNSET


def test_request_without_status_byte_breaks_the_queue(plane: Plane) -> None:
    ring = start(plane)
    spoil_no_status(ring, put_request(ring))
    offer(ring)
    assert ring.wait_error()
    assert "without a status byte" in (plane.broken() or "")


@pytest.mark.parametrize("head", [SIZE, 0xFFFF])
def test_available_head_beyond_the_queue(plane: Plane, head: int) -> None:
    ring = start(plane)
    offer(ring, head)
    expect_broken(plane, ring, "available entry beyond")


def test_available_index_runs_ahead(plane: Plane) -> None:
    ring = start(plane)
    put_request(ring)
    ring.set_avail_idx(SIZE + 1)
    os.eventfd_write(ring.kick_fd, 1)
    expect_broken(plane, ring, "runs ahead")


def indirect(ring: GuestRing, rows: list[tuple[int, int, int, int]], length: int | None = None,
             align: int = 16) -> None:
    table = ring.memory.alloc(16 * max(1, len(rows)), align)
    for i, row in enumerate(rows):
        ring.memory.write(table + 16 * i, struct.pack("<QIHH", *row))
    ring.put_desc(0, table, 16 * len(rows) if length is None else length, INDIRECT, 0)
    offer(ring)


def test_indirect_in_indirect(plane: Plane) -> None:
    ring = start(plane)
    indirect(ring, [(ring.desc, 16, INDIRECT, 0)])
    expect_broken(plane, ring, "indirect descriptor in an indirect")


def test_indirect_next_beyond_its_table(plane: Plane) -> None:
    ring = start(plane)
    indirect(ring, [(ring.desc, 16, NEXT, 1)])
    expect_broken(plane, ring, "beyond its table")


def test_indirect_loop(plane: Plane) -> None:
    ring = start(plane)
    indirect(ring, [(ring.desc, 16, NEXT, 1), (ring.desc, 16, NEXT, 0)])
    expect_broken(plane, ring, "loops")


@pytest.mark.parametrize("length", [0, 8, 17])
def test_indirect_table_of_odd_length(plane: Plane, length: int) -> None:
    ring = start(plane)
    indirect(ring, [(ring.desc, 16, 0, 0)], length)
    expect_broken(plane, ring, "no multiple of 16")


def test_indirect_table_outside_memory(plane: Plane) -> None:
    ring = start(plane)
    ring.put_desc(0, ring.memory.base + ring.memory.size - 8, 16, INDIRECT, 0)
    offer(ring)
    expect_broken(plane, ring, "table outside")


def test_indirect_table_that_wraps(plane: Plane) -> None:
    ring = start(plane)
    ring.put_desc(0, (1 << 64) - 16, 48, INDIRECT, 0)
    offer(ring)
    expect_broken(plane, ring, "table outside")


def test_indirect_chain_with_too_many_buffers(plane: Plane) -> None:
    ring = start(plane)
    rows = [(ring.desc, 16, NEXT, i + 1) for i in range(1100)]
    indirect(ring, rows)
    expect_broken(plane, ring, "too many buffers")


def test_indirect_not_negotiated(plane: Plane) -> None:
    ring = start(plane, F_VERSION_1)
    indirect(ring, [(ring.desc, 16, 0, 0)])
    expect_broken(plane, ring, "not negotiated")


def test_unaligned_indirect_table_is_served(plane: Plane) -> None:
    ring = start(plane)
    request = BlkRequest(ring.memory, FLUSH)
    rows = [(request.header, 16, NEXT, 1), (request.status_at, 1, WRITE, 0)]
    ring.memory.alloc(1, 1)
    indirect(ring, rows, align=1)
    ring.wait_used(1)
    assert request.status == OK


def test_the_same_head_twice_breaks_the_queue(plane: Plane) -> None:
    """A flush is on its way (threads) when its head is made available once more."""
    ring = start(plane)
    request = BlkRequest(ring.memory, FLUSH)
    ring.put_desc(0, request.header, 16, NEXT, 1)
    ring.put_desc(1, request.status_at, 1, WRITE, 0)
    for _ in range(4):
        ring.put_avail(0)
    ring.publish()
    assert ring.wait_error()
    assert "made available twice" in (plane.broken() or "")
    plane.stop()
    # What had been taken is finished all the same, once.
    assert request.status == OK
    assert len(ring.take_used()) == 1


def test_other_queue_goes_on_when_one_breaks(plane: Plane) -> None:
    ring = start(plane)
    plane.start(1, SIZE, ALL)
    offer(ring, SIZE)
    expect_broken(plane, ring, "beyond")
    assert plane.request(IN, 0, room=512, index=1).status == OK


def test_a_broken_queue_works_after_it_is_set_up_again(plane: Plane) -> None:
    ring = start(plane)
    offer(ring, SIZE)
    expect_broken(plane, ring, "beyond")
    plane.stop()
    start(plane)
    assert plane.request(IN, 0, room=512).status == OK
    assert plane.broken() is None


@pytest.mark.parametrize("field", ["desc", "avail", "used"])
@pytest.mark.parametrize("value", [1, 0, (1 << 64) - 64, 0x10000000 + (16 << 20) - 16])
def test_ring_outside_memory_or_unaligned_is_refused(plane: Plane, field: str,
                                                     value: int) -> None:
    ring = GuestRing(plane.memory, SIZE)
    good = getattr(ring, field)
    setattr(ring, field, good + 1 if value == 1 else value)
    assert lib.sv_queue_start(plane.plane, 0, plane.setup(ring)) == -22
    ring.close()


@pytest.mark.parametrize("size", [0, 3, 24, 512, 65536])
def test_ring_size_is_refused(plane: Plane, size: int) -> None:
    ring = GuestRing(plane.memory, SIZE)
    ring.size = size
    assert lib.sv_queue_start(plane.plane, 0, plane.setup(ring)) == -22
    ring.close()


def test_start_twice_and_stop_twice(plane: Plane) -> None:
    ring = start(plane)
    assert lib.sv_queue_start(plane.plane, 0, plane.setup(ring)) == -16
    assert plane.stop() == 0
    assert plane.stop() == -22
    assert lib.sv_queue_stop(plane.plane, 7) == -22


def test_regions_change_only_while_nothing_runs(plane: Plane) -> None:
    start(plane)
    memory = plane.memory
    assert lib.sv_plane_add_region(plane.plane, 0, 4096, 0, memory.fd) == -16
    assert lib.sv_plane_remove_region(plane.plane, memory.base, memory.size) == -16
    assert lib.sv_plane_clear_regions(plane.plane) == -16
    plane.stop()
    assert lib.sv_plane_remove_region(plane.plane, memory.base, memory.size) == 0
    assert lib.sv_plane_remove_region(plane.plane, memory.base, memory.size) == -2


@pytest.mark.parametrize(("address", "size", "offset"), [
    (0, 0, 0),                              # empty
    ((1 << 64) - 4096, 8192, 0),            # wraps
    (0, 4096, (1 << 64) - 4096),            # offset wraps
    (0, 32 << 20, 0),                       # longer than the file
    (0x10000000 + 4096, 4096, 0),           # inside the one that is there
])
def test_bad_region_is_refused(plane: Plane, address: int, size: int, offset: int) -> None:
    assert lib.sv_plane_add_region(plane.plane, address, size, offset, plane.memory.fd) == -22


def test_region_table_is_bounded(plane: Plane) -> None:
    results = [lib.sv_plane_add_region(plane.plane, 0x1000 * i, 0x1000, 0, plane.memory.fd)
               for i in range(lib.SV_MEMORY_MAX_REGIONS)]
    assert results[-1] == -28
    assert set(results[:-1]) == {0}


def test_buffer_across_two_regions_is_one_transfer(plane: Plane, tmp_path: Path) -> None:
    memory = plane.memory
    end = memory.base + memory.size
    # The same file again, right behind: guest-contiguous, not contiguous here.
    Plane.check(lib.sv_plane_add_region(plane.plane, end, memory.size, 0, memory.fd))
    ring = start(plane)
    request = put_request(ring)
    ring.put_desc(1, end - 256, 512, WRITE | NEXT, 2)
    offer(ring)
    ring.wait_used(1)
    assert request.status == OK
    image = (tmp_path / "disk.img").read_bytes()[:512]
    assert memory.read(end - 256, 256) + memory.read(memory.base, 256) == image


def test_indices_wrap_at_65536(plane: Plane) -> None:
    ring = GuestRing(plane.memory, SIZE, ALL)
    base = 0xFFFE
    ring.avail_idx = ring.used_seen = base
    ring.set_avail_idx(base)
    ring.memory.write(ring.used + 2, struct.pack("<H", base))
    plane.start(ring=ring, base=base)
    for _ in range(5):
        assert plane.request(IN, 1, room=512).status == OK
    assert plane.stop() == 3


# ---- notifications -------------------------------------------------------------------------

def flush_once(ring: GuestRing) -> None:
    ring.add(BlkRequest(ring.memory, FLUSH).buffers)
    ring.publish()
    ring.wait_used(1)


def test_calls_can_be_switched_off(plane: Plane) -> None:
    ring = start(plane, F_VERSION_1)
    ring.set_avail_flags(1)
    flush_once(ring)
    plane.stop()
    assert ring.calls() == 0
    assert plane.counters[0].calls == 0


def test_event_index_decides_about_calls(plane: Plane) -> None:
    ring = start(plane, ALL)
    flush_once(ring)          # the first one is always told
    ring.set_used_event(2)    # tell after the third
    flush_once(ring)
    plane.stop()
    assert plane.counters[0].calls == 1
    base = ring.avail_idx
    plane.start(ring=ring, base=base)
    flush_once(ring)
    plane.stop()
    assert plane.counters[0].calls == 2


def test_avail_event_follows_what_was_taken(plane: Plane) -> None:
    ring = start(plane, ALL)
    for count in range(1, 4):
        flush_once(ring)
        # The thread writes it before it sleeps.
        while ring.avail_event != count:
            os.sched_yield()


@pytest.mark.parametrize("features", [F_VERSION_1, ALL])
@pytest.mark.parametrize("requests", [0, 1, 5])
def test_a_stopped_queue_wants_kicks(plane: Plane, features: int, requests: int) -> None:
    """A successor need not ask for them before it waits for the first one."""
    ring = GuestRing(plane.memory, SIZE, features)
    ring.avail_idx = 7
    ring.set_avail_idx(7)
    plane.start(ring=ring, base=7)
    for _ in range(requests):
        flush_once(ring)
    while not ring.wants_kick():
        os.sched_yield()
    assert plane.stop() == 7 + requests
    assert ring.wants_kick()


def test_a_stopped_queue_wants_kicks_for_the_next_entry_at_the_wrap(plane: Plane) -> None:
    ring = GuestRing(plane.memory, SIZE, ALL)
    ring.avail_idx = 0xFFFF
    ring.set_avail_idx(0xFFFF)
    plane.start(ring=ring, base=0xFFFF)
    ring.add(BlkRequest(ring.memory, FLUSH).buffers)
    ring.publish()
    while ring.used_idx != 1:
        os.sched_yield()
    assert plane.stop() == 0
    assert ring.wants_kick() and ring.avail_event == 0


def test_ring_without_kick_descriptor_is_polled(plane: Plane) -> None:
    ring = GuestRing(plane.memory, SIZE, ALL)
    setup = plane.setup(ring)
    setup.kick_fd = -1
    Plane.check(lib.sv_queue_start(plane.plane, 0, setup))
    plane.rings[0] = ring
    ring.add(BlkRequest(ring.memory, FLUSH).buffers)
    ring.publish(kick=False)
    ring.wait_used(1)


def test_call_descriptor_can_change_while_the_ring_runs(plane: Plane) -> None:
    ring = start(plane, F_VERSION_1)
    other = os.eventfd(0, os.EFD_NONBLOCK)
    Plane.check(lib.sv_queue_set_call(plane.plane, 0, other))
    flush_once(ring)
    assert os.eventfd_read(other) == 1
    assert ring.calls() == 0
    Plane.check(lib.sv_queue_set_call(plane.plane, 0, -1))
    flush_once(ring)
    plane.stop()
    with pytest.raises(BlockingIOError):
        os.eventfd_read(other)
    os.close(other)


def test_region_of_huge_pages_need_not_start_at_one(plane: Plane) -> None:
    require("hugepages")
    fd = os.memfd_create("huge", os.MFD_HUGETLB)
    os.ftruncate(fd, 4 << 20)
    assert lib.sv_plane_add_region(plane.plane, 0, 8192, (2 << 20) + 4096, fd) == 0
    assert lib.sv_plane_remove_region(plane.plane, 0, 8192) == 0
    os.close(fd)
