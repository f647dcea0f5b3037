"""The host's view of the bare-metal guest (tests/guest): its images, its data pattern."""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING

from tests.guest.build import guest

if TYPE_CHECKING:
    from pathlib import Path

SECTOR = 512
_MASK = (1 << 64) - 1

__all__ = ["SECTOR", "crc32", "guest", "pattern"]


def pattern(sector: int, count: int, seed: int) -> bytes:
    """What `blk.write DISK sector count seed` writes (see tests/guest/user.c)."""
    words = []
    salt = seed * 0xBF58476D1CE4E5B9 & _MASK
    for index in range(sector * 64, (sector + count) * 64):
        value = (index + 1) * 0x9E3779B97F4A7C15 & _MASK ^ salt
        value ^= value >> 29
        words.append(value * 0x94D049BB133111EB & _MASK)
    return struct.pack(f"<{len(words)}Q", *words)


def crc32(path: Path, sector: int, count: int) -> int:
    """What `blk.read DISK sector count` answers."""
    with path.open("rb") as file:
        file.seek(sector * SECTOR)
        return zlib.crc32(file.read(count * SECTOR))
