"""Front end, device and transport over real back ends, without KVM: ours and QEMU's."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.blk_worker import family
from tests.support.capabilities import require
from tests.support.guest_ring import FLUSH, IN, OK, OUT, BlkRequest, GuestMemory, GuestRing
from tests.support.mmio_driver import FakeGuestMemory, MmioDriver
from vmm.config.model import ChardevConfig
from vmm.devices.vhost_user import BROKEN, IDLE, PAUSED, RUNNING, connect_backend
from vmm.devices.virtio_blk import VirtioBlk
from vmm.errors import BackendError, ConfigError
from vmm.event_loop import EventLoop
from vmm.hypervisor.fake import FakeVm
from vmm.transport import mmio_registers as r
from vmm.transport.virtio_mmio import VirtioMmio

pytestmark = pytest.mark.worker

IMAGE_SIZE = 1 << 20
F_EVENT_IDX = 1 << 29
BASE = 0xF0100000


ROOT = Path(__file__).resolve().parents[2]
COMMANDS = {
    "qemu": lambda image, path: [
        "qemu-storage-daemon",
        "--blockdev", f"file,node-name=disk,filename={image}",
        "--export", "vhost-user-blk,id=export,node-name=disk,addr.type=unix,"
        f"addr.path={path},writable=on,num-queues=2"],
    "ours": lambda image, path: [
        sys.executable, "-m", "workers.blk", f"--blk-file={image}", f"--socket-path={path}",
        "--num-queues=2"],
}


class Disk:
    """A disk with two queues behind `kind`, driven through the registers of its slot."""

    def __init__(self, folder: Path, num_queues: int = 1, kind: str = "qemu") -> None:
        self.content = random.Random(1).randbytes(IMAGE_SIZE)
        self.image = folder / "image"
        self.image.write_bytes(self.content)
        path = folder / "socket"
        self.daemon = subprocess.Popen(COMMANDS[kind](str(self.image), str(path)), cwd=ROOT)
        self.ram = GuestMemory(4 << 20)
        self.vm = FakeVm()
        self.loop = EventLoop()
        self.device = VirtioBlk("disk0", self._connect(str(path)),
                                FakeGuestMemory(self.ram),  # type: ignore[arg-type]
                                self.loop, num_queues, 128, kind == "qemu")
        self.transport = VirtioMmio(self.vm, FakeGuestMemory(self.ram),  # type: ignore[arg-type]
                                    BASE, 5, self.device)
        self.driver = MmioDriver(self.transport)
        self.rings: list[GuestRing] = []

    def _connect(self, path: str) -> int:
        config = ChardevConfig("c0", "socket")
        config.path = path
        deadline = time.monotonic() + 10
        while True:
            try:
                return connect_backend(config)
            except ConfigError:
                assert time.monotonic() < deadline
                assert self.daemon.poll() is None
                time.sleep(0.01)

    def start(self) -> None:
        assert self.driver.take_features(self.driver.features() & ~F_EVENT_IDX)
        for index, queue in enumerate(self.transport._queues):
            ring = GuestRing(self.ram, 128)
            for fd in (ring.kick_fd, ring.call_fd):
                os.close(fd)
            ring.kick_fd, ring.call_fd = queue.kick_fd, queue.call_fd
            self.rings.append(ring)
            assert self.driver.set_queue(index, 128, ring.desc, ring.avail, ring.used)
        self.driver.add_status(r.DRIVER_OK)
        assert self.driver.status == 0xF

    def request(self, kind: int, sector: int = 0, data: bytes = b"", room: int = 0,
                queue: int = 0) -> BlkRequest:
        request = BlkRequest(self.ram, kind, sector, data, room)
        ring = self.rings[queue]
        ring.add(request.buffers)
        ring.publish()
        ring.wait_used()
        assert request.status == OK
        return request

    def read(self, sector: int, size: int = 512, queue: int = 0) -> bytes:
        return self.request(IN, sector, room=size, queue=queue).data

    def close(self) -> None:
        self.device.close()
        self.transport.close()
        self.daemon.kill()
        self.daemon.wait(10)
        for ring in self.rings:
            os.close(ring.err_fd)
        self.loop.close()
        self.ram.close()


@pytest.fixture(params=list(COMMANDS))
def disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Disk]:
    if request.param == "qemu":
        require("qemu")
    result = Disk(tmp_path, kind=request.param)
    yield result
    result.close()


def test_reads_and_writes(disk: Disk) -> None:
    disk.start()
    assert disk.driver.config(0, 4) == IMAGE_SIZE // 512
    assert disk.read(7, 4096) == disk.content[7 * 512:][:4096]
    disk.request(OUT, 100, b"\x5a" * 1024)
    disk.request(FLUSH)
    assert disk.image.read_bytes()[51200:52224] == b"\x5a" * 1024
    assert disk.read(101) == b"\x5a" * 512


@pytest.mark.parametrize("kind", COMMANDS)
def test_two_queues(tmp_path: Path, kind: str) -> None:
    if kind == "qemu":
        require("qemu")
    disk = Disk(tmp_path, 2, kind)
    disk.start()
    assert disk.driver.config(34, 2) == 2
    for queue in (0, 1):
        assert disk.read(queue, queue=queue) == disk.content[queue * 512:][:512]
    disk.close()


def test_more_queues_than_the_back_end_has(tmp_path: Path) -> None:
    disk = Disk(tmp_path, 3, "ours")
    assert disk.driver.features() == 0
    assert disk.device.state == BROKEN
    disk.close()


def test_stop_and_cont(disk: Disk) -> None:
    disk.start()
    for sector in range(3):
        disk.read(sector)
    disk.transport.pause(time.monotonic() + 10)
    assert disk.device.state == PAUSED
    assert disk.device._bases == {0: 3}
    # What the guest queues meanwhile is served after `cont`.
    request = BlkRequest(disk.ram, IN, 9, room=512)
    disk.rings[0].add(request.buffers)
    disk.rings[0].publish()
    disk.transport.resume()
    disk.rings[0].wait_used()
    assert request.data == disk.content[9 * 512:][:512]


def test_stop_with_requests_in_flight(disk: Disk) -> None:
    disk.start()
    ring = disk.rings[0]
    requests = [BlkRequest(disk.ram, IN, 8 * i, room=4096) for i in range(32)]
    for request in requests:
        ring.add(request.buffers)
    ring.publish()
    disk.transport.pause(time.monotonic() + 10)
    served = ring.used_idx
    assert served == disk.device._bases[0]
    disk.transport.resume()
    ring.wait_used(32)
    for i, request in enumerate(requests):
        assert request.data == disk.content[8 * 512 * i:][:4096]


def test_reset_and_a_second_life(disk: Disk) -> None:
    disk.start()
    disk.read(1)
    disk.driver.reset()
    assert disk.driver.status == 0
    assert disk.device.state == IDLE
    os.close(disk.rings.pop().err_fd)
    disk.start()
    assert disk.read(2) == disk.content[1024:1536]


def test_the_end_of_the_back_end(disk: Disk) -> None:
    disk.start()
    disk.daemon.kill()
    deadline = time.monotonic() + 10
    while not disk.driver.status & r.NEEDS_RESET and time.monotonic() < deadline:
        disk.loop.run_once(0.1)
    assert disk.driver.status == 0xF | r.NEEDS_RESET
    disk.transport.pause(time.monotonic() + 5)  # nobody is left to wait for
    disk.driver.reset()
    assert disk.driver.status == 0


def test_a_stopped_back_end_blocks_nothing_for_long(disk: Disk) -> None:
    disk.start()
    for pid in family(disk.daemon.pid):
        os.kill(pid, signal.SIGSTOP)
    begin = time.monotonic()
    with pytest.raises(BackendError, match="in time"):
        disk.transport.pause(time.monotonic() + 0.3)
    assert time.monotonic() - begin < 3
    for pid in family(disk.daemon.pid):
        os.kill(pid, signal.SIGCONT)
    disk.transport.resume()
    assert disk.device.state == RUNNING
    assert disk.read(3) == disk.content[1536:2048]
