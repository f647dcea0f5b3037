"""A shared folder: its config space, what is said to its back end, and back ends of no use."""

from __future__ import annotations

import os
import socket
import threading
import time
from typing import TYPE_CHECKING

import pytest

from shared.vhost_user import messages as m
from shared.vhost_user.backend import Backend
from shared.vhost_user.errors import VhostUserError
from tests.support import hostile_backend
from tests.support.fake_backend import FEATURES, FakeBackendDevice
from tests.support.guest_ring import GuestMemory, GuestRing
from tests.support.hostile_backend import HostileBackend
from tests.support.mmio_driver import FakeGuestMemory, MmioDriver
from vmm.devices import vhost_user
from vmm.devices.vhost_user import BROKEN, IDLE, NEW, RUNNING
from vmm.devices.virtio_fs import VirtioFs
from vmm.errors import BackendError
from vmm.event_loop import EventLoop
from vmm.hypervisor.fake import FakeVm
from vmm.transport import mmio_registers as r
from vmm.transport.virtio_mmio import VirtioMmio

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

BASE, GSI = 0xF0100000, 5
RING_FEATURES = 1 << 28 | 1 << 29 | 1 << 32


class Folder(FakeBackendDevice):
    """Offers everything that there is; has as many queues as virtiofsd."""

    def features(self) -> int:
        return FEATURES | RING_FEATURES | 1 | 1 << 33 | 1 << 34


class Rig:
    """The device in a slot, connected to `peer`; the loop is run by hand."""

    def __init__(self, fd: int, request_queues: int = 1) -> None:
        self.ram = GuestMemory(1 << 20)
        self.rings = [GuestRing(self.ram, 64) for _ in range(1 + request_queues)]
        self.memory = FakeGuestMemory(self.ram)
        self.loop = EventLoop()
        self.device = VirtioFs("fs0", fd, self.memory, self.loop, "shared",  # type: ignore[arg-type]
                               request_queues)
        self.transport = VirtioMmio(FakeVm(), self.memory, BASE, GSI, self.device)  # type: ignore[arg-type]
        self.driver = MmioDriver(self.transport)

    def run(self) -> None:
        assert self.driver.take_features(RING_FEATURES)
        for index, ring in enumerate(self.rings):
            assert self.driver.set_queue(index, 64, ring.desc, ring.avail, ring.used)
        self.driver.add_status(r.DRIVER_OK)

    def run_loop_until(self, condition: Callable[[], object]) -> None:
        deadline = soon()
        while not condition():
            assert time.monotonic() < deadline
            self.loop.run_once(0.05)

    def close(self) -> None:
        self.device.close()
        self.transport.close()
        self.loop.close()
        for ring in self.rings:
            ring.close()
        self.ram.close()


class Served(Rig):
    """With a good back end, on a thread."""

    def __init__(self, request_queues: int = 1) -> None:
        ours, theirs = socket.socketpair()
        self.back = Folder(queue_count=2)
        self.backend = Backend(self.back, theirs.detach())
        super().__init__(ours.detach(), request_queues)
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()

    def serve(self) -> None:
        try:
            self.backend.serve()
        except VhostUserError:
            self.backend.close()

    def close(self) -> None:
        super().close()
        self.thread.join(10)
        assert not self.thread.is_alive()
        assert self.back.inflight_fd == -1  # nobody asked


@pytest.fixture
def served() -> Iterator[Served]:
    before = len(os.listdir("/proc/self/fd"))
    result = Served()
    yield result
    result.close()
    assert len(os.listdir("/proc/self/fd")) == before, "descriptors leaked"


def soon(seconds: float = 5.0) -> float:
    return time.monotonic() + seconds


# ---- what the driver sees ------------------------------------------------------------------


def test_identity_features_and_queues(served: Served) -> None:
    assert served.driver.read(r.DEVICE_ID) == 26
    # Not NOTIFICATION, ACCESS_PLATFORM, RING_PACKED.
    assert served.driver.features() == RING_FEATURES
    for index, size in ((0, 128), (1, 128), (2, 0)):
        served.driver.write(r.QUEUE_SEL, index)
        assert served.driver.read(r.QUEUE_SIZE_MAX) == size
    # There is no DAX window (4.2.2: the length of a region that doesn't exist).
    assert served.driver.read(r.SHM_LEN_LOW) == served.driver.read(r.SHM_LEN_HIGH) == 0xFFFF_FFFF


def test_the_config_space_is_the_core_s(served: Served) -> None:
    space = b"".join(served.driver.config(at, 4).to_bytes(4, "little") for at in range(0, 48, 4))
    assert space == b"shared".ljust(36, b"\0") + (1).to_bytes(4, "little") + bytes(8)
    served.driver.store(r.CONFIG, 4, 0)
    assert served.driver.config(0, 4) == int.from_bytes(b"shar", "little")
    assert served.device.state == NEW  # nobody was asked


def test_the_longest_tag_has_its_end(served: Served) -> None:
    ours, theirs = socket.socketpair()
    device = VirtioFs("fs1", ours.detach(), served.memory, served.loop, "x" * 35, 3)  # type: ignore[arg-type]
    assert device.read_config(0, 40) == b"x" * 35 + b"\0" + (3).to_bytes(4, "little")
    assert device.queue_sizes == (128,) * 4
    device.close()
    theirs.close()


# ---- what is said to the back end ----------------------------------------------------------


def test_until_a_driver_starts_it_only_features_are_asked(served: Served) -> None:
    served.driver.features()
    served.driver.config(0, 4)
    assert served.device.state == IDLE
    assert served.back.calls == []


def test_life(served: Served) -> None:
    served.run()
    assert served.driver.status == 0xF
    assert served.backend.acked_protocol == (m.PF_MQ | m.PF_REPLY_ACK | m.PF_CONFIGURE_MEM_SLOTS
                                             | m.PF_RESET_DEVICE | m.PF_STATUS)
    assert served.backend.channel is None  # it has no way to ask for anything
    names = [call[0] for call in served.back.calls]
    assert names == ["set_features", "set_memory", "start_ring", "start_ring", "enable_ring",
                     "enable_ring"]
    served.transport.pause(soon())
    served.transport.resume()
    assert served.device.state == RUNNING
    served.driver.reset()
    assert served.driver.status == 0
    served.run()
    assert served.driver.status == 0xF


def test_a_back_end_with_fewer_queues() -> None:
    served = Served(request_queues=2)
    assert served.driver.features() == 0
    assert served.driver.status & r.NEEDS_RESET
    with pytest.raises(BackendError, match="2 queues, 3 were asked for; lower num-request-queues"):
        served.device.features()
    served.close()


# ---- death ---------------------------------------------------------------------------------


@pytest.mark.parametrize("noticed", [False, True])
def test_death_with_requests_in_flight_holds_up_nobody(served: Served, noticed: bool) -> None:
    served.run()
    served.rings[1].set_avail_idx(3)
    served.backend.connection.shutdown()
    if noticed:
        served.run_loop_until(lambda: served.driver.status & r.NEEDS_RESET)
        assert served.driver.status == 0xF | r.NEEDS_RESET
    else:
        # What tells the loop comes while `stop` waits for the requests.
        threading.Timer(0.05, served.loop.run_once, (1,)).start()
    served.transport.pause(soon(2))
    assert served.device.state == BROKEN
    served.transport.resume()
    assert served.driver.status & r.NEEDS_RESET
    served.driver.reset()
    assert served.driver.status == 0
    assert served.driver.features() == 0  # the next driver finds that it is of no use
    assert served.driver.status == r.NEEDS_RESET


def test_the_reset_of_a_dead_back_end_is_done_at_once(served: Served) -> None:
    """It touches nothing any more, so that the machine's reset goes on."""
    served.run()
    served.rings[0].set_avail_idx(1)
    served.backend.connection.shutdown()
    served.run_loop_until(lambda: served.driver.status & r.NEEDS_RESET)
    served.transport.reset()
    assert not served.device.is_in_use()
    with pytest.raises(BackendError, match="is gone with requests in flight"):
        served.device.features()


def test_requests_that_don_t_end_are_named_by_stop(served: Served) -> None:
    served.run()
    served.rings[1].set_avail_idx(1)
    with pytest.raises(BackendError, match="fs0 did not finish its requests in time"):
        served.transport.pause(soon(0.1))
    assert served.device.state == RUNNING
    served.ram.write(served.rings[1].used + 2, b"\1\0")
    served.backend.rings[1].base = 1
    served.transport.pause(soon(2))
    served.transport.resume()


# ---- back ends of no use -------------------------------------------------------------------

BEHAVIOURS = [hostile_backend.silent, hostile_backend.deaf_after_features,
              hostile_backend.garbage, hostile_backend.huge_reply, hostile_backend.hang_up,
              hostile_backend.flood, hostile_backend.dribble, hostile_backend.asks_for_a_window]


@pytest.mark.parametrize("behaviour", BEHAVIOURS, ids=lambda b: b.__name__)
def test_a_bad_back_end_costs_its_device_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                               behaviour: Callable[..., None]) -> None:
    monkeypatch.setattr(vhost_user, "REQUEST_LIMIT", 0.2)
    with HostileBackend(tmp_path / "s", behaviour):
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(tmp_path / "s"))
        rig = Rig(sock.detach())
        began = time.monotonic()
        assert rig.driver.config(0, 4) == int.from_bytes(b"shar", "little")
        assert rig.driver.features() == 0
        assert not rig.driver.take_features(RING_FEATURES)
        rig.loop.run_once(0.05)
        rig.transport.pause(soon())
        rig.transport.resume()
        rig.driver.reset()
        rig.transport.reset()
        assert time.monotonic() - began < 2
        rig.close()


def test_a_request_of_a_back_end_ends_it(tmp_path: Path) -> None:
    with HostileBackend(tmp_path / "s", hostile_backend.asks_for_a_window):
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(tmp_path / "s"))
        rig = Rig(sock.detach())
        with pytest.raises(BackendError, match="fs0 sent a request; a reply was due"):
            rig.device.features()
        assert rig.device.state == BROKEN
        rig.close()
