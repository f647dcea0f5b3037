"""Which device answers an address: one instance for MMIO, one for ports.

Only accesses that C does not serve come here (native/core/machine.c).
"""

from __future__ import annotations

from _bisect import bisect_right

from vmm.errors import DeviceError

TYPE_CHECKING = False  # importing typing for it would cost 10 ms of the start
if TYPE_CHECKING:
    from typing import Protocol

    class Handler(Protocol):
        """What answers one range; `offset` is relative to its base, `size` 1, 2, 4 or 8."""

        def read(self, offset: int, size: int) -> int:
            """The value of `size` bytes, little-endian."""

        def write(self, offset: int, size: int, value: int) -> None:
            """Take `size` bytes."""

    class Access(Protocol):
        """Lookup by the vCPU threads."""

        def read(self, address: int, size: int) -> int:
            """The value that the guest reads."""

        def write(self, address: int, size: int, value: int) -> None:
            """Take what the guest wrote."""


class AddressSpace:
    """Disjoint ranges, each with a handler. Lookups take no lock: a change makes a new table."""

    __slots__ = ("_table",)

    def __init__(self) -> None:
        # Sorted bases, and as many (base, size, handler).
        self._table: tuple[list[int], list[tuple[int, int, Handler]]] = ([], [])

    def add(self, base: int, size: int, handler: Handler) -> None:
        """Let `handler` answer [base, base + size).

        :raises DeviceError: the range is empty or overlaps another.
        """
        entries = self._table[1]
        if size <= 0 or base < 0:
            raise DeviceError(f"Address range {base:#x} + {size:#x} is empty", "check its size")
        for other, length, _ in entries:
            if base < other + length and other < base + size:
                raise DeviceError(f"Address range {base:#x} + {size:#x} overlaps "
                                  f"{other:#x} + {length:#x}", "move one of the devices")
        self._set([*entries, (base, size, handler)])

    def remove(self, base: int) -> None:
        """Forget the range that starts at `base`; unknown ones are ignored."""
        self._set([entry for entry in self._table[1] if entry[0] != base])

    def _set(self, entries: list[tuple[int, int, Handler]]) -> None:
        entries.sort(key=lambda entry: entry[0])
        self._table = ([entry[0] for entry in entries], entries)

    def read(self, address: int, size: int) -> int:
        """The handler's answer; all ones where there is none, or not for the whole access."""
        bases, entries = self._table
        index = bisect_right(bases, address) - 1
        if index >= 0:
            base, length, handler = entries[index]
            if address + size <= base + length:
                return handler.read(address - base, size)
        return (1 << 8 * size) - 1

    def write(self, address: int, size: int, value: int) -> None:
        """Give the value to the handler; lost where there is none, or not for all of it."""
        bases, entries = self._table
        index = bisect_right(bases, address) - 1
        if index >= 0:
            base, length, handler = entries[index]
            if address + size <= base + length:
                handler.write(address - base, size, value)
