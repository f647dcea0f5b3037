"""MAC addresses: the user's, or ones that no other NIC of this host should have."""

from __future__ import annotations

import posix as os

# Locally administered, and what QEMU's and StratoVirt's users know virtual NICs by.
_PREFIX = b"\x52\x54\x00"
_HEX = "0123456789abcdefABCDEF"
_FNV_PRIME, _FNV_OFFSET = 0x100000001B3, 0xCBF29CE484222325


def parse_mac(text: str) -> bytes | None:
    """Six bytes of `52:54:00:12:34:56`; None if it is none that a NIC can have."""
    parts = text.split(":")
    if len(parts) != 6 or any(len(part) != 2 or part.strip(_HEX) for part in parts):
        return None
    mac = bytes(int(part, 16) for part in parts)
    return None if mac[0] & 1 or mac == bytes(6) else mac


def format_mac(mac: bytes) -> str:
    """The way people write it."""
    return ":".join(f"{byte:02x}" for byte in mac)


class MacSource:
    """Addresses for NICs that were given none.

    A VM with a UUID has the same ones each time it starts; else they are random.  StratoVirt
    counts from 52:54:00:12:34:56 in each VM, so that two VMs on one bridge collide.

    :param uuid: "" if the VM has none.
    """

    def __init__(self, uuid: str) -> None:
        value = _FNV_OFFSET
        for byte in uuid.encode() or os.urandom(16):
            value = (value ^ byte) * _FNV_PRIME & 0xFFFF_FFFF_FFFF_FFFF
        self._next = (value ^ value >> 24 ^ value >> 48) & 0xFFFFFF
        self._used: set[bytes] = set()

    def reserve(self, mac: bytes) -> None:
        """The user has chosen this one."""
        self._used.add(mac)

    def take(self) -> bytes:
        """One that this VM doesn't use yet."""
        while True:
            mac = _PREFIX + self._next.to_bytes(3, "big")
            self._next = (self._next + 1) & 0xFFFFFF
            if mac not in self._used:
                self._used.add(mac)
                return mac
