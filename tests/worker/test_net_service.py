"""What a net worker is told: options, the memory of its driver, orders; and the NIC that isn't."""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from shared.control.channel import Channel, Message, pair
from shared.statistics import HEADER_BYTES, page_bytes
from shared.virtio import net
from tests.support.capabilities import require
from tests.support.net_namespace import NetNamespace
from tests.support.ring_worker import Nest, RingWorker
from workers.errors import UsageError
from workers.net.service import DEFAULT_MAC, Service
from workers.null.device import NullNic
from workers.nursery import Reporter
from workers.service import map_state

pytestmark = pytest.mark.worker

MAC = bytes.fromhex("525400010203")
OTHER = bytes.fromhex("5254000000aa")


@pytest.fixture
def namespace() -> Iterator[NetNamespace]:
    require("net_admin")
    namespace = NetNamespace()
    yield namespace
    namespace.close()


@pytest.fixture
def tap(namespace: NetNamespace) -> Iterator[int]:
    fd = namespace.tap()[0]
    yield fd
    os.close(fd)


def memfd(size: int = net.STATE_BYTES) -> int:
    fd = os.memfd_create("state")
    os.ftruncate(fd, size)
    return fd


class Served:
    """A service on a thread, the core's end of its control channel, a driver of its rings."""

    def __init__(self, taps: list[int], options: dict[str, object], state: int | None = None,
                 page: int | None = None) -> None:
        self.lines: list[str] = []
        self.service = Service(taps, options, page, state, self.lines.append)
        ours, theirs = socket.socketpair()
        control, worker = pair()
        self.control = Channel(control, blocking=False)
        self.reporter = Reporter(worker)
        self.thread = threading.Thread(target=self.service.serve,
                                       args=(theirs.detach(), self.reporter))
        self.thread.start()
        self.driver = RingWorker(ours.detach())

    def order(self, **fields: Any) -> Message:
        self.control.send(fields)
        assert select.select([self.control], [], [], 10)[0], "no answer"
        return self.control.recv()[0]

    def close(self) -> None:
        self.driver.frontend.close()
        self.thread.join(10)
        assert not self.thread.is_alive()
        self.service.close()
        self.control.close()
        self.reporter.close()
        for ring in self.driver.rings.values():
            ring.close()
        self.driver.memory.close()


@contextmanager
def served(taps: list[int], state: int | None = None, page: int | None = None,
           **options: object) -> Iterator[Served]:
    found = Served(taps, options, state, page)
    try:
        yield found
    finally:
        found.close()


def start(driver: RingWorker, pairs: int = 1) -> None:
    driver.connect(net.slot_features(pairs))
    for index in range(2 * pairs + 1):
        driver.start(index, 64)


def send(driver: RingWorker, data: bytes) -> None:
    """One frame, and until its chain is back."""
    memory, ring = driver.memory, driver.rings[1]
    address = memory.alloc(net.HEADER_BYTES + len(data), 16)
    memory.write(address, bytes(net.HEADER_BYTES) + data)
    ring.add([(address, net.HEADER_BYTES + len(data), False)])
    ring.publish()
    ring.wait_used(1)


def command(driver: RingWorker, data: bytes, index: int = 2) -> int:
    """A command on the control queue; its acknowledgement."""
    memory, ring = driver.memory, driver.rings[index]
    address = memory.alloc(len(data) + 1, 16)
    memory.write(address, data + b"\xaa")
    ring.add([(address, len(data), False), (address + len(data), 1, True)])
    ring.publish()
    ring.wait_used(1)
    return memory.read(address + len(data), 1)[0]


def frame(to: bytes, fill: int = 0) -> bytes:
    return to + OTHER + b"\x88\xb5" + bytes([fill]) * 46


# ---- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "text"), [
    ({"queue-size": 1}, "queue-size"), ({"queue-size": 2048}, "queue-size"),
    ({"queue-size": "256"}, "queue-size"), ({"mac": "52:54:00:01:02:03"}, "mac"),
    ({"mac": bytes(5)}, "mac"), ({"mac": None}, "mac"), ({"link": 1}, "link"),
    ({"link": "up"}, "link"), ({"rx-packets": -1}, "rx-packets"),
    ({"tx-bytes": (1 << 50) + 1}, "tx-bytes"), ({"tx-packets": b"1"}, "tx-packets"),
])
def test_options_that_do_not_hold(tap: int, options: dict[str, object], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        Service([tap], options, None, None, print)


@pytest.mark.parametrize("count", [0, 17])
def test_numbers_of_taps(tap: int, count: int) -> None:
    with pytest.raises(UsageError, match=f"{count} taps"):
        Service([tap] * count, {}, None, None, print)


def test_a_state_that_is_too_short(tap: int) -> None:
    for size in (0, net.STATE_BYTES - 1):
        state = memfd(size)
        with pytest.raises(UsageError, match="too short"):
            Service([tap], {"control": True}, None, state, print)
        os.close(state)


@pytest.mark.parametrize("control", [True, False, 1, "on", None])
def test_a_control_queue_is_there_if_it_was_asked_for(tap: int, control: object) -> None:
    service = Service([tap], {"control": control}, None, None, print)
    there = control is True
    assert service.device.queue_count == 2 + there
    assert bool(service.device.features() & net.F_CTRL_VQ) is there
    assert not (there and service.device.features() & net.UFO)
    assert service.device.announced_queues == 1  # pairs, as front ends count
    assert service.device.mac == DEFAULT_MAC
    service.close()


def test_its_tap_is_left_alone_until_it_serves(namespace: NetNamespace, tap: int) -> None:
    """Another worker may serve it: what that one set goes on."""
    state = memfd()
    with served([tap], state, control=True, mac=MAC) as first, \
            namespace.packet_socket(headers=True) as peer:
        start(first.driver)
        ip = (b"\x45\0" + (40 + 9000).to_bytes(2, "big") + b"\0\1\0\0\x40\6\0\0\n\0\0\1\n\0\0\2")
        tcp = bytes((3, 232, 7, 208, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 3, 232, 0, 0, 0, 0))
        header = b"\1\1\x36\0\xa8\5\x22\0\x10\0"  # NEEDS_CSUM, TCPV4, segments of 1448
        second = Service([tap], {"control": True, "mac": MAC}, None, state, print)
        _, address = first.driver.offer(16384)
        peer.send(header + MAC + OTHER + b"\x08\0" + ip + tcp + bytes(9000))
        (_, length), = first.driver.rings[0].wait_used(1)
        assert length == net.HEADER_BYTES + 54 + 9000
        assert first.driver.memory.read(address + 1, 1) == b"\1"
        second.close()
    os.close(state)


# ---- orders --------------------------------------------------------------------------------------


@pytest.mark.parametrize("begins", [True, False])
def test_the_link(namespace: NetNamespace, tap: int, begins: bool) -> None:
    with served([tap], control=True, mac=MAC, link=begins) as found, \
            namespace.packet_socket() as peer:
        start(found.driver)
        for up in (begins, False, True, False, True):
            if up != begins:
                assert found.order(type="link", serial=4, up=up) == {"type": "done", "serial": 4}
                begins = up
            found.driver.offer(2048)
            send(found.driver, frame(OTHER, 1))
            peer.send(frame(MAC, 2))
            if up:
                assert peer.recv(2000) == frame(OTHER, 1)
                found.driver.rings[0].wait_used(1)
            else:
                dropped = found.service.device.counters
                deadline = time.monotonic() + 10
                while dropped()[0]["dropped"] == 0 or dropped()[1]["dropped"] == 0:
                    assert time.monotonic() < deadline
                peer.setblocking(False)
                with pytest.raises(BlockingIOError):
                    peer.recv(2000)
                peer.settimeout(10)
                assert found.driver.rings[0].take_used() == []


@pytest.mark.parametrize("order", [
    {"type": "link"}, {"type": "link", "up": 1}, {"type": "link", "up": None}, {"type": "resize"},
    {"type": 7, "up": True}, {"up": True}, {}])
def test_orders_that_are_none(tap: int, order: dict[str, object]) -> None:
    with served([tap], control=True) as found:
        answer = found.order(serial=9, **order)
        assert answer["type"] == "failed" and answer["serial"] == 9 and answer["text"]
        assert found.order(serial=10, type="link", up=True)["type"] == "done"


def test_a_core_that_goes(tap: int) -> None:
    """Without its channel a worker serves on: its connection tells when to end."""
    with served([tap], control=True) as found:
        start(found.driver)
        found.control.close()
        assert command(found.driver, b"\0\0\1") == 0


def test_figures_go_on_in_the_page(namespace: NetNamespace, tap: int) -> None:
    page = memfd(page_bytes("net", 3))
    for round_ in (1, 2):
        with served([tap], page=page, control=True) as found:
            start(found.driver)
            send(found.driver, frame(OTHER))
            assert found.service.device.counters()[1]["packets"] == round_
    assert os.pread(page, 4096, HEADER_BYTES) != bytes(4096)
    os.close(page)


# ---- the NIC that isn't there --------------------------------------------------------------------


@pytest.mark.parametrize(("pairs", "size"), [(0, 256), (17, 256), (1, 1), (1, 1025), (-1, 256)])
def test_null_nics_that_can_not_be(pairs: int, size: int) -> None:
    state = memfd()
    with pytest.raises(UsageError, match="null back end"):
        NullNic(pairs, size, MAC, map_state("net", net.STATE_BYTES, state), print)
    os.close(state)


def test_a_null_nic_offers_whatever_a_driver_may_have_acknowledged() -> None:
    state = memfd()
    device = NullNic(4, 256, MAC, map_state("net", net.STATE_BYTES, state), print)
    os.close(state)
    assert device.features() == net.SLOT_BACKEND_FEATURES
    assert device.queue_count == 9 and device.mac == MAC
    device.close()


@contextmanager
def null_nic(nest: Nest, state: int, pairs: int = 1) -> Iterator[RingWorker]:
    process = nest.spawn("null", {}, {}, "#null")
    ours, theirs = socket.socketpair()
    answers: list[str] = []
    process.orders.send("serve", answers.append, [theirs.fileno(), state], device="net",
                        queues=pairs, mac=MAC, **{"queue-size": 64})
    theirs.close()
    nest.until(lambda: bool(answers))
    assert answers == [""]
    driver = RingWorker(ours.detach())
    yield driver
    driver.frontend.close()
    assert process.state == "running"
    process.kill()


def test_a_null_nic_in_its_process(namespace: NetNamespace, tap: int) -> None:
    """What is sent is dropped, commands are carried out, and hold for the worker that follows."""
    require("userns")
    nest = Nest()
    state = memfd()
    try:
        with null_nic(nest, state) as driver:
            start(driver)
            driver.offer(2048)
            for _ in range(3):
                send(driver, frame(OTHER))
            assert command(driver, b"\0\0\0") == 0  # not promiscuous
            assert command(driver, b"\1\1" + OTHER) == 0
            assert command(driver, b"\0\0\7") == 1
            assert command(driver, b"\4\0\1\0") == 1  # it has no pairs
            assert driver.rings[0].take_used() == []
        with served([tap], state, control=True, mac=MAC) as found, \
                namespace.packet_socket() as peer:
            start(found.driver)
            found.driver.offer(2048)
            peer.send(frame(MAC))
            peer.send(frame(OTHER))
            found.driver.rings[0].wait_used(1)
            assert found.service.device.mac == OTHER
            assert found.service.device.counters()[0]["dropped"] == 1
    finally:
        nest.close()
        os.close(state)


@pytest.mark.parametrize(("fields", "descriptors"), [
    ({"device": "net", "queues": 1, "queue-size": 64, "mac": MAC}, 1),     # no state
    ({"device": "net", "queues": 1, "queue-size": 64, "mac": MAC}, 3),
    ({"device": "net", "queues": 1, "queue-size": 64, "mac": bytes(5)}, 2),
    ({"device": "net", "queues": 1, "queue-size": 64}, 2),
    ({"device": "net", "queues": 0, "queue-size": 64, "mac": MAC}, 2),
    ({"device": "net", "queues": 1, "queue-size": 1 << 20, "mac": MAC}, 2),
    ({"device": "net", "queues": "1", "queue-size": 64, "mac": MAC}, 2),
    ({"device": "tap", "queues": 1, "queue-size": 64, "mac": MAC}, 2),
    ({"queues": 1, "queue-size": 64, "mac": MAC}, 2)])
def test_orders_that_the_null_worker_refuses(fields: dict[str, Any], descriptors: int) -> None:
    require("userns")
    nest = Nest()
    state = memfd()
    ours, theirs = socket.socketpair()
    try:
        process = nest.spawn("null", {}, {}, "#null")
        answers: list[str] = []
        process.orders.send("serve", answers.append,
                            [theirs.fileno(), state, state][:descriptors], **fields)
        nest.until(lambda: bool(answers))
        assert answers[0]
        with null_nic(nest, state) as driver:  # another one is served
            start(driver)
        assert process.state == "running"
    finally:
        nest.close()
        ours.close()
        theirs.close()
        os.close(state)
