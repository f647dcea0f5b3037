"""The driver's side of a virtio-console device (virtio 1.2, 5.3.6): ports and control messages."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable

from tests.support.guest_ring import GuestMemory, GuestRing

DEVICE_READY, ADD, REMOVE, READY, CONSOLE, RESIZE, OPEN, NAME = range(8)
CONTROL_RX, CONTROL_TX = 2, 3
BUFFER = 512  # bytes of a receive buffer
F_SIZE, F_MULTIPORT = 1, 2

Message = tuple[int, int, int, bytes]  # port, event, value, what follows


def rx(nr: int) -> int:
    """The receive queue of a port; the transmit queue is the next one."""
    return 2 * nr + 2 if nr else 0


class ConsoleDriver:
    """Drives rings that somebody else has started.

    :param start: starts a queue.
    """

    def __init__(self, memory: GuestMemory, start: Callable[[int], GuestRing]) -> None:
        self.memory = memory
        self._start = start
        self.rings: dict[int, GuestRing] = {}
        self.room: dict[tuple[int, int], int] = {}  # (queue, head) -> address
        self.ready_messages: list[Message] = []

    def begin(self, *ports: int, buffers: int = 16) -> None:
        """Start the control queues and those of these ports, with receive buffers."""
        for index in (CONTROL_RX, CONTROL_TX, *(rx(nr) + i for nr in ports for i in range(2))):
            self.rings[index] = self._start(index)
            if index % 2 == 0:
                self.feed(index, buffers)

    def feed(self, index: int, count: int = 1) -> None:
        """Give a receive queue buffers."""
        ring = self.rings[index]
        for _ in range(count):
            address = self.memory.alloc(BUFFER, 16)
            self.room[index, ring.add([(address, BUFFER, True)])] = address
        ring.publish()

    def used(self, index: int) -> list[bytes]:
        """What came into a receive queue; its buffers are offered again."""
        ring = self.rings[index]
        places = [(self.room.pop((index, head)), written) for head, written in ring.take_used()]
        result = [self.memory.read(address, written) for address, written in places]
        for address, _ in places:
            self.room[index, ring.add([(address, BUFFER, True)])] = address
        if places:
            ring.publish()
        return result

    # ---- control messages ------------------------------------------------------------------

    def send(self, event: int, value: int = 1, nr: int = 0, raw: bytes | None = None) -> None:
        """A control message, and wait until it is taken."""
        data = struct.pack("<IHH", nr, event, value) if raw is None else raw
        address = self.memory.alloc(len(data), 16)
        self.memory.write(address, data)
        self.rings[CONTROL_TX].add([(address, len(data), False)])
        self.rings[CONTROL_TX].publish()
        self.rings[CONTROL_TX].wait_used(1)

    def messages(self, count: int, limit: float = 10.0) -> list[Message]:
        """The next control messages."""
        deadline = time.monotonic() + limit
        while len(self.ready_messages) < count:
            for data in self.used(CONTROL_RX):
                nr, event, value = struct.unpack_from("<IHH", data)
                self.ready_messages.append((nr, event, value, data[8:]))
            assert time.monotonic() < deadline, f"{self.ready_messages} of {count}"
        result, self.ready_messages = (self.ready_messages[:count], self.ready_messages[count:])
        return result

    def set_up(self, *ports: int) -> None:
        """As Linux does it: the device is ready, then each port, then each is opened."""
        self.send(DEVICE_READY)
        assert self.messages(len(ports)) == [(nr, ADD, 1, b"") for nr in ports]
        for nr in ports:
            self.send(READY, 1, nr)
            self.send(OPEN, 1, nr)

    # ---- data ------------------------------------------------------------------------------

    def write(self, nr: int, data: bytes, wait: bool = True, pieces: int = 1) -> int:
        """Send through a port; the chain's head."""
        ring = self.rings[rx(nr) + 1]
        address = self.memory.alloc(len(data), 16)
        self.memory.write(address, data)
        step = -(-len(data) // pieces)
        head = ring.add([(address + at, min(step, len(data) - at), False)
                         for at in range(0, len(data), step)])
        ring.publish()
        if wait:
            assert ring.wait_used(1) == [(head, 0)]
        return head

    def read(self, nr: int, size: int, limit: float = 10.0) -> bytes:
        """Exactly so many bytes that came through a port."""
        deadline = time.monotonic() + limit
        data = b""
        while len(data) < size:
            data += b"".join(self.used(rx(nr)))
            assert time.monotonic() < deadline, f"{len(data)} of {size} bytes"
        assert len(data) == size
        return data
