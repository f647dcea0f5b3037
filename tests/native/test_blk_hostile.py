"""A driver, or a front end, that means harm: what is torn, moved, repeated or a lie while it is
read.  The data plane survives, answers nothing twice, and the neighbours see nothing.

Chains that are wrong from the start: test_virtq.py; random ones: tests/fuzz/test_rings.py.
"""

from __future__ import annotations

import mmap
import os
import random
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.guest_ring import (
    F_EVENT_IDX,
    F_INDIRECT_DESC,
    F_VERSION_1,
    FLUSH,
    GET_ID,
    IN,
    NEXT,
    OK,
    OUT,
    UNSET,
    WRITE,
    BlkRequest,
    GuestRing,
)
from tests.support.plane import Plane, lib

pytestmark = pytest.mark.native

SIZE = 1 << 20
HALF = SIZE // 2 // 512  # the first sector of the neighbour's part
FEATURES = F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX
RING = 16
WORST = 0.6  # seconds of harm
ENTRY = struct.Struct("<B5xHQ")
HEADER = struct.Struct("<QHHHH")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(random.Random(1).randbytes(SIZE))
    return path


@pytest.fixture(params=["io_uring", "threads"])
def plane(image: Path, request: pytest.FixtureRequest) -> Iterator[Plane]:
    plane = Plane(str(image), request.param, queues=2)
    yield plane
    plane.close()


class Neighbour:
    """Verified writes and reads through queue 1, as long as the test does its worst to queue 0."""

    def __init__(self, plane: Plane) -> None:
        self.plane = plane
        self.random = random.Random(7)
        self.rounds = 0
        self.buffer = BlkRequest(plane.memory, OUT, HALF, bytes(4096))
        self.answer = BlkRequest(plane.memory, IN, HALF, room=4096)
        plane.start(1, size=RING, features=FEATURES)

    def check(self) -> None:
        ring, memory = self.plane.rings[1], self.plane.memory
        sector = HALF + self.random.randrange(HALF - 8)
        data = self.random.randbytes(4096)
        for request in (self.buffer, self.answer):
            memory.write(request.header + 8, struct.pack("<Q", sector))
            memory.write(request.status_at, bytes([UNSET]))
        memory.write(self.buffer.data_at, data)
        for request in (self.buffer, self.answer):
            ring.add(request.buffers)
            ring.publish()
            ring.wait_used(1)
            assert request.status == OK
        assert self.answer.data == data
        self.rounds += 1


def worst_for(seconds: float, neighbour: Neighbour, harm: Callable[[], None]) -> None:
    """Do harm over and over, on a thread of its own, while the neighbour works."""
    ending = threading.Event()
    failures: list[BaseException] = []

    def work() -> None:
        try:
            while not ending.is_set():
                harm()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            neighbour.check()
    finally:
        ending.set()
        thread.join(30)
    assert not thread.is_alive()
    assert not failures, failures
    assert neighbour.rounds


# ---- chains that change while they are read ------------------------------------------------

def test_chains_that_change_while_they_are_read(plane: Plane) -> None:
    """Descriptors, header, indirect table and available ring flicker between right and wrong."""
    neighbour = Neighbour(plane)
    chance = random.Random(3)
    memory = plane.memory
    ring = GuestRing(memory, RING, FEATURES)
    request = BlkRequest(memory, IN, 8, room=4096)
    table = memory.alloc(48, 16)
    broken = served = 0

    def rows() -> list[bytes]:
        good = [struct.pack("<QIHH", address, length, (WRITE if writable else 0) | (i < 2), i + 1)
                for i, (address, length, writable) in enumerate(request.buffers)]
        bad = [struct.pack("<QIHH", chance.choice((0, memory.base - 1, (1 << 64) - 8, table)),
                           chance.choice((0, 1, 4096, 0xFFFFFFFF)), chance.randrange(8),
                           chance.choice((0, 1, 2, RING, 0xFFFF))) for _ in range(3)]
        return [chance.choice((g, g, b)) for g, b in zip(good, bad, strict=True)]

    def flicker() -> None:
        nonlocal broken, served
        ring.avail_idx = ring.used_seen = 0
        memory.write(ring.avail, bytes(6 + 2 * RING))
        memory.write(ring.used, bytes(6 + 8 * RING))
        plane.start(0, ring=ring)
        for _ in range(12):
            head = chance.choice((0, 3))
            if head:
                ring.put_desc(3, table, 48, 4, 0)
            ring.put_avail(head)
            ring.publish()
            for _ in range(4):
                at = table if chance.random() < 0.5 else ring.desc
                memory.write(at, b"".join(rows()))
                memory.write(request.header, struct.pack(
                    "<IIQ", chance.choice((0, 1, 8, 11, 77)), 0, chance.choice((0, 8, 1 << 60))))
                memory.write(ring.avail + 4, struct.pack("<H", chance.choice((0, 3, RING))))
            if plane.broken(0):
                break
        broken += plane.broken(0) is not None
        assert plane.stop(0) >= 0
        served += ring.used_idx

    worst_for(WORST, neighbour, flicker)
    assert broken
    assert served


def test_the_available_index_jumps_about(plane: Plane) -> None:
    neighbour = Neighbour(plane)
    chance = random.Random(4)
    ring = GuestRing(plane.memory, RING, FEATURES)
    request = BlkRequest(plane.memory, FLUSH)

    def jump() -> None:
        for i, (address, length, writable) in enumerate(request.buffers):
            ring.put_desc(i, address, length, (WRITE if writable else 0) | (i < 1), i + 1)
        plane.memory.write(ring.used, bytes(6 + 8 * RING))
        ring.set_avail_idx(0)
        plane.start(0, ring=ring)
        for _ in range(30):
            ring.set_avail_idx(chance.getrandbits(16))
            os.eventfd_write(ring.kick_fd, 1)
        assert plane.stop(0) >= 0

    worst_for(WORST, neighbour, jump)


# ---- kicks without buffers -----------------------------------------------------------------

def test_kicks_without_buffers_wake_and_do_nothing(plane: Plane) -> None:
    neighbour = Neighbour(plane)
    ring = plane.start(0, features=FEATURES)

    def kick() -> None:
        for _ in range(1000):
            os.eventfd_write(ring.kick_fd, 1)

    worst_for(WORST, neighbour, kick)
    assert ring.used_idx == 0
    assert plane.broken(0) is None
    assert plane.request(IN, 0, room=512).status == OK


def test_a_kick_descriptor_that_is_full_or_no_eventfd(plane: Plane) -> None:
    ring = GuestRing(plane.memory, RING, FEATURES)
    os.eventfd_write(ring.kick_fd, (1 << 64) - 3)  # one more is the most that it holds
    plane.start(0, ring=ring)
    assert plane.request(FLUSH).status == OK
    plane.stop(0)
    a, b = os.pipe()
    setup = plane.setup(ring, ring.avail_idx)
    setup.kick_fd = a
    Plane.check(lib.sv_queue_start(plane.plane, 0, setup))
    for _ in range(100):
        os.write(b, b"x" * 100)
    ring.add(BlkRequest(ring.memory, FLUSH).buffers)
    ring.publish(kick=False)
    os.write(b, b"x")
    ring.wait_used(1)
    plane.stop(0)
    # A file can't be waited for: refused, nothing left behind.
    with open("/proc/self/status", "rb") as file:
        setup.kick_fd = file.fileno()
        assert lib.sv_queue_start(plane.plane, 0, setup) < 0
    assert plane.stop(0) == -22
    os.close(a)
    os.close(b)


# ---- rings that move or change their size under load ---------------------------------------

def test_rings_that_move_and_resize_under_load(plane: Plane) -> None:
    """Stopped with requests on their way and started elsewhere: each is answered once."""
    neighbour = Neighbour(plane)
    chance = random.Random(5)
    rings = [GuestRing(plane.memory, size, FEATURES) for size in (4, 16, 64, 256)]
    requests = [BlkRequest(plane.memory, IN, 8 * i, room=4096) for i in range(8)]

    def move() -> None:
        ring = chance.choice(rings)
        ring.avail_idx = ring.used_seen = 0
        ring.free = list(range(ring.size - 1, -1, -1))
        plane.memory.write(ring.used, bytes(6 + 8 * ring.size))
        ring.set_avail_idx(0)
        plane.start(0, ring=ring)
        count = min(ring.size // 3, len(requests))
        for request in requests[:count]:
            ring.add(request.buffers)
        ring.publish()
        base = plane.stop(0)
        # What was taken was answered, what was not is still there.
        assert ring.used_idx == base <= count
        assert len(ring.take_used()) == base

    worst_for(WORST, neighbour, move)
    assert plane.broken(0) is None


# ---- wrong directions ----------------------------------------------------------------------

@pytest.mark.parametrize(("type_", "writable", "status"), [
    (OUT, True, OK),       # nothing to write: an empty request
    (IN, False, OK),       # nowhere to read to: the same
    (GET_ID, False, OK),
    (FLUSH, True, OK), (FLUSH, False, OK)])
def test_a_data_buffer_of_the_wrong_direction_is_left_alone(
        plane: Plane, image: Path, type_: int, writable: bool, status: int) -> None:
    before = image.read_bytes()
    ring = plane.start(0, features=FEATURES)
    request = BlkRequest(plane.memory, type_, 0, room=512)
    (header, data, end) = request.buffers
    ring.add([header, (data[0], data[1], writable), end])
    ring.publish()
    (_, written), = ring.wait_used(1)
    assert request.status == status
    if type_ != GET_ID:
        assert request.data == bytes([UNSET]) * 512
    assert written in (0, 1)
    assert image.read_bytes() == before


def test_a_writable_header_is_not_read(plane: Plane) -> None:
    ring = plane.start(0, features=FEATURES)
    request = BlkRequest(plane.memory, IN, 0, room=512)
    ring.put_desc(0, request.header, 16, WRITE | NEXT, 1)
    ring.put_desc(1, request.data_at, 512, WRITE | NEXT, 2)
    ring.put_desc(2, request.status_at, 1, WRITE, 0)
    ring.put_avail(0)
    ring.publish()
    ring.wait_used(1)
    assert request.status != OK
    assert request.status != UNSET
    assert request.data == bytes([UNSET]) * 512


# ---- an in-flight region that lies ---------------------------------------------------------

class Record:
    """The in-flight region of both queues, in memory that the test writes at will."""

    def __init__(self, plane: Plane) -> None:
        self.each = lib.sv_inflight_size(RING)
        self.fd = os.memfd_create("inflight")
        os.ftruncate(self.fd, 2 * self.each)
        self.map = mmap.mmap(self.fd, 2 * self.each)
        Plane.check(lib.sv_plane_set_inflight(plane.plane, self.fd, 0, 2 * self.each, 2, RING))

    def write(self, version: int = 1, desc_num: int = RING, batch: int = 0, used: int = 0,
              entry: tuple[int, int, int] = (0, 0, 0)) -> None:
        data = HEADER.pack(0, version, desc_num, batch, used) + ENTRY.pack(*entry) * RING
        self.map[:self.each] = data.ljust(self.each, b"\0")

    def close(self) -> None:
        self.map.close()
        os.close(self.fd)


@pytest.fixture
def record(plane: Plane) -> Iterator[Record]:
    record = Record(plane)
    yield record
    record.close()


@pytest.mark.parametrize("lie", [
    {"version": 2}, {"version": 0xFFFF}, {"desc_num": 0}, {"desc_num": 8}, {"desc_num": 0xFFFF},
    {"used": RING + 1}, {"used": 0x8000},
    {"used": 0xFFFF, "batch": RING}, {"used": 0xFFFF, "batch": 0xFFFF},
    {"used": 0xFFF0, "batch": 0, "entry": (1, 0xFFFF, 0)}])
def test_a_record_that_contradicts_itself_is_refused(plane: Plane, record: Record,
                                                     lie: dict[str, int]) -> None:
    neighbour = Neighbour(plane)
    ring = GuestRing(plane.memory, RING, FEATURES)
    record.write(**lie)  # type: ignore[arg-type]
    assert lib.sv_queue_start(plane.plane, 0, plane.setup(ring)) == -74  # EBADMSG
    assert plane.stop(0) == -22
    neighbour.check()


@pytest.mark.parametrize("entry", [(1, 0, 0), (255, 0xFFFF, (1 << 64) - 1), (1, 3, 5)])
def test_a_record_that_claims_requests_which_were_never_made(plane: Plane, record: Record,
                                                             entry: tuple[int, int, int]) -> None:
    """Their descriptors are taken as they are, like any that a driver makes available."""
    neighbour = Neighbour(plane)
    ring = GuestRing(plane.memory, RING, FEATURES)
    record.write(entry=entry)
    plane.start(0, ring=ring)
    assert ring.wait_error()
    assert plane.broken(0)
    neighbour.check()
    plane.stop(0)
    # The next one starts afresh.
    plane.start(0, ring=GuestRing(plane.memory, RING, FEATURES))
    assert plane.request(IN, 0, room=512).status == OK


def test_a_batch_that_loops_is_walked_no_further_than_it_is_long(plane: Plane,
                                                                 record: Record) -> None:
    ring = GuestRing(plane.memory, RING, FEATURES)
    record.write(used=0x10000 - RING, batch=5, entry=(0, 5, 0))
    plane.start(0, ring=ring)
    assert plane.request(IN, 0, room=512).status == OK


def test_a_record_that_changes_under_load(plane: Plane, record: Record) -> None:
    neighbour = Neighbour(plane)
    chance = random.Random(6)
    ring = GuestRing(plane.memory, RING, FEATURES)
    requests = [BlkRequest(plane.memory, IN, 8 * i, room=512) for i in range(4)]

    def scribble() -> None:
        ring.avail_idx = ring.used_seen = 0
        ring.free = list(range(RING - 1, -1, -1))
        plane.memory.write(ring.used, bytes(6 + 8 * RING))
        ring.set_avail_idx(0)
        record.write(version=0, desc_num=0)
        setup = plane.setup(ring)
        if lib.sv_queue_start(plane.plane, 0, setup) < 0:
            return
        for _ in range(4):
            for request in requests:
                ring.add(request.buffers)
            ring.publish()
            record.map[:record.each] = chance.randbytes(record.each)
            ring.wait_used(4)
        assert {request.status for request in requests} == {OK}
        assert plane.stop(0) == 16
        # And what such a record says to a successor.
        record.map[:record.each] = chance.randbytes(record.each)
        record.map[8:12] = struct.pack("<HH", 1, RING)
        if lib.sv_queue_start(plane.plane, 0, setup) >= 0:
            plane.stop(0)

    worst_for(WORST, neighbour, scribble)
