"""A device goes on with another back end, where the last one stood."""

from __future__ import annotations

import os
import socket
import threading
import time
from typing import TYPE_CHECKING

import pytest

from shared.vhost_user.backend import Backend
from shared.vhost_user.errors import VhostUserError
from tests.support.mmio_driver import drain
from tests.unit.vmm.devices.test_vhost_user import Rig, RingDevice, soon
from vmm.devices.vhost_user import BROKEN, IDLE, NEW, PAUSED, RUNNING
from vmm.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Iterator


class Other:
    """Another back end, on a thread; `fd` is the device's end of its connection."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self.fd = ours.detach()
        self.back = RingDevice()
        self.backend = Backend(self.back, theirs.detach())
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()

    def serve(self) -> None:
        try:
            self.backend.serve()
        except VhostUserError:
            self.backend.close()

    def start(self, index: int = 0) -> tuple[object, ...]:
        """How it was told to start a ring."""
        return next(c for c in self.back.calls if c[0] == "start_ring" and c[1] == index)

    def names(self) -> list[object]:
        return [call[0] for call in self.back.calls]


class Pair:
    def __init__(self) -> None:
        self.rig = Rig(num_queues=2, foreign=False)
        self.device = self.rig.device
        self.lost: list[str] = []
        self.device.on_lost = self.lost.append
        self.others: list[Other] = []

    def other(self) -> Other:
        self.others.append(Other())
        return self.others[-1]

    def replace(self, other: Other, drain: bool) -> None:
        self.device.replace_backend(other.fd, soon(), drain)

    def die(self) -> None:
        """The back end vanishes, and somebody has noticed."""
        self.rig.backend.connection.shutdown()
        self.rig.thread.join(10)
        self.device.lost("it died")

    def close(self) -> None:
        self.rig.back.hold.set()
        self.rig.close()
        for other in self.others:
            other.thread.join(10)
            assert not other.thread.is_alive()
            if other.back.inflight_fd >= 0:
                os.close(other.back.inflight_fd)


@pytest.fixture
def pair() -> Iterator[Pair]:
    before = len(os.listdir("/proc/self/fd"))
    pair = Pair()
    yield pair
    pair.close()
    assert len(os.listdir("/proc/self/fd")) == before, "descriptors leaked"


def test_one_that_lives_is_drained_first(pair: Pair) -> None:
    pair.rig.activate()
    pair.rig.back.served = 7  # where its rings stop
    pair.rig.set_used_idx(5, 0)  # not what counts
    kick = pair.rig.rings[0].kick_fd
    drain(kick)
    other = pair.other()
    pair.replace(other, drain=True)
    assert pair.device.state == RUNNING
    assert pair.rig.names().count("stop_ring") == 2
    assert other.start(0)[6] == other.start(1)[6] == 7
    assert drain(kick) >= 1  # what the guest kicked while nobody listened
    assert not pair.lost


def test_one_that_died_left_off_at_the_used_index(pair: Pair) -> None:
    pair.rig.activate()
    pair.rig.set_avail_idx(9, 0)
    pair.rig.set_used_idx(5, 0)
    pair.rig.set_used_idx(0xFFFF, 1)
    pair.die()
    assert pair.device.state == BROKEN
    other = pair.other()
    pair.replace(other, drain=False)
    assert pair.device.state == RUNNING
    assert (other.start(0)[6], other.start(1)[6]) == (5, 0xFFFF)
    # The record of requests in flight is handed on, not made anew.
    assert "set_inflight" in other.names() and "get_inflight" not in other.names()
    assert other.back.acked == pair.rig.back.acked


def test_the_dead_are_not_replaced_as_if_they_were_drained(pair: Pair) -> None:
    """Nobody has waited for their I/O: whoever meant to drain has to do that first."""
    pair.rig.activate()
    pair.die()
    other = pair.other()
    with pytest.raises(BackendError, match="it died"):
        pair.replace(other, drain=True)
    assert pair.device.state == BROKEN and "start_ring" not in other.names()
    pair.replace(pair.other(), drain=False)
    assert pair.device.state == RUNNING


def test_one_that_dies_in_the_drain(pair: Pair) -> None:
    pair.rig.activate()
    pair.rig.backend.connection.shutdown()
    pair.rig.thread.join(10)
    with pytest.raises(BackendError):
        pair.replace(pair.other(), drain=True)
    assert pair.device.state == BROKEN and pair.lost
    pair.replace(pair.other(), drain=False)
    assert pair.device.state == RUNNING


def test_one_that_does_not_drain_in_time_stays(pair: Pair) -> None:
    pair.rig.activate()
    pair.rig.back.hold.clear()
    other = pair.other()
    begin = time.monotonic()
    with pytest.raises(BackendError):
        pair.device.replace_backend(other.fd, time.monotonic() + 0.2, drain=True)
    assert time.monotonic() - begin < 2
    assert "start_ring" not in other.names()
    pair.rig.back.hold.set()


@pytest.mark.parametrize("drained", [True, False])
def test_a_paused_device_stays_paused(pair: Pair, drained: bool) -> None:
    pair.rig.activate()
    pair.rig.back.served = 3
    pair.rig.set_used_idx(3, 0)
    pair.rig.set_used_idx(3, 1)
    pair.device.pause(soon())
    if not drained:
        pair.die()
    other = pair.other()
    pair.replace(other, drain=drained)
    assert pair.device.state == PAUSED and "start_ring" not in other.names()
    pair.device.resume()
    assert pair.device.state == RUNNING
    assert other.start(0)[6] == 3


@pytest.mark.parametrize("drained", [True, False])
def test_a_device_that_no_driver_uses(pair: Pair, drained: bool) -> None:
    pair.device.features()
    if not drained:
        pair.die()
    other = pair.other()
    pair.replace(other, drain=drained)
    assert pair.device.state == NEW and "start_ring" not in other.names()
    pair.rig.activate()
    assert pair.device.state == RUNNING
    assert other.start(0)[6] == 0


def test_the_new_one_lacks_features(pair: Pair) -> None:
    pair.rig.activate()
    pair.die()
    poor = pair.other()
    poor.back.offered = 1 << 32
    with pytest.raises(BackendError, match="lacks the features"):
        pair.replace(poor, drain=False)
    assert pair.device.state == BROKEN
    pair.replace(pair.other(), drain=False)
    assert pair.device.state == RUNNING


def test_the_new_one_is_dead_already(pair: Pair) -> None:
    pair.rig.activate()
    pair.die()
    ours, theirs = socket.socketpair()
    theirs.close()
    with pytest.raises(BackendError):
        pair.device.replace_backend(ours.detach(), soon(), drain=False)
    assert pair.device.state == BROKEN


def test_the_new_one_says_nothing(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmm.devices.vhost_user.REQUEST_LIMIT", 0.2)
    pair.rig.activate()
    pair.die()
    ours, theirs = socket.socketpair()
    with theirs:
        begin = time.monotonic()
        with pytest.raises(BackendError):
            pair.device.replace_backend(ours.detach(), soon(), drain=False)
        assert time.monotonic() - begin < 5
    assert pair.device.state == BROKEN
    pair.replace(pair.other(), drain=False)
    assert pair.device.state == RUNNING


def test_a_closed_device(pair: Pair) -> None:
    other = pair.other()
    pair.device.close()
    with pytest.raises(BackendError, match="closed"):
        pair.replace(other, drain=False)


def test_who_needs_it_meanwhile_waits(pair: Pair) -> None:
    """`pause` during a recovery: it ends when there is a back end that has stopped its rings."""
    pair.rig.activate()
    pair.die()
    paused = threading.Thread(target=pair.device.pause, args=(soon(10),))
    paused.start()
    other = pair.other()
    pair.replace(other, drain=False)
    paused.join(10)
    assert not paused.is_alive() and pair.device.state == PAUSED
    assert other.names()[-1] == "stop_ring"


def test_reset_during_a_recovery(pair: Pair) -> None:
    pair.rig.activate()
    pair.die()
    reset = threading.Thread(target=pair.device.reset)
    reset.start()
    other = pair.other()
    pair.replace(other, drain=False)
    reset.join(10)
    assert not reset.is_alive() and pair.device.state == IDLE
    assert other.names()[-1] == "reset"


def test_many_in_a_row(pair: Pair) -> None:
    pair.rig.activate()
    for number in range(10):
        pair.rig.set_used_idx(number, 0)
        pair.device.lost("again")
        other = pair.other()
        pair.replace(other, drain=False)
        assert other.start(0)[6] == number
    assert pair.device.state == RUNNING


def test_who_is_forsaken_holds_up_nobody(pair: Pair) -> None:
    """Until a driver starts it again, or somebody brings another back end."""
    features = pair.device.features()
    pair.rig.activate()
    needed: list[None] = []
    pair.device.on_needed = lambda: needed.append(None)
    pair.die()
    with pytest.raises(BackendError, match="is in use"):
        pair.device.detach(soon())
    pair.device.detach(soon(), forsaken=True)
    began = time.monotonic()
    pair.device.pause(soon())
    assert not needed
    pair.device.resume()
    assert len(needed) == 1  # it is asked for, not waited for
    pair.device.pause(soon())
    pair.device.reset()
    assert time.monotonic() - began < 1
    pair.device.activate(features, pair.rig.queues())
    assert len(needed) == 2
    other = pair.other()
    pair.replace(other, drain=False)
    assert pair.device.state == RUNNING and "start_ring" in other.names()


def test_what_the_driver_wrote_to_the_config_space_is_told_to_each_back_end(pair: Pair) -> None:
    """A driver that turned write-back off sends no flushes: a back end that turned it on again
    would lose what the driver takes for durable."""
    pair.rig.back.offered |= 1 << 11
    pair.rig.activate()
    assert "write_config" not in pair.rig.names()
    pair.device.write_config(32, b"\0")
    pair.device.pause(soon())
    del pair.rig.back.calls[:]
    pair.device.resume()
    names = pair.rig.names()
    assert ("write_config", 32, b"\0", False) in pair.rig.back.calls
    assert names.index("set_features") < names.index("write_config") < names.index("start_ring")
    other = pair.other()
    other.back.offered |= 1 << 11
    pair.replace(other, drain=True)
    assert ("write_config", 32, b"\0", False) in other.back.calls
    assert other.names().index("write_config") < other.names().index("start_ring")
    pair.device.reset()
    del other.back.calls[:]
    pair.device.activate(pair.device.features(), pair.rig.queues())
    assert "write_config" not in other.names()
