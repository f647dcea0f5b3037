"""The balloon's config space and what follows from it; behind it a back end that records."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from shared.vhost_user.backend import Backend
from shared.vhost_user.errors import VhostUserError
from shared.virtio import balloon
from tests.support.fake_backend import FakeBackendDevice
from tests.support.guest_ring import GuestMemory, GuestRing
from tests.support.mmio_driver import FakeGuestMemory
from vmm.devices import virtio_balloon
from vmm.devices.virtio_balloon import GuestStatistics, VirtioBalloon
from vmm.devices.virtio_device import QueueConfig
from vmm.event_loop import EventLoop

SIZE = 1 << 20
PAGES = SIZE >> 12
NUM_PAGES, ACTUAL = 0, 4


class BalloonBackend(FakeBackendDevice):
    """Everything that our worker offers."""

    def features(self) -> int:
        return balloon.FEATURES


class Rig:
    """Device, back end in a thread, event loop (run by hand)."""

    def __init__(self, page_size: int = 4096, **options: bool) -> None:
        self.ram = GuestMemory(SIZE)
        self.memory = FakeGuestMemory(self.ram)
        self.memory.size = SIZE  # type: ignore[attr-defined]
        self.memory.page_size = page_size  # type: ignore[attr-defined]
        self.loop = EventLoop()
        ours, theirs = socket.socketpair()
        self.back = BalloonBackend(balloon.QUEUES)
        self.back.protocol_features &= ~(1 << 9 | 1 << 12)  # no config space, no record
        self.backend = Backend(self.back, theirs.detach())
        self.device = VirtioBalloon("balloon0", ours.detach(), self.memory,  # type: ignore[arg-type]
                                    self.loop, GuestStatistics(), **options)
        self.changes = 0
        self.events: list[object] = []
        self.failures: list[str] = []
        self.device.on_failure = self.failures.append
        self.device.on_config_change = self.changed
        self.device.on_event = lambda name, data: self.events.append((name, dict(data)))
        self.rings = [GuestRing(self.ram, 16) for _ in self.device.queue_sizes]
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()

    def changed(self) -> None:
        self.changes += 1

    def serve(self) -> None:
        try:
            self.backend.serve()
        except VhostUserError:
            self.backend.close()

    def activate(self, features: int | None = None) -> None:
        queues = []
        for index, ring in enumerate(self.rings):
            queue = QueueConfig(index, 16, ring.kick_fd, ring.call_fd)
            queue.desc, queue.avail, queue.used = ring.desc, ring.avail, ring.used
            queue.ready = True
            queues.append(queue)
        self.device.activate(self.device.features() if features is None else features, queues)

    def write(self, value: int) -> None:
        self.device.write_config(ACTUAL, value.to_bytes(4, "little"))

    def field(self, offset: int) -> int:
        return int.from_bytes(self.device.read_config(offset, 4), "little")

    def run_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < deadline
            self.loop.run_once(0.01)

    def close(self) -> None:
        self.device.close()
        self.thread.join(10)
        assert not self.thread.is_alive()
        self.loop.close()
        for ring in self.rings:
            ring.close()
        self.ram.close()


@pytest.fixture
def make() -> Iterator[Callable[..., Rig]]:
    rigs: list[Rig] = []

    def build(**options: object) -> Rig:
        rigs.append(Rig(**options))  # type: ignore[arg-type]
        return rigs[-1]

    yield build
    for rig in rigs:
        rig.close()


@pytest.fixture
def rig(make: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch) -> Rig:
    monkeypatch.setattr(virtio_balloon, "CHANGE_INTERVAL", 0.05)
    rig = make()
    rig.activate()
    return rig


# ---- what is on offer --------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "extra", "queues"), [
    ({}, 0, 3), ({"deflate_on_oom": True}, balloon.F_DEFLATE_ON_OOM, 3),
    ({"free_page_reporting": True}, balloon.F_PAGE_REPORTING, 5),
    ({"page_size": 2 << 20}, balloon.F_MUST_TELL_HOST, 3)])
def test_options_choose_features_and_queues(make: Callable[..., Rig], options: dict[str, object],
                                            extra: int, queues: int) -> None:
    rig = make(**options)
    common = (balloon.F_STATS_VQ | balloon.F_INDIRECT_DESC | balloon.F_EVENT_IDX
              | balloon.F_VERSION_1)
    assert rig.device.features() == common | extra
    assert rig.device.device_id == 5 and len(rig.device.queue_sizes) == queues


def test_the_back_end_is_never_asked_for_the_config_space(rig: Rig) -> None:
    rig.device.read_config(0, 8)
    rig.write(3)
    assert {call[0] for call in rig.back.calls} == {"set_features", "set_memory", "start_ring",
                                                    "enable_ring"}


# ---- config space ------------------------------------------------------------------------------


def test_the_target_is_what_the_driver_is_to_give(rig: Rig) -> None:
    assert (rig.device.actual, rig.device.target) == (SIZE, SIZE)
    for size, pages in ((SIZE, 0), (SIZE - 4096, 1), (SIZE - 4095, 1), (SIZE - 1, 1), (0, PAGES),
                        (1, PAGES), (2 * SIZE, 0), (1 << 64, 0), (SIZE // 2, PAGES // 2)):
        changes = rig.changes
        rig.device.set_target(size)
        assert rig.field(NUM_PAGES) == pages
        assert rig.device.target == SIZE - 4096 * pages
        assert rig.changes == changes + 1, "the driver is told even if nothing changed"


def test_what_the_driver_gave_is_what_it_says(rig: Rig) -> None:
    rig.write(10)
    assert rig.device.actual == SIZE - 10 * 4096 and rig.field(ACTUAL) == 10
    rig.write(PAGES + 1)  # more than there is
    assert rig.device.actual == 0
    rig.write(0xFFFFFFFF)
    assert rig.device.actual == 0 and rig.field(ACTUAL) == 0xFFFFFFFF
    rig.write(0)
    assert rig.device.actual == SIZE


@pytest.mark.parametrize(("offset", "data", "config"), [
    (4, "11", "0000000011000000"), (7, "22", "0000000000000022"), (5, "2233", "0000000000223300"),
    (4, "1122334455667788", "0000000011223344"), (0, "ffffffffffffffff", "00000000ffffffff"),
    (2, "aabbccdd", "00000000ccdd0000"), (0, "ffffffff", "0" * 16), (8, "ffffffff", "0" * 16),
    (255, "ff", "0" * 16), (1 << 20, "ff", "0" * 16), (4, "", "0" * 16)])
def test_writes_of_any_place_and_size(rig: Rig, offset: int, data: str, config: str) -> None:
    """Drivers of old wrote `actual` byte by byte; num_pages is the device's."""
    rig.device.write_config(offset, bytes.fromhex(data))
    assert rig.device.read_config(0, 8) == bytes.fromhex(config)


@pytest.mark.parametrize(("offset", "size"), [(0, 1), (3, 2), (4, 4), (0, 8), (7, 4), (8, 4),
                                              (12, 4), (200, 8), (1 << 30, 1), (0, 0)])
def test_reads_of_any_place_and_size(rig: Rig, offset: int, size: int) -> None:
    rig.device.set_target(SIZE - 0x34 * 4096)
    rig.write(0x01020304)
    whole = bytes.fromhex("3400000004030201")
    assert rig.device.read_config(offset, size) == whole[offset:offset + size].ljust(size, b"\0")


def test_a_driver_that_is_not_up_writes_nothing(make: Callable[..., Rig]) -> None:
    rig = make()
    rig.write(7)
    assert rig.field(ACTUAL) == 0


# ---- events ------------------------------------------------------------------------------------


def test_many_changes_are_one_event_with_the_last_value(rig: Rig) -> None:
    for pages in range(1, 50):
        rig.write(pages)
    assert rig.events == []
    rig.run_until(lambda: bool(rig.events))
    assert rig.events == [("BALLOON_CHANGED", {"actual": SIZE - 49 * 4096})]
    rig.write(49)  # no change, no event
    rig.write(50)
    rig.run_until(lambda: len(rig.events) > 1)
    assert rig.events[1:] == [("BALLOON_CHANGED", {"actual": SIZE - 50 * 4096})]


def test_events_come_while_the_driver_goes_on(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most one an interval, however fast it writes: none is pushed off for ever."""
    pages = 0

    def more() -> bool:
        nonlocal pages
        pages = (pages + 1) % PAGES
        rig.write(pages)
        return len(rig.events) == 3

    began = time.monotonic()
    rig.run_until(more)
    assert time.monotonic() - began >= 3 * virtio_balloon.CHANGE_INTERVAL


# ---- resets ------------------------------------------------------------------------------------


def test_a_reset_empties_the_balloon_and_keeps_the_target(rig: Rig) -> None:
    rig.device.statistics.receive({"type": "stats", "values": [4, 1]})
    rig.device.set_target(SIZE // 2)
    rig.write(PAGES // 2)
    rig.device.reset()
    assert (rig.device.actual, rig.device.target) == (SIZE, SIZE // 2)
    assert rig.device.statistics.told == 0
    assert ("reset",) in rig.back.calls
    rig.run_until(lambda: bool(rig.events))
    assert rig.events == [("BALLOON_CHANGED", {"actual": SIZE})]
    assert not rig.device.is_in_use()
    rig.activate()
    assert rig.field(NUM_PAGES) == PAGES // 2, "the next driver is to give as much"


def test_a_pause_changes_nothing(rig: Rig) -> None:
    rig.device.set_target(SIZE // 2)
    rig.write(5)
    rig.device.pause(time.monotonic() + 5)
    assert rig.device.is_in_use()
    rig.device.set_target(SIZE // 4)  # `balloon` while the VM is paused
    rig.device.resume()
    assert rig.field(NUM_PAGES) == PAGES * 3 // 4 and rig.field(ACTUAL) == 5


def test_huge_pages_are_held_while_the_guest_gives_or_has_given(rig: Rig) -> None:
    """A huge page would take back what it gave."""
    rig.device.set_target(SIZE - 4096)
    assert rig.memory.holds[-1]
    rig.write(1)
    rig.device.set_target(SIZE)
    assert rig.memory.holds[-1], "it has not taken it back yet"
    rig.write(0)
    assert not rig.memory.holds[-1]
    rig.write(1)
    assert rig.memory.holds[-1]
    rig.device.reset()
    assert not rig.memory.holds[-1]
