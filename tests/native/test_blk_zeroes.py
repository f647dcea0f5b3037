"""detect-zeroes, discard: what becomes of zeroes and of space that nobody wants."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.support.guest_ring import (
    DISCARD,
    F_INDIRECT_DESC,
    F_VERSION_1,
    IN,
    OK,
    OUT,
    WRITE_ZEROES,
    ranges,
)
from tests.support.plane import Plane

pytestmark = pytest.mark.native

SIZE = 1 << 20
FEATURES = F_VERSION_1 | F_INDIRECT_DESC
UNMAP = 1


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(random.Random(1).randbytes(SIZE))
    return path


def allocated(image: Path) -> int:
    return os.stat(image).st_blocks * 512


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("engine", ["io_uring", "threads"])
@pytest.mark.parametrize("writeback", [True, False])
def test_written_zeroes_give_space_back(image: Path, engine: str, direct: bool,
                                        writeback: bool) -> None:
    plane = Plane(str(image), engine, direct=direct, align=4096, detect_zeroes=True,
                  detect_unmap=True, writeback=writeback)
    plane.start(features=FEATURES)
    before = allocated(image)
    assert plane.request(OUT, 16, bytes(256 << 10), segments=9, indirect=True).status == OK
    assert allocated(image) <= before - (256 << 10)
    assert plane.request(IN, 16, room=256 << 10).data == bytes(256 << 10)
    assert plane.counters[0].writes == 1
    assert plane.counters[0].written_bytes == 256 << 10
    plane.close()


def test_zeroes_without_unmap_stay_allocated(image: Path) -> None:
    plane = Plane(str(image), detect_zeroes=True)
    plane.start(features=FEATURES)
    before = allocated(image)
    assert plane.request(OUT, 16, bytes(64 << 10)).status == OK
    assert allocated(image) == before
    assert plane.request(IN, 16, room=64 << 10).data == bytes(64 << 10)
    plane.close()


@pytest.mark.parametrize("at", [0, 1, 15, 16, 17, 511, 512, 4095, 65535])
@pytest.mark.parametrize("segments", [1, 3])
def test_one_byte_makes_it_data(image: Path, at: int, segments: int) -> None:
    plane = Plane(str(image), detect_zeroes=True, detect_unmap=True)
    plane.start(features=FEATURES)
    data = bytearray(64 << 10)
    data[at] = 1
    before = allocated(image)
    assert plane.request(OUT, 0, bytes(data), segments=segments).status == OK
    assert image.read_bytes()[:len(data)] == data
    assert allocated(image) == before
    plane.close()


@pytest.mark.parametrize("direct", [False, True])
def test_zeroes_on_parts_of_blocks_leave_their_neighbours(image: Path, direct: bool) -> None:
    content = bytearray(image.read_bytes())
    chance = random.Random(5)
    plane = Plane(str(image), direct=direct, align=4096, detect_zeroes=True, detect_unmap=True)
    plane.start(features=FEATURES)
    for _ in range(40):
        sector, count = chance.randrange(2000), chance.randint(1, 40)
        data = bytes(count * 512) if chance.random() < 0.7 else chance.randbytes(count * 512)
        content[sector * 512:(sector + count) * 512] = data
        assert plane.request(OUT, sector, data).status == OK
    plane.close()
    assert image.read_bytes() == content


def test_zeroes_are_written_where_the_image_makes_none(image: Path) -> None:
    plane = Plane(str(image), detect_zeroes=True, no_zero_range=True)
    plane.start(features=FEATURES)
    assert plane.request(OUT, 3, bytes(8 << 10)).status == OK
    assert plane.request(IN, 3, room=8 << 10).data == bytes(8 << 10)
    plane.close()


@pytest.mark.parametrize("engine", ["io_uring", "threads"])
@pytest.mark.parametrize(("sector", "count"), [
    (1, 2047), (1, 2048), (1, 4104), (8, 4097), (7, 6001), (0, 8192)])
def test_more_zeroes_than_are_written_at_once(image: Path, engine: str, sector: int,
                                              count: int) -> None:
    """Parts of blocks, whose bounce buffer is not filled when a chunk of zeroes ends."""
    content = bytearray(random.Random(2).randbytes(4 << 20))
    image.write_bytes(content)
    plane = Plane(str(image), engine, direct=True, align=4096, no_zero_range=True)
    plane.start(features=FEATURES)
    assert plane.request(WRITE_ZEROES, data=ranges((sector, count, 0))).status == OK
    plane.close()
    content[sector * 512:(sector + count) * 512] = bytes(count * 512)
    assert image.read_bytes() == content


def test_discard_ignore_changes_nothing(image: Path) -> None:
    before, space = image.read_bytes(), allocated(image)
    plane = Plane(str(image), unmap=False)
    plane.start(features=FEATURES)
    assert plane.request(DISCARD, data=ranges((0, 1024, 0))).status == OK
    assert image.read_bytes() == before
    # Zeroes are asked for here, only the space is kept.
    assert plane.request(WRITE_ZEROES, data=ranges((0, 1024, UNMAP))).status == OK
    assert image.read_bytes() == bytes(512 << 10) + before[512 << 10:]
    assert allocated(image) == space
    plane.close()


def test_discard_unmap_gives_space_back(image: Path) -> None:
    space = allocated(image)
    plane = Plane(str(image), unmap=True)
    plane.start(features=FEATURES)
    assert plane.request(DISCARD, data=ranges((0, 512, 0))).status == OK
    assert plane.request(WRITE_ZEROES, data=ranges((1024, 512, UNMAP))).status == OK
    assert allocated(image) <= space - (512 << 10)
    assert plane.request(WRITE_ZEROES, data=ranges((512, 512, 0))).status == OK
    assert allocated(image) >= space - (512 << 10)
    plane.close()
