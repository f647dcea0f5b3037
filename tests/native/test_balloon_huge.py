"""A balloon over huge pages: the host takes whole ones only."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shared.virtio import balloon
from tests.support.balloon_plane import BASE, DEFLATE, INFLATE, PAGE, REPORTING, BalloonPlane
from tests.support.capabilities import require
from tests.support.ring_plane import lib

pytestmark = pytest.mark.native

HUGE = 2 << 20
PER_HUGE = HUGE // PAGE
COUNT = 4
ADDRESS = 0x40000000
FIRST = ADDRESS // PAGE
FOLDER = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
TOLD = BASE | balloon.F_MUST_TELL_HOST

Make = Callable[..., BalloonPlane]


@pytest.fixture
def fd() -> Iterator[int]:
    """COUNT huge pages."""
    require("root")
    require("hugepages")
    number = FOLDER / "nr_hugepages"
    before = int(number.read_text())
    number.write_text(str(before + COUNT))
    try:
        if int((FOLDER / "free_hugepages").read_text()) < COUNT:
            Path("/proc/sys/vm/drop_caches").write_text("1")
            Path("/proc/sys/vm/compact_memory").write_text("1")
            number.write_text(str(before + COUNT))
        if int((FOLDER / "free_hugepages").read_text()) < COUNT:
            pytest.skip("memory is too fragmented for huge pages")
        fd = os.memfd_create("huge", os.MFD_CLOEXEC | os.MFD_HUGETLB | os.MFD_HUGE_2MB)
        os.ftruncate(fd, COUNT * HUGE)
        yield fd
        os.close(fd)
    finally:
        number.write_text(str(before))


@pytest.fixture
def make(fd: int) -> Iterator[Make]:
    planes: list[BalloonPlane] = []

    def build(features: int = TOLD, size: int = COUNT * HUGE, offset: int = 0,
              address: int = ADDRESS) -> BalloonPlane:
        planes.append(BalloonPlane(features))
        planes[-1].check(lib.sv_ring_add_region(planes[-1].device, address, size, offset, fd))
        for index in (INFLATE, DEFLATE, REPORTING):
            planes[-1].start(index)
        return planes[-1]

    yield build
    for plane in planes:
        plane.close()


def removed(plane: BalloonPlane) -> int:
    """Huge pages that went back."""
    assert plane.count("failed_bytes") == 0
    assert plane.count("removed_bytes") % HUGE == 0
    return plane.count("removed_bytes") // HUGE


def pages(huge: int, first: int = 0, end: int = PER_HUGE) -> list[int]:
    return [FIRST + huge * PER_HUGE + i for i in range(first, end)]


def test_a_huge_page_goes_when_all_of_it_is_in_the_balloon(make: Make, fd: int) -> None:
    plane = make()
    free = int((FOLDER / "free_hugepages").read_text())
    plane.pfns(INFLATE, pages(1, 0, 300))
    plane.pfns(INFLATE, pages(1, 301))
    plane.pfns(INFLATE, pages(2))
    assert removed(plane) == 1
    plane.pfns(INFLATE, pages(1, 0, 300))  # named again: nothing new
    assert removed(plane) == 1
    plane.pfns(INFLATE, pages(1, 300, 301))
    assert removed(plane) == 2
    assert plane.count("inflated_pages") == 2 * PER_HUGE + 300
    assert int((FOLDER / "free_hugepages").read_text()) >= free


def test_one_page_that_is_used_keeps_it(make: Make) -> None:
    plane = make()
    plane.pfns(INFLATE, pages(0, 0, 511))
    plane.pfns(DEFLATE, pages(0, 5, 6))
    plane.pfns(INFLATE, pages(0, 511))
    assert removed(plane) == 0
    plane.pfns(INFLATE, pages(0, 5, 6))
    assert removed(plane) == 1
    plane.pfns(DEFLATE, pages(0))
    plane.pfns(DEFLATE, pages(0))
    plane.pfns(INFLATE, pages(0))
    assert removed(plane) == 2


def test_pages_of_several_huge_ones_at_once(make: Make) -> None:
    plane = make()
    plane.pfns(INFLATE, pages(0, 256) + pages(1) + pages(2) + pages(3, 0, 256))
    assert removed(plane) == 2


def test_a_driver_that_does_not_tell_keeps_all(make: Make) -> None:
    """It may use a page again before it says so: no huge page is ever surely unused."""
    plane = make(BASE)
    plane.pfns(INFLATE, pages(0) + pages(1))
    assert removed(plane) == 0
    assert plane.count("inflated_pages") == 2 * PER_HUGE


def test_a_reset_empties_the_balloon(make: Make) -> None:
    plane = make()
    plane.pfns(INFLATE, pages(0, 0, 511))
    rings = [(index, plane.rings[index], plane.stop(index)) for index in
             (INFLATE, DEFLATE, REPORTING)]
    plane.check(lib.sv_ring_reset(plane.device))
    plane.check(lib.sv_ring_set_features(plane.device, TOLD))
    for index, ring, base in rings:
        plane.start(index, ring=ring, base=base)
    plane.pfns(INFLATE, pages(0, 511))
    assert removed(plane) == 0
    plane.pfns(INFLATE, pages(0))
    assert removed(plane) == 1


def test_a_part_of_a_huge_page_never_goes(make: Make) -> None:
    """A region that begins or ends within one."""
    plane = make(size=2 * HUGE, offset=HUGE // 2, address=ADDRESS + HUGE // 2)
    plane.pfns(INFLATE, pages(0) + pages(1) + pages(2))
    assert removed(plane) == 1
    assert plane.count("inflated_pages") == 2 * PER_HUGE
    assert plane.count("refused_pages") == PER_HUGE
    plane.buffers(REPORTING, [(ADDRESS + HUGE // 2, 2 * HUGE, True)])
    assert removed(plane) == 2


def test_of_reported_ranges_whole_ones_go(make: Make) -> None:
    """Without anybody's word: a report is of what is free right now."""
    plane = make(BASE)
    plane.buffers(REPORTING, [(ADDRESS, HUGE - PAGE, True)])
    assert removed(plane) == 0
    plane.buffers(REPORTING, [(ADDRESS + PAGE, 2 * HUGE, True)])
    assert removed(plane) == 1
    plane.buffers(REPORTING, [(ADDRESS, 4 * HUGE, True)])
    assert removed(plane) == 5


def test_content_of_the_neighbours_stays(make: Make, fd: int) -> None:
    plane = make()
    with mmap.mmap(fd, COUNT * HUGE) as mapping:
        mapping[:] = b"x" * COUNT * HUGE
        plane.pfns(INFLATE, pages(0, 0, 100) + pages(1) + pages(2, 0, 511))
        plane.buffers(REPORTING, [(ADDRESS + 3 * HUGE, PAGE, True)])
        assert mapping[:HUGE] == b"x" * HUGE
        assert mapping[HUGE:2 * HUGE] == bytes(HUGE)
        assert mapping[2 * HUGE:] == b"x" * 2 * HUGE
