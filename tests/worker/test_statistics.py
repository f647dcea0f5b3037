"""Statistics pages of real workers: what they count, who may see them, and who removes them."""

from __future__ import annotations

import os
import random
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import posix_ipc
import pytest

from shared import statistics
from shared.statistics import FOLDER, HEADER_BYTES, Page, decode_page, page_bytes
from tests.support.blk_worker import ROOT
from tests.support.guest_ring import (
    DISCARD,
    F_VERSION_1,
    FLUSH,
    GET_ID,
    IN,
    IOERR,
    OK,
    OUT,
    WRITE_ZEROES,
    ranges,
)
from tests.support.plane import Plane
from tests.support.slot import Slot
from vmm.event_loop import EventLoop
from vmm.worker.nursery import Nursery
from vmm.worker.pages import Pages

pytestmark = pytest.mark.worker

SIZE = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(random.Random(1).randbytes(SIZE))
    return path


@pytest.fixture
def pages() -> Iterator[Pages]:
    made = Pages("test-vm")
    yield made
    made.close()


def until(condition: Callable[[], bool], limit: float = 10.0) -> None:
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def read(pages: Pages, device: str = "disk") -> Page:
    page = pages.read(device)
    assert page is not None
    return page


# ---- what is counted -----------------------------------------------------------------------

def test_requests_bytes_and_errors_are_counted(pages: Pages, image: Path) -> None:
    slot = Slot(image, page=pages.take("blk", "disk", 1), discard="unmap")
    for at in range(10):
        assert slot.request(IN, at, room=1024).status == OK
    for at in range(5):
        assert slot.request(OUT, at, b"x" * 4096).status == OK
    assert slot.request(FLUSH).status == OK
    assert slot.request(DISCARD, data=ranges((0, 8, 0))).status == OK
    assert slot.request(WRITE_ZEROES, data=ranges((8, 16, 0), (24, 8, 0))).status == OK
    assert slot.request(GET_ID, room=20).status == OK
    assert slot.request(IN, SIZE // 512, room=512).status == IOERR
    os.truncate(image, SIZE // 2)
    assert slot.request(IN, SIZE // 512 - 1, room=512).status == IOERR
    counters, = read(pages).counters
    expected = {"reads": 12, "writes": 5, "flushes": 1, "discards": 1, "write_zeroes": 1,
                "others": 1, "read_bytes": 10 * 1024, "written_bytes": 5 * 4096,
                "unmapped_bytes": 32 * 512, "errors": 2, "failed_read": 1, "invalid_read": 1,
                "failed_write": 0, "invalid_write": 0, "throttled": 0, "broken": 0}
    assert {name: counters[name] for name in expected} == expected
    histograms, = read(pages).histograms
    # What was the driver's own mistake has no latency.
    assert {name: sum(buckets) for name, buckets in histograms.items()} == {
        "read": 11, "write": 5, "flush": 1, "unmap": 2}
    slot.close()


def test_latencies_are_what_the_driver_waits(pages: Pages, image: Path) -> None:
    slot = Slot(image, page=pages.take("blk", "disk", 1), throttling={"iops-total": 20})
    start = time.monotonic()
    for at in range(8):
        slot.request(IN, at, room=512)
    waited = (time.monotonic() - start) * 1e9
    counters, = read(pages).counters
    histograms, = read(pages).histograms
    assert 100e6 < counters["read_ns"] <= waited
    lowest = sum(statistics.bucket_range(bucket)[0] * count
                 for bucket, count in enumerate(histograms["read"]))
    highest = sum(statistics.bucket_range(bucket)[1] * count
                  for bucket, count in enumerate(histograms["read"]))
    assert lowest <= counters["read_ns"] < highest
    slot.close()


def test_each_queue_counts_for_itself(image: Path) -> None:
    plane = Plane(str(image), queues=2)
    for index in range(2):
        plane.start(index, features=F_VERSION_1)
    for at in range(3):
        plane.request(IN, at, room=512, index=1)
    assert [plane.counters[i].reads for i in range(2)] == [0, 3]
    assert sum(plane.counters[1].latency[0]) == 3
    plane.close()


def test_a_driver_that_asks_for_no_calls_is_counted_as_well(image: Path) -> None:
    plane = Plane(str(image))
    ring = plane.start(features=F_VERSION_1, size=8)
    ring.set_avail_flags(1)
    for at in range(40):
        plane.request(IN, at, room=512)
    assert sum(plane.counters[0].latency[0]) == 40
    plane.close()


def test_a_successor_goes_on_counting(pages: Pages, image: Path) -> None:
    for round_ in range(1, 3):
        slot = Slot(image, page=pages.take("blk", "disk", 1))
        slot.request(IN, 0, room=512)
        slot.close()
        assert read(pages).counters[0]["reads"] == round_
    pages.drop("disk")
    pages.take("blk", "disk", 1)
    assert read(pages).counters[0]["reads"] == 0


# ---- the page ------------------------------------------------------------------------------

def test_a_page_is_posix_shared_memory_for_its_owner_alone(pages: Pages) -> None:
    pages.take("blk", "disk", 3)
    name, = pages.names()
    assert "test-vm" in name
    memory = posix_ipc.SharedMemory("/" + name, read_only=True)
    assert memory.size == page_bytes("blk", 3)
    page = decode_page(os.pread(memory.fd, memory.size, 0))
    memory.close_fd()
    assert page is not None
    assert (page.vm, page.device, page.core) == ("test-vm", "disk", os.getpid())
    status = os.stat(f"{FOLDER}/{name}")
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert status.st_uid == os.geteuid()


def test_names_go_with_device_and_vm(pages: Pages) -> None:
    pages.take("blk", "a", 1)
    pages.take("blk", "b", 1)
    first, second = (Path(FOLDER) / name for name in pages.names())
    assert first.exists()
    pages.drop("a")
    pages.drop("a")
    assert not first.exists()
    assert second.exists()
    pages.close()
    assert not second.exists()


def test_ids_that_look_alike_have_pages_of_their_own(pages: Pages) -> None:
    fds = {pages.take("blk", device, 1) for device in ("a b", "a/b", "a_b")}
    assert len(fds) == 3
    assert len({os.stat(f"{FOLDER}/{name}").st_ino for name in pages.names()}) == 3


def test_a_device_of_another_shape_gets_a_new_page(pages: Pages) -> None:
    pages.take("blk", "disk", 1)
    fd = pages.take("blk", "disk", 4)
    assert os.fstat(fd).st_size == page_bytes("blk", 4)
    assert len(pages.names()) == 1
    assert pages.take("null", "other", 1) == -1
    assert pages.read("other") is None


def test_without_the_folder_there_is_a_page_without_a_name(monkeypatch: pytest.MonkeyPatch,
                                                           tmp_path: Path) -> None:
    monkeypatch.setattr(statistics, "FOLDER", str(tmp_path / "nowhere"))
    pages = Pages("vm")
    pages.take("blk", "disk", 1)
    assert pages.names() == []
    assert read(pages).counters[0]["reads"] == 0
    pages.close()


def test_a_page_that_its_worker_cut_off_or_wrecked_is_no_page(pages: Pages) -> None:
    fd = pages.take("blk", "disk", 1)
    for length in (HEADER_BYTES, 8, 0):
        os.ftruncate(fd, length)
        assert pages.read("disk") is None
    os.ftruncate(fd, page_bytes("blk", 1))
    os.pwrite(fd, os.urandom(page_bytes("blk", 1)), 0)
    assert pages.read("disk") is None


# ---- who removes it ------------------------------------------------------------------------

_CORE = """
import os, sys, time
sys.path.insert(0, os.getcwd())
from vmm.event_loop import EventLoop
from vmm.worker.nursery import Nursery
nursery = Nursery(EventLoop(), (), "killed-vm")
nursery.start()
image = os.open(sys.argv[1], os.O_RDWR)
worker = nursery.spawn("blk", "disk", {"image": image}, {"num-queues": 1})
assert worker.wait_started(time.monotonic() + 20), worker.reason
print(nursery.pid, worker.pid, *nursery.pages.names(), flush=True)
time.sleep(1000)
"""


def start_core(image: Path) -> tuple[subprocess.Popen[str], int, int, Path]:
    core = subprocess.Popen([sys.executable, "-c", _CORE, str(image)], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE)
    assert core.stdout is not None
    nursery, worker, name = core.stdout.readline().split()
    return core, int(nursery), int(worker), Path(FOLDER) / name


def test_the_nursery_removes_the_pages_of_a_core_that_was_killed(image: Path) -> None:
    core, _, _, page = start_core(image)
    assert page.exists()
    core.kill()
    core.wait(10)
    until(lambda: not page.exists())


def test_the_next_nursery_removes_what_everybody_left(pages: Pages, image: Path) -> None:
    pages.take("blk", "living", 1)
    living, = pages.names()
    core, nursery, worker, page = start_core(image)
    for pid in (nursery, worker, core.pid):
        os.kill(pid, signal.SIGKILL)
    core.wait(10)
    assert page.exists()
    second, _, _, other = start_core(image)
    try:
        until(lambda: not page.exists())
        # Those of VMs that live stay, whoever looks for what is left.
        assert other.exists()
        assert (Path(FOLDER) / living).exists()
    finally:
        second.kill()
        second.wait(10)


def test_a_nursery_touches_nothing_but_pages(image: Path) -> None:
    mine = Path(FOLDER) / f"{statistics.PREFIX}0.not-a-file"
    mine.mkdir()
    core, _, _, page = start_core(image)
    try:
        (Path(FOLDER) / f"{statistics.PREFIX}0.left").touch()
        until(lambda: not (Path(FOLDER) / f"{statistics.PREFIX}0.left").exists())
        assert page.exists()
        assert mine.exists()
    finally:
        core.kill()
        core.wait(10)
        mine.rmdir()


def test_an_orderly_end_removes_them(image: Path) -> None:
    loop = EventLoop()
    nursery = Nursery(loop, (), "orderly-vm")
    with image.open("r+b") as file:
        worker = nursery.spawn("blk", "disk", {"image": file.fileno()}, {"num-queues": 1})
    assert worker.wait_started(time.monotonic() + 10), worker.reason
    name, = nursery.pages.names()
    assert (Path(FOLDER) / name).exists()
    assert worker.counters[0]["reads"] == 0
    nursery.close()
    loop.close()
    assert not (Path(FOLDER) / name).exists()
    assert worker.counters == []
