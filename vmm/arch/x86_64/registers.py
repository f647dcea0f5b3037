"""Registers with which the bootstrap processor enters the kernel; the others wait for a SIPI.

64-bit: Linux Documentation/arch/x86/boot.rst, "64-bit Boot Protocol".  PVH: Xen
docs/misc/pvh.pandoc: 32-bit protected mode, paging off, ebx = start info.
"""

from __future__ import annotations

from _struct import pack

from vmm.arch.x86_64 import layout

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from typing import Any

    from vmm.memory import GuestMemory

ENTRY_64 = 64
ENTRY_PVH = 32

_CR0_PE, _CR0_ET, _CR0_PG = 1 << 0, 1 << 4, 1 << 31
_CR4_PAE = 1 << 5
_EFER_LME, _EFER_LMA = 1 << 8, 1 << 10
_PAGE = 0x3  # present, writable
_LARGE_PAGE = 0x83
_CODE_SELECTOR, _DATA_SELECTOR, _TASK_SELECTOR = 0x10, 0x18, 0x20

# IA32_MISC_ENABLE: fast strings; IA32_MTRR_DEF_TYPE: enabled, write back by default.
START_MSRS = ((0x1A0, 1), (0x2FF, 0x806))

MP_STATE_RUNNABLE = 0

# What F000:FFF0 holds where others have firmware: `mov al, 0xfe; out 0x64, al; hlt; jmp hlt`, the
# keyboard controller's reset pulse.  A Linux whose ACPI is hardware-reduced and that was not
# started by EFI reboots by a jump to it (arch/x86/kernel/reboot.c, BOOT_EFI then BOOT_BIOS).
RESET_CODE = bytes.fromhex("b0fe e664 f4 ebfd")


def _segment(selector: int, kind: int, long: bool) -> dict[str, int]:
    code = kind == 0xB
    return {"base": 0, "limit": 0xFFFFFFFF, "selector": selector, "type": kind, "present": 1,
            "dpl": 0, "db": 0 if long and code else 1, "s": 1, "l": 1 if long and code else 0,
            "g": 1, "avl": 0, "unusable": 0}


def system_registers(mode: int) -> dict[str, Any]:
    """What `set_sregs` is given for the bootstrap processor."""
    long = mode == ENTRY_64
    data = _segment(_DATA_SELECTOR, 0x3, long)
    fields: dict[str, Any] = dict.fromkeys(("ds", "es", "fs", "gs", "ss"), data)
    fields["cs"] = _segment(_CODE_SELECTOR, 0xB, long)
    fields["tr"] = {"base": 0, "limit": 0x67, "selector": _TASK_SELECTOR, "type": 0xB,
                    "present": 1, "dpl": 0, "db": 0, "s": 0, "l": 0, "g": 0, "avl": 0,
                    "unusable": 0}
    fields["gdt"] = {"base": layout.GDT, "limit": 5 * 8 - 1}
    fields["idt"] = {"base": 0, "limit": 0}
    fields["cr0"] = _CR0_PE | _CR0_ET
    fields["cr3"] = fields["cr4"] = fields["efer"] = 0
    if long:
        fields["cr0"] |= _CR0_PG
        fields["cr3"] = layout.PML4
        fields["cr4"] = _CR4_PAE
        fields["efer"] = _EFER_LME | _EFER_LMA
    return fields


def general_registers(mode: int, entry: int) -> dict[str, int]:
    """What `set_regs` is given: where to start, and where the boot data lies."""
    if mode == ENTRY_64:
        return {"rip": entry, "rsi": layout.ZERO_PAGE, "rsp": layout.BOOT_STACK,
                "rbp": layout.BOOT_STACK}
    return {"rip": entry, "rbx": layout.PVH_START_INFO}


def write_descriptor_tables(memory: GuestMemory, mode: int) -> None:
    """The GDT and, for the 64-bit entry, page tables that map the first 4 GiB to themselves."""
    code = 0x00AF9B000000FFFF if mode == ENTRY_64 else 0x00CF9B000000FFFF
    memory.write(layout.GDT, pack("<QQQQQ", 0, 0, code, 0x00CF93000000FFFF, 0x00008B0000000067))
    if mode != ENTRY_64:
        return
    directories = layout.PAGE_DIRECTORIES
    memory.write(layout.PML4, pack("<Q", layout.PDPT | _PAGE))
    memory.write(layout.PDPT, pack("<4Q", *(directories + 4096 * i | _PAGE for i in range(4))))
    memory.write(directories, pack("<2048Q", *(i << 21 | _LARGE_PAGE for i in range(2048))))
