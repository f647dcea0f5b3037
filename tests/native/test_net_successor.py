"""Queue pairs that come and go, and what a successor takes over, on a real tap."""

from __future__ import annotations

import os
import struct
import subprocess

import pytest

from tests.native.test_net import (  # noqa: F401  make is a fixture
    BASE,
    CONTROL,
    ERR,
    MAC_CLASS,
    MQ,
    OK,
    RX,
    VLAN,
    Make,
    make,
)
from tests.support.capabilities import require
from tests.support.net_plane import HEADER, MAC, OTHER, NetPlane, ffi, frame, lib
from tests.support.test_vm import wait_until

pytestmark = pytest.mark.native

F_MQ, F_CSUM, F_GUEST_CSUM, F_TSO4 = 1 << 22, 1 << 0, 1 << 1, 1 << 7
PAIRS = BASE | CONTROL | F_MQ


# ---- queue pairs -----------------------------------------------------------------------------

def with_pairs(make: Make, pairs: int = 3) -> NetPlane:  # noqa: F811
    plane = make(pairs=pairs, control=True, features=PAIRS)
    for index in (*range(2 * pairs), 2 * pairs):
        plane.start(index)
        if index < 2 * pairs and not index % 2:
            plane.offer(1600, 32, index)
    return plane


def set_pairs(plane: NetPlane, pairs: int) -> int:
    return plane.command(MQ, 0, struct.pack("<H", pairs))


def test_queue_pairs(make: Make) -> None:  # noqa: F811
    plane = with_pairs(make)
    for pairs, answer in ((0, ERR), (4, ERR), (3, OK), (1, OK), (3, OK), (2, OK)):
        assert set_pairs(plane, pairs) == answer
    assert set_pairs(plane, 1) == OK
    peer = plane.namespace.packet_socket()
    for i in range(8):
        peer.send(frame(60, fill=i))
        assert plane.received()[12:] == frame(60, fill=i)  # all through the first pair


def flows(plane: NetPlane, count: int = 64) -> None:
    """Frames of as many connections, which the tap deals out to its queues."""
    with plane.namespace.packet_socket() as peer:
        for port in range(count):
            ip = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 46, 1, 0, 64, 17, 0, b"\n\0\0\1",
                             b"\n\0\0\2")
            udp = struct.pack(">HHHH", 1000 + port, 2000, 26, 0)
            peer.send(MAC + OTHER + b"\x08\x00" + ip + udp + bytes(18))


def test_pairs_that_come_back_receive_again(make: Make) -> None:  # noqa: F811
    """Their threads had buffers, and nothing to read from, while they had no part in the tap."""
    plane = with_pairs(make)
    for _ in range(3):
        assert set_pairs(plane, 3) == OK
        before = [plane.counters[i].packets for i in (0, 2, 4)]
        flows(plane)
        wait_until(lambda: all(plane.counters[i].packets > old
                               for i, old in zip((0, 2, 4), before, strict=True)),  # noqa: B023
                   "frames on every pair")
        assert set_pairs(plane, 1) == OK
        for index in (0, 2, 4):
            plane.rings[index].wait_used(1)
            plane.offer(1600, 24, index)


def test_a_pair_without_part_sleeps(make: Make) -> None:  # noqa: F811
    plane = with_pairs(make, 2)
    assert set_pairs(plane, 2) == OK
    assert set_pairs(plane, 1) == OK
    before = plane.counters[2].wakeups
    peer = plane.namespace.packet_socket()
    for fill in range(20):
        peer.send(frame(60, fill=fill))
        assert plane.received()[12:] == frame(60, fill=fill)
    assert plane.counters[2].wakeups - before < 5


# ---- an interface that goes ------------------------------------------------------------------

def test_an_interface_that_is_removed(make: Make) -> None:  # noqa: F811
    """Nothing comes, nothing goes, and everything that a driver wants is still carried out."""
    plane = make(pairs=1, control=True, features=BASE | CONTROL)
    for index in range(3):
        plane.start(index)
    plane.offer(1600, 4)
    plane.namespace.run(lambda: subprocess.run(["ip", "link", "del", "tap0"], check=True))
    plane.transmit(HEADER + frame())
    assert plane.counters[1].dropped == 1
    assert plane.command(RX, 0, b"\0") == OK
    before = plane.counters[0].wakeups
    for _ in range(10):
        plane.transmit(HEADER + frame())
    assert plane.counters[0].wakeups - before < 5  # it does not spin
    for index in range(3):
        assert plane.stop(index) >= 0
    assert lib.sv_net_reset(plane.net) == 0
    assert lib.sv_net_set_features(plane.net, BASE) == 0


def test_a_worker_on_a_removed_interface(make: Make) -> None:  # noqa: F811
    first = make(pairs=2, control=True, features=PAIRS)
    first.namespace.run(lambda: subprocess.run(["ip", "link", "del", "tap0"], check=True))
    taps = [os.dup(fd) for fd in first.taps]
    second = make(pairs=2, control=True, features=PAIRS, namespace=first.namespace, taps=taps)
    second.start(1)
    second.transmit(HEADER + frame())
    assert second.counters[1].dropped == 1


# ---- a successor -----------------------------------------------------------------------------

def new_state() -> object:
    return ffi.new("char[]", lib.sv_net_state_size())


def successor(make: Make, first: NetPlane, state: object) -> NetPlane:  # noqa: F811
    return make(control=True, features=first.features, state=state, namespace=first.namespace,
                taps=first.taps)


def test_a_successor_goes_on_with_the_settings(make: Make) -> None:  # noqa: F811
    require("net_admin")
    state = new_state()
    first = NetPlane(control=True, features=BASE | CONTROL, state=state)
    first.start(2)
    assert first.command(RX, 0, b"\0") == OK
    assert first.command(MAC_CLASS, 1, OTHER) == OK
    first.close(taps=False)
    plane = successor(make, first, state)
    plane.start(0)
    plane.offer(1600, 4)
    peer = plane.namespace.packet_socket()
    peer.send(frame(to=MAC))
    peer.send(frame(to=OTHER))
    assert plane.received()[12:18] == OTHER


def test_what_is_set_while_a_successor_gets_ready(make: Make) -> None:  # noqa: F811
    """It is made while the one before still serves: what counts is what holds at the change."""
    require("net_admin")
    state = new_state()
    first = NetPlane(control=True, features=BASE | CONTROL, state=state)
    plane = successor(make, first, state)
    first.start(2)
    assert first.command(RX, 0, b"\0") == OK
    assert first.command(VLAN, 0, struct.pack("<H", 7)) == OK
    assert first.command(MAC_CLASS, 1, OTHER) == OK
    first.close(taps=False)
    assert lib.sv_net_set_features(plane.net, BASE | CONTROL) == 0  # SET_FEATURES at its start
    plane.start(0)
    plane.offer(1600, 4)
    peer = plane.namespace.packet_socket()
    peer.send(frame(to=MAC))
    peer.send(frame(to=OTHER, tag=b"\x81\x00\x00\x08"))
    peer.send(frame(to=OTHER, tag=b"\x81\x00\x00\x07"))
    assert plane.received()[12:] == frame(to=OTHER, tag=b"\x81\x00\x00\x07")


def test_a_reset_while_a_successor_gets_ready(make: Make) -> None:  # noqa: F811
    require("net_admin")
    state = new_state()
    first = NetPlane(control=True, features=BASE | CONTROL, state=state)
    first.start(2)
    assert first.command(RX, 0, b"\0") == OK
    plane = successor(make, first, state)
    first.close(taps=False)
    ffi.memmove(state, bytes(lib.sv_net_state_size()), lib.sv_net_state_size())  # by the core
    assert lib.sv_net_set_features(plane.net, BASE | CONTROL) == 0
    plane.start(0)
    plane.offer(1600, 4)
    plane.namespace.packet_socket().send(frame(to=OTHER))
    assert plane.received()[12:18] == OTHER  # as after power-on


def test_a_successor_leaves_the_tap_alone_until_it_serves(make: Make) -> None:  # noqa: F811
    """What the living one has the tap hand over whole, the tap goes on handing over whole."""
    require("net_admin")
    state = new_state()
    features = BASE | CONTROL | F_CSUM | F_GUEST_CSUM | F_TSO4
    first = make(control=True, features=features, state=state)
    first.start(0, 256)
    first.offer(2000, 60)
    error = ffi.new("int *")
    other = lib.sv_net_create(ffi.new("int[]", first.taps), 1, True, 256, MAC,
                              ffi.new("struct sv_rate[2]", [(0, 0)] * 2),
                              ffi.new("struct sv_net_counters[]", 3),
                              ffi.cast("struct sv_net_state *", state), error)
    assert other != ffi.NULL
    try:
        from tests.native.test_net import tcp_frame

        header, data = tcp_frame(30000)
        first.namespace.packet_socket(headers=True).send(header[:10] + data)
        assert first.received()[12:] == data
    finally:
        lib.sv_net_destroy(other)


@pytest.mark.parametrize("fill", [0xFF, 0x41])
def test_a_state_that_lies_is_not_used(make: Make, fill: int) -> None:  # noqa: F811
    size = lib.sv_net_state_size()
    state = ffi.new("char[]", bytes([fill]) * size)
    plane = make(control=True, features=BASE | CONTROL, state=state)
    plane.start(0)
    plane.offer(1600, 2)
    plane.namespace.packet_socket().send(frame(to=OTHER))
    assert plane.received()[12:18] == OTHER  # as after power-on: everything passes


def test_a_state_that_lies_later_is_not_used(make: Make) -> None:  # noqa: F811
    state = new_state()
    plane = make(control=True, features=BASE | CONTROL, state=state)
    ffi.memmove(state, b"\xff" * lib.sv_net_state_size(), lib.sv_net_state_size())
    assert lib.sv_net_set_features(plane.net, BASE | CONTROL) == 0
    plane.start(0)
    plane.offer(1600, 2)
    plane.namespace.packet_socket().send(frame(to=OTHER))
    assert plane.received()[12:18] == OTHER
