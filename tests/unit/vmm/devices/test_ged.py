"""The Generic Event Device: what a press leaves in its register."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from vmm.devices.ged import POWER_BUTTON, GenericEventDevice
from vmm.hypervisor.fake import FakeHypervisor, FakeVm

GSI = 16


@pytest.fixture
def vm() -> FakeVm:
    return FakeHypervisor().create_vm()


@pytest.fixture
def ged(vm: FakeVm) -> Iterator[GenericEventDevice]:
    device = GenericEventDevice(vm, GSI)
    yield device
    device.close()


def interrupts(vm: FakeVm) -> int:
    (gsi, fd), = vm.irqfds
    assert gsi == GSI
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


def test_a_press_raises_the_interrupt_and_a_read_clears_it(vm: FakeVm,
                                                           ged: GenericEventDevice) -> None:
    assert interrupts(vm) == 0 and ged.read(0, 4) == 0
    ged.press_power_button()
    assert interrupts(vm) == 1
    assert ged.read(0, 4) == POWER_BUTTON
    assert ged.read(0, 4) == 0


def test_presses_merge_until_the_guest_reads(vm: FakeVm, ged: GenericEventDevice) -> None:
    ged.press_power_button()
    ged.press_power_button()
    assert interrupts(vm) == 2
    assert ged.read(0, 4) == POWER_BUTTON and ged.read(0, 4) == 0


@pytest.mark.parametrize(("offset", "size"), [(0, 1), (0, 2), (0, 8), (1, 1), (2, 2)])
def test_other_reads_neither_tell_nor_clear(ged: GenericEventDevice, offset: int,
                                            size: int) -> None:
    ged.press_power_button()
    assert ged.read(offset, size) == 0
    assert ged.read(0, 4) == POWER_BUTTON


def test_writes_are_ignored_and_a_reset_forgets(ged: GenericEventDevice) -> None:
    ged.press_power_button()
    ged.write(0, 4, 0)
    assert ged.read(0, 4) == POWER_BUTTON
    ged.press_power_button()
    ged.reset()
    assert ged.read(0, 4) == 0
