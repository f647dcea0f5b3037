"""Reset, pause and resume of a virtio-mmio slot, and its log."""

from __future__ import annotations

import time

import pytest

from shared.quota import LINES
from tests.support.fake_slot import Slot
from vmm.errors import BackendError, DeviceError
from vmm.transport import mmio_registers as r


def test_reset_forgets_everything(running: Slot) -> None:
    running.driver.reset()
    assert running.device.calls == ["reset"]
    assert running.driver.status == 0
    running.driver.write(r.QUEUE_SEL, 0)
    assert running.driver.read(r.QUEUE_READY) == 0
    running.run()
    assert running.driver.status == 0xF


def test_reset_of_an_idle_device_asks_nobody(slot: Slot) -> None:
    slot.negotiate()
    slot.driver.reset()
    slot.driver.reset()
    assert slot.device.calls == []


def test_a_reset_that_fails_is_not_complete(running: Slot) -> None:
    running.device.errors["reset"] = BackendError("hangs")
    running.driver.reset()
    assert running.driver.status == r.NEEDS_RESET
    assert running.interrupt == 0


def test_machine_reset(running: Slot) -> None:
    running.transport.reset()
    assert running.device.calls == ["reset"]
    assert running.driver.status == 0
    running.run()
    running.device.errors["reset"] = BackendError("hangs")
    with pytest.raises(DeviceError):
        running.transport.reset()


def test_pause_and_resume(running: Slot) -> None:
    running.transport.pause(time.monotonic() + 1)
    running.transport.pause(time.monotonic() + 1)
    running.transport.resume()
    running.transport.resume()
    assert running.device.calls == ["pause", "pause", "resume"]


def test_pause_of_an_idle_device(slot: Slot) -> None:
    slot.transport.pause(time.monotonic() + 1)
    slot.transport.resume()
    assert slot.device.calls == []


def test_driver_ok_while_paused_waits_for_resume(slot: Slot) -> None:
    slot.negotiate()
    assert slot.set_queue()
    slot.transport.pause(time.monotonic() + 1)
    slot.driver.add_status(r.DRIVER_OK)  # a vCPU that was in the middle of it
    assert slot.device.activated is None
    slot.transport.resume()
    assert slot.device.calls == ["activate"]


def test_reset_while_paused_cancels_the_activation(slot: Slot) -> None:
    slot.negotiate()
    slot.transport.pause(time.monotonic() + 1)
    slot.driver.add_status(r.DRIVER_OK)
    slot.transport.reset()
    slot.transport.resume()
    assert slot.device.calls == []


def test_resume_that_fails(running: Slot) -> None:
    running.transport.pause(time.monotonic() + 1)
    running.device.errors["resume"] = BackendError("gone")
    running.transport.resume()  # the VM goes on without its disk
    assert running.driver.status & r.NEEDS_RESET
    assert running.config_interrupts == 1


def test_a_hostile_driver_cannot_fill_the_log(slot: Slot, capfd: pytest.CaptureFixture[str]
                                              ) -> None:
    for _ in range(200):
        slot.driver.take_features((1 << 64) - 1)
        slot.driver.reset()
    # Should the test take long the quota has become larger.
    assert LINES <= capfd.readouterr().err.count("not on offer") < 100


def test_nor_can_a_hostile_back_end(running: Slot, capfd: pytest.CaptureFixture[str]) -> None:
    """What a driver, or who serves it, makes fail again and again."""
    for _ in range(200):
        running.device.on_failure("a queue is broken")
    assert LINES <= capfd.readouterr().err.count("a queue is broken") < 100
    assert running.driver.status & r.NEEDS_RESET


def test_nor_can_resets_that_fail(slot: Slot, capfd: pytest.CaptureFixture[str]) -> None:
    for _ in range(200):
        slot.negotiate()
        slot.driver.add_status(r.DRIVER_OK)
        slot.device.errors["reset"] = BackendError("it hangs")
        slot.driver.reset()
    assert capfd.readouterr().err.count("it hangs") < 100
