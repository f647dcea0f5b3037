"""virtio-console whose worker ends in the middle, and whose driver breaks the rules."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator

import pytest

from tests.support.console_driver import (
    ADD,
    CONTROL_RX,
    CONTROL_TX,
    DEVICE_READY,
    OPEN,
    READY,
    RESIZE,
    ConsoleDriver,
    rx,
)
from tests.support.console_plane import (
    CONSOLE_PORT,
    FEATURES,
    SERIAL_PORT,
    ConsolePlane,
    Make,
    console_planes,
    set_up,
)
from tests.support.ring_plane import ffi, lib, until

pytestmark = pytest.mark.native


@pytest.fixture
def make() -> Iterator[Make]:
    with console_planes() as build:
        yield build


@pytest.fixture
def served(make: Make) -> tuple[ConsolePlane, ConsoleDriver]:
    return set_up(make)


# ---- stops and successors --------------------------------------------------------------------

def test_queues_stop_one_by_one(served: tuple[ConsolePlane, ConsoleDriver]) -> None:
    """The others go on; what was not delivered waits for the next start."""
    plane, driver = served
    base = plane.stop(rx(2))
    plane.host[2].send(b"while it stood")
    driver.write(0, b"on")
    assert plane.host[0].recv(10) == b"on"
    driver.write(2, b"and on")
    assert plane.host[2].recv(10) == b"and on"
    assert driver.rings[rx(2)].take_used() == []
    plane.start(rx(2), base=base, ring=driver.rings[rx(2)])
    assert driver.read(2, 14) == b"while it stood"


def test_half_a_chain_goes_on_after_a_stop(served: tuple[ConsolePlane, ConsoleDriver]) -> None:
    plane, driver = served
    data = os.urandom(1 << 20)
    driver.write(2, data, wait=False, pieces=5)
    until(lambda: plane.counters[7].waits > 0)
    base = plane.stop(7)
    assert driver.rings[7].take_used() == []
    plane.start(7, base=base, ring=driver.rings[7])
    received = b""
    while len(received) < len(data):
        received += plane.host[2].recv(1 << 16)
    assert received == data
    driver.rings[7].wait_used(1)
    driver.write(2, b"the next one whole")
    assert plane.host[2].recv(100) == b"the next one whole"


def test_a_successor_goes_on(make: Make) -> None:
    """What the guest has opened, and what it was told; output that had gone in part."""
    state = ffi.new("char[]", lib.sv_console_state_size())
    plane, driver = make(state=state)
    driver.begin(0, 2)
    driver.set_up(0, 2)
    driver.messages(4)
    data = os.urandom(1 << 20)
    driver.write(2, data, wait=False)
    until(lambda: plane.counters[7].waits > 0)
    plane.die()
    plane.host[2].send(b"hello")
    successor, _ = make({0: {**CONSOLE_PORT, "cols": 100, "rows": 40}, 2: SERIAL_PORT},
                        state=state, before=plane)
    for index, ring in driver.rings.items():
        successor.start(index, base=ring.used_idx, ring=ring)
    assert driver.read(2, 5) == b"hello"
    assert driver.messages(1) == [(0, RESIZE, 0, struct.pack("<HH", 100, 40))]
    received = b""
    while len(received) < len(data):
        received += plane.host[2].recv(1 << 16)
    assert received == data
    successor.set_open(2, False)
    assert driver.messages(1) == [(2, OPEN, 0, b"")]  # nothing was told twice


def test_a_reset_forgets_everything(served: tuple[ConsolePlane, ConsoleDriver]) -> None:
    plane, _ = served
    for index in list(plane.rings):
        plane.stop(index)
    assert lib.sv_ring_reset(plane.device) == 0
    plane.check(lib.sv_ring_set_features(plane.device, FEATURES))
    again = ConsoleDriver(plane.memory, lambda index: plane.start(index, 32))
    again.begin(0, 2)
    plane.host[2].send(b"x")
    again.send(DEVICE_READY)
    assert again.messages(2) == [(0, ADD, 1, b""), (2, ADD, 1, b"")]
    assert again.rings[rx(2)].take_used() == []
    again.send(OPEN, 1, 2)
    assert again.read(2, 1) == b"x"


def test_a_state_that_was_wiped_after_a_reset(make: Make) -> None:
    """By the core, which can't know whether the worker that it told of the reset heard it."""
    size = lib.sv_console_state_size()
    state = ffi.new("char[]", size)
    plane, _ = make(state=state)
    plane.check(lib.sv_ring_reset(plane.device))
    ffi.memmove(state, bytes(size), size)
    plane.check(lib.sv_ring_set_features(plane.device, FEATURES))
    driver = ConsoleDriver(plane.memory, lambda index: plane.start(index, 32))
    driver.begin(0, 2)
    driver.set_up(0, 2)
    driver.messages(4)
    plane.die()
    successor, _ = make(state=state, before=plane)
    for index, ring in driver.rings.items():
        successor.start(index, base=ring.used_idx, ring=ring)
    plane.host[2].send(b"still open")
    assert driver.read(2, 10) == b"still open"


@pytest.mark.parametrize("fill", [b"\xff", b"\x41", b"\1"])
@pytest.mark.parametrize("magic", [b"", struct.pack("<I", 0x53564331)])
def test_a_state_that_lies(make: Make, fill: bytes, magic: bytes) -> None:
    size = lib.sv_console_state_size()
    state = ffi.new("char[]", (magic + fill * size)[:size])
    _, driver = make(state=state)
    driver.begin(0, 2)
    driver.send(DEVICE_READY)
    assert driver.messages(2) == [(0, ADD, 1, b""), (2, ADD, 1, b"")]


# ---- drivers that break the rules ------------------------------------------------------------

@pytest.mark.parametrize(("index", "buffers", "reason"), [
    (0, [(16, False)], "to be read"), (6, [(16, False), (16, True)], "to be read"),
    (1, [(16, True)], "to be written"), (7, [(16, False), (16, True)], "to be written"),
    (CONTROL_RX, [(16, False)], "can't hold a message"),
    (CONTROL_RX, [(7, True)], "can't hold a message"),
    (CONTROL_TX, [(8, False), (8, True)], "to be written"),
    (0, [(0, True)], "length zero"), (7, [(0, False)], "length zero"),
    (7, [(0xFFFFFFFF, False)], "outside guest memory"),
    (0, [(0xFFFFFFFF, True)], "outside guest memory")])
def test_chains_that_break_the_rules(make: Make, index: int, buffers: list[tuple[int, bool]],
                                     reason: str) -> None:
    plane, driver = make()
    driver.begin(0, 2, buffers=0)
    driver.send(OPEN, 1, 0)
    driver.send(OPEN, 1, 2)
    driver.send(DEVICE_READY)
    for nr in (0, 2):
        plane.host[nr].send(b"x")
    ring = driver.rings[index]
    room = plane.memory.alloc(4096)
    ring.add([(room, length, writable) for length, writable in buffers])
    ring.publish()
    assert ring.wait_error()
    assert reason in (plane.broken(index) or "")
    assert plane.counters[index].ring.broken == 1
    other = 0 if index > 3 else 2  # the neighbour sees nothing
    if index != CONTROL_TX:
        driver.write(other, b"alive")
        assert plane.host[other].recv(10) == b"alive"


def test_a_loop_breaks_its_queue(served: tuple[ConsolePlane, ConsoleDriver]) -> None:
    plane, driver = served
    ring = driver.rings[7]
    room = plane.memory.alloc(16)
    head, other = ring.free[-1], ring.free[-2]
    ring.put_desc(head, room, 16, 1, other)
    ring.put_desc(other, room, 16, 1, head)
    ring.put_avail(head)
    ring.publish()
    assert ring.wait_error()
    assert "loops" in (plane.broken(7) or "")


def test_a_chain_that_shrinks_while_it_waits(served: tuple[ConsolePlane, ConsoleDriver]) -> None:
    """More of it has gone than it has now: it is done."""
    plane, driver = served
    head = driver.write(2, bytes(1 << 20), wait=False)
    until(lambda: plane.counters[7].waits > 0)
    driver.rings[7].put_desc(head, plane.memory.base, 8, 0, 0)
    sent = plane.counters[7].bytes
    received = 0
    while received < sent:
        received += len(plane.host[2].recv(1 << 16))
    assert driver.rings[7].wait_used(1) == [(head, 0)]
    driver.write(2, b"next")
    assert plane.host[2].recv(10) == b"next"


@pytest.mark.parametrize(("max_ports", "size", "error"), [
    (0, 128, errno.EINVAL), (32, 128, errno.EINVAL), (1, 0, errno.EINVAL)])
def test_what_can_not_be_made(max_ports: int, size: int, error: int) -> None:
    ports = ffi.new("struct sv_console_port[]", 32)
    counters, result = ffi.new("struct sv_console_counters[]", 66), ffi.new("int *")
    assert lib.sv_console_create(ports, max_ports, size, counters, ffi.NULL, result) == ffi.NULL
    assert result[0] == -error


def test_all_ports(make: Make) -> None:
    numbers = range(31)
    plane, driver = make({nr: {"open": True, "name": b"p%d" % nr} for nr in numbers},
                         max_ports=31)
    driver.begin(*numbers, buffers=2)
    driver.send(DEVICE_READY)
    assert [nr for nr, *_ in driver.messages(31)] == list(numbers)
    for nr in numbers:
        driver.send(READY, 1, nr)
        driver.send(OPEN, 1, nr)
    for nr in numbers:
        driver.write(nr, b"from %d" % nr)
        plane.host[nr].send(b"to %d" % nr)
    for nr in numbers:
        assert plane.host[nr].recv(100) == b"from %d" % nr
        assert driver.read(nr, len(b"to %d" % nr)) == b"to %d" % nr
