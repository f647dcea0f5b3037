"""The driver's side of a split virtqueue (virtio 1.2, 2.7) in a memfd that a back end maps.

Tests build chains from it, honest or hostile: every field can be written as wished.
"""

from __future__ import annotations

import mmap
import os
import select
import struct
import time
from collections.abc import Sequence

NEXT = 1
WRITE = 2
INDIRECT = 4

F_INDIRECT_DESC = 1 << 28
F_EVENT_IDX = 1 << 29
F_VERSION_1 = 1 << 32

IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPP = 0, 1, 2
UNSET = 0xAA  # what the status byte holds before the device writes it


class GuestMemory:
    """RAM of `size` bytes at guest address `base`, in a memfd."""

    def __init__(self, size: int = 16 << 20, base: int = 0x10000000) -> None:
        self.size = size
        self.base = base
        self.fd = os.memfd_create("guest-ram", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, size)
        self.map = mmap.mmap(self.fd, size)
        self._next = 0

    def alloc(self, size: int, align: int = 4096) -> int:
        """A guest address with `size` bytes that nobody else has."""
        self._next = (self._next + align - 1) & ~(align - 1)
        address = self.base + self._next
        self._next += size
        assert self._next <= self.size, "guest memory exhausted"
        return address

    def mark(self) -> int:
        """For `rewind`."""
        return self._next

    def rewind(self, mark: int) -> None:
        """Whatever was allocated since `mark` is nobody's any more."""
        self._next = mark

    def read(self, address: int, size: int) -> bytes:
        at = address - self.base
        return self.map[at:at + size]

    def write(self, address: int, data: bytes) -> None:
        at = address - self.base
        self.map[at:at + len(data)] = data

    def fill(self, address: int, size: int, byte: int) -> None:
        self.write(address, bytes([byte]) * size)

    def close(self) -> None:
        self.map.close()
        os.close(self.fd)


Buffer = tuple[int, int, bool]  # address, length, device-writable


class GuestRing:
    """One ring: descriptors, available, used, kick and call eventfds."""

    def __init__(self, memory: GuestMemory, size: int = 128, features: int = F_VERSION_1) -> None:
        self.memory = memory
        self.size = size
        self.features = features
        self.desc = memory.alloc(16 * size, 4096)
        self.avail = memory.alloc(6 + 2 * size, 4096)
        self.used = memory.alloc(6 + 8 * size, 4096)
        memory.fill(self.desc, self.used + 6 + 8 * size - self.desc, 0)  # it may be used memory
        self.kick_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.call_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.err_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.avail_idx = 0
        self.used_seen = 0
        self.free = list(range(size - 1, -1, -1))
        self.chains: dict[int, list[int]] = {}

    # ---- raw fields ------------------------------------------------------------------------

    def put_desc(self, index: int, address: int, length: int, flags: int, next_: int,
                 table: int | None = None) -> None:
        at = (self.desc if table is None else table) + 16 * index
        self.memory.write(at, struct.pack("<QIHH", address, length, flags, next_))

    def put_avail(self, head: int) -> None:
        """Append a head to the available ring (not yet visible: see `publish`)."""
        at = self.avail + 4 + 2 * (self.avail_idx % self.size)
        self.memory.write(at, struct.pack("<H", head))
        self.avail_idx = (self.avail_idx + 1) & 0xFFFF

    def set_avail_idx(self, index: int) -> None:
        self.memory.write(self.avail + 2, struct.pack("<H", index & 0xFFFF))

    def set_used_event(self, index: int) -> None:
        self.memory.write(self.avail + 4 + 2 * self.size, struct.pack("<H", index & 0xFFFF))

    def set_avail_flags(self, flags: int) -> None:
        self.memory.write(self.avail, struct.pack("<H", flags))

    @property
    def avail_event(self) -> int:
        return int.from_bytes(self.memory.read(self.used + 4 + 8 * self.size, 2), "little")

    def wants_kick(self) -> bool:
        """Whether a driver that makes one more chain available has to kick (2.7.10)."""
        if self.features & F_EVENT_IDX:
            return self.avail_event == self.avail_idx
        return not self.memory.read(self.used, 1)[0] & 1

    @property
    def used_idx(self) -> int:
        return int.from_bytes(self.memory.read(self.used + 2, 2), "little")

    # ---- honest chains ---------------------------------------------------------------------

    def add(self, buffers: Sequence[Buffer], indirect: bool = False) -> int:
        """Put a chain into the ring; returns its head."""
        if indirect:
            table = self.memory.alloc(16 * len(buffers), 16)
            for i, (address, length, writable) in enumerate(buffers):
                last = i == len(buffers) - 1
                flags = (WRITE if writable else 0) | (0 if last else NEXT)
                self.put_desc(i, address, length, flags, 0 if last else i + 1, table)
            head = self.free.pop()
            self.put_desc(head, table, 16 * len(buffers), INDIRECT, 0)
            used = [head]
        else:
            used = [self.free.pop() for _ in buffers]
            head = used[0]
            for i, (address, length, writable) in enumerate(buffers):
                last = i == len(buffers) - 1
                flags = (WRITE if writable else 0) | (0 if last else NEXT)
                self.put_desc(used[i], address, length, flags, 0 if last else used[i + 1])
        self.chains[head] = used
        self.put_avail(head)
        return head

    def publish(self, kick: bool = True) -> None:
        """Make what was added visible, and kick."""
        self.set_avail_idx(self.avail_idx)
        if kick:
            os.eventfd_write(self.kick_fd, 1)

    def take_used(self) -> list[tuple[int, int]]:
        """(head, written) of everything used since the last call."""
        result = []
        while self.used_seen != self.used_idx:
            at = self.used + 4 + 8 * (self.used_seen % self.size)
            head, written = struct.unpack("<II", self.memory.read(at, 8))
            self.free.extend(self.chains.pop(head, []))
            result.append((head, written))
            self.used_seen = (self.used_seen + 1) & 0xFFFF
        return result

    def wait_used(self, count: int = 1, limit: float = 10.0) -> list[tuple[int, int]]:
        """Wait until `count` chains were used."""
        deadline = time.monotonic() + limit
        result = self.take_used()
        while len(result) < count:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{len(result)} of {count} chains used after {limit} s")
            readable(self.call_fd, 0.005)
            result += self.take_used()
        return result

    def calls(self) -> int:
        """How often the device called since the last time."""
        try:
            return os.eventfd_read(self.call_fd)
        except BlockingIOError:
            return 0

    def wait_error(self, limit: float = 5.0) -> bool:
        """Whether the device reports the ring as broken in time."""
        return readable(self.err_fd, limit)

    def close(self) -> None:
        for fd in (self.kick_fd, self.call_fd, self.err_fd):
            os.close(fd)


class BlkRequest:
    """One virtio-blk request (5.2.6) in guest memory."""

    def __init__(self, memory: GuestMemory, type_: int, sector: int = 0, data: bytes = b"",
                 room: int = 0, segments: int = 1, align: int = 512) -> None:
        self.memory = memory
        self.room = room
        self.header = memory.alloc(16, 16)
        memory.write(self.header, struct.pack("<IIQ", type_, 0, sector))
        self.status_at = memory.alloc(1, 1)
        memory.write(self.status_at, bytes([UNSET]))
        self.buffers: list[Buffer] = [(self.header, 16, False)]
        size = len(data) or room
        self.data_at = memory.alloc(size, align) if size else 0
        if data:
            memory.write(self.data_at, data)
        elif room:
            memory.fill(self.data_at, room, UNSET)
        step = -(-size // segments) if size else 0
        if align >= 512 and size % 512 == 0:
            step = -(-step // 512) * 512
        for at in range(0, size, step or 1):
            self.buffers.append((self.data_at + at, min(step, size - at), not data))
        self.buffers.append((self.status_at, 1, True))

    @property
    def status(self) -> int:
        return self.memory.read(self.status_at, 1)[0]

    @property
    def data(self) -> bytes:
        return self.memory.read(self.data_at, self.room)


def ranges(*entries: tuple[int, int, int]) -> bytes:
    """The payload of DISCARD and WRITE_ZEROES: (sector, sectors, flags) each."""
    return b"".join(struct.pack("<QII", *entry) for entry in entries)


def readable(fd: int, limit: float) -> bool:
    """Wait up to `limit` seconds. Not by select(), which knows no descriptor above 1023."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(limit * 1000))
