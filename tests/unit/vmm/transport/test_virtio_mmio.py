"""The virtio-mmio registers, step by step as a driver uses them, and as it must not."""

from __future__ import annotations

import errno
import os
import posix
import threading
import time

import pytest

from tests.support.fake_slot import BASE, GSI, OFFERED, RAM_BASE, Slot
from tests.support.mmio_driver import MmioDriver, drain
from vmm.errors import BackendError, HypervisorError
from vmm.hypervisor.fake import FakeVm
from vmm.transport import mmio_registers as r
from vmm.transport.virtio_mmio import VirtioMmio

# ---- identity and wiring -------------------------------------------------------------------


def test_identity(slot: Slot) -> None:
    driver = slot.driver
    assert driver.read(r.MAGIC_VALUE) == 0x74726976
    assert driver.read(r.VERSION_REGISTER) == 2
    assert driver.read(r.DEVICE_ID) == 2
    assert driver.read(r.VENDOR_ID) == 0


def test_a_placeholder_is_served_by_c_alone() -> None:
    """4.2.3.1.1: a device id of 0, which drivers skip."""
    vm = FakeVm()
    registers = vm.add_virtio(BASE, 0, ())
    assert registers.read(r.MAGIC_VALUE, 4) == 0x74726976
    assert registers.read(r.VERSION_REGISTER, 4) == 2
    assert [registers.read(offset, 4) for offset in range(8, 0x200, 4)] == [0] * 126
    for offset in range(0, 0x200, 4):
        for size in (1, 2, 4):
            assert registers.write(offset, size, (1 << 8 * size) - 1)
    assert registers.read(r.STATUS, 4) == 0


def test_doorbells_and_interrupts_are_wired(slot: Slot) -> None:
    assert {(a, s, v) for a, s, v, _ in slot.vm.ioeventfds} == {
        (BASE + 0x50, 4, 0), (BASE + 0x50, 4, 1)}
    assert len(slot.vm.irqfds) == 3  # two queues and the config change
    assert {gsi for gsi, _ in slot.vm.irqfds} == {GSI}
    assert list(slot.vm.virtio) == [BASE]


def test_close_takes_everything_back() -> None:
    slot = Slot()
    slot.close()
    assert slot.vm.irqfds == set()
    assert slot.vm.ioeventfds == set()
    slot.transport.close()


@pytest.mark.parametrize("works", range(5))
@pytest.mark.parametrize("lacks", ["descriptors", "memory"])
def test_no_doorbells_fail_the_device_alone(slot: Slot, monkeypatch: pytest.MonkeyPatch,
                                            works: int, lacks: str) -> None:
    """All are there or none, and a driver that resets the device can have it later."""
    vm = FakeVm()
    transport = VirtioMmio(vm, slot.transport._memory, BASE, GSI,  # type: ignore[arg-type]
                           slot.device, lazy=True)
    driver = MmioDriver(transport)
    eventfd, add_irqfd = os.eventfd, vm.add_irqfd
    count = iter(range(100))

    def refuse_fd(*arguments: int) -> int:
        if next(count) >= works:
            raise OSError(errno.EMFILE, "Too many open files")
        return eventfd(*arguments)

    def refuse_irqfd(gsi: int, fd: int) -> None:
        if next(count) >= works // 2:
            raise HypervisorError("KVM: cannot set the irqfd: Cannot allocate memory")
        add_irqfd(gsi, fd)

    before = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        if lacks == "descriptors":
            patch.setattr(posix, "eventfd", refuse_fd)
        else:
            patch.setattr(vm, "add_irqfd", refuse_irqfd)
        driver.write(r.STATUS, r.ACKNOWLEDGE)
    assert driver.read(r.STATUS) == r.NEEDS_RESET
    assert not vm.irqfds and not vm.ioeventfds
    assert len(os.listdir("/proc/self/fd")) == before
    driver.write(r.STATUS, 0)
    driver.write(r.STATUS, r.ACKNOWLEDGE)
    assert driver.read(r.STATUS) == r.ACKNOWLEDGE and len(vm.irqfds) == 3
    transport.close()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("offset", [r.QUEUE_NOTIFY, r.INTERRUPT_STATUS, r.DRIVER_FEATURES,
                                    r.QUEUE_SEL, r.QUEUE_DESC_LOW, 0x0C0, 0x0AC, 0x1C, 0x48])
def test_registers_without_a_value_read_as_0(slot: Slot, offset: int) -> None:
    assert slot.driver.read(offset) == 0


def test_no_shared_memory(slot: Slot) -> None:
    assert [slot.driver.read(offset) for offset in range(0xB0, 0xC0, 4)] == [0xFFFFFFFF] * 4


@pytest.mark.parametrize(("offset", "size"), [(0, 1), (0, 2), (0, 8), (1, 4), (2, 4),
                                              (r.STATUS, 1)])
def test_odd_reads_of_registers(running: Slot, offset: int, size: int) -> None:
    assert running.driver.load(offset, size) == 0


@pytest.mark.parametrize("size", [1, 2, 8])
def test_odd_writes_of_registers_do_nothing(slot: Slot, size: int) -> None:
    slot.driver.store(r.STATUS, size, 1)
    assert slot.driver.status == 0


# ---- features and status -------------------------------------------------------------------


def test_features_by_halves(slot: Slot) -> None:
    assert slot.driver.features() == OFFERED
    slot.driver.write(r.DEVICE_FEATURES_SEL, 2)
    assert slot.driver.read(r.DEVICE_FEATURES) == 0
    slot.driver.write(r.DEVICE_FEATURES_SEL, 0xFFFFFFFF)
    assert slot.driver.read(r.DEVICE_FEATURES) == 0


@pytest.mark.parametrize("features", [0, 1 << 9, OFFERED | 1 << 10, OFFERED | 1 << 33,
                                      (1 << 64) - 1])
def test_features_that_are_refused(slot: Slot, features: int) -> None:
    assert not slot.driver.take_features(features)
    assert slot.driver.status == r.ACKNOWLEDGE | r.DRIVER
    slot.driver.add_status(r.DRIVER_OK)
    assert slot.device.activated is None


def test_a_subset_is_accepted_and_handed_on(slot: Slot) -> None:
    assert slot.driver.take_features(1 << 32 | 1 << 6)
    slot.driver.add_status(r.DRIVER_OK)
    assert slot.device.activated is not None
    assert slot.device.activated[0] == 1 << 32 | 1 << 6


def test_features_are_fixed_after_features_ok(slot: Slot) -> None:
    slot.negotiate()
    slot.driver.write(r.DRIVER_FEATURES_SEL, 0)
    slot.driver.write(r.DRIVER_FEATURES, 0xFFFFFFFF)
    slot.driver.add_status(r.DRIVER_OK)
    assert slot.device.activated is not None
    assert slot.device.activated[0] == OFFERED


def test_features_before_driver_or_beyond_64_bits_are_ignored(slot: Slot) -> None:
    driver = slot.driver
    driver.write(r.DRIVER_FEATURES_SEL, 0)
    driver.write(r.DRIVER_FEATURES, 0xFFFFFFFF)
    driver.add_status(r.ACKNOWLEDGE)
    driver.add_status(r.DRIVER)
    driver.write(r.DRIVER_FEATURES_SEL, 2)
    driver.write(r.DRIVER_FEATURES, 0xFFFFFFFF)
    driver.write(r.DRIVER_FEATURES_SEL, 1)
    driver.write(r.DRIVER_FEATURES, 1)
    driver.add_status(r.FEATURES_OK)
    assert driver.status & r.FEATURES_OK


def test_driver_ok_without_features_ok(slot: Slot) -> None:
    slot.driver.write(r.STATUS, r.ACKNOWLEDGE | r.DRIVER)
    slot.driver.write(r.STATUS, r.ACKNOWLEDGE | r.DRIVER | r.DRIVER_OK)
    assert slot.driver.status == r.ACKNOWLEDGE | r.DRIVER | r.NEEDS_RESET
    assert slot.device.activated is None


def test_status_bits_cannot_be_cleared(running: Slot) -> None:
    running.driver.write(r.STATUS, r.ACKNOWLEDGE | r.DRIVER)
    assert running.driver.status == 0xF | r.NEEDS_RESET
    assert running.config_interrupts == 1


def test_the_driver_cannot_set_needs_reset(slot: Slot) -> None:
    slot.driver.write(r.STATUS, 0xFFFFFF00 | r.NEEDS_RESET | r.ACKNOWLEDGE)
    assert slot.driver.status == r.ACKNOWLEDGE


def test_driver_ok_again_starts_nothing(running: Slot) -> None:
    running.driver.add_status(r.DRIVER_OK)
    assert running.device.calls == []


def test_failed_is_kept(slot: Slot) -> None:
    slot.driver.add_status(r.FAILED)
    assert slot.driver.status == r.FAILED


# ---- queues --------------------------------------------------------------------------------


def test_queue_sizes(slot: Slot) -> None:
    for index, size in ((0, 256), (1, 128), (2, 0), (0xFFFFFFFF, 0)):
        slot.driver.write(r.QUEUE_SEL, index)
        assert slot.driver.read(r.QUEUE_SIZE_MAX) == size
        assert slot.driver.read(r.QUEUE_READY) == 0


def test_activation_hands_the_queues_over(running: Slot) -> None:
    assert running.device.activated is not None
    features, queues = running.device.activated
    assert features == OFFERED
    first, second = queues
    assert (first.ready, first.size) == (True, 128)
    assert (first.desc, first.avail, first.used) == (running.ring.desc, running.ring.avail,
                                                     running.ring.used)
    assert not second.ready
    assert {(BASE + 0x50, 4, 0, first.kick_fd), (BASE + 0x50, 4, 1, second.kick_fd)} == set(
        running.vm.ioeventfds)
    assert (GSI, first.call_fd) in running.vm.irqfds


@pytest.mark.parametrize(("field", "value"), [
    ("size", 0), ("size", 3), ("size", 127), ("size", 512), ("size", 0x10000), ("size", 1 << 31),
    ("desc", RAM_BASE + 8), ("avail", RAM_BASE + 1), ("used", RAM_BASE + 2),
    ("desc", RAM_BASE + (1 << 20) - 2032), ("avail", RAM_BASE + (1 << 20) - 260),
    ("used", RAM_BASE + (1 << 20) - 1028), ("desc", RAM_BASE - 16), ("desc", 0), ("used", 0),
    ("desc", (1 << 64) - 16), ("avail", (1 << 64) - 2), ("used", (1 << 64) - 4),
])
def test_wrong_queue_set_up(slot: Slot, field: str, value: int) -> None:
    slot.negotiate()
    ring = slot.ring
    values = {"size": 128, "desc": ring.desc, "avail": ring.avail, "used": ring.used}
    values[field] = value
    assert not slot.driver.set_queue(0, **values)
    assert slot.driver.status & r.NEEDS_RESET
    slot.driver.add_status(r.DRIVER_OK)
    assert slot.device.activated is None
    assert slot.config_interrupts == 0  # DRIVER_OK was not set when it happened


def test_queue_before_features_ok_is_ignored(slot: Slot) -> None:
    slot.driver.add_status(r.ACKNOWLEDGE | r.DRIVER)
    assert not slot.set_queue()
    assert not slot.driver.status & r.NEEDS_RESET


def test_no_change_of_a_ready_queue(slot: Slot) -> None:
    slot.negotiate()
    assert slot.set_queue()
    slot.driver.write(r.QUEUE_SIZE, 64)
    slot.driver.write(r.QUEUE_DESC_LOW, 0)
    slot.driver.add_status(r.DRIVER_OK)
    assert slot.device.activated is not None
    queue = slot.device.activated[1][0]
    assert (queue.size, queue.desc) == (128, slot.ring.desc)


def test_ready_can_be_taken_back_before_driver_ok(slot: Slot) -> None:
    slot.negotiate()
    assert slot.set_queue()
    slot.driver.write(r.QUEUE_READY, 0)
    assert slot.driver.read(r.QUEUE_READY) == 0
    assert slot.set_queue()


def test_no_change_after_driver_ok(running: Slot) -> None:
    running.driver.write(r.QUEUE_SEL, 0)
    running.driver.write(r.QUEUE_READY, 0)
    assert running.driver.read(r.QUEUE_READY) == 1
    assert not running.set_queue(1)


def test_queues_that_do_not_exist(slot: Slot) -> None:
    slot.negotiate()
    assert not slot.set_queue(2)
    assert not slot.set_queue(0xFFFFFFFF)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_a_notify_that_missed_the_ioeventfd(running: Slot, size: int) -> None:
    queues = running.transport._queues
    running.driver.store(r.QUEUE_NOTIFY, size, 1)
    assert [drain(queue.kick_fd) for queue in queues] == [0, 1]
    running.driver.store(r.QUEUE_NOTIFY, size, 2)
    assert [drain(queue.kick_fd) for queue in queues] == [0, 0]


# ---- config space --------------------------------------------------------------------------


def test_config_space_reads(slot: Slot) -> None:
    assert slot.driver.config(0, 1) == 0
    assert slot.driver.config(3, 1) == 3
    assert slot.driver.config(2, 2) == 0x0302
    assert slot.driver.config(4, 4) == 0x07060504
    assert slot.driver.config(8, 8) == 0x0F0E0D0C0B0A0908
    assert slot.driver.config(62, 4) == 0x3F3E
    assert slot.driver.config(0xFC, 4) == 0


def test_config_space_writes(slot: Slot) -> None:
    slot.driver.store(r.CONFIG + 32, 1, 1)
    assert slot.device.written == []  # before DRIVER
    slot.driver.add_status(r.ACKNOWLEDGE | r.DRIVER)
    slot.driver.store(r.CONFIG + 32, 1, 1)
    slot.driver.store(r.CONFIG + 4, 4, 0x01020304)
    assert slot.device.written == [(32, b"\x01"), (4, b"\x04\x03\x02\x01")]


def test_config_change(running: Slot) -> None:
    assert running.driver.read(r.CONFIG_GENERATION) == 0
    running.device.on_config_change()
    assert running.driver.read(r.CONFIG_GENERATION) == 1
    assert running.interrupt & 2
    assert running.config_interrupts == 1


def test_config_change_before_driver_ok_raises_nothing(slot: Slot) -> None:
    slot.device.on_config_change()
    assert slot.driver.read(r.CONFIG_GENERATION) == 1
    assert slot.interrupt == 0
    assert slot.config_interrupts == 0


# ---- interrupts and failure ----------------------------------------------------------------


def test_interrupt_status_is_live_from_driver_ok_to_reset(slot: Slot) -> None:
    assert slot.interrupt == 0
    seen: list[int] = []
    slot.device.hook = lambda: seen.append(slot.interrupt)
    slot.run()
    assert seen == [1]  # before the back end can raise the first
    assert slot.interrupt == 1
    slot.driver.reset()
    assert slot.interrupt == 0


def test_failure_while_running(running: Slot) -> None:
    running.device.on_failure("the worker is gone")
    assert running.driver.status == 0xF | r.NEEDS_RESET
    assert running.interrupt == 3
    assert running.config_interrupts == 1
    running.device.on_failure("once more")
    assert running.config_interrupts == 0
    running.driver.reset()
    assert running.driver.status == 0


def test_failure_at_activation(slot: Slot) -> None:
    slot.device.errors["activate"] = BackendError("no")
    slot.run()
    assert slot.driver.status == 0xF | r.NEEDS_RESET
    assert slot.config_interrupts == 1
    # What did start must be stopped by the reset.
    slot.driver.reset()
    assert slot.device.calls == ["activate", "reset"]


def test_failure_to_say_features(slot: Slot) -> None:
    slot.device.errors["features"] = BackendError("no")
    assert slot.driver.features() == 0
    assert slot.driver.status == r.NEEDS_RESET


def test_failure_to_read_the_config_space(running: Slot) -> None:
    running.device.errors["read_config"] = BackendError("no")
    assert running.driver.config(0, 4) == 0
    assert running.driver.status & r.NEEDS_RESET


def test_failure_does_not_wait_for_a_vcpu(slot: Slot) -> None:
    """on_failure and on_config_change come on the main loop while a vCPU waits in activate."""
    entered, leave = threading.Event(), threading.Event()

    def hook() -> None:
        entered.set()
        assert leave.wait(10)

    slot.device.hook = hook
    vcpu = threading.Thread(target=slot.run)
    vcpu.start()
    assert entered.wait(10)
    slot.device.on_failure("gone")
    slot.device.on_config_change()
    assert slot.driver.status & r.NEEDS_RESET  # another vCPU can still read the status
    with pytest.raises(BackendError, match="still waiting"):
        slot.transport.pause(time.monotonic() + 0.05)
    leave.set()
    vcpu.join()
