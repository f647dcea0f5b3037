"""When the block queue looks for work instead of sleeping, and what it asks the driver for then."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.guest_ring import F_EVENT_IDX, F_VERSION_1, IN, OK, BlkRequest, GuestRing
from tests.support.plane import Plane, lib
from tests.support.tiny_guest import wait_for

pytestmark = pytest.mark.native

# Long enough for any machine to come back in time, far longer than anything else here takes.
SECOND = 1_000_000_000
SECTOR = 512


class SlowDisk:
    """A disk whose reads end when the test says so: a pipe. Only a ring reads one at an offset."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.plane = Plane(str(path), "io_uring", direct=True, block_device=True,
                           size=64 * SECTOR, capacity=64)
        self.ring: GuestRing = self.plane.start(0, 16, F_VERSION_1 | F_EVENT_IDX)
        self.kicks = 0

    def read(self) -> BlkRequest:
        """Begin to read a sector; kick as a driver does (virtio 1.2, 2.7.10): if it is wanted."""
        request = BlkRequest(self.plane.memory, IN, 0, room=SECTOR)
        before = self.ring.avail_idx
        self.ring.add(request.buffers)
        self.ring.publish(kick=False)
        if self.ring.avail_event == before:
            self.kicks += 1
            os.eventfd_write(self.ring.kick_fd, 1)
        return request

    def let(self, request: BlkRequest) -> None:
        """The disk is done."""
        data = os.urandom(SECTOR)
        os.write(self.plane.fd, data)
        self.ring.wait_used(1)
        assert (request.status, request.data) == (OK, data)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SlowDisk]:
    found = SlowDisk(tmp_path / "disk")
    yield found
    os.write(found.plane.fd, bytes(16 * SECTOR))  # what a failed test left is done as well
    found.plane.close()


def test_a_completion_leaves_no_wish_for_a_kick(disk: SlowDisk) -> None:
    request = disk.read()
    wait_for(disk.ring.wants_kick, "the queue's thread sleeps and wants kicks")
    lib.sv_plane_set_poll(disk.plane.plane, 20 * SECOND)
    disk.let(request)
    # It looks for the next request by itself, and the driver has not passed the index that it
    # wanted a kick for: that wish is taken back.
    assert not disk.ring.wants_kick()
    kicks = disk.kicks
    disk.let(disk.read())
    assert disk.kicks == kicks


def test_a_slow_disk_says_nothing_of_the_driver(disk: SlowDisk) -> None:
    lib.sv_plane_set_poll(disk.plane.plane, SECOND)
    before = disk.plane.counters[0].wakeups
    rounds = 24
    for _ in range(rounds):
        request = disk.read()
        wait_for(disk.ring.wants_kick, "the thread sleeps instead of looking at the disk")
        disk.let(request)
    # To look for completions was in vain and is given up; requests always came in time.
    assert disk.kicks <= 2
    assert rounds <= disk.plane.counters[0].wakeups - before <= rounds + 2


def test_requests_are_taken_while_the_disk_is_busy(disk: SlowDisk) -> None:
    first = disk.read()
    wait_for(disk.ring.wants_kick, "the queue's thread sleeps")
    second = disk.read()
    wait_for(disk.ring.wants_kick, "it took the second one and sleeps again")
    assert disk.kicks == 2
    data = [os.urandom(SECTOR), os.urandom(SECTOR)]
    os.write(disk.plane.fd, b"".join(data))
    disk.ring.wait_used(2)
    assert {first.data, second.data} == set(data)  # a pipe's readers have no order
