"""The MultiProcessor table for kernels without ACPI (MultiProcessor Specification 1.4, 4).

The floating pointer lies in the EBDA, where Linux looks; the table itself in the BIOS area,
because 254 processors need 5 KiB.  All interrupts are edge triggered, active high, and each
arrives at the pin of its number, the timer's too: KVM's default routing (Linux
arch/x86/kvm/irq.c), which nobody changes.
"""

from __future__ import annotations

from _struct import pack

from vmm.arch.x86_64 import layout

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from collections.abc import Sequence

_SPEC_REVISION = 4
_APIC_VERSION = 0x14
_CPU_ENABLED = 1
_CPU_BOOTSTRAP = 2
_CPU_FEATURES = 0x201  # FPU, APIC
_CPU_SIGNATURE = 0x600
_EDGE_HIGH = 0x5
_INT, _NMI, _EXTINT = 0, 1, 3
_ISA_BUS = 0
ALL_LOCAL_APICS = 0xFF


def make_mptable(apic_ids: Sequence[int]) -> tuple[bytes, bytes]:
    """The floating pointer structure and the configuration table.

    :param apic_ids: of the processors present; the first is the bootstrap processor.
    """
    taken = set(apic_ids)
    # An id that no processor has: 8 bits, so 254 processors with ids 0..253 leave 254.
    ioapic_id = next(i for i in range(256) if i not in taken)
    entries = [pack("<BBBBIIII", 0, apic, _APIC_VERSION,
                    _CPU_ENABLED | (_CPU_BOOTSTRAP if number == 0 else 0), _CPU_SIGNATURE,
                    _CPU_FEATURES, 0, 0) for number, apic in enumerate(apic_ids)]
    entries.append(pack("<BB6s", 1, _ISA_BUS, b"ISA   "))
    entries.append(pack("<BBBBI", 2, ioapic_id, 0x11, 1, layout.IOAPIC))
    entries += [pack("<BBHBBBB", 3, _INT, _EDGE_HIGH, _ISA_BUS, pin, ioapic_id, pin)
                for pin in range(layout.IOAPIC_PINS)]
    entries.append(pack("<BBHBBBB", 4, _EXTINT, 0, _ISA_BUS, 0, ALL_LOCAL_APICS, 0))
    entries.append(pack("<BBHBBBB", 4, _NMI, 0, _ISA_BUS, 0, ALL_LOCAL_APICS, 1))
    body = b"".join(entries)
    header = pack("<4sHBB8s12sIHHIHBB", b"PCMP", 44 + len(body), _SPEC_REVISION, 0, b"STRATO  ",
                  b"MICROVM     ", 0, 0, len(entries), layout.LAPIC, 0, 0, 0)
    table = _with_checksum(header + body, 7)
    pointer = pack("<4sIBBB5s", b"_MP_", layout.MP_TABLE, 1, _SPEC_REVISION, 0, bytes(5))
    return _with_checksum(pointer, 10), table


def _with_checksum(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([-sum(data) & 0xFF]) + data[at + 1:]
