"""ACPI tables of the microvm, in the hardware-reduced form (ACPI 6.4, 3.11.1, 5.2).

Hardware-reduced: there is no PM timer, no SCI and no fixed hardware, so that a guest waits for
nothing that isn't there; FADT flags say that CMOS RTC, VGA and 8042 are absent.  Power button
and sleep go through the Generic Event Device and the sleep registers.
"""

from __future__ import annotations

from _struct import pack

from vmm.arch.x86_64 import aml, layout

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from collections.abc import Sequence

_OEM_ID = b"STRATO"
_OEM_TABLE = b"MICROVM "
_CREATOR = b"SVMM"

SLEEP_TYPE_S5 = 5  # what `_S5` says and the native core takes for S5
RESET_VALUE = 1
GED_POWER_BUTTON = 1  # bit of the GED's event register

_LEGACY_FREE = 1 << 2 | 1 << 5  # IAPC_BOOT_ARCH: no VGA, no CMOS RTC; bit 1 clear: no 8042
_WBINVD = 1 << 0
_PWR_BUTTON = 1 << 4  # as control methods, not fixed hardware
_SLP_BUTTON = 1 << 5
_RESET_REG_SUP = 1 << 10
_HW_REDUCED = 1 << 20
_ONLINE = 1


def make_acpi(apic_ids: Sequence[int], enabled: int, slots: Sequence[tuple[int, int, int]],
              serial: bool) -> tuple[bytes, bytes]:
    """RSDP (for `layout.ACPI_RSDP`) and all other tables (for `layout.ACPI_TABLES`).

    :param apic_ids: of all processors, the first `enabled` of which are present.
    :param slots: (base, size, gsi) of each virtio-mmio device.
    :param serial: whether COM1 exists.
    """
    tables = bytearray()
    address = layout.ACPI_TABLES

    def place(table: bytes) -> int:
        at = address + len(tables)
        tables.extend(table)
        tables.extend(bytes(-len(tables) % 16))
        return at

    dsdt = place(_table(b"DSDT", 2, _dsdt(slots, serial)))
    fadt = place(_table(b"FACP", 6, _fadt(dsdt)))
    madt = place(_table(b"APIC", 5, _madt(apic_ids, enabled)))
    xsdt = place(_table(b"XSDT", 1, pack("<QQ", fadt, madt)))
    first = pack("<8sB6sBI", b"RSD PTR ", 0, _OEM_ID, 2, 0)
    first = _set_checksum(first, 8)
    rsdp = _set_checksum(first + pack("<IQB3x", 36, xsdt, 0), 32)
    return rsdp, bytes(tables)


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    header = pack("<4sIBB6s8sI4sI", signature, 36 + len(body), revision, 0, _OEM_ID, _OEM_TABLE,
                  1, _CREATOR, 1)
    return _set_checksum(header + body, 9)


def _set_checksum(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([-(sum(data) - data[at]) & 0xFF]) + data[at + 1:]


def _memory_register(address: int) -> bytes:
    """Generic Address Structure of one byte in memory (ACPI 6.4, 5.2.3.2)."""
    return pack("<BBBBQ", 0, 8, 0, 1, address)


def _fadt(dsdt: int) -> bytes:
    body = bytearray(276 - 36)

    def put(offset: int, data: bytes) -> None:
        body[offset - 36:offset - 36 + len(data)] = data

    flags = _WBINVD | _PWR_BUTTON | _SLP_BUTTON | _RESET_REG_SUP | _HW_REDUCED
    put(40, pack("<I", dsdt))
    put(109, pack("<H", _LEGACY_FREE))
    put(112, pack("<I", flags))
    put(116, _memory_register(layout.POWER_BASE + 2))
    put(128, bytes([RESET_VALUE]))
    put(131, bytes([4]))  # minor version: 6.4
    put(140, pack("<Q", dsdt))
    put(244, _memory_register(layout.POWER_BASE))
    put(256, _memory_register(layout.POWER_BASE + 1))
    put(268, b"STRATOVM")
    return bytes(body)


def _madt(apic_ids: Sequence[int], enabled: int) -> bytes:
    entries = [pack("<II", layout.LAPIC, 0)]
    # No PCAT_COMPAT: hardware-reduced kernels use no PIC. Absent processors are left out until
    # they can be plugged.
    for uid, apic_id in enumerate(apic_ids[:enabled]):
        entries.append(pack("<BBBBI", 0, 8, uid, apic_id, _ONLINE))
    taken = set(apic_ids)
    ioapic_id = next(i for i in range(256) if i not in taken)
    # No overrides: GSI n is pin n, 0 to 15 are ISA's (edge, high).
    entries.append(pack("<BBBBII", 1, 12, ioapic_id, 0, layout.IOAPIC, 0))
    entries.append(pack("<BBBHB", 4, 6, 0xFF, 0, 1))  # NMI: LINT1 of every processor
    return b"".join(entries)


def _dsdt(slots: Sequence[tuple[int, int, int]], serial: bool) -> bytes:
    devices = [_virtio(number, *slot) for number, slot in enumerate(slots)]
    if serial:
        devices.append(aml.device(
            "COM1", aml.name("_HID", aml.eisa_id("PNP0501")), aml.name("_UID", aml.integer(1)),
            aml.name("_CRS", aml.resources(aml.io_port(layout.COM1_PORT, 8),
                                           aml.edge_interrupt(layout.COM1_GSI)))))
    devices.append(_ged())
    devices.append(aml.device("PWRB", aml.name("_HID", aml.eisa_id("PNP0C0C")),
                              aml.name("_UID", aml.integer(0))))
    s5 = aml.package(aml.integer(SLEEP_TYPE_S5), aml.integer(SLEEP_TYPE_S5), aml.integer(0),
                     aml.integer(0))
    return aml.scope("\\_SB", *devices) + aml.name("\\_S5", s5)


def _virtio(number: int, base: int, size: int, gsi: int) -> bytes:
    return aml.device(
        f"VR{number:02X}", aml.name("_HID", aml.string("LNRO0005")),
        aml.name("_UID", aml.integer(number)), aml.name("_CCA", aml.integer(1)),
        aml.name("_CRS", aml.resources(aml.memory32(base, size), aml.edge_interrupt(gsi))))


def _ged() -> bytes:
    """The device that turns a bit in its event register into a Notify (ACPI 6.4, 5.6.9)."""
    store_event = b"\x70" + aml.name_string("ESEL") + b"\x60"  # Store (ESEL, Local0)
    test = b"\x7b\x60" + aml.integer(GED_POWER_BUTTON) + b"\x00"  # And (Local0, bit, )
    notify = b"\x86" + aml.name_string("\\_SB.PWRB") + aml.integer(0x80)
    branch = b"\xa0" + aml.package_length(test + notify)  # If (...) {Notify (PWRB, 0x80)}
    return aml.device(
        "GED", aml.name("_HID", aml.string("ACPI0013")), aml.name("_UID", aml.integer(0)),
        aml.name("_CRS", aml.resources(aml.edge_interrupt(layout.GED_GSI))),
        aml.memory_region("EREG", layout.GED_BASE, layout.GED_SIZE),
        aml.dword_field("EREG", "ESEL"),
        aml.method("_EVT", 1, True, store_event + branch))
