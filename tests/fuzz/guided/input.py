"""An input of a guided target, taken from its front; what it lacks is zero."""

from __future__ import annotations


class Input:
    """The bytes of an input, taken from the front."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __bool__(self) -> bool:
        return self._at < len(self._data)

    def bytes(self, count: int) -> bytes:
        part = self._data[self._at:self._at + count]
        self._at += count
        return part.ljust(count, b"\0")

    def number(self, size: int) -> int:
        return int.from_bytes(self.bytes(size), "little")
