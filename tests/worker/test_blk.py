"""A real blk worker over a socketpair, driven by a front end with rings of its own."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.memory_regions import MemoryRegion
from shared.vhost_user import messages as m
from shared.vhost_user.errors import VhostUserError
from shared.virtio import blk
from shared.virtio.features import F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1
from tests.support.blk_worker import ROOT, USER_BASE, BlkWorker
from tests.support.guest_ring import (
    FLUSH,
    GET_ID,
    IN,
    IOERR,
    OK,
    OUT,
    BlkRequest,
    GuestMemory,
    GuestRing,
)

pytestmark = pytest.mark.worker

SIZE = 1 << 20
BASIC = F_VERSION_1 | m.F_PROTOCOL_FEATURES


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(random.Random(5).randbytes(SIZE))
    return path


@pytest.fixture
def worker(image: Path) -> Iterator[BlkWorker]:
    worker = BlkWorker(image, "--num-queues=2", "--serial=disk-7", "--discard=unmap")
    worker.connect()
    yield worker
    worker.close()
    assert worker.process.returncode == 0


@pytest.mark.parametrize("direct", ["on", "off"])
@pytest.mark.parametrize("aio", ["io_uring", "threads"])
def test_data_in_every_way(image: Path, aio: str, direct: str) -> None:
    content = bytearray(image.read_bytes())
    worker = BlkWorker(image, f"--aio={aio}", f"--direct={direct}", "--num-queues=4",
                       memory=GuestMemory(32 << 20))
    worker.connect()
    chance = random.Random(9)
    for index in range(4):
        worker.start(index)
    for count in range(120):
        sector = chance.randrange(SIZE // 512 - 32)
        data = chance.randbytes(512 * chance.randint(1, 32))
        at, end = sector * 512, sector * 512 + len(data)
        wrote = worker.request(OUT, sector, data, index=count % 4, indirect=count % 3 == 0)
        assert wrote.status == OK
        content[at:end] = data
        read = worker.request(IN, sector, room=len(data), index=(count + 1) % 4,
                              segments=1 + count % 3)
        assert read.status == OK
        assert read.data == data
    assert worker.request(FLUSH).status == OK
    assert image.read_bytes() == content
    for index in range(4):
        assert worker.frontend.get_vring_base(index) == worker.rings[index].avail_idx
    assert worker.close() == ""


def test_features_and_config_space(worker: BlkWorker, image: Path) -> None:
    offered = worker.frontend.features
    for bit in (blk.F_FLUSH, blk.F_DISCARD, blk.F_WRITE_ZEROES, blk.F_MQ, blk.F_CONFIG_WCE,
                blk.F_BLK_SIZE, blk.F_TOPOLOGY, blk.F_SEG_MAX, F_VERSION_1, F_EVENT_IDX,
                F_INDIRECT_DESC):
        assert offered & bit
    assert not offered & blk.F_RO
    config = worker.frontend.get_config(0, blk.CONFIG_SIZE)
    assert int.from_bytes(config[:8], "little") == SIZE // 512
    assert int.from_bytes(config[12:16], "little") == 126
    assert int.from_bytes(config[20:24], "little") == 512
    assert config[24] == (image.stat().st_blksize // 512).bit_length() - 1
    assert config[32] == 1
    assert int.from_bytes(config[34:36], "little") == 2
    assert config[56] == 1
    # Cut anywhere, and beyond the end: the same bytes, then zeroes.
    assert worker.frontend.get_config(3, 10) == config[3:13]
    assert worker.frontend.get_config(40, 56) == config[40:].ljust(56, b"\0")


def test_write_back_mode_can_be_switched(worker: BlkWorker) -> None:
    for value in (0, 1):
        worker.frontend.set_config(32, bytes([value]))
        worker.frontend.finish()
        assert worker.frontend.get_config(32, 1) == bytes([value])
    for offset, data in ((32, b"\2"), (0, bytes(8)), (31, b"\0"), (33, b"\1"), (32, b"\1\0")):
        with pytest.raises(VhostUserError):
            worker.frontend.set_config(offset, data)
            worker.frontend.finish()


def test_write_back_mode_stays_until_a_reset(worker: BlkWorker) -> None:
    """QEMU and others send the features again with each start of the rings."""
    front = worker.frontend
    front.set_config(32, b"\0")
    front.set_features(worker.features)
    front.finish()
    assert front.get_config(32, 1) == b"\0"
    front.reset_device()
    front.set_features(worker.features)
    front.finish()
    assert front.get_config(32, 1) == b"\1"


def test_without_flush_writes_go_through(image: Path) -> None:
    worker = BlkWorker(image)
    worker.connect(BASIC)
    assert worker.frontend.get_config(32, 1) == b"\0"
    worker.start()
    assert worker.request(OUT, 0, b"x" * 4096).status == OK
    worker.close()


def test_serial(worker: BlkWorker) -> None:
    worker.start()
    request = worker.request(GET_ID, room=20)
    assert request.data == b"disk-7".ljust(20, b"\0")


def test_read_only(image: Path) -> None:
    os.chmod(image, 0o444)
    worker = BlkWorker(image, "--read-only")
    worker.connect()
    assert worker.frontend.features & blk.F_RO
    assert not worker.frontend.features & (blk.F_DISCARD | blk.F_WRITE_ZEROES)
    worker.start()
    assert worker.request(OUT, 0, bytes(512)).status == IOERR
    assert worker.request(IN, 0, room=512).status == OK
    worker.close()


def test_disabled_ring_takes_nothing(worker: BlkWorker) -> None:
    ring = worker.start()
    worker.frontend.set_vring_enable(0, False)
    worker.frontend.finish()
    ring.add(BlkRequest(worker.memory, FLUSH).buffers)
    ring.publish()
    worker.start(1)
    assert worker.request(FLUSH, index=1).status == OK
    assert ring.take_used() == []
    worker.frontend.set_vring_enable(0, True)
    ring.wait_used(1)


def test_memory_table_replaced_while_rings_run(worker: BlkWorker) -> None:
    worker.start()
    assert worker.request(IN, 0, room=512).status == OK
    # The same memory, in two regions now: rings are found again in the new table.
    memory, half = worker.memory, worker.memory.size // 2
    parts = [MemoryRegion(memory.base + at, half, USER_BASE + at, at) for at in (0, half)]
    worker.frontend.set_mem_table(parts, [memory.fd, memory.fd])
    worker.frontend.finish()
    assert worker.request(IN, 0, room=512).status == OK
    extra = GuestMemory(1 << 20, base=0x80000000)
    region = MemoryRegion(extra.base, extra.size, 0x10000, 0)
    worker.frontend.add_mem_region(region, extra.fd)
    worker.frontend.finish()
    ring = worker.rings[0]
    request = BlkRequest(extra, IN, 1, room=512)
    ring.add(request.buffers)
    ring.publish()
    ring.wait_used(1)
    assert request.status == OK
    worker.frontend.remove_mem_region(region)
    worker.frontend.finish()
    ring.add(BlkRequest(extra, IN, 1, room=512).buffers)
    ring.publish()
    assert ring.wait_error()
    extra.close()


def test_broken_ring_leaves_the_others_and_the_worker_alone(worker: BlkWorker) -> None:
    ring = worker.start(0)
    worker.start(1)
    ring.put_avail(0xFFFF)
    ring.publish()
    assert ring.wait_error()
    assert worker.request(FLUSH, index=1).status == OK
    worker.frontend.get_vring_base(0)
    worker.start(0)
    assert worker.request(FLUSH, index=0).status == OK


def test_killed_worker_s_successor_finishes_the_work(image: Path) -> None:
    """Requests that were in flight, and those not yet taken, complete exactly once."""
    memory = GuestMemory(32 << 20)
    first = BlkWorker(image, "--direct=on", memory=memory)
    first.connect()
    first.track(1, 128)
    ring = first.start()
    requests = [BlkRequest(memory, OUT, 64 * i, bytes([i + 1]) * 32768) for i in range(24)]
    for request in requests:
        ring.add(request.buffers)
    ring.publish()
    first.kill()
    before = {head for head, _ in ring.take_used()}
    second = BlkWorker(image, "--direct=on", memory=memory)
    second.connect()
    assert first.inflight is not None
    second.frontend.set_inflight(*first.inflight)
    second.start(ring=ring, base=0)
    after = [head for head, _ in ring.wait_used(24 - len(before))]
    assert len(after) == len(set(after)) == 24 - len(before)
    assert not before & set(after)
    assert {request.status for request in requests} == {OK}
    assert second.request(FLUSH).status == OK
    content = image.read_bytes()
    for i in range(24):
        assert content[32768 * i:32768 * (i + 1)] == bytes([i + 1]) * 32768
    assert second.frontend.get_vring_base(0) == 25
    second.close()


def test_reset_forgets_what_the_driver_chose(worker: BlkWorker) -> None:
    worker.start()
    assert worker.request(FLUSH).status == OK
    worker.frontend.reset_device()
    worker.frontend.finish()
    worker.connect()
    worker.start()
    assert worker.request(FLUSH).status == OK


# ---- the program ------------------------------------------------------------------------------

def run(*arguments: str, pass_fds: tuple[int, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "workers.blk", *arguments], cwd=ROOT, check=False,
                          stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=20,
                          pass_fds=pass_fds)


def test_print_capabilities_and_description() -> None:
    printed = json.loads(run("--print-capabilities").stdout)
    assert printed == {"type": "block", "features": ["read-only", "blk-file"]}
    described = json.loads((ROOT / "workers/blk/50-stratovirt-blk.json").read_text())
    assert described["type"] == "block"
    assert described["features"] == printed["features"]


@pytest.mark.parametrize(("arguments", "text"), [
    ((), "exactly one of --socket-path and --fd"),
    (("--fd=3", "--socket-path=x", "--blk-file=y"), "exactly one of"),
    (("--fd=0",), "--blk-file is missing"),
    (("--fd=x", "--blk-file=y"), "not a number"),
    (("--fd=0", "--blk-file=/nowhere/at/all"), "No such file"),
    (("--fd=0", "--blk-file=/dev/null"), "--fd"),
    (("--bogus=1",), "unknown option"),
    (("bogus",), "not an option"),
    (("--num-queues=33",), "not a number from 1 to 32"),
    (("--num-queues=0",), "not a number"),
    (("--queue-size=100",), "power of two"),
    (("--queue-size=2048",), "not a number"),
    (("--aio=native",), "auto, io_uring, threads"),
    (("--serial=" + "x" * 21,), "longer than 20"),
    (("--blk-file",), "needs a value"),
])
def test_bad_command_line(arguments: tuple[str, ...], text: str) -> None:
    result = run(*arguments)
    assert result.returncode == 1
    assert text in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_image_that_is_no_disk() -> None:
    ours, theirs = socket.socketpair()
    result = run(f"--fd={theirs.fileno()}", "--blk-file=/dev/null",
                 pass_fds=(theirs.fileno(),))
    ours.close()
    theirs.close()
    assert result.returncode == 1
    assert "not a regular file or block device" in result.stderr


def test_socket_path(image: Path, tmp_path: Path) -> None:
    path = tmp_path / "blk.sock"
    process = subprocess.Popen([sys.executable, "-m", "workers.blk", "--socket-path", str(path),
                                "--blk-file", str(image)], cwd=ROOT)
    deadline = time.monotonic() + 10
    peer = socket.socket(socket.AF_UNIX)
    while True:
        try:
            peer.connect(str(path))
            break
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    peer.sendall(m.HEADER.pack(m.GET_FEATURES, m.VERSION, 0))
    assert len(peer.recv(100)) == 20
    assert not path.exists()
    peer.close()
    assert process.wait(10) == 0


def test_front_end_that_breaks_the_protocol_ends_the_worker(image: Path) -> None:
    worker = BlkWorker(image)
    peer = socket.socket(fileno=os.dup(worker.frontend.connection.fileno()))
    peer.sendall(b"\xff" * 12)
    assert worker.process.wait(10) == 1
    peer.close()
    assert "Traceback" not in worker.close()


def test_ring_driver_helpers_agree() -> None:
    """The driver's side of the tests itself: free descriptors come back."""
    memory = GuestMemory(1 << 20)
    ring = GuestRing(memory, 8)
    for _ in range(20):
        head = ring.add(BlkRequest(memory, FLUSH).buffers)
        at = ring.used + 4 + 8 * (ring.used_idx % 8)
        memory.write(at, head.to_bytes(4, "little") + bytes(4))
        memory.write(ring.used + 2, ((ring.used_idx + 1) & 0xFFFF).to_bytes(2, "little"))
        assert ring.take_used() == [(head, 0)]
    assert sorted(ring.free) == list(range(8))
    ring.close()
    memory.close()
