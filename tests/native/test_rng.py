"""virtio-rng (virtio 1.2, 5.4): sources that have nothing, limits, large and odd requests."""

from __future__ import annotations

import errno
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support.capabilities import require
from tests.support.guest_ring import F_INDIRECT_DESC, F_VERSION_1, GuestMemory
from tests.support.ring_plane import RingPlane, ffi, lib, rng_plane, until

pytestmark = pytest.mark.native

Make = Callable[..., RingPlane]
MIB = 1 << 20


@pytest.fixture
def make() -> Iterator[Make]:
    planes: list[RingPlane] = []
    fds: list[int] = []

    def build(source: int | str, **options: Any) -> RingPlane:
        if isinstance(source, str):
            source = os.open(source, os.O_RDONLY | os.O_NONBLOCK)
        fds.append(source)
        planes.append(rng_plane(source, **options))
        return planes[-1]

    yield build
    for plane in planes:
        plane.close()
    for fd in fds:
        os.close(fd)


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    out, into = os.pipe()
    os.set_blocking(out, False)
    fds = [out, into]
    yield fds[0], fds[1]
    os.close(into)


# ---- what a request gets ---------------------------------------------------------------------

@pytest.mark.parametrize(("length", "pieces"), [(1, 1), (64, 1), (4096, 3), (MIB, 17)])
def test_a_request_is_filled(make: Make, length: int, pieces: int) -> None:
    plane = make("/dev/urandom")
    ring = plane.start()
    head, address = plane.offer(length, pieces=pieces)
    assert ring.wait_used(1) == [(head, length)]
    data = plane.memory.read(address, length)
    if length >= 64:
        assert len(set(data)) > 30
        assert any(data[-16:])
    assert plane.counters[0].bytes == length


@pytest.mark.parametrize("pieces", [1, 5])
def test_no_request_gets_more_than_a_mebibyte(make: Make, pieces: int) -> None:
    plane = make("/dev/urandom")
    ring = plane.start()
    head, address = plane.offer(3 * MIB, pieces=pieces)
    assert ring.wait_used(1) == [(head, MIB)]
    assert not any(plane.memory.read(address + MIB, 2 * MIB))


def test_buffers_that_overlap_a_thousand_times(make: Make) -> None:
    """4 TiB of one page: the table is the guest's, the work is bounded."""
    plane = make("/dev/urandom", features=F_VERSION_1 | F_INDIRECT_DESC,
                 memory=GuestMemory(64 * MIB))
    ring = plane.start()
    room = plane.memory.alloc(32 * MIB)
    head = ring.add([(room, 32 * MIB, True)] * 1024, indirect=True)
    ring.publish()
    assert ring.wait_used(1) == [(head, MIB)]


def test_a_request_may_get_less(make: Make, pipe: tuple[int, int]) -> None:
    plane = make(pipe[0])
    ring = plane.start()
    os.write(pipe[1], b"abc")
    head, address = plane.offer(4096, pieces=3)
    assert ring.wait_used(1) == [(head, 3)]
    assert plane.memory.read(address, 4) == b"abc\0"


def test_it_is_random(make: Make) -> None:
    plane = make("/dev/urandom")
    ring = plane.start()
    seen = set()
    for _ in range(50):
        _, address = plane.offer(32)
        ring.wait_used(1)
        seen.add(plane.memory.read(address, 32))
    assert len(seen) == 50


# ---- sources that have nothing ---------------------------------------------------------------

def test_requests_wait_for_the_source(make: Make, pipe: tuple[int, int]) -> None:
    plane = make(pipe[0])
    ring = plane.start()
    first, _ = plane.offer(8)
    second, _ = plane.offer(8)
    until(lambda: plane.counters[0].starved > 0)
    before = plane.counters[0].starved
    for _ in range(20):  # kicks change nothing: nobody listens to them
        os.eventfd_write(ring.kick_fd, 1)
        assert plane.broken() is None
    assert plane.counters[0].starved == before
    os.write(pipe[1], b"x" * 8)
    assert ring.wait_used(1) == [(first, 8)]
    os.write(pipe[1], b"x" * 8)
    assert ring.wait_used(1) == [(second, 8)]
    assert plane.counters[0].errors == 0


def test_a_source_that_is_called_ready_and_is_not(make: Make) -> None:
    """As /dev/hwrng, which has no poll operation: it is asked after pauses, nobody spins.

    Here it is a datagram whose checksum is wrong, which only reading finds out (udp(7)).
    """
    require("root")
    source = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    source.bind(("127.0.0.1", 0))
    source.setblocking(False)
    address = source.getsockname()
    plane = make(source.detach())
    count = plane.counters[0]
    ring = plane.start()
    head, _ = plane.offer(8)
    until(lambda: count.starved == 1)  # waits for poll to say that there is something
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
        home = socket.inet_aton("127.0.0.1")
        udp = struct.pack(">HHHH", 9, address[1], 208, 0xBAD) + bytes(200)
        raw.sendto(struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(udp), 1, 0, 64, 17, 0, home,
                               home) + udp, ("127.0.0.1", 0))  # a short one is checked at once
    began = time.monotonic()
    until(lambda: count.starved >= 6)
    assert time.monotonic() - began >= 0.010
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as honest:
        honest.sendto(b"12345678", address)
    assert ring.wait_used(1) == [(head, 8)]
    assert count.errors == 0


def test_a_source_that_ends(make: Make) -> None:
    """It is asked again and again, ever more rarely; a stop comes through."""
    out, into = os.pipe()
    os.set_blocking(out, False)
    os.close(into)
    plane = make(out)
    plane.start()
    plane.offer(8)
    until(lambda: plane.counters[0].errors >= 4)
    began, before = time.monotonic(), plane.counters[0].errors
    until(lambda: plane.counters[0].errors >= before + 2)
    assert time.monotonic() - began >= 0.010
    assert plane.stop() == 0


def test_a_source_that_fails(make: Make, tmp_path: Any) -> None:
    """A folder can't be read: EISDIR."""
    plane = make(os.open(tmp_path, os.O_RDONLY))
    ring = plane.start()
    plane.offer(8)
    until(lambda: plane.counters[0].errors >= 2)
    assert ring.take_used() == []
    assert plane.stop() == 0


# ---- limits ----------------------------------------------------------------------------------

def test_a_limit_holds_on_average(make: Make) -> None:
    plane = make("/dev/urandom", max_bytes=4000, period=20)  # 200,000 a second
    ring = plane.start()
    began = time.monotonic()
    total = 0
    while total < 60_000:
        plane.offer(1500)
        total += ring.wait_used(1)[0][1]
    seconds = time.monotonic() - began
    # One period's worth comes at once, and the last request may overdraw.
    assert seconds >= (total - 4000 - 1500) / 200_000 - 0.005
    assert seconds < 5
    assert plane.counters[0].throttled > 0


def test_no_request_gets_more_than_the_limit(make: Make) -> None:
    plane = make("/dev/urandom", max_bytes=64, period=1000)
    ring = plane.start()
    head, _ = plane.offer(4096)
    assert ring.wait_used(1) == [(head, 64)]


def test_who_waits_for_the_limit_can_be_stopped(make: Make) -> None:
    plane = make("/dev/urandom", max_bytes=60, period=60_000)
    ring = plane.start()
    for _ in range(5):
        plane.offer(64)
    until(lambda: plane.counters[0].throttled > 0)
    assert plane.stop() == len(ring.take_used())
    assert plane.counters[0].bytes == 120  # a period's, and what overdrew it


@pytest.mark.parametrize(("max_bytes", "period", "size", "error"), [
    (1 << 32, 1000, 64, errno.EINVAL), (1, 4_000_000, 64, errno.EINVAL),
    (64, 0, 64, errno.EINVAL), (0, 0, 0, errno.EINVAL), (0, 0, 1025, errno.EINVAL)])
def test_what_can_not_be_made(max_bytes: int, period: int, size: int, error: int) -> None:
    counters, result = ffi.new("struct sv_rng_counters *"), ffi.new("int *")
    assert lib.sv_rng_create(0, max_bytes, period, size, counters, result) == ffi.NULL
    assert result[0] == -error
