"""The region table: what it accepts, what lies in it."""

from __future__ import annotations

import pytest

from shared.errors import RegionError
from shared.memory_regions import MemoryRegion, RegionTable

LOW = MemoryRegion(0x1000, 0x2000, 0x7000_0000, 0)
HIGH = MemoryRegion(0x1_0000_0000, 0x1000, 0x8000_0000, 0x2000)


def table() -> RegionTable:
    return RegionTable([HIGH, LOW])


def test_regions_are_sorted_by_guest_address() -> None:
    assert table().regions == [LOW, HIGH]


@pytest.mark.parametrize(("address", "size", "region", "offset"), [
    (0x1000, 1, LOW, 0),
    (0x1000, 0x2000, LOW, 0),
    (0x2FFF, 1, LOW, 0x1FFF),
    (0x1_0000_0800, 0x800, HIGH, 0x800),
    (0x1000, 0, LOW, 0),
])
def test_translate_inside(address: int, size: int, region: MemoryRegion, offset: int) -> None:
    assert table().translate(address, size) == (region, offset)


@pytest.mark.parametrize(("address", "size"), [
    (0xFFF, 1), (0xFFF, 2), (0x3000, 1), (0x3000, 0), (0x2FFF, 2), (0x1000, 0x2001),
    (0x1000, -1), (-1, 1), (0x1_0000_0FFF, 2), (1 << 64, 1), (0x1000, 1 << 64),
])
def test_translate_outside(address: int, size: int) -> None:
    with pytest.raises(RegionError, match="outside RAM"):
        table().translate(address, size)


def test_translate_user_and_back() -> None:
    assert table().translate_user(0x7000_0010, 4) == (LOW, 0x10)
    assert table().to_user(0x1010, 4) == 0x7000_0010
    with pytest.raises(RegionError, match="outside RAM"):
        table().translate_user(0x7000_1FFF, 2)
    with pytest.raises(RegionError):
        table().translate_user(0x7000_0000, -1)


@pytest.mark.parametrize("region", [
    MemoryRegion(0, 0, 0, 0),
    MemoryRegion(0, -1, 0, 0),
    MemoryRegion((1 << 64) - 0x1000, 0x1001, 0, 0),
    MemoryRegion(0, 0x1001, (1 << 64) - 0x1000, 0),
    MemoryRegion(0, 0x1001, 0, (1 << 64) - 0x1000),
    MemoryRegion(-1, 0x1000, 0, 0),
])
def test_a_region_that_does_not_hold(region: MemoryRegion) -> None:
    with pytest.raises(RegionError):
        RegionTable([region])


@pytest.mark.parametrize("region", [
    MemoryRegion(0x2FFF, 1, 0x100, 0),            # last byte of LOW, guest
    MemoryRegion(0, 0x1001, 0x100, 0),            # first byte of LOW, guest
    MemoryRegion(0x9000, 0x1000, 0x7000_1000, 0),  # inside LOW, user
])
def test_overlap_is_refused(region: MemoryRegion) -> None:
    regions = table()
    with pytest.raises(RegionError, match="overlaps"):
        regions.add(region)
    assert regions.regions == [LOW, HIGH]


def test_remove_needs_the_exact_region() -> None:
    regions = table()
    for guest_addr, size, user_addr in ((0x1001, 0x2000, 0x7000_0000), (0x1000, 1, 0x7000_0000),
                                        (0x1000, 0x2000, 0x7000_0001)):
        with pytest.raises(RegionError):
            regions.remove(guest_addr, size, user_addr)
    assert regions.remove(0x1000, 0x2000, 0x7000_0000) is LOW
    assert regions.regions == [HIGH]
