"""What C and Python share of a slot: what C is told, when it has to forget, and guests whose
other vCPUs change what a driver drafts just when it is used."""

from __future__ import annotations

import threading
import time

import pytest

from tests.support.fake_slot import BASE, GSI, OFFERED, FakeDevice, Slot
from tests.support.mmio_driver import MmioDriver
from vmm.errors import BackendError
from vmm.hypervisor.fake import FakeVm
from vmm.transport import mmio_registers as r
from vmm.transport.virtio_mmio import VirtioMmio

DRAFTS = (r.QUEUE_SIZE, *range(r.QUEUE_DESC_LOW, r.QUEUE_DEVICE_HIGH + 1, 4))


def asked(slot: Slot) -> list[int]:
    """What Python served since the last call."""
    offsets, slot.driver.forwarded = slot.driver.forwarded, []
    return offsets


def learn(slot: Slot) -> None:
    slot.driver.features()
    slot.driver.config(0, 4)
    asked(slot)
    slot.driver.features()
    slot.driver.config(8, 8)
    assert asked(slot) == [], "it is known"


def forgotten(slot: Slot) -> bool:
    asked(slot)
    slot.driver.features()
    slot.driver.config(0, 4)
    offsets = asked(slot)
    assert offsets in ([], [r.DEVICE_FEATURES, r.CONFIG])
    return bool(offsets)


# ---- what a probe costs --------------------------------------------------------------------


def test_what_python_serves_of_a_probe(slot: Slot) -> None:
    """As Linux does it: the rest, most of it, is C's."""
    driver = slot.driver
    for register in (r.MAGIC_VALUE, r.VERSION_REGISTER, r.DEVICE_ID, r.VENDOR_ID):
        driver.read(register)
    driver.reset()
    assert driver.take_features(driver.features())
    for offset in range(0, 24, 4):
        driver.config(offset, 4)
        driver.read(r.CONFIG_GENERATION)
    assert slot.set_queue(0) and slot.set_queue(1)
    driver.add_status(r.DRIVER_OK)
    assert driver.status == 0xF
    assert asked(slot) == [r.STATUS, r.DEVICE_FEATURES, *[r.STATUS] * 3, r.CONFIG,
                           r.QUEUE_READY, r.QUEUE_READY, r.STATUS]


def test_a_device_that_says_nothing_is_asked_every_time(slot: Slot) -> None:
    slot.device.keeps_shown = False
    for _ in range(2):
        assert slot.driver.features() == OFFERED
        assert slot.driver.config(4, 4) == 0x07060504
    assert asked(slot) == [r.DEVICE_FEATURES, r.DEVICE_FEATURES, r.CONFIG + 4] * 2


# ---- a slot that no driver has taken -------------------------------------------------------


@pytest.fixture
def lazy() -> Slot:
    slot = Slot()
    slot.transport.close()
    slot.vm = FakeVm()
    slot.transport = VirtioMmio(slot.vm, slot.transport._memory, BASE, GSI, slot.device,
                                lazy=True)
    slot.driver = MmioDriver(slot.transport)
    return slot


def test_a_lazy_slot_costs_nothing_until_a_driver_takes_it(lazy: Slot) -> None:
    driver = lazy.driver
    assert driver.read(r.DEVICE_ID) == 2
    assert driver.features() == OFFERED
    driver.store(r.CONFIG, 4, 1)
    driver.write(r.QUEUE_NOTIFY, 0)
    driver.write(r.QUEUE_SEL, 1)
    driver.write(r.QUEUE_READY, 1)
    driver.reset()
    lazy.transport.reset()
    lazy.transport.pause(time.monotonic() + 1)
    lazy.transport.resume()
    lazy.device.on_config_change()
    assert [call[0] for call in lazy.vm.calls] == ["add_virtio"]
    driver.write(r.STATUS, r.ACKNOWLEDGE)
    assert len(lazy.vm.ioeventfds) == 2 and len(lazy.vm.irqfds) == 3
    driver.reset()
    lazy.run()
    assert driver.status == 0xF and len(lazy.vm.ioeventfds) == 2
    lazy.close()
    assert not lazy.vm.ioeventfds and not lazy.vm.irqfds


def test_any_status_will_do(lazy: Slot) -> None:
    """A driver that leaves ACKNOWLEDGE out, or sets all at once."""
    driver = lazy.driver
    driver.write(r.STATUS, r.DRIVER)
    for half in (0, 1):
        driver.write(r.DRIVER_FEATURES_SEL, half)
        driver.write(r.DRIVER_FEATURES, OFFERED >> 32 * half & 0xFFFFFFFF)
    driver.write(r.STATUS, r.DRIVER | r.FEATURES_OK)
    assert lazy.set_queue()
    driver.write(r.STATUS, r.DRIVER | r.FEATURES_OK | r.DRIVER_OK)
    assert lazy.device.activated is not None and lazy.device.activated[1][0].ready
    lazy.close()


def test_a_failure_before_the_first_status_ends_with_a_reset(lazy: Slot) -> None:
    lazy.device.on_failure("it is gone")
    assert lazy.driver.status == r.NEEDS_RESET
    lazy.driver.reset()
    assert lazy.driver.status == 0
    lazy.close()


def test_a_closed_slot_makes_no_doorbells(slot: Slot) -> None:
    slot.transport.close()
    slot.driver.write(r.STATUS, r.ACKNOWLEDGE)
    assert slot.vm.irqfds == set()


# ---- when C must forget --------------------------------------------------------------------


def test_what_is_shown_changes(slot: Slot) -> None:
    learn(slot)
    slot.device.config = b"\xff" * 8
    assert slot.driver.config(0, 4) == 0xFFFFFFFF
    learn(slot)
    slot.device.offered |= 1 << 10
    assert slot.driver.features() == OFFERED | 1 << 10
    learn(slot)
    slot.device.on_config_change()
    assert forgotten(slot)


def test_a_reset_forgets(slot: Slot) -> None:
    """The next driver is told what there is then."""
    learn(slot)
    slot.driver.reset()
    assert forgotten(slot)
    learn(slot)
    slot.transport.reset()
    assert forgotten(slot)


def test_a_failure_forgets(running: Slot) -> None:
    learn(running)
    running.device.on_failure("the back end is gone")
    assert forgotten(running)
    learn(running)
    running.device.on_failure("once more")
    assert forgotten(running)


def test_pause_and_resume_forget_nothing(running: Slot) -> None:
    learn(running)
    running.transport.pause(time.monotonic() + 1)
    running.transport.resume()
    assert not forgotten(running)


def test_what_fails_is_not_learnt(slot: Slot) -> None:
    slot.device.errors["features"] = slot.device.errors["read_config"] = BackendError("no")
    assert slot.driver.features() == slot.driver.config(0, 4) == 0
    slot.device.errors.clear()
    assert slot.driver.features() == OFFERED
    assert slot.driver.config(0, 4) == 0x03020100


class Changing(FakeDevice):
    """It changes between its answer and the moment at which that would be kept."""

    changes = 0

    def features(self) -> int:
        answer = super().features()
        if self.changes:
            self.changes -= 1
            self.offered = 1 << 32
        return answer

    def read_config(self, offset: int, size: int) -> bytes:
        answer = super().read_config(offset, size)
        if self.changes:
            self.changes -= 1
            self.config = b"new!"
        return answer


def test_an_answer_that_is_older_than_a_change_is_not_kept() -> None:
    device = Changing()
    driver = MmioDriver(VirtioMmio(FakeVm(), None, BASE, GSI, device))  # type: ignore[arg-type]
    device.changes = 1
    driver.read(r.DEVICE_FEATURES)
    assert driver.features() == 1 << 32
    device.changes = 1
    driver.config(0, 4)
    assert driver.config(0, 4) == int.from_bytes(b"new!", "little")


def test_new_generation_new_bytes(running: Slot) -> None:
    """2.5.3: who reads the same generation before and after has read one config space."""
    device, stop = running.device, threading.Event()

    def change() -> None:
        value = 0
        while not stop.is_set():
            value = value + 1 & 0xFF
            device.config = bytes([value]) * 64
            device.on_config_change()

    thread = threading.Thread(target=change)
    thread.start()
    try:
        latest, steady = 0, 0
        deadline = time.monotonic() + 60
        while steady < 300 and time.monotonic() < deadline:
            before = running.driver.read(r.CONFIG_GENERATION)
            value = running.driver.config(0, 1)
            after = running.driver.read(r.CONFIG_GENERATION)
            if before == after:
                steady += 1
                # Of this generation, or already of the next one.
                assert value in (before & 0xFF, before + 1 & 0xFF)
            assert after >= latest
            latest = after
    finally:
        stop.set()
        thread.join()
    assert steady == 300


# ---- hostile drivers -----------------------------------------------------------------------


def test_a_queue_that_changes_while_it_is_checked(slot: Slot, monkeypatch: pytest.MonkeyPatch
                                                  ) -> None:
    """Another vCPU writes other addresses: what was checked is used."""
    slot.negotiate()
    memory = slot.transport._memory
    check = memory.host_address

    def host_address(gpa: int, size: int) -> int:
        for register in DRAFTS:
            assert slot.driver.registers.write(register, 4, 0xFFFFFFFF)
        return check(gpa, size)

    monkeypatch.setattr(memory, "host_address", host_address)
    assert slot.set_queue()
    slot.driver.add_status(r.DRIVER_OK)
    assert slot.device.activated is not None
    queue = slot.device.activated[1][0]
    assert (queue.size, queue.desc, queue.avail, queue.used) == (
        128, slot.ring.desc, slot.ring.avail, slot.ring.used)


def test_features_that_change_while_they_are_checked(slot: Slot) -> None:
    device, registers = slot.device, slot.driver.registers

    class Racing(FakeDevice):
        def features(self) -> int:
            registers.write(r.DRIVER_FEATURES_SEL, 4, 0)
            registers.write(r.DRIVER_FEATURES, 4, 0xFFFFFFFF)
            return OFFERED

    device.__class__ = Racing
    slot.driver.add_status(r.ACKNOWLEDGE | r.DRIVER)
    registers.write(r.DRIVER_FEATURES_SEL, 4, 1)
    registers.write(r.DRIVER_FEATURES, 4, 1)
    slot.driver.add_status(r.FEATURES_OK)
    assert registers.driver_features() == 0x1_FFFFFFFF
    slot.driver.add_status(r.DRIVER_OK)
    assert device.activated is not None
    assert device.activated[0] == 1 << 32


@pytest.mark.parametrize("index", [2, 3, 0xFFFFFFFF])
def test_ready_of_no_queue(slot: Slot, index: int) -> None:
    slot.negotiate()
    slot.driver.write(r.QUEUE_SEL, index)
    slot.driver.write(r.QUEUE_READY, 1)
    assert slot.driver.status == r.ACKNOWLEDGE | r.DRIVER | r.FEATURES_OK


def test_two_vcpus_at_one_slot(slot: Slot) -> None:
    """Whatever they do at once: a device gets what was checked, and never less than a reset."""
    device = slot.device
    seen: list[tuple[int, tuple[int, int, int, int]]] = []

    def hook() -> None:
        queue = slot.transport._queues[0]
        if queue.ready:
            seen.append((queue.size, (queue.desc, queue.avail, queue.used, 0)))

    device.hook = hook
    stop = threading.Event()

    def disturb() -> None:
        while not stop.is_set():
            slot.driver.registers.write(r.QUEUE_SEL, 4, 0)
            for register in DRAFTS:
                slot.driver.registers.write(register, 4, 0xFFFFFFF0)
            slot.driver.registers.write(r.DRIVER_FEATURES, 4, 0xFFFFFFFF)

    vcpu = threading.Thread(target=disturb)
    vcpu.start()
    try:
        for _ in range(300):
            slot.driver.take_features(OFFERED)
            slot.set_queue()
            slot.driver.add_status(r.DRIVER_OK)
            if device.activated is not None:
                assert not device.activated[0] & ~OFFERED
                device.activated = None
            slot.driver.reset()
            assert slot.driver.status == 0
    finally:
        stop.set()
        vcpu.join()
    good = (128, (slot.ring.desc, slot.ring.avail, slot.ring.used, 0))
    for size, (desc, avail, used, _) in seen:
        assert size == good[0]
        slot.transport._memory.host_address(desc, 16 * size)
        slot.transport._memory.host_address(avail, 6 + 2 * size)
        slot.transport._memory.host_address(used, 6 + 8 * size)
