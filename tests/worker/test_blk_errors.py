"""A disk that fails, is full, shrinks or grows under a worker: the guest's answer, and reports."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.control.channel import Channel, Message, pair
from tests.support.capabilities import require
from tests.support.guest_ring import (
    DISCARD,
    FLUSH,
    IN,
    IOERR,
    OK,
    OUT,
    WRITE_ZEROES,
    BlkRequest,
    ranges,
)
from tests.support.slot import Slot

pytestmark = pytest.mark.worker

SIZE = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(random.Random(1).randbytes(SIZE))
    return path


@pytest.fixture(params=["io_uring", "threads"])
def aio(request: pytest.FixtureRequest) -> str:
    if request.param == "io_uring":
        require("io_uring")
    return str(request.param)


def next_report(slot: Slot, kind: str, limit: float = 5.0) -> Message:
    deadline = time.monotonic() + limit
    while True:
        message = slot.report(deadline)
        if message["type"] == kind:
            return message


def order(slot: Slot, **message: object) -> Message:
    slot.control.send({"serial": 7, **message})
    deadline = time.monotonic() + 5
    while True:
        answer = slot.report(deadline)
        if answer.get("serial") == 7:
            return answer


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    require("root")
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(folder)], check=True)
    image = folder / "disk.img"
    with image.open("wb") as file:
        file.truncate(SIZE)
    yield image
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def bad_disk(full_disk: Path) -> Iterator[Path]:
    """A block device with 64 KiB that can be written, at its start; then EIO."""
    with full_disk.open("r+b") as file:
        file.write(b"a" * 65536)
        with (full_disk.parent / "filler").open("wb", buffering=0) as filler:
            try:
                while filler.write(b"x" * 4096):
                    pass
            except OSError as error:
                assert error.errno == errno.ENOSPC
    loop = subprocess.run(["losetup", "-f", "--show", str(full_disk)], capture_output=True,
                          text=True, check=False)
    if loop.returncode:
        pytest.skip(f"no loop device to be had: {loop.stderr.strip()}")
    yield Path(loop.stdout.strip())
    subprocess.run(["losetup", "-d", loop.stdout.strip()], check=True)


def test_a_full_disk_is_an_error_of_that_write_alone(full_disk: Path, aio: str) -> None:
    slot = Slot(full_disk, aio=aio, discard="unmap")
    results = [slot.request(OUT, at, b"x" * 65536).status for at in range(0, SIZE // 512, 128)]
    assert results[:3] == [OK] * 3
    assert results[-1] == IOERR
    report = next_report(slot, "io-error")
    assert isinstance(report["count"], int) and report["count"] >= 1
    assert {**report, "count": 1} == {"type": "io-error", "operation": "write",
                                      "errno": errno.ENOSPC, "count": 1}
    assert slot.request(IN, 0, room=65536).data == b"x" * 65536
    assert slot.request(FLUSH).status == OK
    # Space comes back: so do writes.
    assert slot.request(DISCARD, data=ranges((0, 256, 0))).status == OK
    assert slot.request(OUT, 1024, b"y" * 65536).status == OK
    slot.close()


def test_a_failing_device_fails_what_touches_it(bad_disk: Path, aio: str) -> None:
    slot = Slot(bad_disk, direct=True, aio=aio)
    assert slot.request(OUT, 0, b"b" * 4096).status == OK
    assert slot.request(OUT, 600, b"x" * 4096).status == IOERR
    report = next_report(slot, "io-error")
    assert report["operation"] == "write"
    assert report["errno"] in (errno.EIO, errno.ENOSPC)
    # The neighbours on the same disk.
    assert slot.request(IN, 600, room=4096).data == bytes(4096)
    assert slot.request(OUT, 8, b"c" * 4096).status == OK
    assert slot.request(IN, 0, room=8192).data == b"b" * 4096 + b"c" * 4096
    slot.close()


def test_a_failing_device_fails_the_flush_of_what_was_cached(bad_disk: Path, aio: str) -> None:
    slot = Slot(bad_disk, aio=aio)
    assert slot.request(OUT, 600, b"x" * 4096).status == OK
    assert slot.request(FLUSH).status == IOERR
    report = next_report(slot, "io-error")
    assert report["operation"] == "flush"
    assert report["errno"] in (errno.EIO, errno.ENOSPC)
    assert slot.request(OUT, 0, b"b" * 4096).status == OK
    assert slot.request(FLUSH).status == OK
    slot.close()


def test_many_errors_make_few_reports(image: Path, aio: str) -> None:
    slot = Slot(image, aio=aio)
    os.truncate(image, 0)
    began = time.monotonic()
    for at in range(500):
        assert slot.request(IN, at, room=512).status == IOERR
    took = time.monotonic() - began
    # The first one at once, then one a second: on a busy machine what is left at the first look
    # may be nothing, or more than a second's.
    began, told, reports = time.monotonic(), 0, 0
    while told < 500:
        report = next_report(slot, "io-error")
        assert report["operation"] == "read"
        told += int(str(report["count"]))
        reports += 1
    assert told == 500
    assert reports <= 2 + took + time.monotonic() - began
    slot.close()


def test_an_image_that_shrinks_gives_errors_beyond_its_end(image: Path, aio: str) -> None:
    before = image.read_bytes()
    slot = Slot(image, aio=aio, discard="unmap")
    assert slot.request(IN, 0, room=512).status == OK
    os.truncate(image, SIZE // 2)
    assert slot.request(IN, 1500, room=512).status == IOERR
    assert next_report(slot, "io-error")["errno"] == errno.ENODATA
    assert slot.request(IN, 1020, room=4096).status == IOERR
    for type_, data in ((OUT, b"x" * 512), (WRITE_ZEROES, ranges((1500, 8, 0))),
                        (DISCARD, ranges((0, 8, 0), (1500, 8, 0)))):
        assert slot.request(type_, 1500, data).status == IOERR
    assert os.stat(image).st_size == SIZE // 2
    assert slot.request(IN, 1016, room=4096).data == before[1016 * 512:1024 * 512]
    assert slot.request(OUT, 1016, b"y" * 4096).status == OK
    # It comes back: so does the disk.
    os.truncate(image, SIZE)
    assert slot.request(OUT, 1500, b"x" * 512).status == OK
    assert slot.request(IN, 1500, room=512).data == b"x" * 512
    slot.close()


def test_a_busy_queue_sees_by_itself_that_the_image_shrank(image: Path, aio: str) -> None:
    slot = Slot(image, aio=aio)
    os.truncate(image, SIZE // 2)
    deadline = time.monotonic() + 5
    mark = slot.memory.mark()
    # The first write may still make it longer again; within 100 ms of work it is noticed.
    while slot.request(OUT, 100, b"x" * 512).status != OK or time.monotonic() < deadline - 4.8:
        assert time.monotonic() < deadline
        slot.memory.rewind(mark)  # thousands of requests a second
    assert slot.request(OUT, 1500, b"x" * 512).status == IOERR
    assert os.stat(image).st_size == SIZE // 2
    slot.close()


def test_growth_is_told_and_used(image: Path, aio: str) -> None:
    slot = Slot(image, aio=aio)
    changes = slot.watch_config()
    assert slot.request(OUT, SIZE // 512, b"x" * 512).status == IOERR
    os.truncate(image, 2 * SIZE)
    assert slot.request(OUT, SIZE // 512, b"x" * 512).status == IOERR
    assert order(slot, type="resize")["type"] == "done"
    assert changes.wait(5)
    capacity = slot.frontend.get_config(0, 8)
    assert int.from_bytes(capacity, "little") == 2 * SIZE // 512
    assert slot.request(OUT, SIZE // 512, b"x" * 512).status == OK
    assert slot.request(IN, 2 * SIZE // 512 - 1, room=512).data == bytes(512)
    slot.close()


def test_resize_without_a_change_is_quiet(image: Path) -> None:
    slot = Slot(image)
    changes = slot.watch_config()
    assert order(slot, type="resize")["type"] == "done"
    assert not changes.is_set()
    slot.close()


def test_a_worker_that_takes_over_measures_again(image: Path) -> None:
    """It may have been started before the image grew, and the order went to its predecessor."""
    slot = Slot(image, started=False)
    changes = slot.watch_config()
    os.truncate(image, 2 * SIZE)
    slot.start()
    assert changes.wait(5)
    assert int.from_bytes(slot.frontend.get_config(0, 8), "little") == 2 * SIZE // 512
    assert slot.request(OUT, SIZE // 512, b"x" * 512).status == OK
    slot.close()


def test_growth_under_load(image: Path, aio: str) -> None:
    slot = Slot(image, aio=aio)
    orders = threading.Thread(target=lambda: [order(slot, type="resize") for _ in range(20)])
    orders.start()
    for step in range(60):
        os.truncate(image, SIZE + step * 4096)
        requests = [BlkRequest(slot.memory, OUT, at, bytes([step]) * 512)
                    for at in range(0, 64, 2)]
        for request in requests:
            slot.ring.add(request.buffers)
        slot.ring.publish()
        slot.ring.wait_used(32)
        assert {request.status for request in requests} == {OK}
    orders.join(10)
    slot.close()


@pytest.mark.parametrize("message", [
    {"type": "explode"}, {"type": 5}, {}, {"type": "limits", "throttling": {"iops-total": -1}},
    {"type": "limits", "throttling": 3}, {"type": "limits", "throttling": {"speed": 1}}])
def test_a_wrong_order_is_refused_and_the_worker_goes_on(image: Path,
                                                         message: dict[str, object]) -> None:
    slot = Slot(image)
    answer = order(slot, **message)
    assert answer["type"] == "failed"
    assert answer["text"]
    assert slot.request(IN, 0, room=512).status == OK
    slot.close()


def test_limits_can_be_ordered(image: Path) -> None:
    slot = Slot(image)
    assert order(slot, type="limits", throttling={"iops-total": 10})["type"] == "done"
    start = time.monotonic()
    for at in range(4):
        slot.request(IN, at, room=512)
    assert time.monotonic() - start > 0.2
    slot.close()


def test_the_core_s_end_of_the_channel_may_close(image: Path) -> None:
    slot = Slot(image)
    slot.control.close()
    os.truncate(image, 0)
    assert slot.request(IN, 0, room=512).status == IOERR
    slot.close()


def test_channel_pairs_carry_orders() -> None:
    a, b = pair()
    Channel(a).send({"type": "resize", "serial": 1})
    assert Channel(b).recv()[0] == {"type": "resize", "serial": 1}
