"""virtio-blk requests (virtio 1.2, 5.2.6): what each field may hold, and what else gets."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.guest_ring import (
    DISCARD,
    F_INDIRECT_DESC,
    F_VERSION_1,
    FLUSH,
    GET_ID,
    IN,
    IOERR,
    OK,
    OUT,
    UNSET,
    UNSUPP,
    WRITE_ZEROES,
    BlkRequest,
    ranges,
)
from tests.support.plane import Plane, lib

pytestmark = pytest.mark.native

SECTORS = 128
FEATURES = F_VERSION_1 | F_INDIRECT_DESC


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(SECTORS * 512))
    return path


@pytest.fixture(params=["io_uring", "threads"])
def plane(request: pytest.FixtureRequest, image: Path) -> Iterator[Plane]:
    plane = Plane(str(image), request.param)
    plane.start(features=FEATURES)
    yield plane
    assert plane.broken() is None
    plane.close()


@pytest.mark.parametrize(("sector", "size", "status"), [
    (0, 512, OK),
    (SECTORS - 1, 512, OK),
    (0, SECTORS * 512, OK),
    (SECTORS, 512, IOERR),
    (SECTORS - 1, 1024, IOERR),
    ((1 << 64) - 1, 512, IOERR),
    ((1 << 64) - 1, 1024, IOERR),
    (1 << 55, 512, IOERR),
    (0, 511, IOERR),
    (0, 513, IOERR),
    (0, 1, IOERR),
])
@pytest.mark.parametrize("type_", [IN, OUT])
def test_range_and_length(plane: Plane, image: Path, type_: int, sector: int, size: int,
                          status: int) -> None:
    before = image.read_bytes()
    data = os.urandom(size) if type_ == OUT else b""
    request = plane.request(type_, sector, data, 0 if data else size)
    assert request.status == status
    after = image.read_bytes()
    if status == OK and data:
        assert after == before[:sector * 512] + data + before[sector * 512 + size:]
    else:
        assert after == before
    if status == OK and not data:
        assert request.data == before[sector * 512:sector * 512 + size]
    elif not data:
        assert request.data == bytes([UNSET]) * size


def test_empty_read_and_write_succeed(plane: Plane) -> None:
    assert plane.request(IN, 0).status == OK
    assert plane.request(OUT, 0).status == OK


@pytest.mark.parametrize("type_", [2, 3, 5, 6, 7, 9, 10, 12, 14, 15, 16, 0x80000000, 0xFFFFFFFF])
def test_unknown_type_is_unsupported(plane: Plane, type_: int) -> None:
    assert plane.request(type_, room=512).status == UNSUPP


def test_written_length_is_exact(plane: Plane) -> None:
    """2.7.8.2: at least so many bytes were written, from the first on."""
    ring = plane.rings[0]

    def written(type_: int, sector: int = 0, data: bytes = b"", room: int = 0) -> int:
        ring.add(BlkRequest(ring.memory, type_, sector, data, room).buffers)
        ring.publish()
        return ring.wait_used(1)[0][1]

    assert written(IN, 0, room=1024) == 1025
    assert written(IN, SECTORS, room=1024) == 0
    assert written(OUT, 0, bytes(512)) == 1
    assert written(OUT, SECTORS, bytes(512)) == 1
    assert written(FLUSH) == 1
    assert written(GET_ID, room=20) == 21
    assert written(99, room=20) == 0


@pytest.mark.parametrize("room", [1, 19, 20, 64])
def test_get_id(plane: Plane, room: int) -> None:
    request = plane.request(GET_ID, room=room)
    assert request.status == OK
    expected = b"serial-of-the-test".ljust(20, b"\0")[:room]
    assert request.data[:20] == expected[:20]
    assert request.data[20:] == bytes([UNSET]) * (room - len(expected))


@pytest.mark.parametrize("size", [0, 1, 15])
def test_header_cut_short(plane: Plane, size: int) -> None:
    request = BlkRequest(plane.memory, IN, 0, room=512)
    header = [(request.header, size, False)] if size else []
    ring = plane.rings[0]
    ring.add(header + request.buffers[1:])
    ring.publish()
    ring.wait_used(1)
    assert request.status == IOERR
    assert request.data == bytes([UNSET]) * 512


def test_any_layout(plane: Plane, image: Path) -> None:
    """2.7.4: no assumption about how a request is cut into buffers."""
    memory = plane.memory
    request = BlkRequest(memory, OUT, 3, os.urandom(1024))
    ring = plane.rings[0]
    # Header in three pieces, data in odd ones, header's end and data together.
    joined = memory.alloc(6 + 1024, 1)
    memory.write(joined, memory.read(request.header + 10, 6) + memory.read(request.data_at, 1024))
    ring.add([(request.header, 1, False), (request.header + 1, 9, False), (joined, 6 + 77, False),
              (joined + 83, 947, False), (request.status_at, 1, True)])
    ring.publish()
    ring.wait_used(1)
    assert request.status == OK
    assert image.read_bytes()[1536:2560] == memory.read(request.data_at, 1024)
    # A read whose data and status share a buffer.
    both = memory.alloc(513, 1)
    header = BlkRequest(memory, IN, 3).header
    ring.add([(header, 16, False), (both, 513, True)])
    ring.publish()
    ring.wait_used(1)
    assert memory.read(both, 513) == memory.read(request.data_at, 512) + bytes([OK])


def test_more_data_segments_than_announced(plane: Plane) -> None:
    segments = lib.SV_BLK_MAX_DATA_SEGMENTS
    for count, status in ((segments, OK), (SECTORS, OK), (SECTORS + 72, IOERR)):
        request = BlkRequest(plane.memory, IN, 0, b"", min(count, SECTORS) * 512)
        data = [(request.data_at + 512 * min(i, SECTORS - 1), 512, True) for i in range(count)]
        ring = plane.rings[0]
        ring.add([request.buffers[0], *data[:min(count, 200)], request.buffers[-1]], True)
        ring.publish()
        ring.wait_used(1)
        assert request.status == status


# ---- discard and write zeroes ----------------------------------------------------------------

LIMIT = 4194304


@pytest.mark.parametrize("type_", [DISCARD, WRITE_ZEROES])
@pytest.mark.parametrize(("payload", "status"), [
    (ranges((0, 8, 0)), OK),
    (ranges((0, 8, 0), (16, 8, 0), (SECTORS - 1, 1, 0)), OK),
    (ranges((0, 0, 0)), OK),
    (ranges(*[(i, 1, 0) for i in range(16)]), OK),
    (ranges(*[(i, 1, 0) for i in range(17)]), IOERR),
    (ranges((SECTORS, 1, 0)), IOERR),
    (ranges((SECTORS - 1, 2, 0)), IOERR),
    (ranges(((1 << 64) - 1, 1, 0)), IOERR),
    (ranges((0, LIMIT + 1, 0)), IOERR),
    (ranges((0, 0xFFFFFFFF, 0)), IOERR),
    (ranges((0, 8, 2)), UNSUPP),
    (ranges((0, 8, 0x80000000)), UNSUPP),
    (ranges((0, 8, 0), (0, 8, 4)), UNSUPP),
    (ranges((0, 8, 0))[:15], IOERR),
    (ranges((0, 8, 0)) + b"x", IOERR),
    (b"", IOERR),
])
def test_ranges_are_checked(plane: Plane, image: Path, type_: int, payload: bytes,
                            status: int) -> None:
    before = image.read_bytes()
    assert plane.request(type_, data=payload).status == status
    after = image.read_bytes()
    if status != OK:
        assert after == before
        return
    expected = bytearray(before)
    for at in range(0, len(payload), 16):
        sector, count, _ = struct.unpack_from("<QII", payload, at)
        expected[sector * 512:(sector + count) * 512] = bytes(count * 512)
    if type_ == WRITE_ZEROES:
        assert after == expected


def test_unmap_flag(plane: Plane, image: Path) -> None:
    assert plane.request(DISCARD, data=ranges((0, 8, 1))).status == UNSUPP
    assert plane.request(WRITE_ZEROES, data=ranges((0, 8, 1))).status == OK
    assert image.read_bytes()[:4096] == bytes(4096)


@pytest.mark.parametrize("engine", ["io_uring", "threads"])
def test_discard_gives_space_back_only_if_asked(image: Path, engine: str) -> None:
    image.write_bytes(os.urandom(1 << 20))
    used = image.stat().st_blocks
    for unmap in (False, True):
        plane = Plane(str(image), engine, unmap=unmap)
        plane.start()
        assert plane.request(DISCARD, data=ranges((0, 2048, 0))).status == OK
        plane.close()
        assert (image.stat().st_blocks < used) == unmap


def test_readonly_refuses_what_writes(image: Path) -> None:
    before = image.read_bytes()
    plane = Plane(str(image), readonly=True)
    plane.start()
    assert plane.request(OUT, 0, bytes(512)).status == IOERR
    assert plane.request(DISCARD, data=ranges((0, 8, 0))).status == IOERR
    assert plane.request(WRITE_ZEROES, data=ranges((0, 8, 0))).status == IOERR
    assert plane.request(FLUSH).status == OK
    assert plane.request(IN, 0, room=512).data == before[:512]
    plane.close()
    assert image.read_bytes() == before


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("engine", ["io_uring", "threads"])
def test_image_size_is_no_multiple_of_512(image: Path, engine: str, direct: bool) -> None:
    content = os.urandom(3 * 512 + 100)
    image.write_bytes(content)
    plane = Plane(str(image), engine, direct=direct)
    plane.start()
    assert plane.request(IN, 3, room=512).data == content[1536:] + bytes(412)
    assert plane.request(IN, 2, room=1024, segments=2).data == content[1024:] + bytes(412)
    assert plane.request(IN, 4, room=512).status == IOERR
    data = os.urandom(512)
    assert plane.request(OUT, 3, data).status == OK
    plane.close()
    assert image.read_bytes() == content[:1536] + data


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("engine", ["io_uring", "threads"])
def test_image_that_was_made_shorter_gives_an_error(image: Path, engine: str,
                                                    direct: bool) -> None:
    plane = Plane(str(image), engine, direct=direct)
    plane.start()
    os.truncate(image, 4096)
    assert plane.request(IN, 0, room=4096).status == OK
    assert plane.request(IN, 0, room=8192).status == IOERR
    assert plane.request(IN, 64, room=512).status == IOERR
    plane.close()


@pytest.mark.parametrize("sector", [1, 9, 17])
def test_part_of_a_block_that_was_cut_off_is_not_made_zeroes(image: Path, sector: int) -> None:
    """To write it, its block is read: what is missing then was somebody's data."""
    plane = Plane(str(image), direct=True, align=4096)
    plane.start()
    assert plane.request(OUT, sector, bytes(512)).status == OK  # the image is looked at here
    os.truncate(image, sector // 8 * 4096)
    assert plane.request(OUT, sector, bytes(512)).status == IOERR
    plane.close()
    assert image.stat().st_size == sector // 8 * 4096
