"""Stopping and ending devices: each has its own time, none gets more than its limit."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, cast

import pytest

from vmm.errors import BackendError, DeviceError
from vmm.machine.machine import Machine
from vmm.machine.slots import Slot

if TYPE_CHECKING:
    from vmm.devices.virtio_blk import VirtioBlk
    from vmm.transport.virtio_mmio import VirtioMmio


class FakeDevice:
    """Its own transport too. `behaviour`: "good", "hangs" till aborted, "slow", "broken"."""

    def __init__(self, id: str, behaviour: str) -> None:
        self.id = id
        self.behaviour = behaviour
        self.aborted = threading.Event()
        self.closed = self.paused = False
        self.time_left = 0.0

    def is_in_use(self) -> bool:
        return True

    def pause(self, deadline: float) -> None:
        self.time_left = deadline - time.monotonic()
        if self.behaviour == "hangs":
            assert self.aborted.wait(10)
            raise BackendError("cut off", "")
        if self.behaviour == "slow" and not self.aborted.wait(self.time_left):
            raise BackendError("too slow", "")
        if self.behaviour == "broken":
            raise ZeroDivisionError("a defect")
        self.paused = True

    def abort(self) -> None:
        assert not self.closed
        self.aborted.set()

    def close(self) -> None:
        self.closed = True


def make(**behaviours: str) -> tuple[Machine, dict[str, FakeDevice]]:
    machine = Machine()
    fakes = {name: FakeDevice(name, behaviour) for name, behaviour in behaviours.items()}
    for number, fake in enumerate(fakes.values()):
        machine.slots.append(Slot(number, cast("VirtioBlk", fake), cast("VirtioMmio", fake), True))
    return machine, fakes


@pytest.mark.parametrize("behaviours", [{"a": "hangs"}, {"a": "hangs", "b": "good"},
                                        {"a": "good", "b": "hangs", "c": "hangs"}])
def test_the_end_cuts_a_hanging_back_end_off(behaviours: dict[str, str]) -> None:
    machine, fakes = make(**behaviours)
    began = time.monotonic()
    machine.end(began + 0.05)
    assert time.monotonic() - began < 2
    assert all(fake.closed for fake in fakes.values())
    assert all(fake.paused for fake in fakes.values() if fake.behaviour == "good")


def test_an_end_in_time_aborts_nothing() -> None:
    machine, fakes = make(a="good", b="good")
    machine.end(time.monotonic() + 30)
    for fake in fakes.values():
        assert fake.paused and fake.closed and not fake.aborted.is_set()


def test_a_slow_back_end_takes_no_time_from_the_others() -> None:
    machine, fakes = make(a="slow", b="good", c="good")
    with pytest.raises(DeviceError, match="device a did not stop: too slow"):
        machine.pause_devices(time.monotonic() + 0.2)
    assert fakes["b"].paused and fakes["c"].paused
    assert min(fakes["b"].time_left, fakes["c"].time_left) > 0.05


def test_every_device_that_failed_is_named() -> None:
    machine, _ = make(a="slow", b="broken", c="good")
    with pytest.raises(DeviceError) as caught:
        machine.pause_devices(time.monotonic() + 0.01)
    text = str(caught.value)
    assert "device a did not stop" in text and "device b did not stop" in text
    assert "device c" not in text
