"""A NIC's config space, its features, what outlives its workers, and its control queue's place."""

from __future__ import annotations

import mmap
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

import pytest

from shared.vhost_user.backend import Backend, Ring
from shared.vhost_user.errors import VhostUserError
from shared.virtio import net
from tests.support.fake_backend import FakeBackendDevice
from tests.support.guest_ring import GuestMemory, GuestRing
from tests.support.mmio_driver import FakeGuestMemory
from vmm.devices.vhost_user import IDLE, PAUSED, RUNNING
from vmm.devices.virtio_device import QueueConfig
from vmm.devices.virtio_net import NicState, VirtioNet
from vmm.event_loop import EventLoop

if TYPE_CHECKING:
    from vmm.memory import GuestMemory as CoreMemory

MAC = bytes.fromhex("525400010203")


@pytest.fixture
def loop() -> Iterator[EventLoop]:
    loop = EventLoop()
    yield loop
    loop.close()


def make(loop: EventLoop, **options: object) -> VirtioNet:
    return VirtioNet("nic", -1, cast("CoreMemory", None), loop,  # type: ignore[arg-type]
                     **{"foreign": False, "mac": MAC, **options})  # type: ignore[arg-type]


# ---- the config space ----------------------------------------------------------------------------


def test_each_field(loop: EventLoop) -> None:
    device = make(loop, pairs=3, mtu=9000)
    device.show_nic()
    assert device.read_config(0, 12) == MAC + struct.pack("<HHH", 1, 3, 9000)
    device.close()


@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 8, 12, 13, 64])
def test_any_offset_and_size(loop: EventLoop, size: int) -> None:
    device = make(loop, mtu=1500)
    whole = device.read_config(0, 12).ljust(512, b"\0")
    for offset in (*range(20), 255, 256, 0xF00, 0xFFFFFFFF):
        assert device.read_config(offset, size) == whole[offset:offset + size].ljust(size, b"\0")
    device.close()


def test_the_driver_can_not_write_it(loop: EventLoop) -> None:
    device = make(loop)
    device.write_config(0, b"\xff" * 6)
    assert device.read_config(0, 6) == MAC
    device.close()


def status(device: VirtioNet) -> int:
    return int.from_bytes(device.read_config(6, 2), "little")


def test_the_link(loop: EventLoop) -> None:
    """Down in an empty slot, up with a NIC, down when somebody says so or nobody serves it."""
    told: list[int] = []
    device = make(loop)
    device.on_config_change = lambda: told.append(status(device))
    assert status(device) == 0
    device.set_link(True)
    assert status(device) == 0 and told == [0]
    device.show_nic()
    assert status(device) == 1
    device.set_link(False)
    device.set_link(True)
    assert told == [0, 0, 1]
    device.show_failed()
    device.set_link(True)
    assert told == [0, 0, 1, 0, 0]
    device.set_link(False)
    device.show_empty()
    device.show_nic()
    assert status(device) == 1  # another NIC, another cable
    device.close()


def test_the_address_changes_when_the_nic_comes(loop: EventLoop) -> None:
    device = make(loop)
    other = bytes.fromhex("525400000099")
    device.next_mac = other
    assert device.read_config(0, 6) == MAC
    device.show_nic()
    assert device.read_config(0, 6) == other == device.mac
    device.show_empty()
    assert device.read_config(0, 6) == other  # a driver that is up has it
    device.close()


# ---- features ------------------------------------------------------------------------------------


@pytest.mark.parametrize("pairs", [1, 4])
@pytest.mark.parametrize("mtu", [0, 1500])
def test_a_slot_offers_the_same_for_every_tap_and_for_none(loop: EventLoop, pairs: int,
                                                           mtu: int) -> None:
    device = make(loop, pairs=pairs, mtu=mtu)
    before = device.features()
    assert before & net.F_MAC and before & net.F_STATUS and before & net.F_CTRL_VQ
    assert bool(before & net.F_MTU) is bool(mtu) and bool(before & net.F_MQ) is (pairs > 1)
    assert not before & net.UFO
    assert before & ~device.core_features & ~net.SLOT_BACKEND_FEATURES == 0
    device.show_nic()
    device.show_empty()
    assert device.features() == before
    assert device.queue_sizes == (256,) * 2 * pairs + (net.CONTROL_QUEUE_SIZE,)
    device.close()


# ---- what outlives workers -----------------------------------------------------------------------


def test_the_state_is_sealed_and_made_when_needed(loop: EventLoop) -> None:
    before = len(os.listdir("/proc/self/fd"))
    state = NicState()
    assert len(os.listdir("/proc/self/fd")) == before
    fd = state.fileno()
    assert state.fileno() == fd and os.fstat(fd).st_size == net.STATE_BYTES
    for size in (0, net.STATE_BYTES + 1):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)
    with mmap.mmap(fd, net.STATE_BYTES) as memory:
        memory[:4] = b"kept"
        state.forget()
        assert memory[:4] == bytes(4)
    state.close()
    state.close()
    state.forget()
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_the_null_worker_is_given(loop: EventLoop) -> None:
    device = make(loop, pairs=2, queue_size=512)
    order, fds = device.null_order()
    assert order == {"device": "net", "queues": 2, "queue-size": 512, "mac": MAC}
    assert fds == [device.nic_state.fileno()]
    device.close()


def test_a_reset_forgets_what_the_driver_has_set(loop: EventLoop) -> None:
    device = make(loop)
    os.pwrite(device.nic_state.fileno(), b"\xff" * 8, 0)
    device.set_link(False)
    device.reset()
    assert os.pread(device.nic_state.fileno(), 8, 0) == bytes(8)
    assert not device.nic_state.link_up  # that isn't the driver's
    device.close()


# ---- rings ---------------------------------------------------------------------------------------


class NetBackend(FakeBackendDevice):
    """As a net worker, or another one's back end: rings that are never used up."""

    def __init__(self, pairs: int, features: int) -> None:
        super().__init__(2 * pairs + 1)
        self.announced_queues = pairs
        self.offered = features
        self.rings: list[Ring] = []

    def features(self) -> int:
        return self.offered

    def start_ring(self, ring: Ring) -> None:
        self.rings.append(ring)

    def stop_ring(self, ring: Ring) -> int:
        return ring.base


class Rig:
    """A NIC, its back end on a thread, guest memory with as many rings as a driver wants."""

    def __init__(self, loop: EventLoop, foreign: bool, pairs: int = 1,
                 features: int = net.SLOT_BACKEND_FEATURES) -> None:
        self.ram = GuestMemory(1 << 20)
        self.back = NetBackend(pairs, features)
        ours, theirs = socket.socketpair()
        self._backend = Backend(self.back, theirs.detach())
        self.device = VirtioNet("nic", ours.detach(), FakeGuestMemory(self.ram),  # type: ignore[arg-type]
                                loop, foreign, pairs, mac=MAC)
        self.guest: list[GuestRing] = []
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        try:
            self._backend.serve()
        except VhostUserError:
            self._backend.close()

    def queues(self, *indices: int) -> list[QueueConfig]:
        found = []
        for index in range(len(self.device.queue_sizes)):
            ring = GuestRing(self.ram, 64)
            self.guest.append(ring)
            queue = QueueConfig(index, 64, ring.kick_fd, ring.call_fd)
            queue.desc, queue.avail, queue.used = ring.desc, ring.avail, ring.used
            queue.ready = index in indices
            found.append(queue)
        return found

    def close(self) -> None:
        self.device.close()
        self._thread.join(10)
        for ring in self.guest:
            ring.close()
        self.ram.close()


@pytest.mark.parametrize(("features", "indices", "served"), [
    (net.F_MQ | net.F_CTRL_VQ, (0, 1, 2, 3, 4, 5, 8), [0, 1, 2, 3, 4, 5, 8]),
    (net.F_MQ | net.F_CTRL_VQ, (0, 1, 8), [0, 1, 8]),
    (net.F_CTRL_VQ, (0, 1, 2), [0, 1, 8]),
    (0, (0, 1), [0, 1]),
    (net.F_CTRL_VQ, (0, 1, 2, 3, 4, 8), [0, 1, 8]),  # no right driver has those
])
def test_the_control_queue_follows_the_pairs_that_the_driver_may_use(
        loop: EventLoop, features: int, indices: tuple[int, ...], served: list[int]) -> None:
    rig = Rig(loop, foreign=False, pairs=4)
    queues = rig.queues(*indices)
    rig.device.activate(net.F_MAC | net.F_STATUS | 1 << 32 | features, queues)
    assert sorted(ring.index for ring in rig.back.rings) == served
    if 8 in served and 8 not in indices:
        ring = next(ring for ring in rig.back.rings if ring.index == 8)
        assert ring.desc == queues[2].desc
    assert rig.back.acked & (net.F_MAC | net.F_STATUS) == 0  # the core's own
    rig.device.reset()
    assert rig.device.state == IDLE
    rig.close()


def test_a_foreign_back_end_is_stopped_with_buffers_that_wait(loop: EventLoop) -> None:
    """A receive buffer isn't a request: nobody waits until it is used."""
    rig = Rig(loop, foreign=True, features=net.BASE | net.UFO | net.F_CTRL_VQ | net.F_MQ)
    offered = rig.device.features()
    assert offered == net.BASE | net.UFO | net.F_MAC | net.F_STATUS
    assert rig.device.queue_sizes == (256, 256)
    queues = rig.queues(0, 1)
    rig.device.activate(offered, queues)
    for ring in rig.guest:
        ring.add([(rig.ram.alloc(2000), 2000, True)])
        ring.publish()
    for _ in range(2):
        rig.device.pause(time.monotonic() + 5)
        assert rig.device.state == PAUSED
        rig.device.resume()
        assert rig.device.state == RUNNING
    rig.device.reset()
    assert rig.device.state == IDLE
    rig.close()
