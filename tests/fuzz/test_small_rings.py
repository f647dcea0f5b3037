"""Random rings of small devices: whatever a driver writes, nothing crashes or hangs, and a port
that behaves goes on.

Run under ASAN and UBSAN too (workers/blk/README.md, "Testing").
"""

from __future__ import annotations

import os
import random
import struct

import pytest

from tests.support.balloon_plane import (
    BASE,
    DEFLATE,
    INFLATE,
    REPORTING,
    STATISTICS,
    BalloonPlane,
)
from tests.support.console_driver import CONTROL_RX, CONTROL_TX, rx
from tests.support.console_plane import console_planes
from tests.support.guest_ring import F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, GuestRing
from tests.support.ring_plane import RingPlane, rng_plane

pytestmark = [pytest.mark.fuzz, pytest.mark.native]

SIZE = 16
ROUNDS = int(os.environ.get("FUZZ_ROUNDS", "150"))
FEATURES = F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX


class Chaos:
    """Fills a ring with chains that are right, nearly right, or noise."""

    def __init__(self, seed: int, ring: GuestRing, area: int, writable: float) -> None:
        self.random = random.Random(seed)
        self.ring = ring
        self.memory = ring.memory
        self.area = area
        self.writable = writable  # how many of the buffers are, unless all are right
        self.clean = self.random.random() < 0.3

    def _address(self) -> int:
        memory = self.memory
        return self.random.choice((
            *[self.area + self.random.randrange(32768) for _ in range(6)], self.ring.desc,
            memory.base + memory.size - self.random.randint(0, 600), memory.base - 1,
            (1 << 64) - self.random.randint(1, 600)))

    def _length(self) -> int:
        return self.random.choice((1, 8, 9, 16, 100, 512, 4096, 32768, 8, 8, 0, 0xFFFFFFFF))

    def _row(self) -> bytes:
        flags = 2 if self.random.random() < self.writable else 0
        flags |= self.random.choice((0, 0, 0, 1, 1, 4))
        return struct.pack("<QIHH", self._address(), self._length(), flags,
                           self.random.choice((0, 1, 2, 3, SIZE - 1, SIZE, 0xFFFF)))

    def fill(self) -> None:
        good = 1.0 if self.clean else 0.9 if self.random.random() < 0.7 else 0.3
        writable = round(self.writable) if self.clean else self.writable
        for at in range(SIZE):
            row = self._row() if self.random.random() >= good else struct.pack(
                "<QIHH", self.area + 256 * at, self.random.choice((8, 16, 256)),
                2 if self.random.random() < writable else 0, 0)
            self.memory.write(self.ring.desc + 16 * at, row)
        # What a control queue reads: messages of all kinds.
        for at in range(SIZE):
            self.memory.write(self.area + 256 * at, struct.pack(
                "<IHH", self.random.choice((0, 2, 2, 2, 1, 9, 0xFFFFFFFF)),
                self.random.choice((0, 3, 6, 6, 1, 99)), self.random.choice((0, 1, 1, 0xFFFF))))
        for _ in range(self.random.randint(1, SIZE)):
            wild = not self.clean and self.random.random() < 0.03
            self.ring.put_avail(self.random.choice((SIZE, 0xFFFF)) if wild
                                else self.random.randrange(SIZE))
        if not self.clean and self.random.random() < 0.05:
            self.ring.avail_idx = self.random.getrandbits(16)


def play(plane: RingPlane, index: int, seed: int, area: int, writable: float) -> bool:
    """One life of a queue; whether it was broken."""
    ring = GuestRing(plane.memory, SIZE, FEATURES)
    plane.check(plane.try_start(index, ring))
    chaos = Chaos(seed, ring, area, writable)
    for _ in range(3):
        chaos.fill()
        ring.publish()
        plane.broken(index)  # waits for the batch at hand
    assert 0 <= plane.stop(index) <= 0xFFFF
    broken = bool(plane.counters[index].ring.broken)
    assert plane.stop(index) == -22
    ring.close()
    plane.memory._next -= plane.memory._next - chaos.ring.desc + plane.memory.base
    return broken


def test_random_rings_of_an_rng() -> None:
    source = os.open("/dev/urandom", os.O_RDONLY | os.O_NONBLOCK)
    plane = rng_plane(source, features=FEATURES)
    area = plane.memory.alloc(65536)
    broken = sum(play(plane, 0, seed, area, 0.97) for seed in range(ROUNDS))
    assert 0 < broken < ROUNDS
    assert plane.counters[0].bytes > 0
    plane.close()
    os.close(source)


class AskingPlane(BalloonPlane):
    """Asks for statistics between two looks."""

    def broken(self, index: int = 0) -> str | None:
        self.ask()
        return super().broken(index)


@pytest.mark.parametrize(("queue", "writable"), [
    (INFLATE, 0.03), (DEFLATE, 0.03), (STATISTICS, 0.03), (REPORTING, 0.97)])
def test_random_rings_of_a_balloon(queue: int, writable: float) -> None:
    """It may take any page of memory from under its driver, rings included."""
    plane = AskingPlane(BASE | FEATURES)
    area = plane.memory.alloc(65536)
    broken = 0
    for seed in range(ROUNDS):
        broken += play(plane, queue, seed, area, writable)
        plane.news()
    assert 0 < broken < ROUNDS
    assert plane.counters[queue].ring.chains > 0
    assert plane.count("removed_bytes") > 0 or queue in (DEFLATE, STATISTICS)
    plane.close()


@pytest.mark.parametrize(("queue", "writable"), [
    (CONTROL_RX, 0.97), (CONTROL_TX, 0.03), (rx(2), 0.97), (rx(2) + 1, 0.03)])
def test_random_rings_of_a_console(queue: int, writable: float) -> None:
    with console_planes() as make:
        plane, driver = make()
        driver.begin(0, 2)
        driver.set_up(0, 2)
        driver.messages(4)
        plane.stop(queue)
        area = plane.memory.alloc(65536)
        plane.host[2].setblocking(False)
        broken = 0
        for seed in range(ROUNDS):
            try:
                plane.host[2].send(b"input" * 20)
                plane.host[2].recv(1 << 20)
            except BlockingIOError:
                pass
            plane.set_open(2, seed % 3 > 0)
            broken += play(plane, queue, seed, area, writable)
            if queue != CONTROL_TX:  # else port 0 may be closed by what was said there
                driver.write(0, b"alive")
                assert plane.host[0].recv(16) == b"alive"
        assert 0 < broken < ROUNDS
