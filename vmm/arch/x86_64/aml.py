"""The few terms of the ACPI Machine Language that our DSDT needs (ACPI 6.4, 20.2).

Each function returns encoded bytes; terms nest by concatenation.
"""

from __future__ import annotations

from _struct import pack


def name_string(path: str) -> bytes:
    """NameString: segments of four characters, parted by dots; a leading backslash is the root."""
    root = b"\\" if path.startswith("\\") else b""
    segments = [s.ljust(4, "_").encode() for s in path.removeprefix("\\").split(".")]
    if len(segments) == 1:
        return root + segments[0]
    if len(segments) == 2:
        return root + b"\x2e" + b"".join(segments)
    return root + b"\x2f" + bytes([len(segments)]) + b"".join(segments)


def package_length(body: bytes) -> bytes:
    """PkgLength and the body: the length counts itself."""
    for extra in range(4):
        length = len(body) + extra + 1
        if extra == 0 and length < 64:
            return bytes([length]) + body
        if extra and length < 1 << (4 + 8 * extra):
            rest = (length >> 4).to_bytes(extra, "little")
            return bytes([extra << 6 | length & 15]) + rest + body
    raise ValueError("AML package too long")


def integer(value: int) -> bytes:
    """The shortest integer constant."""
    if value in (0, 1):
        return bytes([value])
    for prefix, size in ((0x0A, 1), (0x0B, 2), (0x0C, 4), (0x0E, 8)):
        if value < 1 << (8 * size):
            return bytes([prefix]) + value.to_bytes(size, "little")
    raise ValueError("AML integer too large")


def string(text: str) -> bytes:
    """A string constant."""
    return b"\x0d" + text.encode("ascii") + b"\0"


def eisa_id(text: str) -> bytes:
    """EisaId("PNPxxxx") as a DWord constant (ACPI 6.4, 19.3.4)."""
    letters = [ord(c) - 0x40 for c in text[:3]]
    value = letters[0] << 26 | letters[1] << 21 | letters[2] << 16 | int(text[3:], 16)
    return b"\x0c" + value.to_bytes(4, "big")


def name(path: str, value: bytes) -> bytes:
    """Name (path, value)."""
    return b"\x08" + name_string(path) + value


def package(*elements: bytes) -> bytes:
    """Package () {…}."""
    return b"\x12" + package_length(bytes([len(elements)]) + b"".join(elements))


def scope(path: str, *terms: bytes) -> bytes:
    """Scope (path) {…}."""
    return b"\x10" + package_length(name_string(path) + b"".join(terms))


def device(path: str, *terms: bytes) -> bytes:
    """Device (path) {…}."""
    return b"\x5b\x82" + package_length(name_string(path) + b"".join(terms))


def method(path: str, arguments: int, serialized: bool, *terms: bytes) -> bytes:
    """Method (path, arguments, …) {…}."""
    flags = arguments | (8 if serialized else 0)
    return b"\x14" + package_length(name_string(path) + bytes([flags]) + b"".join(terms))


def memory_region(path: str, base: int, size: int) -> bytes:
    """OperationRegion (path, SystemMemory, base, size)."""
    return b"\x5b\x80" + name_string(path) + b"\x00" + integer(base) + integer(size)


def dword_field(region: str, field: str) -> bytes:
    """Field (region, DWordAcc, NoLock, WriteAsZeros) { field, 32 }."""
    unit = field.ljust(4, "_").encode() + b"\x20"  # 32 bits, PkgLength form
    return b"\x5b\x81" + package_length(name_string(region) + b"\x43" + unit)


def resources(*descriptors: bytes) -> bytes:
    """ResourceTemplate () {…}: a buffer that ends in an end tag."""
    body = b"".join(descriptors) + b"\x79\x00"
    return b"\x11" + package_length(integer(len(body)) + body)


def memory32(base: int, size: int) -> bytes:
    """Memory32Fixed (ReadWrite, base, size)."""
    return pack("<BHBII", 0x86, 9, 1, base, size)


def io_port(base: int, size: int) -> bytes:
    """IO (Decode16, base, base, 1, size)."""
    return pack("<BBHHBB", 0x47, 1, base, base, 1, size)


def edge_interrupt(gsi: int) -> bytes:
    """Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive) {gsi}."""
    return pack("<BHBBI", 0x89, 6, 0x03, 1, gsi)
