"""The net data plane and its rings: odd buffers, frames that wait, calls, floods, pairs."""

from __future__ import annotations

import contextlib
import os
import random
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from tests.native.test_net import (
    BASE,
    CONTROL,
    F_EVENT_IDX,
    F_GUEST_CSUM,
    F_INDIRECT,
    F_MQ,
    F_TSO4,
    tcp_frame,
)
from tests.support.guest_ring import GuestRing
from tests.support.net_plane import (
    F_VERSION_1,
    HEADER,
    MAC,
    OTHER,
    Make,
    NetPlane,
    frame,
    planes,
)

pytestmark = pytest.mark.native

LIMIT = 10.0
NO_INTERRUPT = 1


@pytest.fixture
def make() -> Iterator[Make]:
    yield from planes()


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.001)  # polls guest memory or a counter


def drained(ring: GuestRing) -> bool:
    """Whether all chains of the ring were used."""
    ring.take_used()
    return not ring.chains


def called(ring: GuestRing) -> bool:
    """Whether a call comes, by nothing but the call descriptor."""
    if not select.select([ring.call_fd], [], [], LIMIT)[0]:
        return False
    os.eventfd_read(ring.call_fd)
    return True


# ---- buffers of a guest's choice -----------------------------------------------------------------

@pytest.mark.parametrize("sizes", [(12,), (13, 17), (100, 12, 61), (1525, 40), (1527, 40), (4096,)],
                         ids=str)
@pytest.mark.parametrize("length", [60, 61, 999, 1514])
def test_mergeable_buffers_of_odd_sizes(make: Make, sizes: tuple[int, ...], length: int) -> None:
    plane = make()
    plane.start(0, 256)
    peer = plane.namespace.packet_socket()
    for fill in range(4):
        rest, count = length + 12, 0
        while rest > 0:  # as many as the frame takes
            size = sizes[count % len(sizes)]
            plane.offer(size)
            rest -= size
            count += 1
        peer.send(frame(length, fill=fill))
        received = plane.received()
        assert received[12:] == frame(length, fill=fill)
        assert received[10:12] == struct.pack("<H", count)
    assert plane.counters[0].dropped == 0


@pytest.mark.parametrize("indirect", [False, True])
@pytest.mark.parametrize("mergeable", [True, False])
def test_a_header_over_several_buffers_of_a_chain(make: Make, mergeable: bool, indirect: bool
                                                  ) -> None:
    plane = make(features=(BASE if mergeable else F_VERSION_1) | F_INDIRECT)
    ring = plane.start(0)
    parts = [(plane.memory.alloc(size, 32), size, True) for size in (5, 6, 1, 30, 2000)]
    ring.add(parts, indirect=indirect)
    ring.publish()
    plane.namespace.packet_socket().send(frame(700, fill=3))
    assert ring.wait_used(1)[0][1] == 712
    data = b"".join(plane.memory.read(address, size) for address, size, _ in parts)
    assert data[12:712] == frame(700, fill=3)
    assert data[10:12] == b"\1\0"


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (0, 1, 3, 2), (2, 3, 0, 1)], ids=str)
def test_pieces_side_by_side_and_apart(make: Make, order: tuple[int, ...]) -> None:
    """What lies side by side is sent as one piece, in the order of the chain."""
    plane = make()
    ring = plane.start(1)
    peer = plane.namespace.packet_socket()
    data = HEADER + MAC + OTHER + b"\x88\xb5" + os.urandom(400 - 26)
    base = plane.memory.alloc(400)
    parts = [(base + 100 * place, 100, False) for place in order]
    for number, (address, size, _) in enumerate(parts):
        plane.memory.write(address, data[100 * number:][:size])
    ring.add(parts)
    ring.publish()
    assert peer.recv(2000) == data[12:]


@pytest.mark.parametrize("lengths", [
    ([60000] + 50 * [20000]) * 4,  # always some are left
    ([20000] + 80 * [100]) * 3,    # until short ones are expected
    random.Random(3).choices((100, 900, 3000, 20000, 60000), k=200)],
    ids=["long", "falling", "mixed"])
def test_long_and_short_frames_in_turn(make: Make, lengths: list[int]) -> None:
    """Buffers that were taken for a long frame serve the short ones that come instead."""
    plane = make(features=BASE | F_GUEST_CSUM | F_TSO4)
    ring = plane.start(0, 256)
    peer = plane.namespace.packet_socket(headers=True)
    room = [plane.memory.alloc(1500, 4) for _ in range(256)]
    for length in lengths:
        while ring.free:
            address = room[ring.free[-1]]
            plane.room[0, ring.add([(address, 1500, True)])] = (address, 1500)
        ring.publish()
        header, data = tcp_frame(length)
        peer.send(header[:10] + data)
        assert plane.received()[12:] == data
    assert plane.counters[0].packets == len(lengths)


def test_long_frames_are_filtered_where_they_lie(make: Make) -> None:
    plane = make(control=True, features=BASE | CONTROL | F_GUEST_CSUM | F_TSO4)
    plane.start(0, 256)
    plane.start(2)
    assert plane.command(0, 0, b"\0") == 0  # not promiscuous
    plane.offer(4096, 120)
    peer = plane.namespace.packet_socket(headers=True)
    for length in (20000, 20000, 30000, 60000):
        header, data = tcp_frame(length)
        peer.send(header[:10] + OTHER + data[6:])
        peer.send(header[:10] + data)
        assert plane.received()[12:] == data
    assert plane.counters[0].dropped == 4


def waiting(plane: NetPlane, ring: GuestRing) -> None:
    """One buffer of 100 bytes, a frame that is longer: the device waits for more of them."""
    plane.offer(100)
    plane.namespace.packet_socket().send(frame(1000, fill=7))
    # While it waits for frames it asks for no kicks.
    until(lambda: ring.avail_event == 1, "it waits for buffers")


@pytest.mark.parametrize("features", [BASE, BASE | F_EVENT_IDX])
@pytest.mark.parametrize("index", [0, 1])
def test_a_stopped_queue_wants_kicks(make: Make, features: int, index: int) -> None:
    """A successor need not ask for them before it waits for the first one."""
    plane = make(features=features)
    ring = GuestRing(plane.memory, 64, features)
    ring.avail_idx = 7
    ring.set_avail_idx(7)
    plane.start(index, base=7, ring=ring)
    until(ring.wants_kick, "it waits for buffers")
    assert plane.stop(index) == 7
    assert ring.wants_kick()


def test_a_frame_waits_for_buffers_enough(make: Make) -> None:
    plane = make(features=BASE | F_EVENT_IDX)
    ring = plane.start(0)
    waiting(plane, ring)
    plane.namespace.packet_socket().send(frame(60, fill=8))
    for _ in range(9):
        plane.offer(100)
    assert ring.used_idx == 0
    plane.offer(100)
    received = plane.received()
    assert received[12:] == frame(1000, fill=7)
    assert received[10:12] == struct.pack("<H", 11)
    plane.offer(100)
    assert plane.received()[12:] == frame(60, fill=8)
    assert plane.counters[0].dropped == 0


def test_a_frame_that_no_ring_holds_is_dropped(make: Make) -> None:
    plane = make()
    plane.start(0, 8)
    plane.offer(100, 8)
    peer = plane.namespace.packet_socket()
    peer.send(frame(1000, fill=1))
    peer.send(frame(60, fill=2))
    assert plane.received()[12:] == frame(60, fill=2)
    assert plane.counters[0].dropped == 1


def test_stop_while_a_frame_waits(make: Make) -> None:
    plane = make(features=BASE | F_EVENT_IDX)
    ring = plane.start(0)
    waiting(plane, ring)
    assert plane.stop(0) == 0
    assert plane.counters[0].dropped == 1
    plane.start(0, ring=ring)
    plane.namespace.packet_socket().send(frame(60, fill=2))
    assert plane.received()[12:] == frame(60, fill=2)


def test_an_index_that_runs_ahead_while_it_is_looked_at(make: Make) -> None:
    """It is reported whenever it comes: while the thread looks for chains, or sleeps."""
    plane = make()
    for number in range(60):
        ring = plane.start(1)
        for _ in range(number):
            plane.transmit(HEADER + frame())
        ring.set_avail_idx(ring.avail_idx + 1000)
        os.eventfd_write(ring.kick_fd, 1)
        assert ring.wait_error()
        plane.stop(1)
        ring.close()
    plane.start(1)


def test_a_bad_chain_while_a_frame_waits(make: Make) -> None:
    plane = make(features=BASE | F_EVENT_IDX)
    ring = plane.start(0)
    waiting(plane, ring)
    ring.add([(0xDEAD0000, 2000, True)])
    ring.publish()
    assert ring.wait_error()
    assert plane.stop(0) >= 0


# ---- calls ---------------------------------------------------------------------------------------

def queue_frames(plane: NetPlane, ring: GuestRing, address: int, count: int) -> None:
    for _ in range(count):
        ring.add([(address, 76, False)])
    ring.publish()


def passed(ring: GuestRing, event: int) -> bool:
    """Whether the used index has passed the entry that a call was asked for."""
    return (event - ring.used_idx) & 0xFFFF >= 0x8000


@pytest.mark.parametrize("size", [2, 16, 256])
def test_no_call_is_lost_with_the_event_index(make: Make, size: int) -> None:
    """The driver sleeps until a call for the entry that it named, whichever that is."""
    plane = make(features=BASE | F_EVENT_IDX)
    ring = plane.start(1, size)
    chance = random.Random(size)
    address = plane.memory.alloc(100)
    plane.memory.write(address, HEADER + frame())
    sent = 0
    for _ in range(200):
        count = chance.randint(1, size)
        event = ring.used_seen + chance.randrange(count)
        ring.set_used_event(event)
        queue_frames(plane, ring, address, count)
        sent += count
        assert called(ring), f"no call after {event}; {ring.used_idx} are used"
        until(lambda: drained(ring), "all are used")
        ring.calls()
    assert plane.counters[1].packets == sent


def test_a_driver_that_wants_no_calls_gets_none(make: Make) -> None:
    plane = make()
    ring = plane.start(1, 256)
    address = plane.memory.alloc(100)
    plane.memory.write(address, HEADER + frame())
    ring.set_avail_flags(NO_INTERRUPT)
    for _ in range(4):
        queue_frames(plane, ring, address, 256)
        until(lambda: drained(ring), "all are used")
    assert ring.calls() == 0
    ring.set_avail_flags(0)
    queue_frames(plane, ring, address, 1)
    assert called(ring)


def test_a_call_is_not_held_back_by_frames_that_are_dropped(make: Make) -> None:
    plane = make(control=True, features=BASE | CONTROL)
    ring = plane.start(0, 256)
    plane.start(2)
    assert plane.command(0, 0, b"\0") == 0  # not promiscuous
    plane.offer(1600, 256)
    peer = plane.namespace.packet_socket()
    stop = threading.Event()
    header, data = tcp_frame(64000)  # becomes 45 frames

    def flood() -> None:
        with plane.namespace.packet_socket(headers=True) as other:
            while not stop.is_set():
                with contextlib.suppress(OSError):  # the tap is full
                    other.send(header[:10] + b"\2aaaaa" + data[6:])

    threads = [threading.Thread(target=flood) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        until(lambda: plane.counters[0].dropped > 1000, "the flood comes")
        for _ in range(32):
            until(partial(passes, plane, peer), "the tap has room")
            assert called(ring)
            ring.take_used()
            ring.calls()
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def passes(plane: NetPlane, peer: socket.socket) -> bool:
    """Send a frame that is wanted; whether one came through a tap that mostly is full."""
    before = plane.counters[0].packets
    with contextlib.suppress(OSError):
        peer.send(frame(60))
    time.sleep(0.001)  # it is counted then, or another one will
    return bool(plane.counters[0].packets > before)


# ---- floods --------------------------------------------------------------------------------------

def test_kicks_for_nothing(make: Make) -> None:
    """They cost the queue that they are for, and no other."""
    plane = make()
    rings = [plane.start(0), plane.start(1)]
    plane.offer(1600, 32)
    peer = plane.namespace.packet_socket()
    for fill in range(32):
        for _ in range(300):
            os.eventfd_write(rings[fill % 2].kick_fd, 1)
        peer.send(frame(60, fill=fill))
        assert plane.received()[12:] == frame(60, fill=fill)
    plane.transmit(HEADER + frame(60, fill=1))
    assert peer.recv(2000) == frame(60, fill=1)
    assert [counters.packets for counters in plane.counters] == [32, 1]


def test_stop_in_a_flood(make: Make) -> None:
    """What was taken is sent, what wasn't is still there; the other direction goes on."""
    plane = make(features=BASE | F_EVENT_IDX)
    plane.start(0)
    plane.offer(1600, 64)
    ring = plane.start(1, 256)
    address = plane.memory.alloc(1600)
    plane.memory.write(address, HEADER + frame(1514))
    peer = plane.namespace.packet_socket()
    chance = random.Random(1)
    for fill in range(40):
        while ring.free:
            ring.add([(address, 1526, False)])
        event = ring.used_seen + chance.randrange(256)
        ring.set_used_event(event)
        ring.calls()
        ring.publish()
        peer.send(frame(60, fill=fill))
        base = plane.stop(1)
        assert base == ring.used_idx & 0xFFFF
        assert plane.counters[1].packets == base
        assert ring.calls() or not passed(ring, event)
        plane.start(1, ring=ring, base=base)
        until(lambda: drained(ring), "the rest is sent")
        assert plane.received()[12:] == frame(60, fill=fill)
    assert plane.counters[1].packets == 40 * 256


def test_the_same_chain_again_before_it_is_used(make: Make) -> None:
    plane = make()
    ring = plane.start(0)
    ring.put_avail(ring.add([(plane.memory.alloc(100), 100, True)]))
    ring.publish()
    assert ring.wait_error()
    assert "twice" in (plane.broken(0) or "")


# ---- several queue pairs -------------------------------------------------------------------------

def flow(port: int, to_guest: bool) -> bytes:
    """A UDP frame; both ways of a port are one flow to the tap."""
    ends = [(MAC, bytes([10, 0, 0, 2]), port), (OTHER, bytes([10, 0, 0, 1]), 9)]
    (to, to_ip, to_port), (source, source_ip, source_port) = ends if to_guest else ends[::-1]
    udp = struct.pack(">HHHH", source_port, to_port, 8 + 18, 0) + bytes(18)
    ip = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(udp), 1, 0, 64, 17, 0, source_ip, to_ip)
    return to + source + b"\x08\x00" + ip + udp


def test_a_flow_comes_back_through_its_pair(make: Make) -> None:
    plane = make(pairs=3, control=True, features=BASE | CONTROL | F_MQ | F_EVENT_IDX)
    for index in range(7):
        plane.start(index)
    assert plane.command(4, 0, struct.pack("<H", 3)) == 0
    peer = plane.namespace.packet_socket()
    for round_ in range(3):
        for pair in range(3):
            plane.offer(1600, 1, 2 * pair)
            plane.transmit(HEADER + flow(2000 + pair, False), index=2 * pair + 1)
            assert peer.recv(2000) == flow(2000 + pair, False)
            peer.send(flow(2000 + pair, True))
            assert plane.received(2 * pair)[12:] == flow(2000 + pair, True)
            assert plane.counters[2 * pair].packets == round_ + 1


def test_a_pair_that_breaks_leaves_the_others(make: Make) -> None:
    plane = make(pairs=2, control=True, features=BASE | CONTROL | F_MQ)
    for index in range(5):
        plane.start(index)
    assert plane.command(4, 0, struct.pack("<H", 2)) == 0
    plane.rings[3].add([(0xDEAD0000, 100, False)])
    plane.rings[3].publish()
    assert plane.rings[3].wait_error()
    peer = plane.namespace.packet_socket()
    plane.offer(1600)
    plane.transmit(HEADER + flow(2000, False), index=1)
    assert peer.recv(2000) == flow(2000, False)
    peer.send(flow(2000, True))
    assert plane.received()[12:] == flow(2000, True)


# ---- offloads that lie, commands that are cut ----------------------------------------------------

def lies() -> dict[str, tuple[bytes, int]]:
    """(header, bytes of a TCP segment behind it)"""
    def header(flags: int, kind: int, length: int, size: int, start: int, offset: int) -> bytes:
        return struct.pack("<BBHHHHH", flags, kind, length, size, start, offset, 0xFFFF)

    return {
        "segments of one byte": (header(1, 1, 54, 1, 34, 16), 3000),
        "segments longer than the frame": (header(1, 1, 54, 0xFFFF, 34, 16), 3000),
        "no header before the segments": (header(1, 1, 0, 1448, 34, 16), 3000),
        "segmentation without checksum": (header(0, 1, 54, 1448, 0, 0), 3000),
        "checksum of the wrong field": (header(1, 1, 54, 1448, 34, 6), 3000),
        "checksum in the Ethernet header": (header(1, 0, 0, 0, 0, 0), 100),
        "checksum that wraps": (header(1, 0, 0, 0, 0xFFFF, 0xFFFF), 100),
        "checksum across the end": (header(1, 0, 0, 0, 34, 119), 100),
        "UDP fragments of a TCP segment": (header(1, 3, 42, 1448, 34, 6), 3000),
        "UDP segments of a TCP segment": (header(1, 5, 42, 1448, 34, 6), 3000),
        "IPv6 segments of an IPv4 frame": (header(1, 4, 74, 1448, 34, 16), 3000),
        "congestion and nothing else": (header(1, 0x80, 54, 1448, 34, 16), 3000),
        "all bits": (b"\xff" * 12, 3000),
        "longer than the interface takes": (HEADER, 65000),
    }


@pytest.mark.parametrize(("header", "length"), lies().values(), ids=lies().keys())
def test_more_offload_headers_that_lie(make: Make, header: bytes, length: int) -> None:
    plane = make(features=BASE | 1 | 1 << 11)
    plane.start(1)
    peer = plane.namespace.packet_socket()
    plane.transmit(header + tcp_frame(length)[1][:54 + length], pieces=3)
    plane.transmit(HEADER + frame(60, fill=2))
    while peer.recv(70000) != frame(60, fill=2):  # passed on, cut or dropped: the queue goes on
        pass
    counters = plane.counters[1]
    assert counters.packets + counters.errors + counters.dropped == 2
    assert plane.broken(1) is None


COMMANDS = [
    b"\0\0\1", b"\1\1" + OTHER, b"\2\0" + struct.pack("<H", 7), b"\4\0" + struct.pack("<H", 1),
    b"\5\0" + bytes(8), b"\1\0" + (struct.pack("<I", 2) + MAC + OTHER) * 2]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{command[0]}-{command[1]}")
def test_commands_cut_anywhere(make: Make, command: bytes) -> None:
    plane = make(control=True, pairs=1, features=BASE | CONTROL | F_MQ)
    ring = plane.start(2)
    whole = plane.memory.alloc(len(command))
    plane.memory.write(whole, command)
    answer = plane.memory.alloc(16)
    for length in range(len(command) + 1):
        for step in (1, 3, 1000):
            plane.memory.fill(answer, 16, 0xAA)
            pieces = [(whole + at, min(step, length - at), False) for at in range(0, length, step)]
            ring.add([*pieces, (answer, 4, True), (answer + 8, 4, True)])
            ring.publish()
            assert ring.wait_used(1)[0][1] == 1
            status = plane.memory.read(answer, 16)
            assert status == bytes([length < len(command)]) + b"\xaa" * 15
    assert plane.broken(2) is None


def test_a_flood_of_commands(make: Make) -> None:
    plane = make(control=True, features=BASE | CONTROL)
    plane.start(0)
    ring = plane.start(2, 256)
    address, answer = plane.memory.alloc(64), plane.memory.alloc(64)
    plane.memory.write(address, b"\2\0\7\0")
    plane.offer(1600, 16)
    peer = plane.namespace.packet_socket()
    for fill in range(16):
        while len(ring.free) > 1:
            ring.add([(address, 4, False), (answer, 1, True)])
        ring.publish()
        peer.send(frame(60, fill=fill))
        assert plane.received()[12:] == frame(60, fill=fill)
        until(lambda: drained(ring), "all are answered")
    assert plane.counters[2].commands == 16 * 128
