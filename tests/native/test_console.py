"""virtio-console (virtio 1.2, 5.3): ports, control messages, back pressure."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator

import pytest

from tests.support.console_driver import (
    ADD,
    CONSOLE,
    CONTROL_RX,
    CONTROL_TX,
    DEVICE_READY,
    NAME,
    OPEN,
    READY,
    REMOVE,
    RESIZE,
    ConsoleDriver,
    rx,
)
from tests.support.console_plane import (
    CONSOLE_PORT,
    SERIAL_PORT,
    ConsolePlane,
    Make,
    console_planes,
    set_up,
)
from tests.support.guest_ring import F_VERSION_1
from tests.support.ring_plane import lib, until

pytestmark = pytest.mark.native


@pytest.fixture
def make() -> Iterator[Make]:
    with console_planes() as build:
        yield build


@pytest.fixture
def served(make: Make) -> tuple[ConsolePlane, ConsoleDriver]:
    return set_up(make)


# ---- control messages ------------------------------------------------------------------------

def test_what_a_driver_is_told(make: Make) -> None:
    _, driver = make({0: CONSOLE_PORT, 2: SERIAL_PORT, 3: {"name": b"late"}})
    driver.begin(0, 2, 3)
    driver.send(DEVICE_READY)
    assert driver.messages(3) == [(0, ADD, 1, b""), (2, ADD, 1, b""), (3, ADD, 1, b"")]
    driver.send(READY, 1, 2)
    assert driver.messages(2) == [(2, NAME, 1, b"agent.channel.0"), (2, OPEN, 1, b"")]
    driver.send(READY, 1, 0)
    assert driver.messages(2) == [(0, CONSOLE, 1, b""), (0, OPEN, 1, b"")]
    driver.send(READY, 1, 3)  # nobody is at its other end
    assert driver.messages(1) == [(3, NAME, 1, b"late")]
    driver.send(READY, 1, 3)
    assert driver.messages(1) == [(3, NAME, 1, b"late")]


def test_somebody_comes_and_leaves(served: tuple[ConsolePlane, ConsoleDriver]) -> None:
    plane, driver = served
    for is_open in (False, True, False):
        assert plane.set_open(2, is_open) == 0
        assert driver.messages(1) == [(2, OPEN, int(is_open), b"")]
    plane.set_open(2, False)  # nothing new
    plane.set_open(0, False)  # a terminal is always there
    plane.set_open(2, True)
    assert driver.messages(1) == [(2, OPEN, 1, b"")]
    for nr in (1, 3, 4, 31, 1 << 31):
        assert plane.set_open(nr, True) == -errno.ENOENT
        assert lib.sv_console_set_size(plane.device, nr, 80, 24) == -errno.ENOENT


def test_the_size_of_a_terminal(make: Make) -> None:
    plane, driver = make({0: {**CONSOLE_PORT, "cols": 80, "rows": 25}, 1: SERIAL_PORT})
    driver.begin(0, 1)
    driver.set_up(0, 1)
    messages = driver.messages(5)
    assert (0, RESIZE, 0, struct.pack("<HH", 80, 25)) in messages
    assert lib.sv_console_set_size(plane.device, 1, 10, 10) == 0  # no terminal
    assert lib.sv_console_set_size(plane.device, 0, 80, 25) == 0  # as before
    assert lib.sv_console_set_size(plane.device, 0, 132, 43) == 0
    assert driver.messages(1) == [(0, RESIZE, 0, struct.pack("<HH", 132, 43))]


def test_messages_wait_for_buffers(make: Make) -> None:
    """However often things change meanwhile: the driver is told how they are."""
    plane, driver = make()
    driver.begin(0, 2, buffers=0)
    for _ in range(200):
        driver.send(DEVICE_READY)
    driver.send(READY, 1, 2)
    for _ in range(101):
        plane.set_open(2, False)
        plane.set_open(2, True)
    driver.feed(CONTROL_RX)  # one, which comes and goes with each message
    assert driver.messages(4) == [(0, ADD, 1, b""), (2, ADD, 1, b""),
                                  (2, NAME, 1, b"agent.channel.0"), (2, OPEN, 1, b"")]
    plane.set_open(2, False)
    assert driver.messages(1) == [(2, OPEN, 0, b"")]


def test_without_multiport_there_is_port_0(make: Make) -> None:
    plane, driver = make(features=F_VERSION_1)
    for index in (0, 1):
        driver.rings[index] = plane.start(index, 16)
    driver.feed(0)
    driver.write(0, b"out")
    assert plane.host[0].recv(100) == b"out"
    plane.host[0].send(b"in")
    assert driver.read(0, 2) == b"in"


NONSENSE = {
    "empty": b"\0", "short": bytes(7), "no such port": struct.pack("<IHH", 1, READY, 1),
    "port beyond": struct.pack("<IHH", 4, OPEN, 1), "far beyond": b"\xff" * 8,
    "unknown event": struct.pack("<IHH", 0, 99, 1), "add": struct.pack("<IHH", 0, ADD, 1),
    "remove": struct.pack("<IHH", 0, REMOVE, 1), "name": struct.pack("<IHH", 0, NAME, 1) + b"x",
    "not ready": struct.pack("<IHH", 0, DEVICE_READY, 0),
}


@pytest.mark.parametrize("raw", NONSENSE.values(), ids=NONSENSE.keys())
def test_messages_that_make_no_sense(served: tuple[ConsolePlane, ConsoleDriver],
                                     raw: bytes) -> None:
    plane, driver = served
    driver.send(0, raw=raw)
    assert plane.counters[CONTROL_TX].errors == 1
    driver.write(2, b"goes on")
    assert plane.host[2].recv(100) == b"goes on"


def test_a_long_message_is_read_in_part(served: tuple[ConsolePlane, ConsoleDriver]) -> None:
    plane, driver = served
    driver.send(0, raw=struct.pack("<IHH", 2, OPEN, 0) + bytes(5000))
    plane.host[2].send(b"stays")
    driver.send(OPEN, 1, 2)
    assert driver.read(2, 5) == b"stays"
    assert plane.counters[CONTROL_TX].errors == 0


@pytest.mark.parametrize("room", [8, 10, 511])
def test_a_name_is_cut_to_the_buffer(make: Make, room: int) -> None:
    plane, driver = make({1: {"name": b"n" * 255}})
    driver.begin(1)
    driver.send(DEVICE_READY)
    driver.messages(1)
    plane.stop(CONTROL_RX)
    ring = driver.rings[CONTROL_RX] = plane.start(CONTROL_RX, 32)
    address = plane.memory.alloc(1024, 16)
    ring.add([(address, 4, True), (address + 4, room - 4, True)])
    ring.publish()
    driver.send(READY, 1, 1)
    (_, written), = ring.wait_used(1)
    assert written == min(room, 263)
    assert plane.memory.read(address, written + 1) == (
        struct.pack("<IHH", 1, NAME, 1) + b"n" * (written - 8) + b"\0")


# ---- data ------------------------------------------------------------------------------------

@pytest.mark.parametrize(("size", "pieces"), [(1, 1), (5000, 7), (100_000, 30), (1 << 20, 3)])
def test_output(served: tuple[ConsolePlane, ConsoleDriver], size: int, pieces: int) -> None:
    plane, driver = served
    data = os.urandom(size)
    driver.write(2, data, wait=False, pieces=pieces)
    received = b""
    while len(received) < size:
        received += plane.host[2].recv(1 << 16)
    assert received == data
    driver.rings[rx(2) + 1].wait_used(1)
    assert plane.counters[rx(2) + 1].bytes == size


@pytest.mark.parametrize("size", [1, 511, 5000, 300_000])
def test_input(served: tuple[ConsolePlane, ConsoleDriver], size: int) -> None:
    plane, driver = served
    data = os.urandom(size)
    plane.host[0].setblocking(False)
    left, received = data, b""
    while len(received) < size:
        if left:
            try:
                left = left[plane.host[0].send(left):]
            except BlockingIOError:
                pass
        received += b"".join(driver.used(0))
    assert received == data
    assert plane.counters[0].bytes == size


# ---- back pressure ---------------------------------------------------------------------------

def fill(plane: ConsolePlane, driver: ConsoleDriver, nr: int) -> None:
    """Write through a port until its reader's socket is full."""
    index = rx(nr) + 1
    ring, count = driver.rings[index], plane.counters[index]
    address = plane.memory.alloc(65536)
    deadline = 10_000
    while not count.waits:
        if ring.free:
            ring.add([(address, 65536, False)])
            ring.publish()
        ring.take_used()
        deadline -= 1
        assert deadline


def test_a_reader_that_does_not_read_holds_up_its_port_alone(
        served: tuple[ConsolePlane, ConsoleDriver]) -> None:
    plane, driver = served
    index = rx(2) + 1
    fill(plane, driver, 2)
    sent = plane.counters[index].bytes
    for number in range(50):
        driver.write(0, b"%d" % number)
        assert plane.host[0].recv(10) == b"%d" % number
        plane.host[0].send(b"in")
        assert driver.read(0, 2) == b"in"
    plane.host[2].send(b"the other way")
    assert driver.read(2, 13) == b"the other way"
    assert plane.counters[index].bytes == sent
    assert plane.counters[index].waits < 10  # nobody spins
    received = 0
    while received < sent:
        received += len(plane.host[2].recv(1 << 16))
    until(lambda: plane.counters[index].bytes > sent)


def test_what_waits_is_dropped_when_the_reader_leaves(
        served: tuple[ConsolePlane, ConsoleDriver]) -> None:
    plane, driver = served
    fill(plane, driver, 2)
    plane.set_open(2, False)
    until(lambda: driver.rings[7].take_used() is not None and not driver.rings[7].chains)
    assert plane.counters[7].unheard > 0
    assert plane.counters[7].bytes + plane.counters[7].unheard == (
        65536 * plane.counters[7].ring.chains)


def test_output_is_dropped_while_nobody_is_there(
        served: tuple[ConsolePlane, ConsoleDriver]) -> None:
    plane, driver = served
    plane.set_open(2, False)
    driver.write(2, b"lost" * 1000)
    assert plane.counters[7].unheard == 4000
    plane.set_open(2, True)
    driver.write(2, b"heard")
    assert plane.host[2].recv(100) == b"heard"


def test_input_stays_in_the_socket(make: Make) -> None:
    """While the driver has no buffers, and while nobody in the guest has the port open."""
    plane, driver = make({1: SERIAL_PORT})
    driver.begin(1, buffers=0)
    plane.host[1].send(b"early")
    driver.feed(CONTROL_RX, 8)
    driver.set_up(1)
    driver.send(OPEN, 0, 1)
    driver.feed(rx(1), 1)
    driver.messages(2)
    assert driver.rings[rx(1)].take_used() == []
    driver.send(OPEN, 1, 1)
    assert driver.read(1, 5) == b"early"
    driver.send(OPEN, 0, 1)
    plane.host[1].send(b"later")
    driver.messages(0)
    assert plane.counters[rx(1)].bytes == 5
    driver.send(OPEN, 1, 1)
    assert driver.read(1, 5) == b"later"


def test_input_comes_before_the_news_that_nobody_is_there(
        served: tuple[ConsolePlane, ConsoleDriver]) -> None:
    plane, driver = served
    plane.set_open(2, False)
    plane.host[2].send(b"last words")
    assert driver.read(2, 10) == b"last words"


def test_a_socket_that_ends(served: tuple[ConsolePlane, ConsoleDriver]) -> None:
    """Output is dropped, nothing comes, nobody spins; the neighbour goes on."""
    plane, driver = served
    plane.host[2].close()
    driver.write(2, b"x" * 1000)
    driver.write(2, b"y" * 1000)
    assert plane.counters[7].unheard == 2000
    kicks = plane.counters[rx(2)].ring.kicks
    for _ in range(20):
        driver.write(0, b"z")
        assert plane.host[0].recv(10) == b"z"
    assert plane.counters[rx(2)].ring.kicks == kicks
    assert plane.set_open(2, True) == 0


def test_a_flood_through_one_port(served: tuple[ConsolePlane, ConsoleDriver]) -> None:
    """A driver that always has something to say on port 2, and a reader that always reads."""
    plane, driver = served
    ring = driver.rings[7]
    address = plane.memory.alloc(65536)
    plane.host[2].setblocking(False)
    for number in range(100):
        while ring.free:
            ring.add([(address, 65536, False)])
        ring.publish()
        try:
            plane.host[2].recv(1 << 20)
        except BlockingIOError:
            pass
        ring.take_used()
        driver.write(0, b"%d" % number)
        assert plane.host[0].recv(10) == b"%d" % number
        assert plane.broken(7) is None
    assert plane.counters[7].bytes > 0
