"""A blk worker over real block devices: loop devices with blocks of 512 bytes and of 4 KiB."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.blk_worker import BlkWorker
from tests.support.capabilities import require
from tests.support.guest_ring import DISCARD, FLUSH, IN, OK, OUT, WRITE_ZEROES, ranges
from vmm.block.image import open_image
from vmm.config.model import DriveConfig
from vmm.errors import ConfigError

pytestmark = pytest.mark.worker

SIZE = 4 << 20


@pytest.fixture
def loop_device(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    require("root")
    devices: list[str] = []
    backing = tmp_path / "backing.img"

    def make(block: int) -> Path:
        backing.write_bytes(random.Random(block).randbytes(SIZE))
        found = subprocess.run(["losetup", "-f", "--show", "-b", str(block), str(backing)],
                               capture_output=True, text=True, check=False)
        if found.returncode:
            pytest.skip(f"no loop device to be had: {found.stderr.strip()}")
        devices.append(found.stdout.strip())
        return Path(devices[-1])

    yield make
    for device in devices:
        subprocess.run(["losetup", "-d", device], check=False)


def content(device: Path) -> bytes:
    # Around the page cache of this very reader: what the device has.
    fd = os.open(device, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        return os.pread(fd, SIZE, 0)
    finally:
        os.close(fd)


@pytest.mark.parametrize("direct", ["on", "off"])
@pytest.mark.parametrize("aio", ["io_uring", "threads"])
@pytest.mark.parametrize("block", [512, 4096])
def test_reads_writes_zeroes_and_discards(loop_device: Callable[[int], Path], block: int,
                                          aio: str, direct: str) -> None:
    device = loop_device(block)
    expected = bytearray(content(device))
    worker = BlkWorker(device, f"--aio={aio}", f"--direct={direct}", "--discard=unmap")
    worker.connect()
    config = worker.frontend.get_config(0, 60)
    assert int.from_bytes(config[:8], "little") == SIZE // 512
    assert int.from_bytes(config[20:24], "little") == block
    worker.start()
    chance = random.Random(2)
    # Also where a driver ignores the block size: 512-byte sectors on 4 KiB blocks.
    for _ in range(60):
        sector = chance.randrange(SIZE // 512 - 24)
        data = chance.randbytes(512 * chance.randint(1, 24))
        expected[sector * 512:sector * 512 + len(data)] = data
        assert worker.request(OUT, sector, data).status == OK
        assert worker.request(IN, sector, room=len(data)).data == data
    assert worker.request(WRITE_ZEROES, data=ranges((64, 64, 0), (301, 7, 1))).status == OK
    expected[64 * 512:128 * 512] = bytes(64 * 512)
    expected[301 * 512:308 * 512] = bytes(7 * 512)
    assert worker.request(DISCARD, data=ranges((2048, 1024, 0))).status == OK
    assert worker.request(FLUSH).status == OK
    worker.close()
    result = content(device)
    assert result[:2048 * 512] == expected[:2048 * 512]
    assert result[3072 * 512:] == expected[3072 * 512:]


def test_image_of_a_block_device(loop_device: Callable[[int], Path]) -> None:
    device = loop_device(4096)
    config = DriveConfig("disk", str(device))
    image = open_image(config)
    assert image.is_block_device
    assert image.size == SIZE
    assert image.logical_block_size == image.physical_block_size == 4096
    with pytest.raises(ConfigError, match="write lock"):
        open_image(config)
    fd = image.reopen()
    os.close(fd)
    image.close()
