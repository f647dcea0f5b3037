"""A blk worker behind a microVM's slot: the same features whatever the image is."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from native import _dataplane
from shared.virtio import blk
from tests.support.capabilities import require
from tests.support.guest_ring import (
    DISCARD,
    FLUSH,
    IN,
    IOERR,
    OK,
    OUT,
    WRITE_ZEROES,
    ranges,
)
from tests.support.slot import Slot
from workers.blk import device
from workers.blk.service import Service
from workers.errors import UsageError

pytestmark = pytest.mark.worker

SIZE = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(random.Random(1).randbytes(SIZE))
    return path


@pytest.fixture
def loop_4k(image: Path) -> Iterator[Path]:
    require("root")
    found = subprocess.run(["losetup", "-f", "--show", "-b", "4096", str(image)],
                           capture_output=True, text=True, check=False)
    if found.returncode:
        pytest.skip(f"no loop device to be had: {found.stderr.strip()}")
    yield Path(found.stdout.strip())
    subprocess.run(["losetup", "-d", found.stdout.strip()], check=True)


def test_limits_are_those_of_the_data_plane() -> None:
    lib = _dataplane.lib
    assert blk.MAX_DATA_SEGMENTS == lib.SV_BLK_MAX_DATA_SEGMENTS
    assert blk.MAX_SECTORS == lib.SV_BLK_MAX_SECTORS
    assert blk.MAX_SEGMENTS == lib.SV_BLK_MAX_SEGMENTS


def test_a_driver_reads_the_same_from_an_empty_slot_and_a_full_one(image: Path) -> None:
    slot = Slot(image)
    config = slot.frontend.get_config(0, 60)
    slot.close()
    empty = bytearray(blk.slot_config().encode())
    assert int.from_bytes(config[:8], "little") == SIZE // 512
    assert int.from_bytes(empty[:8], "little") == 0
    empty[:8] = config[:8]
    # What an image may change: hints on sizes, and whether zeroing gives space back.
    for start, end in ((24, 32), (44, 48), (56, 57)):
        empty[start:end] = config[start:end]
    assert config == bytes(empty)


@pytest.mark.parametrize("readonly", [False, True])
def test_features_do_not_depend_on_the_image(image: Path, readonly: bool) -> None:
    slot = Slot(image, readonly=readonly)
    # Its driver is offered less, and may have read RO or MQ from the disk before this one.
    assert slot.features == blk.SLOT_FEATURES | blk.F_RO | blk.F_MQ
    slot.close()


def test_writes_to_a_read_only_image_are_io_errors(image: Path) -> None:
    before = image.read_bytes()
    slot = Slot(image, readonly=True)
    assert slot.request(OUT, 0, bytes(512)).status == IOERR
    assert slot.request(WRITE_ZEROES, data=ranges((0, 8, 0))).status == IOERR
    assert slot.request(DISCARD, data=ranges((0, 8, 0))).status == IOERR
    assert slot.request(FLUSH).status == OK
    assert slot.request(IN, 3, room=1024).data == before[3 * 512:5 * 512]
    slot.close()
    assert image.read_bytes() == before


@pytest.mark.parametrize("aio", ["io_uring", "threads"])
def test_blocks_of_4_kib_behind_sectors_of_512(loop_4k: Path, aio: str) -> None:
    if aio == "io_uring":
        require("io_uring")
    slot = Slot(loop_4k, direct=True, aio=aio)
    config = slot.frontend.get_config(0, 60)
    assert int.from_bytes(config[20:24], "little") == 512
    assert config[24] == 3  # 4 KiB physical blocks
    assert slot.request(OUT, 3, b"a" * 512).status == OK
    assert slot.request(OUT, 4, b"b" * 1024).status == OK
    assert slot.request(OUT, 15, b"c" * 4096).status == OK
    assert slot.request(IN, 3, room=1536).data == b"a" * 512 + b"b" * 1024
    assert slot.request(IN, 15, room=4096).data == b"c" * 4096
    slot.close()


@pytest.mark.parametrize(("name", "value"), [
    ("slot", 1), ("slot", "on"), ("readonly", "yes")])
def test_wrong_options_are_refused(image: Path, name: str, value: object) -> None:
    with open(image, "rb+") as file, pytest.raises(UsageError, match=r"slot|readonly"):
        Service(file.fileno(), {"slot": True, name: value}, None, print)


class CountedSyncs:
    """The data plane, and how often it was told to sync the image."""

    def __init__(self) -> None:
        self.count = 0

    def __getattr__(self, name: str) -> object:
        if name == "sv_plane_sync":
            self.count += 1
        return getattr(_dataplane.lib, name)


def test_what_was_written_is_synced_when_a_ring_stops_or_is_disabled(
        image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """QEMU disables each ring before it stops it."""
    syncs = CountedSyncs()
    monkeypatch.setattr(device, "lib", syncs)
    slot = Slot(image)
    try:
        assert slot.request(OUT, 0, b"x" * 512).status == OK
        slot.frontend.set_vring_enable(0, False)
        slot.frontend.finish()
        assert slot.frontend.get_vring_base(0) == 1
        assert syncs.count == 1
        slot.frontend.set_vring_call(0, slot.ring.call_fd)
        slot.frontend.set_vring_base(0, 1)
        slot.frontend.set_vring_kick(0, slot.ring.kick_fd)
        slot.frontend.set_vring_enable(0, True)
        slot.frontend.finish()
        assert slot.request(IN, 0, room=512).status == OK
        assert slot.frontend.get_vring_base(0) == 2
        assert syncs.count == 1  # nothing was written since
    finally:
        slot.close()
