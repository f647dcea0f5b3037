"""A balloon's data plane and its driver's side, without any worker process."""

from __future__ import annotations

import os
import random
import struct
from typing import Any

from shared.virtio import balloon
from tests.support.guest_ring import GuestMemory, GuestRing
from tests.support.ring_plane import RingPlane, ffi, lib

INFLATE, DEFLATE, STATISTICS, REPORTING = range(4)
PAGE = 4096
BASE = balloon.F_VERSION_1 | balloon.F_STATS_VQ | balloon.F_PAGE_REPORTING


def blocks(memory: GuestMemory) -> int:
    """Bytes that the memory takes of the host."""
    return os.fstat(memory.fd).st_blocks * 512


def entries(*values: tuple[int, int]) -> bytes:
    """A buffer with statistics: (tag, value) each."""
    return b"".join(struct.pack("<HQ", *value) for value in values)


class BalloonPlane(RingPlane):
    """One balloon over guest memory, whose last part is free for it."""

    def __init__(self, features: int = BASE, memory: GuestMemory | None = None,
                 keep: bool = False) -> None:
        super().__init__(lambda counters, error: lib.sv_balloon_create(keep, 128, counters, error),
                         "struct sv_balloon_counters", balloon.QUEUES, features, memory)

    def start(self, index: int = 0, size: int = 64, base: int = 0, ring: GuestRing | None = None,
              **fields: int) -> GuestRing:
        """Start a queue; the ring that it had before is the driver's no more."""
        before = self.rings.get(index)
        if before is not None and before is not ring:
            before.close()
        return super().start(index, size, base, ring, **fields)

    def chain(self, index: int, data: bytes, pieces: int = 1, wait: bool = True) -> None:
        """Send a buffer to the device; wait until it is used."""
        address = self.memory.alloc(len(data), 16)
        self.memory.write(address, data)
        step = -(-len(data) // pieces)
        self.buffers(index, [(address + at, min(step, len(data) - at), False)
                             for at in range(0, len(data), step)], wait)

    def buffers(self, index: int, buffers: list[tuple[int, int, bool]], wait: bool = True) -> None:
        ring = self.rings[index]
        head = ring.add(buffers)
        ring.publish()
        if wait:
            assert ring.wait_used(1) == [(head, 0)]

    def pfns(self, index: int, pfns: list[int], pieces: int = 1) -> None:
        """Name pages by their numbers."""
        self.chain(index, struct.pack(f"<{len(pfns)}I", *pfns), pieces)

    def fill(self, address: int, pages: int) -> bytes:
        """Random content, so that every page is there."""
        data = random.Random(address).randbytes(PAGE * pages)
        self.memory.write(address, data)
        return data

    def count(self, name: str) -> int:
        """A counter, over all queues."""
        return sum(getattr(record, name) for record in self.counters)

    def ask(self) -> int:
        """Ask the driver for statistics: 0 or a negative errno."""
        return int(lib.sv_balloon_ask(self.device))

    def news(self) -> Any:
        """What came."""
        news = ffi.new("struct sv_balloon_news *")
        lib.sv_balloon_take(self.device, news)
        return news

    def told(self) -> dict[int, int] | None:
        """The statistics that came; None: none did."""
        news = self.news()
        present = {tag: int(news.values[tag]) for tag in range(32) if news.present & 1 << tag}
        return present if news.told else None

    def notified(self) -> bool:
        """Whether there are news, taken note of."""
        try:
            return bool(os.eventfd_read(lib.sv_ring_notify_fd(self.device)))
        except BlockingIOError:
            return False
