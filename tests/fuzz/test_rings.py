"""Random rings: whatever a driver writes, the data plane neither crashes, hangs nor answers twice.

Run under ASAN and UBSAN too (workers/blk/README.md, "Testing").
"""

from __future__ import annotations

import os
import random
import struct
import time
from pathlib import Path

import pytest

from tests.support.guest_ring import F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, GuestRing
from tests.support.plane import Plane, lib

pytestmark = [pytest.mark.fuzz, pytest.mark.native]

SIZE = 16
ROUNDS = int(os.environ.get("FUZZ_ROUNDS", "150"))
FEATURES = F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX


class Chaos:
    """Fills guest memory with requests that are right, nearly right, or noise."""

    def __init__(self, seed: int, plane: Plane, ring: GuestRing, area: int) -> None:
        self.random = random.Random(seed)
        self.memory = plane.memory
        self.ring = ring
        self.area = area

    def address(self) -> int:
        memory = self.memory
        return self.random.choice((
            self.area + self.random.randrange(0, 65536), self.area, self.ring.desc,
            memory.base + memory.size - self.random.randint(0, 600), memory.base - 1, 0,
            (1 << 64) - self.random.randint(1, 600), self.random.getrandbits(64)))

    def length(self) -> int:
        return self.random.choice((0, 1, 16, 17, 48, 512, 513, 4096, 65536, 0xFFFFFFFF,
                                   self.random.getrandbits(32)))

    def good(self, table: int, at: int) -> None:
        """A request in three descriptors from `at` on: mostly sane type and sector."""
        header = self.area + 64 * at
        type_ = self.random.choice((0, 1, 4, 8, 11, 13, self.random.getrandbits(32)))
        sector = self.random.choice((0, 5, 127, 128, self.random.getrandbits(64)))
        self.memory.write(header, struct.pack("<IIQ", type_, 0, sector))
        writable = 2 if self.random.random() < 0.5 else 0
        size = self.random.choice((16, 20, 512, 1024, 4096))
        rows = [(header, 16, 1, at + 1), (self.area + 8192, size, writable | 1, at + 2),
                (header + 32, 1, 2, 0)]
        for i, row in enumerate(rows):
            self.memory.write(table + 16 * (at + i), struct.pack("<QIHH", *row))

    def noise(self, table: int, count: int) -> None:
        """Replace some descriptors by anything."""
        for _ in range(self.random.choice((0, 0, 1, 3))):
            row = (self.address(), self.length(), self.random.choice((0, 1, 2, 3, 4, 5, 7, 0xFFFF)),
                   self.random.choice((0, 1, 2, SIZE - 1, SIZE, 0xFFFF)))
            self.memory.write(table + 16 * self.random.randrange(count),
                              struct.pack("<QIHH", *row))

    def fill(self) -> None:
        ring = self.ring
        for at in (0, 3, 6):
            self.good(ring.desc, at)
        table = self.area + 32768
        self.good(table, 0)
        self.memory.write(ring.desc + 16 * 9, struct.pack("<QIHH", table, 48, 4, 0))
        self.noise(ring.desc, SIZE)
        self.noise(table, 3)
        for _ in range(self.random.randint(1, 6)):
            ring.put_avail(self.random.choice((0, 0, 3, 6, 9, 9, 1, SIZE - 1, SIZE, 0xFFFF)))
        if self.random.random() < 0.05:
            ring.avail_idx = self.random.getrandbits(16)


def settle(plane: Plane, ring: GuestRing) -> None:
    """Wait until everything made available is used, or the queue is broken."""
    deadline = time.monotonic() + 20
    while plane.broken() is None and ring.used_idx != ring.avail_idx:
        assert time.monotonic() < deadline, "the queue hangs"
        os.sched_yield()


@pytest.mark.parametrize("engine", ["io_uring", "threads"])
@pytest.mark.parametrize("direct", [False, True])
def test_random_rings(tmp_path: Path, engine: str, direct: bool) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(os.urandom(65536))
    plane = Plane(str(image), engine, direct=direct, unmap=True)
    ring = GuestRing(plane.memory, SIZE, FEATURES)
    area = plane.memory.alloc(1 << 20)
    broken = 0
    for seed in range(ROUNDS):
        ring.avail_idx = ring.used_seen = 0
        plane.memory.write(ring.avail, bytes(6 + 2 * SIZE))
        plane.memory.write(ring.used, bytes(6 + 8 * SIZE))
        plane.start(ring=ring)
        chaos = Chaos(seed, plane, ring, area)
        for _ in range(3):
            chaos.fill()
            ring.publish()
            settle(plane, ring)
        broken += plane.broken() is not None
        base = plane.stop()
        assert 0 <= base <= 0xFFFF
        assert lib.sv_queue_stop(plane.plane, 0) == -22
    # Both kinds of end must occur, or this tests nothing.
    assert 0 < broken < ROUNDS
    assert image.stat().st_size == 65536
    plane.close()
