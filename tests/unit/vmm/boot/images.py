"""Small kernel images, right in every field unless a test changes one."""

from __future__ import annotations

import struct
from typing import Any

BASE = 0x1000000
PT_LOAD, PT_NOTE = 1, 4


def note(value: int, size: int = 4, name: bytes = b"Xen\0", kind: int = 18) -> bytes:
    """One ELF note."""
    return struct.pack("<III", len(name), size, kind) + name + bytes(-len(name) % 4) + (
        value.to_bytes(size, "little") + bytes(-size % 4))


def program_header(kind: int, offset: int, address: int, size: int,
                   memory_size: int | None = None) -> bytes:
    """One Elf64_Phdr."""
    return struct.pack("<IIQQQQQQ", kind, 7, offset, 0xFFFFFFFF80000000 | address, address, size,
                       size if memory_size is None else memory_size, 4096)


def elf(pvh: int | None = None, notes: bytes | None = None,
        segments: list[tuple[int, ...]] | None = None, **header: Any) -> bytes:
    """A vmlinux: `segments` are (offset, address, size, memory size); `header` overrides fields.

    Bytes: 0x1000 headers, then 0x3000 of content, which starts at 0x1000.
    """
    if segments is None:
        segments = [(0x1000, BASE, 0x2000, 0x2000), (0x3000, BASE + 0x2000, 0x1000, 0x5000)]
    if notes is None and pvh is not None:
        notes = note(1, kind=5) + note(pvh)
    rows = [program_header(PT_LOAD, *segment) for segment in segments]
    if notes is not None:
        rows.append(program_header(PT_NOTE, 0x800, BASE, len(notes)))
    fields: dict[str, Any] = {
        "ident": b"\x7fELF\x02\x01\x01" + bytes(9), "type": 2, "machine": 62, "version": 1,
        "entry": BASE, "phoff": 64, "shoff": 0, "flags": 0, "ehsize": 64, "phentsize": 56,
        "phnum": len(rows), "shentsize": 64, "shnum": 0, "shstrndx": 0, **header}
    image = bytearray(0x4000)
    struct.pack_into("<16sHHIQQQIHHHHHH", image, 0, *fields.values())
    table = b"".join(rows)
    image[64:64 + len(table)] = table
    if notes is not None:
        image[0x800:0x800 + len(notes)] = notes
    image[0x1000:] = bytes((n * 7 + 1) & 0xFF for n in range(0x3000))
    return bytes(image)


SETUP_SECTORS = 4
BZIMAGE_FIELDS = {  # offset and format of those that the loader reads
    "setup_sects": (0x1F1, "<B"), "syssize": (0x1F4, "<I"), "jump": (0x201, "<B"),
    "version": (0x206, "<H"), "loadflags": (0x211, "<B"), "initrd_addr_max": (0x22C, "<I"),
    "kernel_alignment": (0x230, "<I"), "relocatable_kernel": (0x234, "<B"),
    "xloadflags": (0x236, "<H"), "cmdline_size": (0x238, "<I"), "pref_address": (0x258, "<Q"),
    "init_size": (0x260, "<I")}


def bzimage(size: int = 0x3000, **fields: int) -> bytes:
    """A bzImage of boot protocol 2.15 with `size` bytes of kernel; `fields` override."""
    image = bytearray((SETUP_SECTORS + 1) * 512 + size)
    image[0x1FE:0x200] = b"\x55\xaa"
    image[0x202:0x206] = b"HdrS"
    values = {"setup_sects": SETUP_SECTORS, "syssize": size // 16, "jump": 0x6A,
              "version": 0x20F, "loadflags": 1, "initrd_addr_max": 0x7FFFFFFF,
              "kernel_alignment": 0x200000, "relocatable_kernel": 1, "xloadflags": 0x3F,
              "cmdline_size": 2047, "pref_address": BASE, "init_size": 0x100000, **fields}
    for name, value in values.items():
        at, form = BZIMAGE_FIELDS[name]
        struct.pack_into(form, image, at, value)
    start = (SETUP_SECTORS + 1) * 512
    image[start:] = bytes((n * 5 + 1) & 0xFF for n in range(size))
    return bytes(image)
