"""What the run loop answers in C: ports and MMIO that are nobody's, or too frequent for Python."""

from __future__ import annotations

import errno
import gc
import time
from collections.abc import Iterator
from typing import Any

import pytest

from native._core import ffi, lib
from vmm.hypervisor.virtio_registers import VirtioRegisters

pytestmark = pytest.mark.native

SERVED, FORWARD, RESET, POWEROFF = lib.SV_SERVED, lib.SV_FORWARD, 7, 8
POWER = 0xF0000000
SLOT = 0xF0100000


class Machine:
    """A machine with one UART at 0x3f8, whose output can be seen."""

    def __init__(self) -> None:
        out = ffi.new("struct sv_machine **")
        assert lib.sv_machine_create(out) == 0
        self.machine = out[0]
        uart = ffi.new("struct sv_uart **")
        assert lib.sv_uart_create(-1, 4, -1, uart) == 0
        self.uart = uart[0]
        assert lib.sv_machine_add_uart(self.machine, 0x3F8, self.uart) == 0

    def read(self, port: int, size: int = 1) -> tuple[int, int]:
        data = ffi.new("uint8_t[8]")
        result = lib.sv_machine_port(self.machine, port, size, False, data)
        return result, int.from_bytes(bytes(data)[:size], "little")

    def write(self, port: int, value: int, size: int = 1) -> int:
        data = ffi.new("uint8_t[8]", value.to_bytes(8, "little"))
        return int(lib.sv_machine_port(self.machine, port, size, True, data))

    def read_mmio(self, address: int, size: int = 4) -> tuple[int, int]:
        data = ffi.new("uint8_t[8]")
        result = lib.sv_machine_mmio(self.machine, address, size, False, data)
        return result, int.from_bytes(bytes(data)[:size], "little")

    def write_mmio(self, address: int, value: int, size: int = 4) -> int:
        data = ffi.new("uint8_t[8]", value.to_bytes(8, "little"))
        return int(lib.sv_machine_mmio(self.machine, address, size, True, data))

    def add_virtio(self, base: int, device: Any = None) -> int:
        device = device or VirtioRegisters(2, (256,)).handle
        return int(lib.sv_machine_add_virtio(self.machine, base, device))

    def close(self) -> None:
        lib.sv_machine_destroy(self.machine)
        lib.sv_uart_destroy(self.uart)


@pytest.fixture
def machine() -> Iterator[Machine]:
    made = Machine()
    yield made
    made.close()


@pytest.mark.parametrize("port", [0x70, 0x72, 0x80, 0xED, 0x2F8, 0x3E8, 0xCF8, 0xCFC, 0xCFF])
def test_absent_ports_read_all_ones_in_c(machine: Machine, port: int) -> None:
    assert machine.read(port) == (SERVED, 0xFF)
    assert machine.write(port, 0x12) == SERVED


def test_pci_configuration_reads_all_ones(machine: Machine) -> None:
    assert machine.write(0xCF8, 0x80000000, 4) == SERVED
    assert machine.read(0xCF8, 4) == (SERVED, 0xFFFFFFFF)
    assert machine.read(0xCFC, 4) == (SERVED, 0xFFFFFFFF)
    assert machine.read(0xCFC, 2) == (SERVED, 0xFFFF)


def test_keyboard_controller_is_ready_for_a_reset_pulse(machine: Machine) -> None:
    result, status = machine.read(0x64)
    assert result == SERVED
    assert status & 2 == 0, "reboot=k would wait"
    assert machine.write(0x64, 0xD1) == SERVED
    assert machine.write(0x64, 0xFE) == RESET
    assert machine.write(0x60, 0xFE) == SERVED


def test_rtc_tells_the_time_and_is_never_updating(machine: Machine) -> None:
    def register(index: int) -> int:
        assert machine.write(0x70, index | 0x80) == SERVED, "bit 7 masks the NMI"
        result, value = machine.read(0x71)
        assert result == SERVED
        return value

    def bcd(value: int) -> int:
        return value // 10 * 16 + value % 10

    assert register(0x0A) & 0x80 == 0, "Linux waits for this bit"
    assert register(0x0B) & 0x06 == 0x02, "24 hours, BCD"
    assert register(0x0D) & 0x80
    while True:
        before = time.gmtime()
        fields = [register(index) for index in (9, 8, 7, 4, 2, 0, 6, 0x32)]
        if before == time.gmtime():
            break
    assert fields == [bcd(value) for value in (
        before.tm_year % 100, before.tm_mon, before.tm_mday, before.tm_hour, before.tm_min,
        before.tm_sec, (before.tm_wday + 1) % 7 + 1, before.tm_year // 100)]
    assert machine.write(0x71, 0) == SERVED
    assert register(0x40) == 0


def test_timer_2_has_expired(machine: Machine) -> None:
    assert machine.read(0x61) == (SERVED, 0x20)


def test_other_ports_go_to_python(machine: Machine) -> None:
    for port in (0x100, 0x600, 0xFFFF):
        assert machine.read(port)[0] == FORWARD
        assert machine.write(port, 1) == FORWARD


def test_ports_can_be_given_to_python(machine: Machine) -> None:
    assert lib.sv_machine_forward_ports(machine.machine, 0x70, 2) == 0
    assert machine.read(0x70)[0] == FORWARD
    assert machine.read(0x72) == (SERVED, 0xFF)
    assert lib.sv_machine_forward_ports(machine.machine, 0xFFFF, 2) == -errno.EINVAL
    assert lib.sv_machine_forward_ports(machine.machine, 0, 0xFFFFFFFF) == -errno.EINVAL
    assert lib.sv_machine_forward_ports(machine.machine, 0xFFFF, 1) == 0


def test_uart_answers_its_eight_ports_and_wide_accesses_are_bytes(machine: Machine) -> None:
    assert machine.write(0x3FF, 0x5A) == SERVED
    assert machine.read(0x3FF) == (SERVED, 0x5A)
    assert machine.read(0x3FF, 4) == (SERVED, 0xFFFFFF5A), "beyond it there is nothing"
    assert machine.read(0x3FD, 2) == (SERVED, 0xB060)
    assert machine.write(0x3F8, 0x0041, 2) == SERVED
    buffer = ffi.new("char[]", 10)
    assert lib.sv_uart_take_output(machine.uart, buffer, 10) == 1


def test_there_is_one_uart_and_it_fits(machine: Machine) -> None:
    assert lib.sv_machine_add_uart(machine.machine, 0x2F8, machine.uart) == -errno.EBUSY
    out = ffi.new("struct sv_machine **")
    assert lib.sv_machine_create(out) == 0
    assert lib.sv_machine_add_uart(out[0], 0xFFF9, machine.uart) == -errno.EINVAL
    lib.sv_machine_destroy(out[0])


def test_slots_are_found_by_their_address(machine: Machine) -> None:
    """virtio 1.2, 4.2.2: InterruptStatus 0x60, InterruptACK 0x64."""
    device = VirtioRegisters(2, (256,))
    assert machine.add_virtio(SLOT, device.handle) == 0
    assert machine.add_virtio(SLOT + 0x200) == 0
    device.raise_bits(3)
    assert machine.read_mmio(SLOT + 0x60) == (SERVED, 3)
    assert machine.read_mmio(SLOT + 0x260) == (SERVED, 0)
    assert machine.write_mmio(SLOT + 0x64, 1) == SERVED
    assert machine.read_mmio(SLOT + 0x60) == (SERVED, 2)


def test_addresses_without_a_slot_go_to_python(machine: Machine) -> None:
    assert machine.add_virtio(SLOT) == 0
    # Also those that share its place in the table.
    for base in (SLOT - 0x200, SLOT + 0x200, SLOT + 64 * 0x200, SLOT - 64 * 0x200, 0,
                 SLOT + (1 << 32), (1 << 64) - 0x200):
        assert machine.read_mmio(base)[0] == FORWARD
        assert machine.write_mmio(base + 0x64, 1) == FORWARD


@pytest.mark.parametrize(("offset", "size"), [(0x1FC, 8), (0x1FF, 2), (0x1FE, 4), (0x1F9, 8)])
def test_accesses_beyond_a_slot_go_to_python(machine: Machine, offset: int, size: int) -> None:
    assert machine.add_virtio(SLOT) == 0
    assert machine.read_mmio(SLOT + offset, size)[0] == FORWARD
    assert machine.write_mmio(SLOT + offset, 0, size) == FORWARD


def test_the_table_is_bounded_and_addresses_are_unique(machine: Machine) -> None:
    for index in range(lib.SV_MAX_VIRTIO):
        assert machine.add_virtio(SLOT + index * 0x200) == 0
    assert machine.add_virtio(SLOT) == -errno.EEXIST
    assert machine.add_virtio(SLOT + 0x100000) == -errno.ENOSPC
    assert machine.add_virtio(SLOT + 0x100) == -errno.EINVAL
    for index in range(lib.SV_MAX_VIRTIO):
        assert machine.read_mmio(SLOT + index * 0x200 + 8) == (SERVED, 2)


def test_a_machine_keeps_its_devices() -> None:
    """Whichever ends first: the machine, or Python's side of a device."""
    machine = Machine()
    assert machine.add_virtio(SLOT) == 0  # Python lets go at once
    gc.collect()
    assert machine.read_mmio(SLOT) == (SERVED, 0x74726976)
    device = VirtioRegisters(2, ())
    assert machine.add_virtio(SLOT + 0x200, device.handle) == 0
    machine.close()
    device.raise_bits(1)
    assert device.read(0x60, 4) == 1


def test_power_registers(machine: Machine) -> None:
    """ACPI 6.4, 4.8.3.6 and 4.8.3.7: SLP_EN is bit 5, SLP_TYP bits 2 to 4."""
    assert machine.write_mmio(POWER, 0x34, 1) == FORWARD
    assert lib.sv_machine_add_power(machine.machine, POWER) == 0
    assert machine.write_mmio(POWER, 5 << 2, 1) == SERVED, "not enabled"
    assert machine.write_mmio(POWER, 0x20 | 3 << 2, 1) == SERVED, "another state"
    assert machine.write_mmio(POWER, 0x20 | 5 << 2, 1) == POWEROFF
    assert machine.read_mmio(POWER, 1) == (SERVED, 0)
    assert machine.read_mmio(POWER + 1, 1) == (SERVED, 0)
    assert machine.write_mmio(POWER + 1, 0x80, 1) == SERVED
    assert machine.write_mmio(POWER + 2, 0, 1) == SERVED
    assert machine.write_mmio(POWER + 2, 1, 1) == RESET
    assert machine.write_mmio(POWER + 3, 1, 1) == FORWARD
    assert machine.write_mmio(POWER - 1, 1, 1) == FORWARD
    assert lib.sv_machine_add_power(machine.machine, POWER) == -errno.EBUSY
