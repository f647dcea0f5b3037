"""The net data plane on a real tap: frames both ways, what drivers and taps do wrong."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Iterator

import pytest

from tests.support.guest_ring import INDIRECT, NEXT, WRITE
from tests.support.net_namespace import NetNamespace
from tests.support.net_plane import (
    BROADCAST,
    F_MRG_RXBUF,
    F_VERSION_1,
    HEADER,
    MAC,
    OTHER,
    Make,
    NetPlane,
    ffi,
    frame,
    lib,
    planes,
)

pytestmark = pytest.mark.native

F_EVENT_IDX = 1 << 29
F_INDIRECT = 1 << 28
F_CSUM, F_GUEST_CSUM, F_TSO4 = 1 << 0, 1 << 1, 1 << 7
CONTROL = 1 << 17 | 1 << 18 | 1 << 19 | 1 << 20 | 1 << 21 | 1 << 23 | 1 << 2
BASE = F_VERSION_1 | F_MRG_RXBUF
F_MQ = 1 << 22
MULTICAST = bytes.fromhex("01005e000001")
RX, MAC_CLASS, VLAN, ANNOUNCE, MQ, OFFLOADS = range(6)
OK, ERR = 0, 1


@pytest.fixture
def make() -> Iterator[Make]:
    yield from planes()


def nothing_comes(plane: NetPlane, index: int = 0) -> bool:
    """A marker frame that passes every filter arrives first: what was sent before did not."""
    return plane.received(index)[12:].startswith(BROADCAST)


# ---- transmitting ----------------------------------------------------------------------------

@pytest.mark.parametrize(("length", "pieces"), [(60, 1), (60, 7), (1514, 2), (1514, 40)])
def test_frames_reach_the_host(make: Make, length: int, pieces: int) -> None:
    plane = make()
    plane.start(1)
    peer = plane.namespace.packet_socket()
    for fill in range(3):
        plane.transmit(HEADER + frame(length, fill=fill), pieces=pieces)
        assert peer.recv(2000) == frame(length, fill=fill)
    assert plane.counters[1].packets == 3
    assert plane.counters[1].bytes == 3 * length


def test_a_large_frame_with_segmentation_stays_whole(make: Make) -> None:
    plane = make(features=BASE | F_CSUM | 1 << 11)
    plane.start(1)
    peer = plane.namespace.packet_socket(headers=True)
    header, data = tcp_frame(40000)
    plane.transmit(header + data, pieces=11)
    received = peer.recv(70000)
    assert received[10:] == data
    assert received[1] == 1  # GSO_TCPV4


def tcp_frame(payload: int) -> tuple[bytes, bytes]:
    """(virtio_net_hdr_v1, frame) of a TCP segment to be cut to 1448 bytes."""
    ip = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 40 + payload, 1, 0, 64, 6, 0,
                     bytes([10, 0, 0, 2]), bytes([10, 0, 0, 1]))
    tcp = struct.pack(">HHIIBBHHH", 1000, 2000, 1, 1, 0x50, 0x10, 1000, 0, 0)
    header = struct.pack("<BBHHHHH", 1, 1, 54, 1448, 34, 16, 0)
    return header, MAC + OTHER + b"\x08\x00" + ip + tcp + os.urandom(payload)


LIES = {
    "checksum beyond the frame": struct.pack("<BBHHHHH", 1, 0, 0, 0, 60000, 16, 0),
    "checksum at the end": struct.pack("<BBHHHHH", 1, 0, 0, 0, 59, 0xFFFF, 0),
    "unknown segmentation": struct.pack("<BBHHHHH", 1, 0x55, 54, 1448, 34, 16, 0),
    "segments of nothing": struct.pack("<BBHHHHH", 1, 1, 54, 0, 34, 16, 0),
    "header longer than the frame": struct.pack("<BBHHHHH", 1, 1, 0xFFFF, 100, 34, 16, 0),
}


@pytest.mark.parametrize("header", LIES.values(), ids=LIES.keys())
def test_offload_headers_that_lie(make: Make, header: bytes) -> None:
    plane = make(features=BASE | F_CSUM)
    plane.start(1)
    peer = plane.namespace.packet_socket()
    plane.transmit(header + frame(60, fill=1))
    plane.transmit(HEADER + frame(60, fill=2))
    assert peer.recv(2000)[-1] in (1, 2)  # passed on or dropped: the queue goes on
    assert plane.counters[1].packets + plane.counters[1].errors == 2
    assert plane.broken(1) is None


@pytest.mark.parametrize("data", [b"", b"\0" * 5, HEADER, HEADER + b"short",
                                  HEADER + bytes(70000)],
                         ids=["empty-header", "part", "no-frame", "runt", "giant"])
def test_frames_that_are_none(make: Make, data: bytes) -> None:
    plane = make()
    plane.start(1)
    plane.transmit(data or b"\0")
    plane.transmit(HEADER + frame())
    assert plane.counters[1].errors == 1
    assert plane.counters[1].packets == 1


def test_interface_down_drops(make: Make) -> None:
    namespace = NetNamespace()
    plane = make(namespace=namespace, taps=namespace.tap(up=False))
    plane.start(1)
    plane.transmit(HEADER + frame())
    assert plane.counters[1].dropped == 1
    namespace.up("tap0")
    plane.transmit(HEADER + frame())
    assert plane.counters[1].packets == 1


# ---- receiving -------------------------------------------------------------------------------

@pytest.mark.parametrize("mergeable", [True, False])
@pytest.mark.parametrize("length", [60, 1514])
def test_frames_reach_the_guest(make: Make, length: int, mergeable: bool) -> None:
    plane = make(features=F_VERSION_1 | (F_MRG_RXBUF if mergeable else 0))
    plane.start(0)
    plane.offer(1600, 4)
    peer = plane.namespace.packet_socket()
    for fill in range(3):
        peer.send(frame(length, fill=fill))
        received = plane.received()
        assert received[12:] == frame(length, fill=fill)
        assert received[10:12] == b"\1\0"
    assert plane.counters[0].bytes == 3 * length


def test_a_frame_over_many_buffers(make: Make) -> None:
    plane = make(features=BASE | F_GUEST_CSUM | F_TSO4)
    plane.start(0, 256)
    peer = plane.namespace.packet_socket(headers=True)
    plane.namespace.up("tap0", 1500)
    for payload in (1000, 20000, 60000, 100, 60000):
        plane.offer(1500, 50)
        header, data = tcp_frame(payload)
        peer.send(header[:10] + data)
        received = plane.received()
        assert received[12:] == data
        assert struct.unpack_from("<H", received, 10)[0] == -(-(12 + len(data)) // 1500)


def test_without_offloads_large_frames_come_in_pieces(make: Make) -> None:
    plane = make(features=BASE)
    plane.start(0)
    plane.offer(2000, 40)
    peer = plane.namespace.packet_socket(headers=True)
    header, data = tcp_frame(3000)
    peer.send(header[:10] + data)
    deadline = time.monotonic() + 10
    while plane.counters[0].packets < 3:
        assert time.monotonic() < deadline
        time.sleep(0.002)  # polls a counter
    assert plane.counters[0].bytes == 3000 + 3 * 54


def test_frames_wait_for_buffers(make: Make) -> None:
    plane = make()
    plane.start(0)
    peer = plane.namespace.packet_socket()
    peer.send(frame(100, fill=1))
    plane.offer(1600)
    assert plane.received()[12:] == frame(100, fill=1)
    assert plane.counters[0].wakeups < 20  # it sleeps while it can't receive


def test_a_frame_longer_than_its_buffer_is_dropped(make: Make) -> None:
    plane = make(features=F_VERSION_1)  # a frame can't go on in a second buffer
    plane.start(0)
    plane.offer(100, 1)
    peer = plane.namespace.packet_socket()
    peer.send(frame(1000, fill=1))
    peer.send(frame(60, fill=2))
    assert plane.received()[12:] == frame(60, fill=2)
    assert plane.counters[0].dropped == 1


@pytest.mark.parametrize("index_of", ["event index", "flags"])
def test_interrupts_and_kicks(make: Make, index_of: str) -> None:
    plane = make(features=BASE | (F_EVENT_IDX if index_of == "event index" else 0))
    ring = plane.start(1)
    for i in range(300):
        ring.set_used_event(i)
        plane.transmit(HEADER + frame())
    assert plane.counters[1].packets == 300


# ---- hostile drivers -------------------------------------------------------------------------

def test_a_receive_buffer_that_holds_no_header(make: Make) -> None:
    plane = make()
    ring = plane.start(0)
    plane.offer(11)
    peer = plane.namespace.packet_socket()
    peer.send(frame())
    assert ring.wait_error()
    assert "can't hold a frame" in (plane.broken(0) or "")


def test_a_readable_receive_buffer(make: Make) -> None:
    plane = make()
    ring = plane.start(0)
    ring.add([(plane.memory.alloc(2000), 2000, False)])
    ring.publish()
    assert ring.wait_error()


@pytest.mark.parametrize("index", [0, 1])
def test_a_chain_out_of_memory_breaks_only_its_queue(make: Make, index: int) -> None:
    plane = make()
    rings = [plane.start(0), plane.start(1)]
    rings[index].add([(0xDEAD0000, 2000, index == 0)])
    rings[index].publish()
    assert rings[index].wait_error()
    assert "outside guest memory" in (plane.broken(index) or "")
    assert plane.broken(1 - index) is None


def test_a_loop_and_an_index_that_runs_ahead(make: Make) -> None:
    plane = make()
    ring = plane.start(1)
    ring.put_desc(0, plane.memory.alloc(100), 100, NEXT, 0)
    ring.put_avail(0)
    ring.publish()
    assert ring.wait_error()
    other = plane.start(0)
    other.set_avail_idx(1000)
    os.eventfd_write(other.kick_fd, 1)
    assert other.wait_error()


def test_unwanted_indirect_and_bad_rings(make: Make) -> None:
    plane = make()
    ring = plane.start(1)
    ring.put_desc(0, plane.memory.alloc(100), 16, INDIRECT, 0)
    ring.put_avail(0)
    ring.publish()
    assert ring.wait_error()
    setup = ffi.new("struct sv_net_ring *", {"size": 64, "desc": 0x1000, "avail": 0x2000,
                                            "used": 0x3000, "kick_fd": -1, "call_fd": -1,
                                            "err_fd": -1})
    assert lib.sv_net_start(plane.net, 0, setup) < 0
    setup.size = 512
    assert lib.sv_net_start(plane.net, 0, setup) < 0
    assert lib.sv_net_start(plane.net, 7, setup) < 0
    assert lib.sv_net_stop(plane.net, 0) < 0
    assert lib.sv_net_stop(plane.net, 9) < 0


# ---- stop and start --------------------------------------------------------------------------

def test_stop_gives_unused_buffers_back(make: Make) -> None:
    plane = make()
    ring = plane.start(0)
    plane.offer(1600, 8)
    peer = plane.namespace.packet_socket()
    peer.send(frame(60, fill=1))
    assert plane.received()[12:] == frame(60, fill=1)
    base = plane.stop(0)
    assert base == 1
    peer.send(frame(60, fill=2))
    plane.start(0, ring=ring, base=base)
    assert plane.received()[12:] == frame(60, fill=2)


def test_stop_is_prompt_while_idle_full_and_limited(make: Make) -> None:
    plane = make(limits=((1, 0), (1, 0)))
    plane.start(0)
    ring = plane.start(1)
    for _ in range(8):
        address = plane.memory.alloc(100)
        plane.memory.write(address, HEADER + frame())
        ring.add([(address, 76, False)])
    ring.publish()
    ring.wait_used(1)
    began = time.monotonic()
    base = plane.stop(1)
    plane.stop(0)
    assert time.monotonic() - began < 0.5
    assert base == ring.used_idx  # nothing taken is lost
    assert base < 8


def test_limits_hold(make: Make) -> None:
    plane = make(limits=((0, 0), (1000, 0)))
    ring = plane.start(1, 256)
    began = time.monotonic()
    for _ in range(200):
        address = plane.memory.alloc(100, 64)
        plane.memory.write(address, HEADER + frame())
        ring.add([(address, 76, False)])
    ring.publish()
    ring.wait_used(200)
    # 200 frames at 1,000 a second, 100 of them at once.
    assert 0.09 < time.monotonic() - began < 5


def test_limit_of_bytes(make: Make) -> None:
    plane = make(limits=((0, 0), (0, 100_000)))
    plane.start(1)
    began = time.monotonic()
    for _ in range(20):
        plane.transmit(HEADER + frame(1500))
    assert time.monotonic() - began > 0.15


# ---- the control queue -----------------------------------------------------------------------

@pytest.fixture
def controlled(make: Make) -> NetPlane:
    plane = make(control=True, features=BASE | CONTROL)
    plane.start(0)
    plane.start(2)
    plane.offer(1600, 16)
    return plane


def test_receive_modes_and_the_mac_table(controlled: NetPlane) -> None:
    plane = controlled
    peer = plane.namespace.packet_socket()
    assert plane.command(RX, 0, b"\0") == OK  # not promiscuous
    assert plane.command(VLAN, 0, b"\0\0") == OK
    for wanted in (MAC, BROADCAST):
        peer.send(frame(to=OTHER))
        peer.send(frame(to=MULTICAST))
        peer.send(frame(to=wanted))
        assert plane.received()[12:18] == wanted
    table = struct.pack("<I", 1) + OTHER + struct.pack("<I", 1) + MULTICAST
    assert plane.command(MAC_CLASS, 0, table, pieces=3) == OK
    for wanted in (OTHER, MULTICAST):
        peer.send(frame(to=wanted))
        assert plane.received()[12:18] == wanted
    assert plane.command(RX, 5, b"\1") == OK  # no broadcast
    peer.send(frame(to=BROADCAST))
    peer.send(frame(to=MAC))
    assert plane.received()[12:18] == MAC
    assert plane.command(RX, 0, b"\1") == OK  # promiscuous
    peer.send(frame(to=b"\2aaaaa"))
    assert plane.received()[12:18] == b"\2aaaaa"


def test_an_address_of_the_drivers_choice(controlled: NetPlane) -> None:
    plane = controlled
    peer = plane.namespace.packet_socket()
    assert plane.command(RX, 0, b"\0") == OK
    assert plane.command(MAC_CLASS, 1, OTHER) == OK
    peer.send(frame(to=MAC))
    peer.send(frame(to=OTHER))
    assert plane.received()[12:18] == OTHER
    mac = ffi.new("uint8_t[6]")
    lib.sv_net_mac(plane.net, mac)
    assert bytes(mac) == OTHER
    assert plane.command(MAC_CLASS, 1, MULTICAST) == ERR


def test_a_table_that_overflows_lets_everything_pass(controlled: NetPlane) -> None:
    plane = controlled
    assert plane.command(RX, 0, b"\0") == OK
    table = struct.pack("<I", 200) + os.urandom(1200) + struct.pack("<I", 0)
    assert plane.command(MAC_CLASS, 0, table) == OK
    plane.namespace.packet_socket().send(frame(to=b"\2bbbbb"))
    assert plane.received()[12:18] == b"\2bbbbb"


def test_vlans(controlled: NetPlane) -> None:
    plane = controlled
    peer = plane.namespace.packet_socket()

    def tagged(number: int) -> bytes:
        return frame(to=MAC, tag=b"\x81\x00" + number.to_bytes(2, "big"))

    assert plane.command(VLAN, 0, struct.pack("<H", 7)) == OK
    peer.send(tagged(8))
    peer.send(tagged(7))
    assert plane.received()[12:] == tagged(7)
    assert plane.command(VLAN, 1, struct.pack("<H", 7)) == OK
    peer.send(tagged(7))
    peer.send(frame(to=BROADCAST))
    assert nothing_comes(plane)


BAD_COMMANDS = {
    "empty mode": (RX, 0, b""), "mode 2": (RX, 0, b"\2"), "unknown mode": (RX, 6, b"\1"),
    "short mac": (MAC_CLASS, 1, b"12345"), "unknown mac command": (MAC_CLASS, 2, bytes(20)),
    "table cut in its count": (MAC_CLASS, 0, b"\1\0"),
    "table cut in an address": (MAC_CLASS, 0, struct.pack("<I", 2) + MAC),
    "table without multicast": (MAC_CLASS, 0, struct.pack("<I", 1) + MAC),
    "table with an endless count": (MAC_CLASS, 0, b"\xff" * 4 + bytes(600)),
    "table that is too long": (MAC_CLASS, 0, struct.pack("<I", 180_000) + bytes(1_080_004)),
    "vlan 4096": (VLAN, 0, struct.pack("<H", 4096)), "short vlan": (VLAN, 0, b"\1"),
    "unknown vlan command": (VLAN, 2, b"\1\0"),
    "pairs without MQ": (MQ, 0, b"\1\0"), "announce": (ANNOUNCE, 1, b""),
    "offloads that were not acknowledged": (OFFLOADS, 0, struct.pack("<Q", 1 << 7)),
    "short offloads": (OFFLOADS, 0, bytes(7)), "unknown class": (99, 0, b""),
}


@pytest.mark.parametrize("command", BAD_COMMANDS.values(), ids=BAD_COMMANDS.keys())
def test_bad_commands_are_refused(controlled: NetPlane, command: tuple[int, int, bytes]) -> None:
    plane = controlled
    assert plane.command(*command) == ERR
    assert plane.command(RX, 1, b"\1") == OK
    assert plane.broken(2) is None


def test_commands_without_their_parts(controlled: NetPlane) -> None:
    plane = controlled
    ring = plane.rings[2]
    ack = plane.memory.alloc(1)
    ring.add([(ack, 1, True)])  # no command at all
    ring.publish()
    ring.wait_used(1)
    assert plane.memory.read(ack, 1) == bytes([ERR])
    address = plane.memory.alloc(2)
    ring.add([(address, 2, False)])  # no room for the answer
    ring.publish()
    assert ring.wait_error()


def test_features_rule_commands(make: Make) -> None:
    plane = make(control=True, features=BASE | 1 << 17)
    plane.start(2)
    for command in ((RX, 0, b"\1"), (RX, 2, b"\1"), (MAC_CLASS, 1, OTHER), (VLAN, 0, b"\1\0"),
                    (OFFLOADS, 0, bytes(8)), (ANNOUNCE, 0, b"")):
        assert plane.command(*command) == ERR


def test_writable_is_ignored_behind_a_frame(make: Make) -> None:
    plane = make()
    ring = plane.start(1)
    address = plane.memory.alloc(200)
    plane.memory.write(address, HEADER + frame())
    ring.put_desc(0, address, 76, NEXT, 1)
    ring.put_desc(1, address + 100, 50, WRITE, 0)
    ring.put_avail(0)
    ring.publish()
    assert ring.wait_used(1) == [(0, 0)]
    assert plane.counters[1].packets == 1
