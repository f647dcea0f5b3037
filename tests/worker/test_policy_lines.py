"""Every line of a worker's policy is needed: by its test load, or it says that it rarely is."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from socket import socket, socketpair

import pytest

from shared.memory_regions import MemoryRegion
from shared.sandbox import policy
from shared.vhost_user.frontend import Frontend
from shared.virtio import net
from tests.support.blk_worker import ROOT, USER_BASE, BlkWorker
from tests.support.capabilities import require
from tests.support.console_driver import ConsoleDriver
from tests.support.guest_ring import (
    DISCARD,
    FLUSH,
    GET_ID,
    IN,
    IOERR,
    OK,
    OUT,
    WRITE_ZEROES,
    BlkRequest,
    GuestMemory,
)
from tests.support.net_namespace import NetNamespace
from tests.support.policy_trace import Tracer, matches
from tests.support.ring_worker import Nest, RingWorker
from tests.worker.test_blk_device import loop_device  # noqa: F401  a fixture
from vmm.event_loop import EventLoop
from vmm.worker.nursery import Nursery
from vmm.worker.process import WorkerProcess

pytestmark = pytest.mark.worker

SIZE = 1 << 20
MAC = b"\x52\x54\0\x12\x34\x56"


class Driven(BlkWorker):
    """A worker from a nursery, with the driver that otherwise drives one that runs alone."""

    def __init__(self, worker: WorkerProcess) -> None:
        self.worker = worker
        self.frontend = Frontend(worker.take_socket(), "the worker", limit=20.0)
        self.memory = GuestMemory()
        self.rings = {}
        self.inflight = None


def segment(sector: int, count: int) -> bytes:
    return sector.to_bytes(8, "little") + count.to_bytes(4, "little") + bytes(4)


def load(driven: Driven, status: int = OK) -> None:
    """All that a driver and a front end do in the life of a disk."""
    chance = random.Random(1)
    front = driven.frontend
    driven.connect()
    channel = front.open_backend_channel()
    driven.track(1, 64)
    ring = driven.start(size=64)
    for number in range(40):
        data = chance.randbytes(512 * chance.randint(1, 64))
        sector = chance.randrange(SIZE // 512 - 64)
        driven.request(OUT, sector, data, segments=1 + number % 3)
        read = driven.request(IN, sector, room=len(data), segments=1 + number % 3)
        assert read.status == status
    # Many at once, of all kinds: the pool's threads, and rings that are full.
    for _ in range(4):
        for kind in (DISCARD, WRITE_ZEROES, FLUSH, IN, OUT):
            data = segment(8, 8) if kind in (DISCARD, WRITE_ZEROES) else b""
            data = data if kind != OUT else chance.randbytes(4096)
            request = BlkRequest(driven.memory, kind, 0, data, 4096 if kind == IN else 0, 1)
            ring.add(request.buffers)
    ring.publish()
    ring.wait_used(20)
    driven.request(GET_ID, room=20)
    call = os.eventfd(0)
    front.set_vring_call(0, call)
    front.finish()
    os.close(call)
    front.set_mem_table([MemoryRegion(driven.memory.base, driven.memory.size, USER_BASE, 0)],
                        [driven.memory.fd])
    front.get_vring_base(0)
    front.get_config(0, 60)
    os.close(channel)


def is_dead(worker: WorkerProcess) -> bool:
    return worker.state == "dead"


@pytest.fixture
def images(tmp_path: Path, loop_device: Callable[[int], Path]  # noqa: F811
           ) -> Iterator[list[int]]:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SIZE))
    fds = [os.open(path, os.O_RDWR), os.open(path, os.O_RDWR | os.O_DIRECT),
           os.open(loop_device(4096), os.O_RDWR)]
    yield fds
    for fd in fds:
        os.close(fd)


def test_blk_needs_each_line(tmp_path: Path, images: list[int]) -> None:
    loop = EventLoop()
    nursery = Nursery(loop, ("pid",))  # so that numbers mean the same inside and outside
    nursery.start()
    tracer = Tracer(nursery.pid, tmp_path / "trace")
    try:
        leaders = []
        for aio in ("io_uring", "threads"):
            for image in images:
                worker = nursery.spawn("blk", "disk", {"image": image}, {
                    "aio": aio, "discard": "unmap", "serial": "s", "queue-size": 64})
                assert worker.wait_started(time.monotonic() + 60), worker.reason
                leaders.append(worker.pid)
                driven = Driven(worker)
                load(driven)
                resized: list[str] = []
                worker.orders.send("resize", resized.append)
                until(loop, partial(bool, resized))
                driven.frontend.close()
                until(loop, partial(is_dead, worker))
                # The tracer may hear of its end before we do.
                assert worker.reason in ("exit code 0", "ended")
        nursery.close()
        calls = tracer.calls(leaders)
    finally:
        nursery.close()
        tracer.close()
        loop.close()
    assert len(calls) > 1000
    check_lines("blk", calls)


class Slot(Driven):
    """An empty slot of a null worker."""

    def __init__(self, worker: WorkerProcess, socket: int) -> None:
        self.worker = worker
        self.frontend = Frontend(socket, "the null worker", limit=20.0)
        self.memory = GuestMemory()
        self.rings = {}
        self.inflight = None


def test_null_needs_each_line(tmp_path: Path) -> None:
    loop = EventLoop()
    nursery = Nursery(loop, ("pid",))
    nursery.start()
    tracer = Tracer(nursery.pid, tmp_path / "trace")
    try:
        worker = nursery.spawn("null", "#null", {}, {})
        assert worker.wait_started(time.monotonic() + 60), worker.reason
        leader = worker.pid
        for _ in range(2):
            ours, theirs = socketpair()
            served: list[str] = []
            worker.orders.send("serve", served.append, [theirs.fileno()], queues=1, device="blk",
                               **{"queue-size": 64})
            until(loop, partial(bool, served))
            assert served == [""]
            theirs.close()
            slot = Slot(worker, ours.detach())
            load(slot, IOERR)
            slot.frontend.close()
        ours, theirs = socketpair()
        state = state_file()
        worker.orders.send("serve", lambda problem: None, [theirs.fileno(), state], queues=1,
                           device="net", mac=MAC, **{"queue-size": 64})
        theirs.close()
        drive_nic(RingWorker(ours.detach()), None)
        os.close(state)
        nursery.close()
        calls = tracer.calls([leader])
    finally:
        nursery.close()
        tracer.close()
        loop.close()
    assert len(calls) > 100
    check_lines("null", calls, only="seccomp.policy")


def state_file() -> int:
    """What a NIC's workers share."""
    fd = os.memfd_create("state")
    os.ftruncate(fd, net.STATE_BYTES)
    return fd


def drive_nic(worker: RingWorker, peer: socket | None) -> None:
    """Frames both ways (one, as nobody sends any to a NIC without a tap), a command, a change."""
    worker.connect(net.slot_features(1))
    memory = worker.memory
    receive, transmit, control = (worker.start(index, 64) for index in range(3))
    frame = memory.alloc(net.HEADER_BYTES + 60, 16)
    memory.write(frame, bytes(net.HEADER_BYTES) + b"\xff" * 12 + bytes(48))
    for _ in range(5):
        worker.offer(2048, 0)
    transmit.add([(frame, net.HEADER_BYTES + 60, False)])
    apart = memory.alloc(60, 16)
    memory.write(apart, b"\xff" * 60)
    transmit.add([(frame, net.HEADER_BYTES, False), (apart, 60, False)])
    transmit.publish()
    transmit.wait_used(2)
    if peer is not None:
        assert [len(peer.recv(2048)) for _ in range(2)] == [60, 60]
        for length in (60, 4000, 4000):  # a long one, and one that is expected to be long
            peer.send(b"\xff" * length)
        receive.wait_used(5)
    command = memory.alloc(4, 16)
    memory.write(command, bytes((0, 0, 1, 0xFF)))  # CTRL_RX, PROMISC, on
    control.add([(command, 3, False), (command + 3, 1, True)])
    control.publish()
    control.wait_used(1)
    assert memory.read(command + 3, 1) == b"\0"
    for index in (1, 2):
        worker.frontend.get_vring_base(index)
    change_rings(worker)
    worker.frontend.close()


def test_net_needs_each_line(tmp_path: Path) -> None:
    require("net_admin")
    space = NetNamespace()
    try:
        taps = space.tap("t0")
        space.up("t0", 9000)
        peer = space.packet_socket("t0")

        def drive(nest: Nest) -> list[WorkerProcess]:
            state = state_file()
            process = nest.spawn("net", {"tap0": taps[0], "state": state}, {
                "control": True, "num-queues": 3, "queue-size": 64, "mac": MAC})
            os.close(state)
            assert nest.order(process, "link", up=True) == ""
            drive_nic(RingWorker(process.take_socket()), peer)
            nest.gone(process)
            return [process]

        traced(tmp_path, "net", drive)
        peer.close()
        os.close(taps[0])
    finally:
        space.close()


def traced(tmp_path: Path, kind: str, drive: Callable[[Nest], Sequence[WorkerProcess]]) -> None:
    """Trace the workers of `kind` that `drive` starts and ends; check the lines of the policy."""
    nest = Nest(("pid",))
    tracer = Tracer(nest.nursery.pid, tmp_path / "trace")
    try:
        leaders = [worker.pid for worker in drive(nest)]
        nest.nursery.close()
        calls = tracer.calls(leaders)
    finally:
        nest.close()
        tracer.close()
    assert len(calls) > 100
    check_lines(kind, calls, only="seccomp.policy")


def change_rings(worker: RingWorker, index: int = 0) -> None:
    """What a front end may do to a ring that runs."""
    front, memory = worker.frontend, worker.memory
    call = os.eventfd(0)
    front.set_vring_call(index, call)
    front.finish()
    os.close(call)
    front.set_mem_table([MemoryRegion(memory.base, memory.size, USER_BASE, 0)], [memory.fd])
    front.get_vring_base(index)


def test_rng_needs_each_line(tmp_path: Path) -> None:
    out, into = os.pipe()

    def drive(nest: Nest) -> list[WorkerProcess]:
        process = nest.spawn("rng", {"source": out}, {"max-bytes": 64, "period": 50})
        worker = RingWorker(process.take_socket())
        worker.connect()
        ring = worker.start(size=64)
        for _ in range(3):
            worker.offer(64)
            os.write(into, bytes(64))
            ring.wait_used(1)
        change_rings(worker)
        nest.order(process, "unknown")
        worker.frontend.close()
        nest.gone(process)
        return [process]

    traced(tmp_path, "rng", drive)
    os.close(out)
    os.close(into)


def test_console_needs_each_line(tmp_path: Path) -> None:
    here, there = socketpair()

    def drive(nest: Nest) -> list[WorkerProcess]:
        process = nest.spawn("console", {"port0": there.fileno()}, {
            "max-ports": 1, "num-queues": 4, "ports": [{"nr": 0, "console": True, "open": True}]})
        worker = RingWorker(process.take_socket())
        worker.connect()
        driver = ConsoleDriver(worker.memory, lambda index: worker.start(index, 32))
        driver.begin(0)
        driver.set_up(0)
        driver.write(0, b"out")
        assert here.recv(10) == b"out"
        here.send(b"in")
        assert driver.read(0, 2) == b"in"
        nest.order(process, "open", nr=0, open=False)
        change_rings(worker, 1)
        worker.frontend.close()
        nest.gone(process)
        return [process]

    traced(tmp_path, "console", drive)
    here.close()
    there.close()


def test_balloon_needs_each_line(tmp_path: Path) -> None:
    def drive(nest: Nest) -> list[WorkerProcess]:
        process = nest.spawn("balloon", {}, {"num-queues": 5})
        worker = RingWorker(process.take_socket())
        worker.connect()
        inflate = worker.start(0, size=16)
        statistics = worker.start(2, size=16)
        page = worker.memory.alloc(4096)
        worker.memory.write(page, (page // 4096).to_bytes(4, "little"))
        inflate.add([(page, 4, False)])
        inflate.publish()
        inflate.wait_used(1)
        statistics.add([(page, 10, False)])
        statistics.publish()
        answers: list[str] = []
        process.orders.send("stats", answers.append)
        statistics.wait_used(1)
        statistics.add([(page, 10, False)])
        statistics.publish()
        nest.until(lambda: answers == [""])
        change_rings(worker)
        nest.order(process, "unknown")
        worker.frontend.close()
        nest.gone(process)
        return [process]

    traced(tmp_path, "balloon", drive)


def check_lines(kind: str, calls: Sequence[tuple[str, list[int]]], only: str = "") -> None:
    """No call without a line; no line without a call, in the policy's own file or all of them."""
    rules = policy.load(str(ROOT / f"workers/{kind}/seccomp.policy"))
    unneeded = [rule for rule in rules if rule.place.startswith(only)
                and not rule.rare and not any(matches(rule, call) for call in calls)]
    assert not [f"{rule.place} {rule.call}" for rule in unneeded]
    uncovered = {call[0] for call in calls if not any(matches(rule, call) for rule in rules)}
    assert not uncovered


def until(loop: EventLoop, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        loop.run_once(0.05)
