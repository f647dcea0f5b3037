"""A vsock device and its driver, with the kernel played: negotiation, life, the event queue."""

from __future__ import annotations

import errno
import os
import struct
import threading
import time
from typing import TYPE_CHECKING

import pytest

from tests.support.fake_vhost import VCPU_REQUESTS, FakeDevice, FakeVhost
from tests.support.guest_ring import WRITE, GuestMemory, GuestRing
from tests.support.mmio_driver import USER_BASE, FakeGuestMemory, MmioDriver, drain
from vmm.devices.vhost_kernel import KernelVsock
from vmm.devices.vhost_vsock import CLOSED, EVENT, IDLE, PAUSED, RUNNING, RX, TX, VhostVsock
from vmm.errors import BackendError, ConfigError
from vmm.event_loop import EventLoop
from vmm.hypervisor.fake import FakeVm
from vmm.transport import mmio_registers as r
from vmm.transport.virtio_mmio import VirtioMmio

if TYPE_CHECKING:
    from collections.abc import Iterator

BASE, GSI = 0xF0100000, 5
CID = 0x1234_5678


class WritableMemory(FakeGuestMemory):
    def write(self, gpa: int, data: bytes) -> None:
        self.host_address(gpa, len(data))
        self.ram.write(gpa, data)


class Rig:
    """A slot with the device in it, a driver, three rings; the loop is run by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fake = FakeVhost(monkeypatch)
        self.ram = GuestMemory(1 << 20)
        self.rings = [GuestRing(self.ram, 64) for _ in range(3)]
        self.memory = WritableMemory(self.ram)
        self.loop = EventLoop()
        fd = self.fake.open()
        self.device = VhostVsock("vsock0", KernelVsock(fd), CID, self.memory,  # type: ignore[arg-type]
                                 self.loop)
        self.kernel: FakeDevice = self.fake.devices[fd]
        self.transport = VirtioMmio(FakeVm(), self.memory, BASE, GSI, self.device)  # type: ignore[arg-type]
        self.driver = MmioDriver(self.transport)

    def set_up(self, *queues: int) -> None:
        """Everything before DRIVER_OK."""
        features = self.driver.features()
        assert self.driver.take_features(features)
        for index in queues:
            ring = self.rings[index]
            assert self.driver.set_queue(index, 64, ring.desc, ring.avail, ring.used)

    def run(self, *queues: int) -> None:
        self.set_up(*(queues or (RX, TX, EVENT)))
        self.driver.add_status(r.DRIVER_OK)

    def eventfds(self, index: int) -> tuple[int, int]:
        queue = self.transport._queues[index]
        return drain(queue.kick_fd), drain(queue.call_fd)

    def close(self) -> None:
        self.transport.close()
        self.device.close()
        self.loop.close()
        for ring in self.rings:
            ring.close()
        self.ram.close()


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    before = len(os.listdir("/proc/self/fd"))
    result = Rig(monkeypatch)
    yield result
    result.close()
    assert len(os.listdir("/proc/self/fd")) == before, "descriptors leaked"


def soon() -> float:
    return time.monotonic() + 5


# ---- the start -----------------------------------------------------------------------------


def test_what_the_main_thread_sets_up(rig: Rig) -> None:
    assert rig.fake.calls[0] == "VHOST_SET_OWNER"
    assert rig.kernel.cid == CID
    assert rig.kernel.regions == [(rig.ram.base, rig.ram.size, USER_BASE + rig.ram.base)]
    assert rig.kernel.rings[RX].err == rig.kernel.rings[TX].err >= 0
    assert not rig.kernel.running


@pytest.mark.parametrize(("request_", "error", "says"), [
    ("VHOST_VSOCK_SET_GUEST_CID", errno.EADDRINUSE, "x: another VM has the guest-cid 3; choose"),
    ("VHOST_VSOCK_SET_GUEST_CID", errno.EINVAL, "keeps the guest-cid 3 for itself; choose"),
    ("VHOST_SET_OWNER", errno.EBUSY, "x: another process owns this vhostfd; hand in one"),
    ("VHOST_SET_OWNER", errno.ENOMEM, "x: VHOST_SET_OWNER: Cannot allocate memory"),
    ("VHOST_GET_FEATURES", errno.ENOTTY, "x: VHOST_GET_FEATURES: Inappropriate ioctl"),
    ("VHOST_SET_MEM_TABLE", errno.E2BIG, "x: VHOST_SET_MEM_TABLE: Argument list too long"),
    ("VHOST_SET_VRING_ERR", errno.EINVAL, "x: VHOST_SET_VRING_ERR: Invalid argument"),
])
def test_a_refused_start_leaves_nothing(monkeypatch: pytest.MonkeyPatch, request_: str,
                                        error: int, says: str) -> None:
    fake, loop, ram = FakeVhost(monkeypatch), EventLoop(), GuestMemory(1 << 16)
    before = len(os.listdir("/proc/self/fd"))
    fake.fail[request_] = error
    with pytest.raises(ConfigError) as caught:
        VhostVsock("v", KernelVsock(fake.open()), 3, FakeGuestMemory(ram), loop, "x")  # type: ignore[arg-type]
    assert says in str(caught.value)
    assert len(os.listdir("/proc/self/fd")) == before
    loop.close()
    ram.close()


def test_two_guests_can_t_have_one_address(rig: Rig) -> None:
    other = KernelVsock(rig.fake.open())
    with pytest.raises(ConfigError, match=f"another VM has the guest-cid {CID}"):
        VhostVsock("other", other, CID, rig.memory, rig.loop)  # type: ignore[arg-type]
    assert other.fd == -1


# ---- what the driver sees ------------------------------------------------------------------


def test_identity_features_and_config_space(rig: Rig) -> None:
    assert rig.driver.read(r.DEVICE_ID) == 19
    # Of what the kernel has: SEQPACKET, INDIRECT_DESC, EVENT_IDX, VERSION_1; neither
    # NOTIFY_ON_EMPTY, ANY_LAYOUT (of old drivers), LOG_ALL (vhost's), ACCESS_PLATFORM, IN_ORDER.
    assert rig.driver.features() == 1 << 1 | 1 << 28 | 1 << 29 | 1 << 32
    assert rig.driver.config(0, 4) == CID
    assert rig.driver.config(4, 4) == 0
    assert rig.driver.config(2, 2) == CID >> 16
    assert rig.driver.config(8, 4) == 0
    for index, size in ((RX, 256), (TX, 256), (EVENT, 256), (3, 0)):
        rig.driver.write(r.QUEUE_SEL, index)
        assert rig.driver.read(r.QUEUE_SIZE_MAX) == size
    rig.run()
    rig.driver.store(r.CONFIG, 4, 99)
    assert rig.driver.config(0, 4) == CID


def test_a_driver_starts_it(rig: Rig) -> None:
    rig.set_up(RX, TX, EVENT)
    assert not rig.kernel.running
    rig.fake.calls.clear()
    rig.driver.add_status(r.DRIVER_OK)
    assert rig.driver.status == 0xF
    assert rig.device.state == RUNNING
    assert rig.kernel.running
    assert rig.kernel.features == rig.driver.features()
    for index in (RX, TX):
        ring, given = rig.kernel.rings[index], rig.rings[index]
        queue = rig.transport._queues[index]
        assert (ring.size, ring.base) == (64, 0)
        assert ring.addresses == {"desc": USER_BASE + given.desc, "used": USER_BASE + given.used,
                                  "avail": USER_BASE + given.avail}
        assert (ring.kick, ring.call) == (queue.kick_fd, queue.call_fd)
        assert rig.eventfds(index) == (1, 1)
    assert rig.eventfds(EVENT) == (0, 0)
    assert set(rig.fake.calls) == VCPU_REQUESTS
    rig.fake.calls.clear()
    rig.driver.reset()
    assert set(rig.fake.calls) == {"VHOST_VSOCK_SET_RUNNING"}


def test_a_driver_without_an_event_queue_has_its_sockets(rig: Rig) -> None:
    rig.run(RX, TX)
    assert rig.kernel.running
    assert not rig.device.transport_reset()


@pytest.mark.parametrize("queues", [(RX,), (TX,), (EVENT,), (RX, EVENT)])
def test_a_driver_without_both_rings_must_reset(rig: Rig, queues: tuple[int, ...]) -> None:
    rig.run(*queues)
    assert rig.driver.status & r.NEEDS_RESET
    assert not rig.kernel.running and rig.device.state == IDLE
    rig.driver.reset()
    assert rig.driver.status == 0
    rig.run()
    assert rig.driver.status == 0xF and rig.kernel.running


@pytest.mark.parametrize("request_", sorted(VCPU_REQUESTS))
def test_a_kernel_that_refuses_the_start(rig: Rig, request_: str) -> None:
    rig.fake.fail[request_] = errno.EFAULT
    rig.run()
    assert rig.driver.status & r.NEEDS_RESET
    assert rig.device.state == IDLE
    rig.driver.reset()
    rig.run()
    assert rig.driver.status == 0xF and rig.kernel.running


def test_reset_stops_it_and_starts_over(rig: Rig) -> None:
    rig.run()
    rig.kernel.rings[TX].base = 7
    rig.driver.reset()
    assert rig.driver.status == 0
    assert not rig.kernel.running and rig.device.state == IDLE
    rig.run()
    assert rig.kernel.running
    assert rig.kernel.rings[TX].base == 0


def test_a_reset_that_the_kernel_refuses_is_not_done(rig: Rig) -> None:
    rig.run()
    rig.fake.fail["VHOST_VSOCK_SET_RUNNING"] = errno.EPERM
    rig.driver.reset()
    assert rig.driver.status == r.NEEDS_RESET  # guest memory may still be touched
    assert rig.kernel.running
    rig.driver.reset()
    with pytest.raises(BackendError, match="already started"):
        rig.device.activate(1 << 32, rig.transport._queues)
    rig.transport.reset()


def test_a_broken_ring_is_told_to_the_driver(rig: Rig) -> None:
    rig.run()
    drain(rig.transport._config_fd)
    os.eventfd_write(rig.kernel.rings[RX].err, 1)
    rig.loop.run_once(1)
    assert rig.driver.status & r.NEEDS_RESET
    assert drain(rig.transport._config_fd) == 1
    rig.device._ring_error(0)  # a wake-up for nothing
    rig.driver.reset()
    rig.run()
    assert rig.driver.status == 0xF


# ---- stop, cont, the end -------------------------------------------------------------------


def test_stop_and_cont_go_on_where_the_rings_stood(rig: Rig) -> None:
    rig.run()
    for index in (RX, TX):
        rig.eventfds(index)
    rig.kernel.rings[RX].base, rig.kernel.rings[TX].base = 5, 0xFFFF
    rig.transport.pause(soon())
    assert not rig.kernel.running and rig.device.state == PAUSED
    rig.transport.pause(soon())
    rig.kernel.rings[RX].base = 0  # whatever it remembers itself
    rig.transport.resume()
    assert rig.kernel.running and rig.device.state == RUNNING
    assert [ring.base for ring in rig.kernel.rings] == [5, 0xFFFF]
    # What was kicked meanwhile was heard by nobody.
    assert rig.eventfds(RX) == rig.eventfds(TX) == (1, 1)


def test_stop_and_cont_before_a_driver(rig: Rig) -> None:
    rig.transport.pause(soon())
    rig.set_up(RX, TX, EVENT)
    rig.driver.add_status(r.DRIVER_OK)
    assert not rig.kernel.running
    rig.transport.resume()
    assert rig.kernel.running


def test_a_reset_while_paused(rig: Rig) -> None:
    rig.run()
    rig.transport.pause(soon())
    rig.transport.reset()
    rig.transport.resume()
    assert not rig.kernel.running and rig.device.state == IDLE
    rig.run()
    assert rig.kernel.running


def test_a_kernel_that_refuses_stop_or_cont(rig: Rig) -> None:
    rig.run()
    rig.fake.fail["VHOST_VSOCK_SET_RUNNING"] = errno.EPERM
    with pytest.raises(BackendError, match="refused vsock0: VHOST_VSOCK_SET_RUNNING"):
        rig.transport.pause(soon())
    assert rig.device.state == RUNNING
    rig.fake.fail["VHOST_GET_VRING_BASE"] = errno.EPERM
    with pytest.raises(BackendError, match="refused vsock0: VHOST_GET_VRING_BASE"):
        rig.transport.pause(soon())
    rig.fake.fail["VHOST_VSOCK_SET_RUNNING"] = errno.EFAULT
    rig.transport.resume()
    assert rig.driver.status & r.NEEDS_RESET
    rig.driver.reset()
    rig.run()
    assert rig.driver.status == 0xF and rig.kernel.running


def test_close_stops_what_runs(rig: Rig) -> None:
    """A copy of the descriptor may be in another process."""
    rig.run()
    rig.device.close()
    assert not rig.kernel.running and rig.device.state == CLOSED
    rig.device.close()
    rig.device.abort()
    rig.device.reset()
    rig.device.pause(soon())
    rig.device.resume()
    assert not rig.device.transport_reset()
    with pytest.raises(BackendError, match="already started"):
        rig.device.activate(1 << 32, rig.transport._queues)


def test_close_goes_on_if_the_kernel_refuses(rig: Rig) -> None:
    rig.run()
    rig.fake.fail["VHOST_VSOCK_SET_RUNNING"] = errno.EPERM
    rig.device.close()
    assert rig.device.state == CLOSED and rig.device._kernel.fd == -1


def test_a_start_and_the_end_at_once(rig: Rig) -> None:
    """The descriptor is not closed under a vCPU that is about to use it."""
    rig.set_up(RX, TX, EVENT)
    rig.device._lock.acquire()
    vcpu = threading.Thread(target=rig.driver.add_status, args=(r.DRIVER_OK,))
    end = threading.Thread(target=rig.device.close)
    vcpu.start()
    end.start()
    rig.device._lock.release()
    vcpu.join(5)
    end.join(5)
    assert rig.device.state == CLOSED and not rig.kernel.running


# ---- the event queue -----------------------------------------------------------------------


def buffer(rig: Rig, size: int = 4, flags: int = WRITE) -> int:
    """A buffer of the driver in its event queue; its address."""
    ring, address = rig.rings[EVENT], rig.ram.alloc(16, 16)
    rig.ram.fill(address, 16, 0xAA)
    head = ring.free.pop()
    ring.put_desc(head, address, size, flags, 0)
    ring.put_avail(head)
    ring.publish(kick=False)
    return address


def test_all_connections_are_gone(rig: Rig) -> None:
    rig.run()
    ring = rig.rings[EVENT]
    assert not rig.device.transport_reset()  # no buffer yet
    addresses = [buffer(rig) for _ in range(3)]
    rig.transport.pause(soon())
    assert rig.device.transport_reset()
    assert rig.device.transport_reset()
    assert [written for _, written in ring.take_used()] == [4, 4]
    assert [rig.ram.read(address, 5) for address in addresses] == [
        b"\0\0\0\0\xAA", b"\0\0\0\0\xAA", b"\xAA" * 5]
    assert rig.eventfds(EVENT)[1] == 2
    assert rig.device.transport_reset()
    assert not rig.device.transport_reset()


def test_the_event_queue_s_indices_wrap(rig: Rig) -> None:
    rig.run()
    ring = rig.rings[EVENT]
    rig.ram.write(ring.used + 2, b"\xff\xff")
    ring.avail_idx = 0xFFFF
    ring.used_seen = 0xFFFF
    buffer(rig)
    assert rig.device.transport_reset()
    assert ring.used_idx == 0
    assert len(ring.take_used()) == 1


@pytest.mark.parametrize(("size", "flags"), [(3, WRITE), (0, WRITE), (4, 0), (16, WRITE | 4),
                                             (4, 1)])
def test_a_wrong_buffer_for_events(rig: Rig, size: int, flags: int) -> None:
    rig.run()
    address = buffer(rig, size, flags)
    assert not rig.device.transport_reset()
    assert rig.ram.read(address, 16) == b"\xAA" * 16
    assert rig.rings[EVENT].used_idx == 0


def test_a_hostile_event_queue(rig: Rig) -> None:
    rig.run()
    ring = rig.rings[EVENT]
    for head in (64, 0xFFFF):
        rig.ram.write(ring.avail + 4, struct.pack("<H", head))
        ring.set_avail_idx(1)
        assert not rig.device.transport_reset()
    for address in (0, rig.ram.base + rig.ram.size - 3, (1 << 64) - 2):
        ring.put_desc(0, address, 4, WRITE, 0)
        rig.ram.write(ring.avail + 4, struct.pack("<H", 0))
        assert not rig.device.transport_reset()
    assert ring.used_idx == 0
