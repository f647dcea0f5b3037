"""Zero page, PVH start info, descriptor tables and registers, and the whole set-up on a fake."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from tests.support.firmware_tables import read_acpi, read_mptable
from tests.unit.vmm.boot.images import bzimage, elf
from vmm.arch.x86_64 import boot_params, layout, registers, setup
from vmm.arch.x86_64.topology import Topology
from vmm.boot.loading import Loading
from vmm.config.model import MemoryConfig, VmConfig
from vmm.hypervisor.fake import FakeHypervisor, FakeVcpu
from vmm.memory import GuestMemory

MIB = 1 << 20
LOW = [(0, 256 * MIB)]
BOTH = [(0, layout.LOW_END), (layout.HIGH_START, 1 << 30)]
SLOTS = [(layout.virtio_base(0), 0x200, 5), (layout.virtio_base(1), 0x200, 6)]


@pytest.mark.parametrize("ram", [LOW, BOTH])
def test_memory_map_is_sorted_disjoint_and_spares_the_bios(ram: list[tuple[int, int]]) -> None:
    rows = boot_params.memory_map(ram)
    assert all(a[0] + a[1] <= b[0] for a, b in pairwise(rows))
    usable = [(start, size) for start, size, kind in rows if kind == boot_params.RAM]
    assert usable[0] == (0, layout.EBDA)
    assert usable[1] == (MIB, ram[0][1] - MIB)
    assert usable[2:] == ram[1:]
    reserved = [(start, start + size) for start, size, kind in rows if kind == 2]
    for address in (layout.EBDA, layout.ACPI_RSDP, layout.ACPI_TABLES, layout.MP_TABLE):
        assert any(start <= address < end for start, end in reserved)


def test_zero_page_of_a_kernel_without_a_header() -> None:
    page = boot_params.make_zero_page(b"", BOTH, 77, (0x3000000, 0x1234))
    assert len(page) == 4096
    assert struct.unpack_from("<H", page, 0x1FE)[0] == 0xAA55 and page[0x202:0x206] == b"HdrS"
    assert page[0x1EF] == 0, "the sentinel says that nothing is garbage"
    assert page[0x210] == 0xFF and page[0x211] & 1
    assert struct.unpack_from("<II", page, 0x218) == (0x3000000, 0x1234)
    assert struct.unpack_from("<I", page, 0x228)[0] == layout.COMMAND_LINE
    assert struct.unpack_from("<I", page, 0x238)[0] == 77
    assert struct.unpack_from("<Q", page, 0x70)[0] == layout.ACPI_RSDP
    rows = [struct.unpack_from("<QQI", page, 0x2D0 + 20 * n) for n in range(page[0x1E8])]
    assert rows == boot_params.memory_map(BOTH)


def test_zero_page_keeps_the_kernels_header_but_not_its_initrd() -> None:
    header = bytearray(range(256))[:0x73]
    page = boot_params.make_zero_page(bytes(header), LOW, 1, (0, 0))
    assert page[0x1F1:0x202] == header[:0x11]
    assert struct.unpack_from("<II", page, 0x218) == (0, 0)


def test_pvh_start_info() -> None:
    parts = dict(boot_params.make_pvh(BOTH, (0x3000000, 0x1234)))
    info = parts[layout.PVH_START_INFO]
    magic, version, flags, count, modules, line, rsdp, table, rows, reserved = struct.unpack(
        "<IIIIQQQQII", info)
    assert (magic, version, flags, count, reserved) == (0x336EC578, 1, 0, 1, 0)
    assert (line, rsdp) == (layout.COMMAND_LINE, layout.ACPI_RSDP)
    assert struct.unpack("<QQQQ", parts[modules]) == (0x3000000, 0x1234, 0, 0)
    assert [struct.unpack_from("<QQI", parts[table], 24 * n) for n in range(rows)
            ] == boot_params.memory_map(BOTH)


def test_pvh_without_an_initrd_has_no_module() -> None:
    parts = dict(boot_params.make_pvh(LOW, (0, 0)))
    assert struct.unpack_from("<I", parts[layout.PVH_START_INFO], 12)[0] == 0
    assert struct.unpack_from("<Q", parts[layout.PVH_START_INFO], 16)[0] == 0


def test_64_bit_entry_state() -> None:
    fields = registers.system_registers(registers.ENTRY_64)
    assert fields["efer"] == 0x500 and fields["cr0"] & 0x80000001 == 0x80000001
    assert fields["cr4"] == 1 << 5 and fields["cr3"] == layout.PML4
    assert fields["cs"]["selector"] == 0x10 and fields["cs"]["l"] and not fields["cs"]["db"]
    assert fields["ds"]["selector"] == fields["ss"]["selector"] == 0x18
    assert registers.general_registers(registers.ENTRY_64, 0x1234) == {
        "rip": 0x1234, "rsi": layout.ZERO_PAGE, "rsp": layout.BOOT_STACK,
        "rbp": layout.BOOT_STACK}


def test_pvh_entry_state() -> None:
    fields = registers.system_registers(registers.ENTRY_PVH)
    assert fields["cr0"] == 0x11 and fields["cr4"] == fields["efer"] == 0
    assert fields["cs"]["db"] and not fields["cs"]["l"] and fields["tr"]["type"] == 0xB
    assert registers.general_registers(registers.ENTRY_PVH, 0x1234) == {
        "rip": 0x1234, "rbx": layout.PVH_START_INFO}


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    config = MemoryConfig()
    config.size = 64 * MIB
    memory = GuestMemory(config)
    yield memory
    memory.close()


def test_page_tables_map_the_first_4_gib_to_themselves(memory: GuestMemory) -> None:
    registers.write_descriptor_tables(memory, registers.ENTRY_64)

    def entry(table: int, index: int) -> int:
        return int.from_bytes(memory.read(table + 8 * index, 8), "little")

    for address in (0, 0x1FFFFF, MIB * 777, layout.LAPIC, (1 << 32) - 1):
        directories = entry(layout.PML4, 0)
        directory = entry(directories & -4096, address >> 30)
        page = entry(directory & -4096, address >> 21 & 511)
        assert directories & 3 == directory & 3 == 3 and page & 0x83 == 0x83
        assert page & -(1 << 21) == address & -(1 << 21)
    assert entry(layout.PDPT, 4) == 0
    assert entry(layout.GDT, 2) == 0x00AF9B000000FFFF


def make_config(tmp_path: Path, image: bytes, count: int = 2) -> VmConfig:
    config = VmConfig()
    (tmp_path / "kernel").write_bytes(image)
    (tmp_path / "initrd").write_bytes(b"initrd" * 1000)
    config.boot.kernel, config.boot.initrd = str(tmp_path / "kernel"), str(tmp_path / "initrd")
    config.boot.append = "console=ttyS0"
    config.cpu.count = config.cpu.max_cpus = config.cpu.sockets = count
    config.serial = "serial0"
    return config


@pytest.mark.parametrize("form", ["bzimage", "pvh", "elf", "raw"])
def test_whole_set_up(memory: GuestMemory, tmp_path: Path, form: str) -> None:
    image = {"bzimage": bzimage(), "pvh": elf(pvh=0x1000010), "elf": elf(),
             "raw": b"\xf4" * 5000}[form]
    config = make_config(tmp_path, image)
    loading = Loading(memory, config.boot, fresh=True)
    entry = setup.write_tables(memory, config, loading, SLOTS)
    loading.wait()
    assert entry.mode == (registers.ENTRY_PVH if form == "pvh" else registers.ENTRY_64)
    line = memory.read(layout.COMMAND_LINE, 200).split(b"\0")[0].decode()
    assert line == ("console=ttyS0 virtio_mmio.device=512@0xf0100000:5 "
                    "virtio_mmio.device=512@0xf0100200:6")
    if form == "pvh":
        modules, = struct.unpack("<Q", memory.read(layout.PVH_START_INFO + 16, 8))
        start, size = struct.unpack("<QQ", memory.read(modules, 16))
    else:
        start, size = struct.unpack("<II", memory.read(layout.ZERO_PAGE + 0x218, 8))
        assert struct.unpack("<I", memory.read(layout.ZERO_PAGE + 0x238, 4))[0] == len(line)
    assert memory.read(start, size) == b"initrd" * 1000 and start % 4096 == 0
    acpi = read_acpi(memory.read(layout.ACPI_RSDP, 36),
                     memory.read(layout.ACPI_TABLES, layout.ACPI_END - layout.ACPI_TABLES))
    assert len([1 for kind, _ in acpi.entries if kind == 0]) == 2
    # A reboot through the BIOS: mov al, 0xfe; out 0x64, al.
    assert memory.read(layout.RESET_VECTOR, 4) == bytes([0xB0, 0xFE, 0xE6, 0x64])
    table = memory.read(layout.MP_TABLE, layout.BIOS_END - layout.MP_TABLE)
    mp = read_mptable(memory.read(layout.EBDA, 16), table[:struct.unpack_from("<H", table, 4)[0]])
    assert len(mp.processors) == 2


def test_only_the_bootstrap_processor_enters_the_kernel() -> None:
    config = VmConfig()
    config.cpu.count = config.cpu.max_cpus = config.cpu.cores = 2
    topology = Topology(config.cpu)
    entry = setup.EntryPoint(registers.ENTRY_64, 0x100200)
    rows = FakeHypervisor().supported_cpuid()
    vcpus = [FakeVcpu(0), FakeVcpu(1)]
    for index, vcpu in enumerate(vcpus):
        setup.setup_vcpu(vcpu, entry, index, topology, rows)  # type: ignore[arg-type]
        assert vcpu.registers["msrs"] == list(registers.START_MSRS)
        cpuid = vcpu.registers["cpuid"]
        assert isinstance(cpuid, list)
        assert next(row[4] for row in cpuid if row[0] == 1) >> 24 == index
    assert vcpus[0].registers["regs"]["rip"] == 0x100200  # type: ignore[index]
    assert "regs" not in vcpus[1].registers and "sregs" not in vcpus[1].registers
