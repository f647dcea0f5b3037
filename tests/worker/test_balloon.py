"""The balloon worker, as the core starts it."""

from __future__ import annotations

import fcntl
import mmap
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from shared.vhost_user import messages as m
from shared.virtio import balloon
from tests.support.balloon_plane import DEFLATE, INFLATE, PAGE, REPORTING, STATISTICS, entries
from tests.support.guest_ring import GuestMemory
from tests.support.ring_worker import Nest, RingWorker
from tests.support.tree import ROOT
from vmm.balloon.part import BalloonWorkers
from vmm.devices.virtio_balloon import GuestStatistics
from vmm.worker.process import WorkerProcess
from workers.balloon.worker import Service
from workers.errors import UsageError

pytestmark = pytest.mark.worker

PAGES = 64
F_SEAL_FUTURE_WRITE = 0x10  # linux/fcntl.h: no holes any more either
FEATURES = balloon.FEATURES & ~balloon.F_MUST_TELL_HOST


class Driven(RingWorker):
    """A worker and its guest's driver."""

    def __init__(self, nest: Nest, before: Driven | None = None,
                 memory: GuestMemory | None = None) -> None:
        self.nest = nest
        self.told = GuestStatistics()
        self.process: WorkerProcess = BalloonWorkers(nest.nursery, "balloon0", self.told).first()
        assert self.process.wait_started(time.monotonic() + 60), self.process.reason
        if before is None:
            super().__init__(self.process.take_socket(), memory)
        else:
            super().__init__(self.process.take_socket(), before.memory, before.rings)
        self.connect(FEATURES | m.F_PROTOCOL_FEATURES)

    def send(self, index: int, data: bytes, wait: bool = True) -> None:
        address = self.memory.alloc(len(data), 16)
        self.memory.write(address, data)
        self.put(index, [(address, len(data), False)], wait)

    def put(self, index: int, buffers: list[tuple[int, int, bool]], wait: bool = True) -> None:
        head = self.rings[index].add(buffers)
        self.rings[index].publish()
        if wait:
            assert self.rings[index].wait_used(1) == [(head, 0)]

    def pfns(self, index: int, address: int, count: int = PAGES) -> None:
        first = address // PAGE
        self.send(index, struct.pack(f"<{count}I", *range(first, first + count)))

    def fill(self) -> int:
        address = self.memory.alloc(PAGES * PAGE)
        self.memory.fill(address, PAGES * PAGE, 0xA5)
        return address

    def count(self, name: str) -> int:
        return sum(queue[name] for queue in self.process.counters)

    def close_guest(self) -> None:
        """Once for all workers of the guest."""
        self.frontend.close()
        for ring in self.rings.values():
            ring.close()
        self.memory.close()

    def order(self) -> list[str]:
        """Order statistics; what the worker answers, once it does."""
        answers: list[str] = []
        self.process.orders.send("stats", answers.append)
        return answers


@pytest.fixture
def nest() -> Iterator[Nest]:
    nest = Nest()
    yield nest
    nest.close()


@pytest.fixture
def driven(nest: Nest) -> Iterator[Driven]:
    driven = Driven(nest)
    for index in (INFLATE, DEFLATE, STATISTICS, REPORTING):
        driven.start(index, size=16)
    yield driven
    driven.close_guest()


def test_other_processes_lose_the_pages(driven: Driven) -> None:
    """This process maps the same memory."""
    at = driven.fill()
    driven.pfns(INFLATE, at)
    assert driven.memory.read(at, PAGES * PAGE) == bytes(PAGES * PAGE)
    driven.memory.fill(at, PAGES * PAGE, 1)
    driven.pfns(DEFLATE, at)
    driven.put(REPORTING, [(at + PAGE, 2 * PAGE, True)])
    expected = b"\1" * PAGE + bytes(2 * PAGE) + b"\1" * (PAGES - 3) * PAGE
    assert driven.memory.read(at, PAGES * PAGE) == expected
    counted = {name: driven.count(name) for name in (
        "inflated_pages", "deflated_pages", "reported_pages", "removed_bytes", "removals",
        "refused_pages", "chains", "broken")}
    assert counted == {"inflated_pages": PAGES, "deflated_pages": PAGES, "reported_pages": 2,
                       "removed_bytes": (PAGES + 2) * PAGE, "removals": 2, "refused_pages": 0,
                       "chains": 3, "broken": 0}
    assert "seccomp" in driven.process.stages


class SealableMemory(GuestMemory):
    """Its file can be sealed."""

    def __init__(self) -> None:
        super().__init__()
        fd = os.memfd_create("guest-ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.dup2(fd, self.fd, inheritable=False)
        os.close(fd)
        os.ftruncate(self.fd, self.size)
        self.map.close()
        self.map = mmap.mmap(self.fd, self.size)


def test_a_host_that_takes_no_pages(nest: Nest, capfd: pytest.CaptureFixture[str]) -> None:
    """The guest goes on, its memory stays, the log says it once."""
    driven = Driven(nest, memory=SealableMemory())
    driven.start(INFLATE, size=16)
    fcntl.fcntl(driven.memory.fd, fcntl.F_ADD_SEALS, F_SEAL_FUTURE_WRITE)
    at = driven.fill()
    for _ in range(3):
        driven.pfns(INFLATE, at)
    assert driven.count("failed_bytes") == 3 * PAGES * PAGE
    assert driven.memory.read(at, 1) == b"\xa5"
    told: list[str] = []

    def logged() -> bool:
        told.append(capfd.readouterr().err)
        return "does not take the guest's pages: Operation not permitted" in "".join(told)

    nest.until(logged)
    assert "sandbox" not in nest.order(driven.process, "unknown")
    assert "".join(told).count("does not take") == 1
    driven.close_guest()


def test_what_it_negotiates(nest: Nest, driven: Driven) -> None:
    assert driven.frontend.features & ~m.F_PROTOCOL_FEATURES == balloon.FEATURES
    assert not driven.frontend.protocol & (m.PF_CONFIG | m.PF_INFLIGHT_SHMFD)
    assert driven.frontend.queue_count == balloon.QUEUES
    driven.frontend.close()
    assert nest.gone(driven.process) == "exit code 0"


def test_statistics_on_order(nest: Nest, driven: Driven) -> None:
    driven.send(STATISTICS, entries((4, 0)), wait=False)
    answers, more = driven.order(), driven.order()
    driven.rings[STATISTICS].wait_used(1)
    assert driven.told.told == 0
    driven.send(STATISTICS, entries((4, 77), (99, 1), (6, 5)), wait=False)

    def done() -> bool:
        # The second order may have come after the answer to the first one.
        if driven.rings[STATISTICS].take_used():
            driven.send(STATISTICS, entries((4, 77), (6, 5)), wait=False)
        return bool(answers and more)

    nest.until(done)
    assert answers == more == [""]
    assert driven.told.values == {"free-memory": 77, "available-memory": 5}


def test_orders_that_can_t_be_done(nest: Nest, driven: Driven) -> None:
    assert "'resize'" in nest.order(driven.process, "resize")
    driven.frontend.get_vring_base(STATISTICS)
    answers = driven.order()
    nest.until(lambda: bool(answers))
    assert "The driver can't be asked for statistics" in answers[0]
    assert driven.process.state == "running"


def test_a_driver_that_does_not_answer_costs_a_bounded_list(nest: Nest, driven: Driven) -> None:
    """Orders that the core has given up waiting for stay with the worker."""
    last: list[str] = []
    for _ in range(70):
        answers: list[str] = []
        serial = driven.process.orders.send("stats", answers.append)
        if not driven.process.orders.forget(serial):
            last = answers
        nest.loop.run_once(0.0)
    answers = driven.order()
    nest.until(lambda: bool(answers))
    assert answers == ["The guest's driver doesn't answer"] and last == []
    driven.send(STATISTICS, b"x", wait=False)
    driven.rings[STATISTICS].wait_used(1)
    driven.send(STATISTICS, entries((4, 1)), wait=False)
    nest.until(lambda: bool(driven.told.told))
    assert driven.order() == []


# ---- who comes after ---------------------------------------------------------------------------


def succeed(nest: Nest, driven: Driven) -> Driven:
    """Kill the worker; another one takes over where the used rings say."""
    driven.process.kill()
    nest.gone(driven.process)
    driven.frontend.close()
    successor = Driven(nest, driven)
    for index, ring in driven.rings.items():
        successor.start(index, ring=ring, base=ring.used_idx)
    return successor


def test_a_successor_goes_on(nest: Nest, driven: Driven) -> None:
    at = driven.fill()
    driven.pfns(INFLATE, at, 10)
    successor = succeed(nest, driven)
    successor.pfns(INFLATE, at + 10 * PAGE, 5)
    assert driven.memory.read(at, 15 * PAGE) == bytes(15 * PAGE)
    assert successor.count("inflated_pages") == 15, "it counts on"
    successor.frontend.close()


def test_the_held_buffer_is_the_successor_s(nest: Nest, driven: Driven) -> None:
    driven.send(STATISTICS, entries((4, 1)), wait=False)
    answers = driven.order()
    driven.rings[STATISTICS].wait_used(1)
    driven.send(STATISTICS, entries((4, 2)), wait=False)
    nest.until(lambda: bool(answers))
    successor = succeed(nest, driven)
    assert driven.rings[STATISTICS].take_used() == []
    answers = successor.order()
    successor.rings[STATISTICS].wait_used(1)
    successor.send(STATISTICS, entries((4, 3)), wait=False)
    nest.until(lambda: bool(answers))
    assert answers == [""] and successor.told.values == {"free-memory": 3}
    successor.frontend.close()


def test_an_order_ends_with_the_worker(nest: Nest, driven: Driven) -> None:
    answers = driven.order()
    driven.process.kill()
    nest.gone(driven.process)
    assert answers == ["the worker ended"]


def test_what_was_under_way_is_done_again(nest: Nest, driven: Driven) -> None:
    """A chain of many numbers, and the worker is killed in the middle of it."""
    at = driven.fill()
    first = at // PAGE
    data = struct.pack(f"<{PAGES}I", *range(first, first + PAGES)) * (1 << 12)
    driven.send(INFLATE, data, wait=False)
    nest.until(lambda: driven.count("removals") > 0)
    successor = succeed(nest, driven)
    used = driven.rings[INFLATE].take_used() or driven.rings[INFLATE].wait_used(1)
    assert len(used) == 1
    assert driven.memory.read(at, PAGES * PAGE) == bytes(PAGES * PAGE)
    successor.frontend.close()


def test_a_null_worker_answers(nest: Nest, driven: Driven) -> None:
    """For a worker that was given up: everything is answered, nothing goes."""
    driven.process.kill()
    nest.gone(driven.process)
    null = nest.nursery.spawn("null", "#null", {}, {})
    ours, theirs = socket.socketpair()
    answers: list[str] = []
    null.orders.send("serve", answers.append, [theirs.fileno()], device="balloon", queues=5,
                     **{"queue-size": 128})
    theirs.close()
    nest.until(lambda: answers == [""])
    successor = RingWorker(ours.detach(), driven.memory, driven.rings)
    successor.connect(FEATURES | m.F_PROTOCOL_FEATURES)
    for index, ring in list(driven.rings.items()):
        successor.start(index, ring=ring, base=ring.used_idx)
    at = driven.fill()
    driven.pfns(INFLATE, at)
    driven.pfns(DEFLATE, at)
    driven.put(REPORTING, [(at, PAGE * PAGES, True)])
    assert driven.memory.read(at, PAGES * PAGE) == b"\xa5" * PAGES * PAGE
    assert null.state != "dead"
    successor.frontend.close()


@pytest.mark.parametrize("fields", [{"queue-size": 1}, {"queue-size": 2048}, {"queue-size": None}])
def test_what_a_null_worker_can_not_be(nest: Nest, fields: dict[str, Any]) -> None:
    null = nest.nursery.spawn("null", "#null", {}, {})
    ours, theirs = socket.socketpair()
    answers: list[str] = []
    null.orders.send("serve", answers.append, [theirs.fileno()], device="balloon", queues=5,
                     **fields)
    theirs.close()
    nest.until(lambda: bool(answers))
    assert answers[0] and null.state != "dead"
    ours.close()
    null.discard()


# ---- its beginning -----------------------------------------------------------------------------


@pytest.mark.parametrize("options", [
    {}, {"num-queues": 3}, {"num-queues": "5"}, {"num-queues": 5, "queue-size": 1},
    {"num-queues": 5, "queue-size": 2048}, {"num-queues": 5, "queue-size": True}])
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Service(options, None, print)


def test_it_is_no_program_of_its_own() -> None:
    done = subprocess.run([sys.executable, "-m", "workers.balloon"], capture_output=True,
                          text=True, cwd=ROOT, check=False, timeout=30)
    assert done.returncode == 1 and "the core starts it" in done.stderr
