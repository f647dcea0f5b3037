"""Where everything lies in the guest-physical address space of the x86_64 microvm.

One place for all addresses: builders, tables and tests read them from here.  What the guest's
kernel may overwrite once it runs (zero page, page tables) lies low; what it must find later
(ACPI, MP table) lies in the reserved BIOS area.
"""

from __future__ import annotations

# RAM: [0, LOW_END) and, if there is more, from HIGH_START on.
LOW_END = 0xC0000000
HIGH_START = 1 << 32

# Boot data in low memory.
GDT = 0x500
PVH_START_INFO = 0x6000
PVH_MODULES = 0x6040
PVH_MEMORY_MAP = 0x6080
ZERO_PAGE = 0x7000
BOOT_STACK = 0x8FF0
PML4 = 0x9000
PDPT = 0xA000
PAGE_DIRECTORIES = 0xB000  # four of them: 4 GiB of 2 MiB pages
COMMAND_LINE = 0x20000
COMMAND_LINE_LIMIT = 0x10000

# The extended BIOS data area, where a kernel without ACPI looks for the MP floating pointer.
EBDA = 0x9FC00
EBDA_END = 0xA0000
# The BIOS area: reserved in the memory map, kept by every kernel.
BIOS_AREA = 0xD0000
ACPI_RSDP = 0xE0000
ACPI_TABLES = 0xE0040
ACPI_END = 0xF0000
MP_TABLE = 0xF0000
RESET_VECTOR = 0xFFFF0
BIOS_END = 0x100000

KERNEL_START = 0x100000
RAW_KERNEL = 0x1000000
INITRD_MAX = 0x37FFFFFF  # what every kernel accepts

# Devices.
POWER_BASE = 0xF0000000  # ACPI sleep control, sleep status, reset: one byte each
GED_BASE = 0xF0000010
GED_SIZE = 4
VIRTIO_MMIO_BASE = 0xF0100000
VIRTIO_MMIO_SIZE = 0x200
IOAPIC = 0xFEC00000
LAPIC = 0xFEE00000

COM1_PORT = 0x3F8
COM1_GSI = 4
GED_GSI = 16
IOAPIC_PINS = 24

# The GSI of each virtio-mmio slot: StratoVirt's 5..15 first, then what the GED leaves.
_FIRST_GSI = 5
_LAST_ISA_GSI = 15


def virtio_base(slot: int) -> int:
    """Guest-physical address of a virtio-mmio slot's registers."""
    return VIRTIO_MMIO_BASE + slot * VIRTIO_MMIO_SIZE


def virtio_gsi(slot: int) -> int:
    """The slot's interrupt: edge, not shared.

    :raises ValueError: there are more slots than interrupts.
    """
    gsi = _FIRST_GSI + slot
    if gsi > _LAST_ISA_GSI:
        gsi += GED_GSI + 1 - (_LAST_ISA_GSI + 1)
    if gsi >= IOAPIC_PINS:
        raise ValueError(f"slot {slot} has no interrupt: the IOAPIC has {IOAPIC_PINS} pins")
    return gsi
