"""Block requests in bulk: data arrives where it belongs, in every way that it can travel."""

from __future__ import annotations

import errno
import os
import random
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.guest_ring import (
    F_EVENT_IDX,
    F_INDIRECT_DESC,
    F_VERSION_1,
    FLUSH,
    IN,
    IOERR,
    OK,
    OUT,
    WRITE_ZEROES,
    BlkRequest,
    GuestMemory,
    GuestRing,
    ranges,
)
from tests.support.plane import Plane, ffi, lib

pytestmark = pytest.mark.native

FEATURES = F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX
SIZE = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(random.Random(1).randbytes(SIZE))
    return path


class Model:
    """What the image must hold: random writes are done to both, reads compared."""

    def __init__(self, plane: Plane, image: Path, seed: int, unit: int = 512) -> None:
        self.plane = plane
        self.content = bytearray(image.read_bytes())
        self.random = random.Random(seed)
        self.unit = unit

    def _extent(self, low: int, high: int, limit: int) -> tuple[int, int]:
        count = self.random.randint(1, limit)
        start = self.random.randrange(low, max(low + 1, high - count))
        return start * self.unit, min(count, high - start) * self.unit

    def round(self, ring: GuestRing, depth: int, low: int, high: int, limit: int,
              indirect: bool, align: int) -> None:
        """`depth` requests at once between the units `low` and `high`, no two overlapping."""
        slices = (high - low) // depth
        pending: dict[int, tuple[BlkRequest, bytes]] = {}
        for i in range(depth):
            offset, size = self._extent(low + i * slices, low + (i + 1) * slices,
                                        min(limit, slices))
            segments = self.random.choice((1, 1, 2, 3))
            if self.random.random() < 0.5:
                data = self.random.randbytes(size)
                request = BlkRequest(ring.memory, OUT, offset // 512, data, 0, segments, align)
                self.content[offset:offset + size] = data
                expected = b""
            else:
                request = BlkRequest(ring.memory, IN, offset // 512, b"", size, segments, align)
                expected = bytes(self.content[offset:offset + size])
            pending[ring.add(request.buffers, indirect)] = request, expected
        ring.publish()
        for head, written in ring.wait_used(depth):
            request, expected = pending.pop(head)
            assert request.status == OK
            assert request.data == expected
            assert written == len(expected) + 1
        assert not pending


@pytest.mark.parametrize("indirect", [False, True])
@pytest.mark.parametrize(("direct", "align"), [(False, 1), (True, 4096), (True, 1)])
@pytest.mark.parametrize("engine", ["io_uring", "threads"])
def test_random_reads_and_writes(image: Path, engine: str, direct: bool, align: int,
                                 indirect: bool) -> None:
    plane = Plane(str(image), engine, direct=direct, queues=2, memory=GuestMemory(64 << 20))
    rings = [plane.start(i, 128, FEATURES) for i in range(2)]
    model = Model(plane, image, 7)
    units = SIZE // 512
    for count in range(12):
        for index, ring in enumerate(rings):
            depth = (1, 4, 24)[count % 3]
            model.round(ring, depth, index * units // 2, (index + 1) * units // 2, 40, indirect,
                        align)
    for index in range(2):
        assert plane.stop(index) == rings[index].avail_idx
    assert image.read_bytes() == bytes(model.content)
    counters = plane.counters[0]
    assert counters.reads + counters.writes == 12 // 3 * (1 + 4 + 24)
    assert counters.errors == 0
    assert (counters.bounced > 0) == (direct and align == 1)
    plane.close()


@pytest.mark.parametrize("engine", ["io_uring", "threads"])
def test_blocks_larger_than_sectors(image: Path, engine: str) -> None:
    """4 KiB blocks behind 512-byte requests: read-modify-write loses no neighbour."""
    plane = Plane(str(image), engine, direct=True, align=4096, queues=2,
                  memory=GuestMemory(64 << 20))
    rings = [plane.start(i, 128, FEATURES) for i in range(2)]
    model = Model(plane, image, 11)
    units = SIZE // 512
    for _ in range(6):
        for index, ring in enumerate(rings):
            model.round(ring, 16, index * units // 2, (index + 1) * units // 2, 64, True, 512)
    # Both queues write the halves of the same blocks at once.
    for _ in range(20):
        pairs = []
        for index, ring in enumerate(rings):
            for block in range(8):
                data = model.random.randbytes(2048)
                at = block * 4096 + index * 2048
                request = BlkRequest(plane.memory, OUT, at // 512, data)
                model.content[at:at + 2048] = data
                ring.add(request.buffers)
                pairs.append(request)
        for ring in rings:
            ring.publish()
        for ring in rings:
            ring.wait_used(8)
        assert {request.status for request in pairs} == {OK}
    plane.close()
    assert image.read_bytes() == bytes(model.content)


@pytest.mark.parametrize("engine", ["io_uring", "threads"])
def test_large_unaligned_direct_request_goes_in_pieces(image: Path, engine: str) -> None:
    plane = Plane(str(image), engine, direct=True, align=4096)
    plane.start(features=FEATURES)
    data = random.Random(3).randbytes(700 * 512)
    request = plane.request(OUT, 3, data, segments=100, indirect=True)
    assert request.status == OK
    assert image.read_bytes()[3 * 512:703 * 512] == data
    read = plane.request(IN, 3, room=700 * 512, segments=7, indirect=True)
    assert read.status == OK
    assert read.data == data
    plane.close()


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("engine", ["io_uring", "threads"])
def test_zeroes_are_written_where_the_image_can_t_make_them(image: Path, engine: str,
                                                            direct: bool) -> None:
    content = bytearray(image.read_bytes())
    plane = Plane(str(image), engine, direct=direct, align=4096, no_zero_range=True)
    plane.start(features=FEATURES)
    # Odd ends, more than one chunk of zeroes in between.
    payload = ranges((1, 3, 0), (100, 1500, 0), (1700, 8, 0))
    assert plane.request(WRITE_ZEROES, data=payload).status == OK
    for sector, count in ((1, 3), (100, 1500), (1700, 8)):
        content[sector * 512:(sector + count) * 512] = bytes(count * 512)
    plane.close()
    assert image.read_bytes() == content


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("engine", ["io_uring", "threads"])
def test_write_through(image: Path, engine: str, direct: bool) -> None:
    plane = Plane(str(image), engine, direct=direct, writeback=False)
    plane.start(features=FEATURES)
    data = random.Random(4).randbytes(8192)
    assert plane.request(OUT, 8, data).status == OK
    assert plane.request(WRITE_ZEROES, data=ranges((24, 8, 0))).status == OK
    # Nothing of it was done on the queue's thread, where it would have held up others.
    assert plane.counters[0].inline_ops == 0
    plane.close()
    assert image.read_bytes()[4096:16384] == data + bytes(4096)


def test_turning_write_back_off_syncs(image: Path) -> None:
    plane = Plane(str(image))
    assert lib.sv_plane_set_writeback(plane.plane, False) == 0
    assert lib.sv_plane_set_writeback(plane.plane, True) == 0
    os.close(plane.fd)  # a sync can now only fail
    assert lib.sv_plane_set_writeback(plane.plane, False) == -9
    plane.fd = os.open(image, os.O_RDONLY)
    plane.close()


def test_errors_of_the_host_are_io_errors(image: Path) -> None:
    """The descriptor turns into one that can neither be read, written nor synced."""
    plane = Plane(str(image), "threads")
    plane.start(features=FEATURES)
    broken = os.eventfd(0)
    os.dup2(broken, plane.fd)
    assert plane.request(IN, 0, room=512).status == IOERR
    assert plane.request(OUT, 0, bytes(512)).status == IOERR
    assert plane.request(FLUSH).status == IOERR
    assert plane.request(WRITE_ZEROES, data=ranges((0, 8, 0))).status == IOERR
    assert plane.counters[0].errors == 4
    os.close(broken)
    plane.close()


@pytest.mark.parametrize("engine", ["io_uring", "threads"])
def test_stop_finishes_what_was_taken(image: Path, engine: str) -> None:
    plane = Plane(str(image), engine, direct=True, memory=GuestMemory(64 << 20))
    ring = plane.start(0, 256, FEATURES)
    requests = [BlkRequest(plane.memory, (IN, FLUSH)[i % 2], 0, b"", (65536, 0)[i % 2])
                for i in range(200)]
    for request in requests:
        ring.add(request.buffers, indirect=True)
    ring.publish()
    taken = plane.stop()
    used = ring.take_used()
    assert len(used) == taken
    assert [r.status == OK for r in requests] == [True] * taken + [False] * (200 - taken)
    # The rest is done after the next start, once.
    plane.start(ring=ring, base=taken)
    used += ring.wait_used(200 - taken)
    assert sorted(head for head, _ in used) == sorted({head for head, _ in used})
    assert {r.status for r in requests} == {OK}
    plane.close()


# ---- requests in flight (vhost-user, "Inflight I/O tracking") --------------------------------

HEADER = struct.Struct("<QHHHH")  # features, version, desc_num, last_batch_head, used_idx
ENTRY = struct.Struct("<B5xHQ")   # inflight, next, counter


class Inflight:
    """The buffer of one queue of 16 descriptors, as a back end that died left it."""

    size = 16

    def __init__(self) -> None:
        self.bytes = lib.sv_inflight_size(self.size)
        self.fd = os.memfd_create("inflight")
        os.ftruncate(self.fd, self.bytes)

    def write(self, version: int = 1, desc_num: int = 16, batch: int = 0, used: int = 0,
              entries: dict[int, tuple[int, int, int]] | None = None) -> None:
        data = bytearray(self.bytes)
        HEADER.pack_into(data, 0, 0, version, desc_num, batch, used)
        for head, (inflight, next_, counter) in (entries or {}).items():
            ENTRY.pack_into(data, 16 + 16 * head, inflight, next_, counter)
        os.pwrite(self.fd, data, 0)

    def entry(self, head: int) -> tuple[int, int, int]:
        return ENTRY.unpack(os.pread(self.fd, 16, 16 + 16 * head))

    @property
    def header(self) -> tuple[int, ...]:
        return HEADER.unpack(os.pread(self.fd, 16, 0))


@pytest.fixture
def tracked(image: Path) -> Iterator[tuple[Plane, Inflight, GuestRing]]:
    plane = Plane(str(image), "threads")
    inflight = Inflight()
    ring = GuestRing(plane.memory, 16, FEATURES)
    plane.rings[0] = ring
    Plane.check(lib.sv_plane_set_inflight(plane.plane, inflight.fd, 0, inflight.bytes, 1, 16))
    yield plane, inflight, ring
    plane.close()
    os.close(inflight.fd)


def test_record_is_kept_while_running(tracked: tuple[Plane, Inflight, GuestRing]) -> None:
    plane, inflight, ring = tracked
    plane.start(ring=ring)
    for _ in range(3):
        plane.request(FLUSH)
    while inflight.header[4] != 3:  # the last thing that the queue's thread writes
        os.sched_yield()
    assert inflight.header[1:3] == (1, 16)
    assert all(inflight.entry(head)[0] == 0 for head in range(16))
    # Stopped in order: nothing is in flight, the next ring may start anywhere.
    plane.stop()
    assert inflight.header[1] == 0


def test_what_was_in_flight_is_done_again_in_order(
        tracked: tuple[Plane, Inflight, GuestRing], image: Path) -> None:
    plane, inflight, ring = tracked
    writes = [BlkRequest(plane.memory, OUT, 0, bytes([value]) * 512) for value in (1, 2, 3)]
    heads = [ring.add(request.buffers) for request in writes]
    ring.set_avail_idx(ring.avail_idx)
    # Taken in another order than that of the heads; the first one is done and published.
    inflight.write(batch=0, used=0, entries={heads[0]: (1, 0, 12), heads[1]: (1, 0, 10),
                                             heads[2]: (1, 0, 11)})
    plane.start(ring=ring, base=3)
    assert [head for head, _ in ring.wait_used(3)] == [heads[1], heads[2], heads[0]]
    assert {request.status for request in writes} == {OK}
    assert image.read_bytes()[:512] == bytes([1]) * 512
    assert plane.stop() == 3


def test_published_but_not_yet_marked_is_not_done_again(
        tracked: tuple[Plane, Inflight, GuestRing]) -> None:
    plane, inflight, ring = tracked
    requests = [BlkRequest(plane.memory, FLUSH) for _ in range(3)]
    heads = [ring.add(request.buffers) for request in requests]
    ring.set_avail_idx(3)
    plane.memory.write(ring.used + 2, struct.pack("<H", 2))  # two were published
    ring.used_seen = 2
    inflight.write(batch=heads[1], used=0, entries={
        heads[0]: (1, 0, 0), heads[1]: (1, heads[0], 1), heads[2]: (1, 0, 2)})
    plane.start(ring=ring)
    assert [head for head, _ in ring.wait_used(1)] == [heads[2]]
    assert [request.status for request in requests] == [0xAA, 0xAA, OK]
    assert plane.stop() == 3


@pytest.mark.parametrize("change", [
    {"version": 2}, {"version": 0xFFFF}, {"desc_num": 8}, {"desc_num": 32},
    {"used": 1}, {"used": 0x8000}, {"used": 0xFFFE, "batch": 16}, {"used": 0xFFFE, "batch": 99},
])
def test_record_that_contradicts_itself_is_refused(
        tracked: tuple[Plane, Inflight, GuestRing], change: dict[str, int]) -> None:
    plane, inflight, ring = tracked
    inflight.write(**change)
    assert lib.sv_queue_start(plane.plane, 0, plane.setup(ring)) == -74


@pytest.mark.parametrize("entries", [
    {0: (1, 0, 0)},                      # a chain that loops
    {15: (255, 0xFFFF, (1 << 64) - 1)},  # every field at its end
])
def test_record_may_name_chains_that_are_garbage(
        tracked: tuple[Plane, Inflight, GuestRing],
        entries: dict[int, tuple[int, int, int]]) -> None:
    plane, inflight, ring = tracked
    for head in entries:
        ring.put_desc(head, ring.desc, 16, 1, head)
    ring.set_avail_idx(1)
    inflight.write(entries=entries)
    plane.start(ring=ring)
    assert ring.wait_error()
    assert "loops" in (plane.broken() or "")
    plane.stop()


@pytest.mark.parametrize(("offset", "size", "queues", "queue_size"), [
    (1, 0, 1, 16), (32, 0, 1, 16), (0, 16, 1, 16), (0, 0, 2, 16), (0, 0, 1, 512),
    (0, 0, 1, 32), (0, 0, 9, 16),
])
def test_bad_inflight_buffer_is_refused(tracked: tuple[Plane, Inflight, GuestRing], offset: int,
                                        size: int, queues: int, queue_size: int) -> None:
    plane, inflight, _ = tracked
    assert lib.sv_plane_set_inflight(plane.plane, inflight.fd, offset, size or inflight.bytes,
                                     queues, queue_size) == -22


@pytest.mark.parametrize("engine", ["io_uring", "threads"])
def test_what_the_host_can_t_read_is_an_error_and_is_counted(image: Path, engine: str) -> None:
    # A file that says EIO wherever nothing is mapped.
    plane = Plane("/proc/self/mem", engine, readonly=True, block_device=True, size=SIZE,
                  capacity=SIZE // 512)
    told = os.eventfd(0, os.EFD_NONBLOCK)
    assert lib.sv_plane_watch_failures(plane.plane, told) == 0
    ring = plane.start(features=FEATURES)
    assert lib.sv_plane_watch_failures(plane.plane, -1) == -errno.EBUSY
    for sector in range(3):
        assert plane.request(IN, sector, room=512).status == IOERR
    error = ffi.new("int *")
    assert lib.sv_plane_failures(plane.plane, lib.SV_BLK_READ, error) == 3
    assert error[0] == errno.EIO
    assert lib.sv_plane_failures(plane.plane, lib.SV_BLK_WRITE, error) == 0
    assert lib.sv_plane_failures(plane.plane, lib.SV_BLK_OTHER, error) == 0
    assert os.eventfd_read(told) == 3
    # The guest's own mistakes are not the host's errors.
    assert plane.request(IN, SIZE // 512, room=512).status == IOERR
    assert lib.sv_plane_failures(plane.plane, lib.SV_BLK_READ, error) == 3
    assert ring.used_idx == 4
    plane.close()
    os.close(told)


@pytest.mark.parametrize("engine", ["io_uring", "threads"])
def test_a_part_of_a_block_is_written_beside_a_stream_of_whole_ones(image: Path,
                                                                    engine: str) -> None:
    """The stream never pauses by itself, and the part must be alone: it is let in."""
    plane = Plane(str(image), engine, queues=2, direct=True, align=4096)
    stream = plane.start(0, features=FEATURES)
    plane.start(1, features=FEATURES)
    requests = [BlkRequest(plane.memory, OUT, 8 * i, bytes([i]) * 4096, align=4096)
                for i in range(16)]
    ending = threading.Event()
    rounds = 0

    def keep_busy() -> None:
        nonlocal rounds
        heads = {stream.add(request.buffers): request for request in requests}
        stream.publish()
        while not ending.is_set():
            for head, _ in stream.take_used():
                request = heads.pop(head)
                heads[stream.add(request.buffers)] = request
                stream.publish()
                rounds += 1

    thread = threading.Thread(target=keep_busy)
    thread.start()
    try:
        for count in range(20):
            part = plane.request(OUT, 1024 + 8 * count + 3, bytes([count]) * 512, index=1)
            assert part.status == OK
    finally:
        ending.set()
        thread.join()
    assert rounds
    plane.close()
    content = image.read_bytes()
    for count in range(20):
        at = (1024 + 8 * count + 3) * 512
        assert content[at:at + 512] == bytes([count]) * 512
