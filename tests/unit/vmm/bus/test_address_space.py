"""Which device answers an address."""

from __future__ import annotations

import pytest

from vmm.bus.address_space import AddressSpace
from vmm.errors import DeviceError


class Recorder:
    def __init__(self, answer: int = 0) -> None:
        self.answer = answer
        self.reads: list[tuple[int, int]] = []
        self.writes: list[tuple[int, int, int]] = []

    def read(self, offset: int, size: int) -> int:
        self.reads.append((offset, size))
        return self.answer

    def write(self, offset: int, size: int, value: int) -> None:
        self.writes.append((offset, size, value))


def test_handlers_get_offsets() -> None:
    space, low, high = AddressSpace(), Recorder(1), Recorder(2)
    space.add(0x2000, 0x100, high)
    space.add(0x1000, 0x200, low)
    assert space.read(0x11FC, 4) == 1
    assert space.read(0x2000, 1) == 2
    space.write(0x20FF, 1, 7)
    assert low.reads == [(0x1FC, 4)]
    assert high.writes == [(0xFF, 1, 7)]


@pytest.mark.parametrize(("size", "ones"), [(1, 0xFF), (2, 0xFFFF), (4, 0xFFFFFFFF),
                                            (8, 0xFFFFFFFFFFFFFFFF)])
def test_nobody_reads_all_ones(size: int, ones: int) -> None:
    space = AddressSpace()
    assert space.read(0, size) == ones
    space.add(0x1000, 0x10, Recorder())
    assert space.read(0xFFF, size) == ones
    assert space.read(0x1010, size) == ones
    space.write(0x1010, size, 0)


def test_an_access_across_the_end_reaches_nobody() -> None:
    space, device = AddressSpace(), Recorder()
    space.add(0x1000, 0x10, device)
    assert space.read(0x100C, 8) == 0xFFFFFFFFFFFFFFFF
    space.write(0x100F, 2, 0)
    assert device.reads == [] and device.writes == []


@pytest.mark.parametrize(("base", "size"), [(0x1000, 0x10), (0xFFF, 2), (0x100F, 1), (0, 0x10000),
                                            (0x1004, 4)])
def test_overlaps_are_refused(base: int, size: int) -> None:
    space = AddressSpace()
    space.add(0x1000, 0x10, Recorder())
    with pytest.raises(DeviceError, match="overlaps 0x1000"):
        space.add(base, size, Recorder())
    assert space.read(0x1000, 4) == 0


@pytest.mark.parametrize(("base", "size"), [(0, 0), (0, -1), (-1, 2)])
def test_empty_ranges_are_refused(base: int, size: int) -> None:
    with pytest.raises(DeviceError):
        AddressSpace().add(base, size, Recorder())


def test_neighbours_and_removal() -> None:
    space = AddressSpace()
    space.add(0x1000, 0x10, Recorder(1))
    space.add(0x1010, 0x10, Recorder(2))
    assert (space.read(0x100F, 1), space.read(0x1010, 1)) == (1, 2)
    space.remove(0x1000)
    space.remove(0x5000)
    assert space.read(0x100F, 1) == 0xFF
    space.add(0x1000, 0x10, Recorder(3))
    assert space.read(0x1000, 1) == 3
