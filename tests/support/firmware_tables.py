"""Reads ACPI and MP tables the way a guest does; knows nothing of the code that writes them."""

from __future__ import annotations

import struct
from typing import NamedTuple

from vmm.arch.x86_64 import layout


class Acpi(NamedTuple):
    """All tables by signature, each with its header; `entries` of the MADT as (type, bytes)."""

    tables: dict[str, bytes]
    addresses: dict[str, int]

    @property
    def entries(self) -> list[tuple[int, bytes]]:
        """The MADT's interrupt controller structures."""
        madt = self.tables["APIC"]
        found, at = [], 44
        while at < len(madt):
            kind, length = madt[at], madt[at + 1]
            assert length >= 2 and at + length <= len(madt)
            found.append((kind, madt[at + 2:at + length]))
            at += length
        return found


def read_acpi(rsdp: bytes, area: bytes, base: int = layout.ACPI_TABLES) -> Acpi:
    """Follow RSDP and XSDT; every checksum and length is asserted."""
    assert rsdp[:8] == b"RSD PTR "
    revision, length, xsdt = rsdp[15], *struct.unpack_from("<IQ", rsdp, 20)
    assert revision == 2 and length == len(rsdp) == 36
    assert sum(rsdp[:20]) & 0xFF == 0 and sum(rsdp) & 0xFF == 0
    tables: dict[str, bytes] = {}
    addresses: dict[str, int] = {}

    def read(address: int) -> bytes:
        at = address - base
        assert 0 <= at <= len(area) - 36
        size, = struct.unpack_from("<I", area, at + 4)
        table = area[at:at + size]
        assert 36 <= size == len(table) and sum(table) & 0xFF == 0
        assert address % 8 == 0
        signature = table[:4].decode()
        assert signature not in tables
        tables[signature], addresses[signature] = table, address
        return table

    roots = read(xsdt)
    assert roots[:4] == b"XSDT" and (len(roots) - 36) % 8 == 0
    for at in range(36, len(roots), 8):
        read(struct.unpack_from("<Q", roots, at)[0])
    fadt = tables["FACP"]
    dsdt, extended = struct.unpack_from("<I", fadt, 40)[0], struct.unpack_from("<Q", fadt, 140)[0]
    assert dsdt == extended
    read(dsdt)
    return Acpi(tables, addresses)


class MpTable(NamedTuple):
    """The MP configuration table: its entries by type, without the type byte."""

    processors: list[tuple[int, int, int]]  # APIC id, version, flags
    buses: list[tuple[int, bytes]]
    ioapics: list[tuple[int, int, int, int]]  # id, version, flags, address
    interrupts: list[tuple[int, int, int, int, int, int]]  # type, flags, bus, irq, id, pin
    local: list[tuple[int, int, int, int, int, int]]


def read_mptable(pointer: bytes, table: bytes, base: int = layout.MP_TABLE) -> MpTable:
    """Check pointer, header and checksums; split the entries."""
    assert pointer[:4] == b"_MP_" and len(pointer) == pointer[8] * 16 == 16
    assert sum(pointer) & 0xFF == 0
    assert struct.unpack_from("<I", pointer, 4)[0] == base and pointer[9] == 4
    assert table[:4] == b"PCMP" and sum(table) & 0xFF == 0
    length, revision = struct.unpack_from("<HB", table, 4)
    count, lapic = struct.unpack_from("<HI", table, 34)
    assert length == len(table) and revision == 4 and lapic == layout.LAPIC
    found = MpTable([], [], [], [], [])
    at = 44
    last = 0
    for _ in range(count):
        kind = table[at]
        assert kind >= last, "entries are sorted by type"
        last = kind
        if kind == 0:
            found.processors.append(struct.unpack_from("<BBB", table, at + 1))
        elif kind == 1:
            found.buses.append(struct.unpack_from("<B6s", table, at + 1))
        elif kind == 2:
            found.ioapics.append(struct.unpack_from("<BBBI", table, at + 1))
        else:
            row = struct.unpack_from("<BHBBBB", table, at + 1)
            (found.interrupts if kind == 3 else found.local).append(row)
        at += 20 if kind == 0 else 8
    assert at == len(table)
    return found
