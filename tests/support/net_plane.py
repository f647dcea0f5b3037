"""A net data plane around a tap, driven without any worker process: for tests of the C code."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from typing import Any

from native import _net
from tests.support.capabilities import require
from tests.support.guest_ring import GuestMemory, GuestRing
from tests.support.net_namespace import NetNamespace

ffi, lib = _net.ffi, _net.lib

MAC = bytes.fromhex("525400aabbcc")
OTHER = bytes.fromhex("525400ddeeff")
BROADCAST = b"\xff" * 6
ETHERTYPE = b"\x88\xb5"  # IEEE: for experiments
HEADER = bytes(12)
F_VERSION_1 = 1 << 32
F_MRG_RXBUF = 1 << 15


def frame(length: int = 64, to: bytes = MAC, fill: int = 0x5A, tag: bytes = b"") -> bytes:
    """An Ethernet frame of this length, the header included."""
    head = to + OTHER + tag + ETHERTYPE
    return head + bytes([fill]) * (length - len(head))


class NetPlane:
    """Taps in a namespace of their own, guest memory, rings."""

    def __init__(self, pairs: int = 1, control: bool = False, queue_size: int = 256,
                 limits: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0)),
                 state: object | None = None, features: int = F_VERSION_1 | F_MRG_RXBUF,
                 namespace: NetNamespace | None = None, taps: list[int] | None = None) -> None:
        self.namespace = namespace or NetNamespace()
        self.taps = taps or self.namespace.tap(queues=pairs)
        self.memory = GuestMemory()
        self.features = features
        self.counters = ffi.new("struct sv_net_counters[]", 2 * pairs + control)
        self._state = state
        error = ffi.new("int *")
        self.net = lib.sv_net_create(
            ffi.new("int[]", self.taps), pairs, control, queue_size, MAC,
            ffi.new("struct sv_rate[2]", limits), self.counters,
            ffi.NULL if state is None else ffi.cast("struct sv_net_state *", state), error)
        assert self.net, os.strerror(-error[0])
        self.check(lib.sv_net_add_region(self.net, self.memory.base, self.memory.size, 0,
                                         self.memory.fd))
        self.check(lib.sv_net_set_features(self.net, features))
        self.rings: dict[int, GuestRing] = {}
        self.room: dict[tuple[int, int], tuple[int, int]] = {}  # (ring, head) -> buffer

    @staticmethod
    def check(result: int) -> int:
        assert result >= 0, os.strerror(-result)
        return result

    def start(self, index: int, size: int = 64, base: int = 0,
              ring: GuestRing | None = None) -> GuestRing:
        ring = ring or GuestRing(self.memory, size, self.features)
        self.rings[index] = ring
        setup: Any = ffi.new("struct sv_net_ring *", {
            "size": ring.size, "desc": ring.desc, "avail": ring.avail, "used": ring.used,
            "base": base, "kick_fd": ring.kick_fd, "call_fd": ring.call_fd,
            "err_fd": ring.err_fd})
        self.check(lib.sv_net_start(self.net, index, setup))
        return ring

    def stop(self, index: int) -> int:
        return int(lib.sv_net_stop(self.net, index))

    def broken(self, index: int) -> str | None:
        reason = lib.sv_net_broken(self.net, index)
        return None if reason == ffi.NULL else ffi.string(reason).decode()

    def transmit(self, data: bytes, index: int = 1, pieces: int = 1) -> None:
        """Queue a frame (with its header) in one chain and wait until it is used."""
        ring = self.rings[index]
        step = -(-len(data) // pieces)
        buffers = []
        for at in range(0, len(data), step):
            part = data[at:at + step]
            address = self.memory.alloc(len(part), 16)
            self.memory.write(address, part)
            buffers.append((address, len(part), False))
        ring.add(buffers)
        ring.publish()
        ring.wait_used(1)

    def offer(self, length: int, count: int = 1, index: int = 0) -> None:
        """Receive buffers of `length` bytes."""
        ring = self.rings[index]
        for _ in range(count):
            address = self.memory.alloc(length, 16)
            self.room[index, ring.add([(address, length, True)])] = (address, length)
        ring.publish()

    def received(self, index: int = 0) -> bytes:
        """The next frame with its header; its chains were published together."""
        ring = self.rings[index]
        used = ring.wait_used(1)
        data = b""
        first = True
        frames: list[bytes] = []
        left = 0
        for head, written in used:
            address, _ = self.room.pop((index, head))
            part = self.memory.read(address, written)
            if first:
                left = struct.unpack_from("<H", part, 10)[0]
                data = b""
            data += part
            left -= 1
            first = left == 0
            if first:
                frames.append(data)
        assert left == 0, "a frame in pieces"
        assert len(frames) == 1, "more than one frame at once"
        return frames[0]

    def command(self, class_: int, command: int, data: bytes = b"", pieces: int = 1) -> int:
        """A command on the control queue; returns its acknowledgement."""
        index = max(self.rings)
        ring = self.rings[index]
        whole = bytes([class_, command]) + data
        step = -(-len(whole) // pieces)
        buffers = []
        for at in range(0, len(whole), step):
            address = self.memory.alloc(step, 16)
            self.memory.write(address, whole[at:at + step])
            buffers.append((address, len(whole[at:at + step]), False))
        ack = self.memory.alloc(1, 16)
        self.memory.fill(ack, 1, 0xAA)
        ring.add([*buffers, (ack, 1, True)])
        ring.publish()
        ring.wait_used(1)
        return self.memory.read(ack, 1)[0]

    def close(self, taps: bool = True) -> None:
        lib.sv_net_destroy(self.net)
        for ring in self.rings.values():
            ring.close()
        self.memory.close()
        if taps:
            for fd in self.taps:
                os.close(fd)
            self.namespace.close()


Make = Callable[..., NetPlane]


def planes() -> Iterator[Make]:
    """For fixtures: what makes planes; all are closed at the end."""
    require("net_admin")
    made: list[NetPlane] = []

    def make(**options: object) -> NetPlane:
        made.append(NetPlane(**options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for plane in made:
        plane.close()
