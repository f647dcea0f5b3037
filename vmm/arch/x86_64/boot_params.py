"""What a Linux kernel is told at its start: zero page, PVH start info, memory map.

Linux Documentation/arch/x86/boot.rst and zero-page.rst; Xen public/arch-x86/hvm/start_info.h.
"""

from __future__ import annotations

from _struct import pack, pack_into

from vmm.arch.x86_64 import layout

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from collections.abc import Sequence

RAM, RESERVED = 1, 2

_SETUP_HEADER = 0x1F1
_E820_COUNT = 0x1E8
_E820_TABLE = 0x2D0
_ACPI_RSDP = 0x070
_LOADER_UNDEFINED = 0xFF
_BOOT_FLAG = 0xAA55
_HDRS = 0x53726448
_PVH_MAGIC = 0x336EC578


def memory_map(ram: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """Rows (start, size, type): RAM with the BIOS areas cut out.

    :param ram: (start, size) of each region of RAM, ascending; the first starts at 0.
    """
    rows = [(0, layout.EBDA, RAM), (layout.EBDA, layout.EBDA_END - layout.EBDA, RESERVED),
            (layout.BIOS_AREA, layout.BIOS_END - layout.BIOS_AREA, RESERVED)]
    for start, size in ram:
        if start == 0:
            start, size = layout.BIOS_END, size - layout.BIOS_END
        rows.append((start, size, RAM))
    return rows


def make_zero_page(header: bytes, ram: Sequence[tuple[int, int]], command_line_size: int,
                   initrd: tuple[int, int]) -> bytes:
    """The 4096 bytes of struct boot_params.

    :param header: the bzImage's setup header from 0x1F1 on; empty for other kernels.
    :param initrd: address and size; size 0 for none.
    """
    page = bytearray(4096)
    page[_SETUP_HEADER:_SETUP_HEADER + len(header)] = header
    if not header:
        pack_into("<H", page, 0x1FE, _BOOT_FLAG)
        pack_into("<I", page, 0x202, _HDRS)
        pack_into("<H", page, 0x206, 0x020C)
        pack_into("<I", page, 0x230, 0x1000000)  # kernel_alignment
    page[0x210] = _LOADER_UNDEFINED
    page[0x211] |= 0x01  # LOADED_HIGH
    pack_into("<II", page, 0x218, *(initrd if initrd[1] else (0, 0)))
    pack_into("<I", page, 0x228, layout.COMMAND_LINE)
    pack_into("<I", page, 0x238, command_line_size)
    pack_into("<Q", page, _ACPI_RSDP, layout.ACPI_RSDP)
    rows = memory_map(ram)
    page[_E820_COUNT] = len(rows)
    for number, (start, size, kind) in enumerate(rows):
        pack_into("<QQI", page, _E820_TABLE + 20 * number, start, size, kind)
    return bytes(page)


def make_pvh(ram: Sequence[tuple[int, int]], initrd: tuple[int, int]) -> list[tuple[int, bytes]]:
    """The PVH start info with its tables: (address, bytes) to be written."""
    rows = memory_map(ram)
    table = b"".join(pack("<QQII", start, size, kind, 0) for start, size, kind in rows)
    modules = pack("<QQQQ", *initrd, 0, 0) if initrd[1] else b""
    info = pack("<IIIIQQQQII", _PVH_MAGIC, 1, 0, 1 if modules else 0,
                layout.PVH_MODULES if modules else 0, layout.COMMAND_LINE, layout.ACPI_RSDP,
                layout.PVH_MEMORY_MAP, len(rows), 0)
    return [(layout.PVH_START_INFO, info), (layout.PVH_MODULES, modules),
            (layout.PVH_MEMORY_MAP, table)]
