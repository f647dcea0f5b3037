"""The driver side of a split virtqueue in shared memory, for tests of back ends (no KVM).

virtio 1.2, 2.7.  `GuestRam` is a memfd with one region; `GuestRing` puts a ring into it and
exchanges buffers with whatever serves it.
"""

from __future__ import annotations

import mmap
import os
import select
import struct
import time

from shared.memory_regions import MemoryRegion

USER_BASE = 0x7F00_0000_0000

DESC_NEXT = 1
DESC_WRITE = 2


class GuestRam:
    """`size` bytes of shared memory at guest-physical `base`, with a bump allocator."""

    def __init__(self, size: int = 1 << 20, base: int = 0) -> None:
        self.size = size
        self.base = base
        self.fd = os.memfd_create("guest-ram", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, size)
        self.map = mmap.mmap(self.fd, size)
        self.region = MemoryRegion(base, size, USER_BASE + base, 0)
        self._next = 0

    def allocate(self, size: int, align: int = 16) -> int:
        """A guest-physical address of `size` fresh bytes."""
        self._next = (self._next + align - 1) // align * align
        address = self._next
        self._next += size
        assert self._next <= self.size
        return self.base + address

    def read(self, address: int, size: int) -> bytes:
        offset = address - self.base
        return self.map[offset:offset + size]

    def write(self, address: int, data: bytes) -> None:
        offset = address - self.base
        self.map[offset:offset + len(data)] = data

    def user(self, address: int) -> int:
        """The front end's user address, as vhost-user names it."""
        return self.region.user_addr + address - self.base

    def close(self) -> None:
        self.map.close()
        os.close(self.fd)


class GuestRing:
    """One virtqueue as a driver sees it: `submit` chains, `wait_used` for them."""

    def __init__(self, ram: GuestRam, size: int = 64) -> None:
        self.ram = ram
        self.size = size
        self.desc = ram.allocate(16 * size, 16)
        self.avail = ram.allocate(6 + 2 * size, 2)
        self.used = ram.allocate(6 + 8 * size, 4)
        self.kick_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.call_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.avail_idx = 0
        self.used_idx = 0
        self._free = list(range(size))

    def submit(self, buffers: list[tuple[int, int, bool]], kick: bool = True) -> int:
        """Make a chain of (address, length, device writes) available; returns its head."""
        heads = [self._free.pop(0) for _ in buffers]
        for i, (address, length, writes) in enumerate(buffers):
            more = i + 1 < len(buffers)
            flags = (DESC_NEXT if more else 0) | (DESC_WRITE if writes else 0)
            self.ram.write(self.desc + 16 * heads[i], struct.pack(
                "<QIHH", address, length, flags, heads[i + 1] if more else 0))
        slot = self.avail_idx % self.size
        self.ram.write(self.avail + 4 + 2 * slot, struct.pack("<H", heads[0]))
        self.avail_idx = (self.avail_idx + 1) & 0xFFFF
        self.ram.write(self.avail + 2, struct.pack("<H", self.avail_idx))
        if kick:
            os.eventfd_write(self.kick_fd, 1)
        return heads[0]

    def device_used_idx(self) -> int:
        index: int = struct.unpack("<H", self.ram.read(self.used + 2, 2))[0]
        return index

    def wait_used(self, timeout: float = 5.0) -> tuple[int, int]:
        """Wait for one used buffer: (head, bytes written); waits on the call eventfd."""
        deadline = time.monotonic() + timeout
        poll = select.poll()
        poll.register(self.call_fd, select.POLLIN)
        while self.device_used_idx() == self.used_idx:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError("no used buffer came")
            if poll.poll(left * 1000):
                os.eventfd_read(self.call_fd)
        slot = self.used_idx % self.size
        head, written = struct.unpack("<II", self.ram.read(self.used + 4 + 8 * slot, 8))
        self.used_idx = (self.used_idx + 1) & 0xFFFF
        self._recycle(head)
        return head, written

    def _recycle(self, head: int) -> None:
        while True:
            self._free.append(head)
            flags, following = struct.unpack("<HH", self.ram.read(self.desc + 16 * head + 12, 4))
            if not flags & DESC_NEXT:
                return
            head = following

    def close(self) -> None:
        os.close(self.kick_fd)
        os.close(self.call_fd)


BLK_IN, BLK_OUT, BLK_FLUSH, BLK_GET_ID = 0, 1, 4, 8


class BlkDriver:
    """Synchronous virtio-blk requests over a `GuestRing` (virtio 1.2, 5.2.6)."""

    def __init__(self, ring: GuestRing, buffer_size: int = 65536) -> None:
        self.ring = ring
        self.ram = ring.ram
        self.header = self.ram.allocate(16)
        self.status = self.ram.allocate(1)
        self.buffer = self.ram.allocate(buffer_size, 512)

    def start(self, kind: int, sector: int, length: int, device_writes: bool) -> None:
        self.ram.write(self.header, struct.pack("<IIQ", kind, 0, sector))
        self.ram.write(self.status, b"\xff")
        data = [(self.buffer, length, device_writes)] if length else []
        self.ring.submit([(self.header, 16, False), *data, (self.status, 1, True)])

    def finish(self, timeout: float = 5.0) -> int:
        self.ring.wait_used(timeout)
        return self.ram.read(self.status, 1)[0]

    def read(self, sector: int, length: int) -> bytes:
        self.start(BLK_IN, sector, length, True)
        assert self.finish() == 0
        return self.ram.read(self.buffer, length)

    def write(self, sector: int, data: bytes) -> None:
        self.ram.write(self.buffer, data)
        self.start(BLK_OUT, sector, len(data), False)
        assert self.finish() == 0

    def flush(self) -> None:
        self.start(BLK_FLUSH, 0, 0, False)
        assert self.finish() == 0
