"""ACPI and MP tables, read back by a parser that shares nothing with their makers."""

from __future__ import annotations

import struct
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest

from tests.support.capabilities import require
from tests.support.firmware_tables import Acpi, MpTable, read_acpi, read_mptable
from vmm.arch.x86_64 import acpi, aml, layout, mptable
from vmm.hypervisor import kvm

SLOTS = [(layout.virtio_base(n), layout.VIRTIO_MMIO_SIZE, layout.virtio_gsi(n)) for n in range(8)]
COUNTS = (1, 2, 16, 254)


def make_acpi(count: int = 2, enabled: int | None = None, serial: bool = True) -> Acpi:
    rsdp, tables = acpi.make_acpi(range(count), count if enabled is None else enabled, SLOTS,
                                  serial)
    assert layout.ACPI_RSDP + len(rsdp) <= layout.ACPI_TABLES
    assert layout.ACPI_TABLES + len(tables) <= layout.ACPI_END
    return read_acpi(rsdp, tables)


def make_mptable(ids: range) -> MpTable:
    pointer, table = mptable.make_mptable(ids)
    assert layout.EBDA + len(pointer) <= layout.EBDA_END
    assert layout.MP_TABLE + len(table) <= layout.BIOS_END
    return read_mptable(pointer, table)


@pytest.mark.parametrize("count", COUNTS)
def test_madt_lists_every_processor_and_one_ioapic(count: int) -> None:
    entries = make_acpi(count).entries
    lapics = [struct.unpack("<BBI", body) for kind, body in entries if kind == 0]
    assert lapics == [(n, n, 1) for n in range(count)]
    ioapics = [struct.unpack("<BBII", body) for kind, body in entries if kind == 1]
    assert [row[2:] for row in ioapics] == [(layout.IOAPIC, 0)]
    assert ioapics[0][0] not in range(count)
    assert [body for kind, body in entries if kind == 4] == [struct.pack("<BHB", 0xFF, 0, 1)]
    # GSI n is pin n in KVM's default routing, the timer's too: an override would be a lie.
    assert not [body for kind, body in entries if kind == 2]


def test_absent_processors_are_not_listed() -> None:
    assert len([1 for kind, _ in make_acpi(8, 3).entries if kind == 0]) == 3


def test_fadt_says_what_does_not_exist() -> None:
    fadt = make_acpi().tables["FACP"]
    assert len(fadt) == 276 and fadt[8] == 6
    boot, = struct.unpack_from("<H", fadt, 109)
    assert boot & 1 << 1 == 0, "no 8042"
    assert boot & 1 << 2, "no VGA"
    assert boot & 1 << 5, "no CMOS RTC"
    flags, = struct.unpack_from("<I", fadt, 112)
    assert flags & 1 << 20, "hardware-reduced"
    assert flags & 1 << 10, "reset register"
    assert flags & 1 << 4 and flags & 1 << 5, "buttons are control methods"
    assert fadt[56:109].strip(b"\0") == b"", "no PM registers"


def test_power_registers_are_those_that_the_core_serves() -> None:
    fadt = make_acpi().tables["FACP"]
    for at, address in ((116, layout.POWER_BASE + 2), (244, layout.POWER_BASE),
                        (256, layout.POWER_BASE + 1)):
        assert struct.unpack_from("<BBBBQ", fadt, at) == (0, 8, 0, 1, address)
    assert fadt[128] == acpi.RESET_VALUE == kvm.RESET_VALUE
    assert acpi.SLEEP_TYPE_S5 == kvm.SLEEP_TYPE_S5


def disassemble(table: bytes, folder: Path, name: str) -> str:
    require("iasl")
    (folder / f"{name}.aml").write_bytes(table)
    done = subprocess.run(["iasl", "-d", f"{name}.aml"], cwd=folder, capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Error" not in done.stderr and "Warning" not in done.stderr, done.stderr
    return (folder / f"{name}.dsl").read_text()


@pytest.mark.parametrize("name", ["DSDT", "FACP", "APIC", "XSDT"])
def test_iasl_reads_every_table(tmp_path: Path, name: str) -> None:
    text = disassemble(make_acpi().tables[name], tmp_path, name)
    assert "Unknown" not in text and "Invalid" not in text and "Incorrect" not in text


def test_dsdt_describes_the_machine_and_compiles_again(tmp_path: Path) -> None:
    text = disassemble(make_acpi().tables["DSDT"], tmp_path, "dsdt")
    for number, (base, size, gsi) in enumerate(SLOTS):
        node = text[text.index(f"Device (VR{number:02X})"):]
        node = node[:node.index("Device", 10)]
        assert '"LNRO0005"' in node and f"0x{base:08X}" in node and f"0x{size:08X}" in node
        assert f"0x{gsi:08X}" in node
        assert "Edge, ActiveHigh, Exclusive" in node
    assert 'EisaId ("PNP0501")' in text and "0x03F8" in text
    assert '"ACPI0013"' in text and 'EisaId ("PNP0C0C")' in text
    assert f"0x{layout.GED_BASE:X}" in text and "_EVT" in text
    assert "Notify (\\_SB.PWRB, 0x80)" in text
    done = subprocess.run(["iasl", "-tc", "dsdt.dsl"], cwd=tmp_path, capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0 and "0 Errors, 0 Warnings" in done.stdout, done.stdout


def test_no_serial_port_no_com1() -> None:
    assert b"COM1" not in make_acpi(serial=False).tables["DSDT"]
    assert b"COM1" in make_acpi(serial=True).tables["DSDT"]


@pytest.mark.parametrize("count", COUNTS)
def test_mptable_lists_every_processor(count: int) -> None:
    table = make_mptable(range(count))
    assert [row[0] for row in table.processors] == list(range(count))
    assert [row[2] for row in table.processors] == [3] + [1] * (count - 1)
    assert table.buses == [(0, b"ISA   ")]
    (number, _, flags, address), = table.ioapics
    assert number not in range(count) and flags == 1 and address == layout.IOAPIC


def test_every_interrupt_is_edge_high_at_the_pin_of_its_number() -> None:
    table = make_mptable(range(1))
    ioapic = table.ioapics[0][0]
    assert table.interrupts == [(0, 5, 0, n, ioapic, n) for n in range(layout.IOAPIC_PINS)]
    gsis = [gsi for _, _, gsi in SLOTS] + [layout.COM1_GSI, layout.GED_GSI]
    assert set(gsis) <= {row[5] for row in table.interrupts}
    assert [(row[0], row[4], row[5]) for row in table.local] == [(3, 0xFF, 0), (1, 0xFF, 1)]


def test_layout_keeps_everything_apart() -> None:
    gsis = [layout.virtio_gsi(n) for n in range(18)]
    assert gsis[:11] == list(range(5, 16)) and gsis[11:] == list(range(17, 24))
    assert layout.GED_GSI not in gsis and layout.COM1_GSI not in gsis
    with pytest.raises(ValueError, match="slot 18"):
        layout.virtio_gsi(18)
    areas = sorted([
        (layout.GDT, 40), (layout.PVH_START_INFO, 56), (layout.PVH_MODULES, 32),
        (layout.PVH_MEMORY_MAP, 8 * 24), (layout.ZERO_PAGE, 4096), (layout.BOOT_STACK - 256, 256),
        (layout.PML4, 4096), (layout.PDPT, 4096), (layout.PAGE_DIRECTORIES, 4 * 4096),
        (layout.COMMAND_LINE, layout.COMMAND_LINE_LIMIT), (layout.EBDA, 1024),
        (layout.ACPI_RSDP, 36), (layout.ACPI_TABLES, layout.ACPI_END - layout.ACPI_TABLES),
        (layout.MP_TABLE, layout.BIOS_END - layout.MP_TABLE)])
    for (start, size), (after, _) in pairwise(areas):
        assert start + size <= after
    assert layout.POWER_BASE + 3 <= layout.GED_BASE
    assert layout.virtio_base(18) <= layout.IOAPIC
    assert kvm.TSS + 3 * 4096 <= 1 << 32 and kvm.IDENTITY_MAP >= layout.LAPIC + 4096


@pytest.mark.parametrize("size", [0, 62, 63, 64, 4093, 4094, 4095, 1 << 20])
def test_aml_package_length_counts_itself(size: int) -> None:
    data = aml.package_length(bytes(size))
    follow = data[0] >> 6
    value = data[0] & (15 if follow else 63)
    for number in range(follow):
        value |= data[1 + number] << (4 + 8 * number)
    assert value == len(data) and len(data) == size + 1 + follow


def test_aml_too_large_values() -> None:
    with pytest.raises(ValueError):
        aml.integer(1 << 64)
    with pytest.raises(ValueError):
        aml.package_length(bytes(1 << 28))
    assert aml.name_string("\\_SB.PCI0.COM1") == b"\\\x2f\x03_SB_PCI0COM1"
