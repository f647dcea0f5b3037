"""The region table: which guest addresses are RAM, and where they lie in a file descriptor.

The core makes one table from its guest memory, a worker makes one from the messages that it
receives; both check every address against it before use.  Sizes and addresses are bytes.
"""

from __future__ import annotations

from shared.errors import RegionError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

ADDRESS_LIMIT = 1 << 64


class MemoryRegion:
    """One contiguous range of guest RAM.

    guest_addr: guest-physical address; size: bytes, never 0; user_addr: the front end's own
    address of it (vhost-user names rings by user addresses); file_offset: where it starts in
    the file descriptor that holds it.
    """

    __slots__ = ("file_offset", "guest_addr", "size", "user_addr")

    def __init__(self, guest_addr: int, size: int, user_addr: int, file_offset: int) -> None:
        self.guest_addr = guest_addr
        self.size = size
        self.user_addr = user_addr
        self.file_offset = file_offset

    def __repr__(self) -> str:
        return (f"MemoryRegion(guest_addr={self.guest_addr:#x}, size={self.size:#x}, "
                f"user_addr={self.user_addr:#x}, file_offset={self.file_offset:#x})")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, MemoryRegion):
            return NotImplemented
        return (self.guest_addr, self.size, self.user_addr, self.file_offset) == (
            other.guest_addr, other.size, other.user_addr, other.file_offset)

    def __hash__(self) -> int:
        return hash((self.guest_addr, self.size, self.user_addr, self.file_offset))

    def check(self) -> None:
        """:raises RegionError: the region is empty or one of its ranges passes 2^64."""
        if self.size <= 0:
            raise RegionError(f"Memory region at {self.guest_addr:#x} is empty",
                              "its size must be positive")
        for name, start in (("guest address", self.guest_addr), ("user address", self.user_addr),
                            ("file offset", self.file_offset)):
            if start < 0 or start + self.size > ADDRESS_LIMIT:
                raise RegionError(f"Memory region {name} {start:#x} + {self.size:#x} wraps around",
                                  "the range must end below 2^64")


class RegionTable:
    """Regions sorted by guest address, none overlapping another in guest or user addresses.

    :raises RegionError: from every method that is given something that does not hold.
    """

    __slots__ = ("regions",)

    def __init__(self, regions: Iterable[MemoryRegion] = ()) -> None:
        self.regions: list[MemoryRegion] = []
        for region in regions:
            self.add(region)

    def add(self, region: MemoryRegion) -> None:
        """Insert a region that overlaps no other."""
        region.check()
        for other in self.regions:
            for name, mine, theirs in (("guest", region.guest_addr, other.guest_addr),
                                       ("user", region.user_addr, other.user_addr)):
                if mine < theirs + other.size and theirs < mine + region.size:
                    raise RegionError(
                        f"Memory region at {name} address {mine:#x} (size {region.size:#x}) "
                        f"overlaps the one at {theirs:#x} (size {other.size:#x})",
                        "regions must be disjoint")
        self.regions.append(region)
        self.regions.sort(key=_by_guest_addr)

    def remove(self, guest_addr: int, size: int, user_addr: int) -> MemoryRegion:
        """Remove and return the region with exactly these values."""
        for index, region in enumerate(self.regions):
            if (region.guest_addr, region.size, region.user_addr) == (guest_addr, size, user_addr):
                return self.regions.pop(index)
        raise RegionError(f"No memory region at {guest_addr:#x} with size {size:#x} and user "
                          f"address {user_addr:#x}", "remove a region exactly as it was added")

    def translate(self, guest_addr: int, size: int) -> tuple[MemoryRegion, int]:
        """The region that holds all of [guest_addr, guest_addr + size), and the offset in it."""
        if size >= 0:
            for region in self.regions:
                offset = guest_addr - region.guest_addr
                if offset >= 0 and offset + size <= region.size and offset < region.size:
                    return region, offset
        raise RegionError(f"Guest address {guest_addr:#x} (size {size:#x}) is outside RAM",
                          "the whole range must lie in one region")

    def translate_user(self, user_addr: int, size: int) -> tuple[MemoryRegion, int]:
        """As `translate`, for an address of the front end's own address space."""
        if size >= 0:
            for region in self.regions:
                offset = user_addr - region.user_addr
                if offset >= 0 and offset + size <= region.size and offset < region.size:
                    return region, offset
        raise RegionError(f"User address {user_addr:#x} (size {size:#x}) is outside RAM",
                          "the whole range must lie in one region")

    def to_user(self, guest_addr: int, size: int) -> int:
        """The front end's user address of a guest range."""
        region, offset = self.translate(guest_addr, size)
        return region.user_addr + offset


def _by_guest_addr(region: MemoryRegion) -> int:
    return region.guest_addr
