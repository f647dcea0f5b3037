"""A virtio-blk device against back ends that serve, refuse, hang, lie and die."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from shared.vhost_user import messages as m
from shared.vhost_user.backend import Backend, Ring
from shared.vhost_user.errors import VhostUserError
from tests.support.fake_backend import FEATURES, FakeBackendDevice
from tests.support.guest_ring import GuestMemory, GuestRing
from tests.support.mmio_driver import FakeGuestMemory, drain
from vmm.devices import vhost_user
from vmm.devices.vhost_user import BROKEN, CLOSED, IDLE, NEW, PAUSED, RUNNING
from vmm.devices.virtio_blk import CONFIG_SIZE, VirtioBlk
from vmm.devices.virtio_device import QueueConfig
from vmm.errors import BackendError
from vmm.event_loop import EventLoop

F_MQ = 1 << 12


class RingDevice(FakeBackendDevice):
    """The rings' used index follows what the test wants, so that "in flight" can be played."""

    def __init__(self) -> None:
        super().__init__(queue_count=2, max_queue_size=256)
        self.offered = FEATURES
        self.hold = threading.Event()  # cleared: stop_ring hangs
        self.hold.set()

    def features(self) -> int:
        return self.offered

    def stop_ring(self, ring: Ring) -> int:
        assert self.hold.wait(10)
        return super().stop_ring(ring)


class Rig:
    """Device, back end in a thread, event loop (run by hand), guest memory."""

    def __init__(self, num_queues: int = 1, protocol: int | None = None,
                 foreign: bool = True) -> None:
        self.ram = GuestMemory(1 << 20)
        self.rings = [GuestRing(self.ram, 64) for _ in range(num_queues)]
        self.loop = EventLoop()
        ours, theirs = socket.socketpair()
        self.back = RingDevice()
        if protocol is not None:
            self.back.protocol_features = protocol
        self.backend = Backend(self.back, theirs.detach())
        self.failures: list[str] = []
        self.changes = 0
        self.device = VirtioBlk("disk0", ours.detach(), FakeGuestMemory(self.ram),  # type: ignore[arg-type]
                                self.loop, num_queues, 64, foreign)
        self.device.on_failure = self.failures.append
        self.device.on_config_change = self.changed
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()

    def changed(self) -> None:
        self.changes += 1

    def serve(self) -> None:
        try:
            self.backend.serve()
        except VhostUserError:
            self.backend.close()

    def queues(self) -> list[QueueConfig]:
        result = []
        for index, ring in enumerate(self.rings):
            queue = QueueConfig(index, 64, ring.kick_fd, ring.call_fd)
            queue.desc, queue.avail, queue.used = ring.desc, ring.avail, ring.used
            queue.ready = True
            result.append(queue)
        return result

    def activate(self) -> None:
        self.device.activate(self.device.features(), self.queues())

    def set_avail_idx(self, index: int, ring: int = 0) -> None:
        self.ram.write(self.rings[ring].avail + 2, index.to_bytes(2, "little"))

    def set_used_idx(self, index: int, ring: int = 0) -> None:
        self.ram.write(self.rings[ring].used + 2, index.to_bytes(2, "little"))

    def names(self) -> list[object]:
        return [call[0] for call in self.back.calls]

    def close(self) -> None:
        self.device.close()
        self.thread.join(10)
        assert not self.thread.is_alive()
        self.loop.close()
        for ring in self.rings:
            ring.close()
        self.ram.close()
        if self.back.inflight_fd >= 0:
            os.close(self.back.inflight_fd)


@pytest.fixture
def rig() -> Iterator[Rig]:
    before = len(os.listdir("/proc/self/fd"))
    result = Rig()
    yield result
    result.back.hold.set()
    result.close()
    assert len(os.listdir("/proc/self/fd")) == before, "descriptors leaked"


def soon(seconds: float = 5.0) -> float:
    return time.monotonic() + seconds


# ---- the good way --------------------------------------------------------------------------


def test_nothing_is_said_before_it_is_needed(rig: Rig) -> None:
    assert rig.device.state == NEW
    rig.device.reset()
    rig.device.pause(soon())
    rig.device.resume()
    assert rig.device.state == NEW
    assert not rig.backend.owned


def test_features_are_masked(rig: Rig) -> None:
    rig.back.offered = (1 << 64) - 1
    features = rig.device.features()
    assert rig.device.state == IDLE
    for bit in (m.F_PROTOCOL_FEATURES, m.F_LOG_ALL, F_MQ, 1 << 33, 1 << 34, 1 << 40, 1 << 63):
        assert not features & bit
    for bit in (1 << 32, 1 << 28, 1 << 29, 1 << 5, 1 << 9, 1 << 13):
        assert features & bit


def test_life(rig: Rig) -> None:
    rig.activate()
    assert rig.device.state == RUNNING
    assert rig.names() == ["set_features", "set_memory", "get_inflight", "set_inflight",
                           "start_ring", "enable_ring"]
    assert drain(rig.rings[0].kick_fd) == 1
    assert drain(rig.rings[0].call_fd) == 1

    rig.back.calls.clear()
    rig.back.served = 3
    rig.set_avail_idx(3)
    rig.set_used_idx(3)
    rig.device.pause(soon())
    assert rig.device.state == PAUSED
    assert rig.names() == ["stop_ring"]

    rig.back.calls.clear()
    rig.device.resume()
    assert rig.device.state == RUNNING
    assert "set_memory" not in rig.names()
    start = next(call for call in rig.back.calls if call[0] == "start_ring")
    assert start[6] == 3  # where the pause left it
    assert drain(rig.rings[0].kick_fd) >= 1
    assert drain(rig.rings[0].call_fd) == 1

    rig.back.calls.clear()
    rig.set_avail_idx(6)
    rig.set_used_idx(6)
    rig.device.reset()
    assert rig.device.state == IDLE
    assert rig.names() == ["stop_ring", "reset"]
    rig.set_avail_idx(0)
    rig.set_used_idx(0)
    rig.back.served = 0
    rig.activate()
    assert rig.device.state == RUNNING


@pytest.mark.parametrize("protocol", [0, m.PF_REPLY_ACK, m.PF_STATUS | m.PF_REPLY_ACK,
                                      m.PF_MQ | m.PF_CONFIG])
def test_life_with_plainer_back_ends(protocol: int) -> None:
    rig = Rig(protocol=protocol)
    rig.activate()
    rig.device.pause(soon())
    rig.device.resume()
    rig.device.reset()
    rig.activate()
    assert rig.device.state == RUNNING
    rig.close()


def test_only_ready_queues_are_started() -> None:
    rig = Rig(num_queues=2)
    queues = rig.queues()
    queues[0].ready = False
    rig.device.activate(rig.device.features(), queues)
    starts = [call for call in rig.back.calls if call[0] == "start_ring"]
    assert [call[1] for call in starts] == [1]
    rig.close()


def test_config_space(rig: Rig) -> None:
    rig.back.config[34:36] = b"\x07\x00"  # the back end's own number of queues
    assert rig.device.read_config(0, 4) == bytes([0, 1, 2, 3])
    assert rig.device.read_config(34, 2) == b"\x01\x00"
    assert rig.device.read_config(56, 8) == bytes([56, 57, 58, 59, 0, 0, 0, 0])
    assert rig.device.read_config(CONFIG_SIZE, 4) == bytes(4)
    assert rig.device.read_config(255, 4) == bytes(4)
    rig.back.config[0] = 99
    assert rig.device.read_config(0, 1) == b"\0"  # asked once


def test_config_change(rig: Rig) -> None:
    assert rig.device.read_config(0, 1) == b"\0"
    rig.back.config[0] = 99
    assert rig.backend.config_changed()
    deadline = soon()
    while not rig.changes and time.monotonic() < deadline:
        rig.loop.run_once(0.1)
    assert rig.changes == 1
    assert rig.device.read_config(0, 1) == b"\x63"


def test_only_write_back_is_writable_and_only_if_negotiated(rig: Rig) -> None:
    rig.back.offered |= 1 << 11
    rig.device.write_config(32, b"\x01")
    rig.activate()
    for offset, data in ((0, b"\x01"), (32, b"\x01\x02"), (31, b"\x01\x02"), (33, b"\x01")):
        rig.device.write_config(offset, data)
    assert "write_config" not in rig.names()
    rig.device.write_config(32, b"\x01")
    assert rig.back.calls[-1] == ("write_config", 32, b"\x01", False)
    assert rig.device.read_config(32, 1) == b"\x01"


# ---- refusals ------------------------------------------------------------------------------


def test_a_refused_start_is_undone_by_the_reset(rig: Rig) -> None:
    rig.device.features()
    rig.back.fail = OSError(12, "no memory")
    with pytest.raises(BackendError, match=r"disk0.*refused SET_FEATURES"):
        rig.activate()
    rig.device.reset()
    assert rig.device.state == IDLE
    rig.activate()
    assert rig.device.state == RUNNING


def test_a_refused_config_read_leaves_the_device_alive(rig: Rig) -> None:
    rig.device.features()
    rig.back.fail = OSError(5, "no")
    with pytest.raises(BackendError, match="refused to read"):
        rig.device.read_config(0, 4)
    assert rig.device.state == IDLE
    assert rig.device.read_config(0, 1) == b"\0"


def test_activate_twice(rig: Rig) -> None:
    rig.activate()
    with pytest.raises(BackendError, match="already started"):
        rig.activate()


def test_too_few_queues() -> None:
    rig = Rig(num_queues=3)
    with pytest.raises(BackendError, match="has 2 queues, 3 were asked for; lower num-queues"):
        rig.device.features()
    assert rig.device.state == BROKEN
    rig.close()


def test_no_config_space() -> None:
    rig = Rig(protocol=m.PF_REPLY_ACK)
    with pytest.raises(BackendError, match="has no config space"):
        rig.device.read_config(0, 4)
    rig.close()


# ---- slow, hung, dead ----------------------------------------------------------------------


def test_pause_lets_a_foreign_back_end_finish_first(rig: Rig) -> None:
    """qemu-storage-daemon 7.2 can't stop a ring with requests in flight."""
    rig.activate()
    drain(rig.rings[0].kick_fd)
    rig.set_avail_idx(2)
    with pytest.raises(BackendError, match="did not finish its requests in time"):
        rig.device.pause(soon(0.05))
    assert rig.device.state == RUNNING
    assert "stop_ring" not in rig.names()
    assert drain(rig.rings[0].kick_fd) == 1  # the guest may have been stopped before its kick
    rig.back.served = 2
    timer = threading.Timer(0.1, rig.set_used_idx, (2,))
    timer.start()
    rig.device.pause(soon())
    assert rig.device.state == PAUSED
    timer.join()


def test_pause_leaves_waiting_to_a_worker_of_ours() -> None:
    """A guest that lies about its indices can't delay `stop`."""
    rig = Rig(foreign=False)
    rig.activate()
    rig.set_avail_idx(77)
    rig.set_used_idx(55)
    rig.device.pause(soon())
    rig.device.resume()
    rig.device.reset()
    assert rig.device.state == IDLE
    rig.close()


def test_pause_waits_for_requests_in_flight(rig: Rig) -> None:
    """Other back ends answer with the base while requests are still running."""
    rig.activate()
    rig.back.served = 2
    timer = threading.Timer(0.1, rig.set_used_idx, (2,))
    timer.start()
    begin = time.monotonic()
    rig.device.pause(soon())
    assert time.monotonic() - begin >= 0.08
    timer.join()


def test_pause_that_is_not_drained_in_time_can_be_repeated(rig: Rig) -> None:
    rig.activate()
    rig.back.served = 2
    with pytest.raises(BackendError, match="did not finish its requests in time"):
        rig.device.pause(soon(0.05))
    assert rig.device.state == PAUSED
    rig.set_used_idx(2)
    rig.device.pause(soon())
    rig.device.resume()
    assert rig.device.state == RUNNING


def test_pause_of_a_hung_back_end_ends_in_time_and_recovers(rig: Rig) -> None:
    rig.activate()
    rig.back.hold.clear()
    begin = time.monotonic()
    with pytest.raises(BackendError, match="in time"):
        rig.device.pause(soon(0.1))
    assert time.monotonic() - begin < 2
    rig.back.hold.set()
    rig.device.resume()  # stops it first: whether it had stopped nobody could know
    assert rig.device.state == RUNNING
    assert [name for name in rig.names() if name in ("start_ring", "stop_ring")] == [
        "start_ring", "stop_ring", "start_ring"]


def test_reset_of_a_hung_back_end(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vhost_user, "RESET_LIMIT", 0.1)
    rig.activate()
    rig.back.hold.clear()
    with pytest.raises(BackendError, match="in time"):
        rig.device.reset()
    with pytest.raises(BackendError, match="already started"):
        rig.activate()
    rig.back.hold.set()
    monkeypatch.setattr(vhost_user, "RESET_LIMIT", 5.0)
    rig.device.reset()
    rig.activate()
    assert rig.device.state == RUNNING


class Silent:
    """A device whose back end accepts everything and says nothing."""

    def __init__(self) -> None:
        self.ram = GuestMemory(1 << 20)
        self.loop = EventLoop()
        ours, self.peer = socket.socketpair()
        self.device = VirtioBlk("disk0", ours.detach(), FakeGuestMemory(self.ram),  # type: ignore[arg-type]
                                self.loop)
        self.failures: list[str] = []
        self.device.on_failure = self.failures.append

    def close(self) -> None:
        self.device.close()
        self.peer.close()
        self.loop.close()
        self.ram.close()


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[Silent]:
    before = len(os.listdir("/proc/self/fd"))
    result = Silent()
    yield result
    result.close()
    assert len(os.listdir("/proc/self/fd")) == before, "descriptors leaked"


def test_a_silent_back_end_costs_its_limit_once(silent: Silent) -> None:
    silent.device._current()._frontend.limit = 0.1
    with pytest.raises(BackendError, match="did not send a message in time"):
        silent.device.features()
    assert silent.device.state == BROKEN
    begin = time.monotonic()
    for _ in range(10):
        with pytest.raises(BackendError, match="failed before"):
            silent.device.features()
        with pytest.raises(BackendError, match="failed before"):
            silent.device.read_config(0, 4)
    assert time.monotonic() - begin < 0.1
    silent.device.pause(soon())
    silent.device.reset()
    silent.device.resume()


def test_abort_frees_a_waiting_vcpu_at_once(silent: Silent) -> None:
    errors: list[str] = []

    def vcpu() -> None:
        try:
            silent.device.features()
        except BackendError as error:
            errors.append(str(error))

    thread = threading.Thread(target=vcpu)
    thread.start()
    assert silent.peer.recv(12)  # the question is out: it waits
    begin = time.monotonic()
    silent.device.abort()
    thread.join(10)
    assert time.monotonic() - begin < 1
    assert "Gave up waiting" in errors[0]


def test_close_does_not_wait_for_a_hung_back_end(silent: Silent) -> None:
    def vcpu() -> None:
        with pytest.raises(BackendError):
            silent.device.features()

    thread = threading.Thread(target=vcpu)
    thread.start()
    assert silent.peer.recv(12)
    begin = time.monotonic()
    silent.device.close()
    silent.device.close()
    silent.device.abort()
    assert time.monotonic() - begin < 1
    thread.join()
    assert silent.device.state == CLOSED
    with pytest.raises(BackendError, match="is closed"):
        silent.device.features()


def test_a_liar_is_cut_off(silent: Silent) -> None:
    silent.peer.sendall(m.HEADER.pack(m.GET_STATUS, 5, 8) + bytes(8))
    with pytest.raises(BackendError, match="lied: answered request 40"):
        silent.device.features()
    assert silent.device.state == BROKEN
    assert silent.peer.recv(100)  # our question
    assert silent.peer.recv(100) == b""  # and our good-bye


def test_death_before_the_first_word(silent: Silent) -> None:
    silent.peer.close()
    with pytest.raises(BackendError):
        silent.device.features()
    silent.loop.run_once(0.1)
    assert silent.failures == []  # the guest is told when it asks


def test_death_while_running_is_noticed_by_the_loop(rig: Rig) -> None:
    rig.activate()
    rig.backend.connection.shutdown()
    deadline = soon()
    while not rig.failures and time.monotonic() < deadline:
        rig.loop.run_once(0.1)
    assert "is gone" in rig.failures[0]
    rig.device.pause(soon())  # nobody is left to wait for
    assert rig.device.state == BROKEN
    rig.device.resume()
    assert rig.device.state == BROKEN
    rig.device.reset()
    with pytest.raises(BackendError, match="failed before"):
        rig.activate()


def test_ring_error_is_reported(rig: Rig) -> None:
    rig.activate()
    assert rig.backend.rings[0].err_fd >= 0
    os.eventfd_write(rig.backend.rings[0].err_fd, 1)
    rig.loop.run_once(1)
    assert "can't serve a queue" in rig.failures[0]


def test_nonsense_on_the_channel_does_not_hold_the_loop(rig: Rig) -> None:
    rig.activate()
    assert rig.backend.channel is not None
    peer = socket.socket(fileno=os.dup(rig.backend.channel.fileno()))
    peer.sendall(b"\xff" * 5)
    rig.loop.run_once(1)
    peer.sendall(b"\xff" * 4000)
    begin = time.monotonic()
    rig.loop.run_once(0.05)
    assert time.monotonic() - begin < 1
    assert rig.changes == 0
    assert rig.device.state == RUNNING
    peer.close()
