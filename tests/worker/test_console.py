"""The console worker as the core starts it: ports, orders, death in the middle."""

from __future__ import annotations

import mmap
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from shared.virtio.console import STATE_BYTES
from tests.support.blk_worker import ROOT
from tests.support.console_driver import NAME, OPEN, RESIZE, ConsoleDriver, rx
from tests.support.ring_worker import Nest, RingWorker
from vmm.worker.process import WorkerProcess
from workers.console.service import Service
from workers.errors import UsageError

pytestmark = pytest.mark.worker

PORTS = [{"nr": 0, "console": True, "open": True}, {"nr": 2, "name": "serial", "open": True}]


class Host:
    """The sockets of two ports, and a nursery."""

    def __init__(self) -> None:
        self.nest = Nest()
        self.ends = {nr: socket.socketpair() for nr in (0, 2)}
        self.here = {nr: ends[0] for nr, ends in self.ends.items()}
        for end in self.here.values():
            end.settimeout(10)
        self.state = os.memfd_create("state")
        os.ftruncate(self.state, STATE_BYTES)

    @property
    def fds(self) -> dict[str, int]:
        ports = {f"port{nr}": ends[1].fileno() for nr, ends in self.ends.items()}
        return {**ports, "state": self.state}

    def spawn(self, ports: object = PORTS, **options: object) -> WorkerProcess:
        return self.nest.spawn("console", self.fds, {"max-ports": 4, "num-queues": 10,
                                                     "ports": ports, **options})

    def close(self) -> None:
        self.nest.close()
        for ends in self.ends.values():
            for end in ends:
                end.close()
        os.close(self.state)


@pytest.fixture
def host() -> Iterator[Host]:
    host = Host()
    yield host
    host.close()


def connect(process: WorkerProcess) -> tuple[RingWorker, ConsoleDriver]:
    worker = RingWorker(process.take_socket())
    worker.connect()
    return worker, ConsoleDriver(worker.memory, lambda index: worker.start(index, 32))


def test_ports(host: Host) -> None:
    process = host.spawn()
    worker, driver = connect(process)
    driver.begin(0, 2)
    driver.set_up(0, 2)
    assert (2, NAME, 1, b"serial") in driver.messages(4)
    for nr in (0, 2):
        driver.write(nr, b"from the guest")
        assert host.here[nr].recv(100) == b"from the guest"
        host.here[nr].send(b"to the guest")
        assert driver.read(nr, 12) == b"to the guest"
    counters = process.counters
    assert len(counters) == 10
    assert counters[rx(2)]["bytes"] == 12
    assert counters[rx(2) + 1]["bytes"] == 14
    assert "seccomp" in process.stages
    worker.frontend.close()
    assert host.nest.gone(process) == "exit code 0"


def test_orders(host: Host) -> None:
    process = host.spawn()
    _, driver = connect(process)
    driver.begin(0, 2)
    driver.set_up(0, 2)
    driver.messages(4)
    order = host.nest.order
    assert order(process, "open", nr=2, open=False) == ""
    assert driver.messages(1) == [(2, OPEN, 0, b"")]
    driver.write(2, b"nobody hears")
    assert order(process, "open", nr=2, open=True) == ""
    assert driver.messages(1) == [(2, OPEN, 1, b"")]
    driver.write(2, b"heard")
    assert host.here[2].recv(100) == b"heard"
    assert order(process, "size", nr=0, cols=80, rows=24) == ""
    assert driver.messages(1)[0][1] == RESIZE


@pytest.mark.parametrize(("kind", "fields"), [
    ("open", {"nr": 1, "open": True}), ("open", {"nr": 31, "open": True}), ("open", {"nr": 2}),
    ("open", {"open": True}), ("open", {"nr": 2, "open": 1}), ("open", {"nr": "2", "open": True}),
    ("size", {"nr": 0, "cols": -1, "rows": 1}), ("size", {"nr": 0, "cols": 1, "rows": 65536}),
    ("size", {"nr": 3, "cols": 1, "rows": 1}), ("close", {}), ("", {})])
def test_orders_that_do_not_hold(host: Host, kind: str, fields: dict[str, Any]) -> None:
    process = host.spawn()
    answer = host.nest.order(process, kind, **fields)
    # An order without `open` means that nobody is there.
    assert (answer == "") == (fields == {"nr": 2})
    assert process.state == "running"


def test_a_successor_goes_on(host: Host) -> None:
    """What the guest has opened, what it was told, and output that had gone in part."""
    process = host.spawn()
    worker, driver = connect(process)
    driver.begin(0, 2)
    driver.set_up(0, 2)
    driver.messages(4)
    data = os.urandom(1 << 20)
    driver.write(2, data, wait=False, pieces=3)
    host.nest.until(lambda: process.counters[rx(2) + 1]["waits"] > 0)
    process.kill()
    host.nest.gone(process)
    worker.frontend.close()
    host.here[0].send(b"typed meanwhile")
    process = host.spawn([PORTS[0], {**PORTS[1], "open": False}])
    successor = RingWorker(process.take_socket(), worker.memory, worker.rings)
    successor.connect()
    for index, ring in driver.rings.items():
        successor.start(index, base=ring.used_idx, ring=ring)
    assert driver.read(0, 15) == b"typed meanwhile"
    # Somebody left meanwhile: that alone is told, and what waits is dropped.
    assert driver.messages(1) == [(2, OPEN, 0, b"")]
    driver.rings[rx(2) + 1].wait_used(1)
    counters = process.counters[rx(2) + 1]
    assert counters["bytes"] + counters["unheard"] == len(data)
    received = b""
    while len(received) < counters["bytes"]:
        received += host.here[2].recv(1 << 16)
    assert received == data[:len(received)]
    successor.frontend.close()


def test_the_state_is_kept_where_the_core_said(host: Host) -> None:
    process = host.spawn()
    _, driver = connect(process)
    driver.begin(0, 2)
    driver.set_up(0, 2)
    with mmap.mmap(host.state, STATE_BYTES, prot=mmap.PROT_READ) as state:
        assert any(state[:])


BAD_PORTS: list[object] = [
    None, [], {}, [{}], ["0"], [{"nr": 4}], [{"nr": -1}], [{"nr": "0"}], [{"nr": True}],
    [{"nr": 1}], [{"nr": 0}, {"nr": 0}], [{"nr": 0, "colour": 1}], [{"nr": 0, "console": 1}],
    [{"nr": 0, "open": "yes"}], [{"nr": 0, "name": "x" * 256}], [{"nr": 0, "name": "a\0b"}],
    [{"nr": 0, "name": 7}], [{"nr": 0, "cols": 65536}], [{"nr": 0, "rows": -1}],
    [{"nr": n} for n in range(5)]]


@pytest.mark.parametrize("ports", BAD_PORTS, ids=lambda value: repr(value)[:40])
def test_ports_that_do_not_hold(host: Host, ports: object) -> None:
    with pytest.raises(UsageError):
        Service(host.fds, {"max-ports": 4, "ports": ports}, print)


@pytest.mark.parametrize("options", [
    {"max-ports": 0}, {"max-ports": 32}, {"max-ports": "4"}, {"queue-size": 1},
    {"queue-size": 1025}, {"num-queues": 9}])
def test_options_that_do_not_hold(host: Host, options: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        Service(host.fds, {"max-ports": 4, "ports": PORTS, **options}, print)


def test_a_port_that_is_no_socket(host: Host) -> None:
    with pytest.raises(UsageError, match="without a socket"):
        Service({"port0": host.state}, {"max-ports": 4, "ports": [{"nr": 0}]}, print)


def test_a_state_that_is_too_short(host: Host) -> None:
    os.ftruncate(host.state, STATE_BYTES - 1)
    with pytest.raises(UsageError, match="too short"):
        Service(host.fds, {"max-ports": 4, "ports": PORTS}, print)


def test_a_worker_with_all_ports(host: Host) -> None:
    """31 sockets come with one message."""
    pairs = [socket.socketpair() for _ in range(31)]
    fds = {f"port{nr}": pair[1].fileno() for nr, pair in enumerate(pairs)}
    process = host.nest.spawn("console", fds, {
        "max-ports": 31, "num-queues": 64,
        "ports": [{"nr": nr, "open": True} for nr in range(31)]})
    _, driver = connect(process)
    driver.begin(0, 30)
    driver.send(0)
    assert len(driver.messages(31)) == 31
    driver.send(OPEN, 1, 30)
    driver.write(30, b"last")
    assert pairs[30][0].recv(10) == b"last"
    for pair in pairs:
        for end in pair:
            end.close()


# ---- nobody serves it any more ---------------------------------------------------------------

def serve_null(host: Host, process: WorkerProcess, device: str = "console", queues: object = 4,
               size: object = 128, state: bool = True) -> tuple[socket.socket, str]:
    """Have a null worker take a connection; our end, and what it says."""
    ours, theirs = socket.socketpair()
    answers: list[str] = []
    process.orders.send("serve", answers.append,
                        [theirs.fileno(), *([host.state] if state else [])], device=device,
                        queues=queues, **{"queue-size": size})
    theirs.close()
    host.nest.until(lambda: bool(answers))
    return ours, answers[0]


def test_a_null_worker_takes_what_is_written(host: Host) -> None:
    """From a driver that has opened everything long ago, and from one that begins."""
    process = host.spawn()
    worker, driver = connect(process)
    driver.begin(0, 2)
    driver.set_up(0, 2)
    driver.messages(4)
    process.kill()
    host.nest.gone(process)
    worker.frontend.close()
    null = host.nest.nursery.spawn("null", "#null", {}, {})
    ours, answer = serve_null(host, null)
    assert answer == ""
    successor = RingWorker(ours.detach(), worker.memory, worker.rings)
    successor.connect()
    for index, ring in driver.rings.items():
        successor.start(index, base=ring.used_idx, ring=ring)
    host.here[2].send(b"typed")
    for nr in (0, 2):
        driver.write(nr, b"nobody hears")
    driver.send(0)
    assert driver.used(2) == []
    host.here[2].settimeout(0)
    with pytest.raises(BlockingIOError):
        host.here[2].recv(1)
    assert null.state == "running"
    successor.frontend.close()


@pytest.mark.parametrize("fields", [
    {"queues": 0}, {"queues": 32}, {"queues": "4"}, {"size": 1}, {"size": 2048}, {"size": None},
    {"state": False}, {"device": "rng"}])
def test_what_a_null_worker_can_not_be(host: Host, fields: dict[str, Any]) -> None:
    null = host.nest.nursery.spawn("null", "#null", {}, {})
    ours, answer = serve_null(host, null, **fields)
    assert answer
    assert ours.recv(1) == b""  # nobody is there
    ours.close()
    # Its answer and the nursery's come by different ways, in any order.
    host.nest.until(lambda: null.state == "running")


def test_a_null_worker_with_a_state_that_is_too_short(host: Host) -> None:
    os.ftruncate(host.state, 10)
    null = host.nest.nursery.spawn("null", "#null", {}, {})
    ours, answer = serve_null(host, null)
    assert "too short" in answer
    ours.close()


def test_it_does_not_run_alone() -> None:
    done = subprocess.run([sys.executable, "-m", "workers.console"], cwd=ROOT, text=True,
                          capture_output=True, timeout=30, check=False)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
