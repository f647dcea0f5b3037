"""Guest RAM becomes huge pages where it is used (native/core/huge.c)."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from native._core import ffi, lib
from tests.support.capabilities import require
from tests.support.test_vm import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.native

MIB = 1 << 20
HUGE = 2 * MIB
SIZE = 64 * MIB
EXTENTS = SIZE // HUGE
CONFINED = "SV_NATIVE" not in os.environ  # else the sanitizers' calls are refused as well
MADV_NOHUGEPAGE = 15
ENOUGH = 64  # pages that a guest must have taken for a look at it


class Ram:
    """A memfd, mapped as guest RAM is, and its thread."""

    def __init__(self, size: int = SIZE) -> None:
        self.fd = lib.sv_memory_memfd(b"huge-test", size, 0)
        assert self.fd >= 0
        self.mapping = ffi.new("struct sv_mapping *")
        assert lib.sv_memory_map(self.fd, size, 4096, True, self.mapping) == 0
        self.size = size
        self.bytes = ffi.buffer(ffi.cast("char *", self.mapping.address), size)
        self.huge: Any = ffi.NULL

    def start(self, *ahead: tuple[int, int, bool], least: int = 0) -> None:
        out = ffi.new("struct sv_huge **")
        assert lib.sv_huge_start(self.fd, self.mapping, least, ffi.new("struct sv_ahead[]", ahead),
                                 len(ahead), True, CONFINED, out) == 0
        self.huge = out[0]

    def touch(self, *extents: int, pages: int = ENOUGH) -> None:
        """Use the first `pages` pages of each extent."""
        for extent in extents:
            self.bytes[extent * HUGE:extent * HUGE + pages * 4096] = bytes([extent]) * pages * 4096

    def give_back(self, offset: int, length: int) -> None:
        with mmap.mmap(self.fd, self.size) as view:
            view.madvise(mmap.MADV_REMOVE, offset, length)

    def present(self) -> list[int]:
        """KiB that are there, of each extent."""
        found = [0] * (self.size // HUGE)
        at = 0
        while True:
            try:
                at = os.lseek(self.fd, at, os.SEEK_DATA)
            except OSError as error:
                assert error.errno == errno.ENXIO
                return found
            end = os.lseek(self.fd, at, os.SEEK_HOLE)
            while at < end:
                upto = min(end, (at // HUGE + 1) * HUGE)
                found[at // HUGE] += (upto - at) // 1024
                at = upto

    def whole(self) -> list[int]:
        """Numbers of the extents that are there as a whole."""
        return [number for number, kib in enumerate(self.present()) if kib == HUGE // 1024]

    def huge_kib(self) -> int:
        text = Path("/proc/self/smaps").read_text()
        found = re.search(r"ShmemPmdMapped: +(\d+) kB",
                          text[text.index(f"\n{self.mapping.address:x}-"):])
        assert found
        return int(found[1])

    def wait_whole(self, *extents: int) -> None:
        wait_until(lambda: self.whole() == sorted(extents), f"extents {extents}")

    def is_calm(self) -> bool:
        """Whether nothing came to be there for a while."""
        before = lib.sv_huge_made(self.huge)
        time.sleep(0.1)  # several looks of its
        return bool(lib.sv_huge_made(self.huge) == before)

    def close(self) -> None:
        lib.sv_huge_stop(self.huge)
        self.huge = ffi.NULL
        lib.sv_memory_unmap(self.mapping)
        os.close(self.fd)


@pytest.fixture
def ram() -> Iterator[Ram]:
    require("huge_memfd")
    made = Ram()
    yield made
    made.close()


def test_the_end_does_not_wait_for_a_whole_scan() -> None:
    """Which takes seconds in a large guest, and `quit` would take as long."""
    require("huge_memfd")
    for _ in range(50):  # a scan may be over before we are told that it has begun
        ram = Ram()
        try:
            ram.touch(*range(EXTENTS))
            ram.start()
            while not lib.sv_huge_made(ram.huge):
                os.sched_yield()
            lib.sv_huge_stop(ram.huge)
            ram.huge = ffi.NULL
            if len(ram.whole()) < EXTENTS:
                return
        finally:
            ram.close()
    pytest.fail("every scan came to its end")


def test_an_extent_that_can_not_become_huge_ends_nothing(ram: Ram) -> None:
    """The kernel says EINVAL of it, as of pages that are given back meanwhile."""
    libc = ctypes.CDLL(None, use_errno=True)
    place = ctypes.c_void_p(ram.mapping.address + 3 * HUGE)
    assert libc.madvise(place, ctypes.c_size_t(HUGE), MADV_NOHUGEPAGE) == 0
    ram.start()
    ram.touch(1)
    ram.wait_whole(1)
    ram.touch(3, 5, EXTENTS - 1)
    ram.wait_whole(1, 5, EXTENTS - 1)


def test_what_is_used_becomes_huge(ram: Ram) -> None:
    ram.start()
    ram.touch(1, 5, EXTENTS - 1)
    ram.wait_whole(1, 5, EXTENTS - 1)
    assert ram.huge_kib() == 3 * HUGE // 1024
    wait_until(lambda: lib.sv_huge_made(ram.huge) == 3, "the count")
    for extent in (1, 5):
        used = ENOUGH * 4096
        assert ram.bytes[extent * HUGE:extent * HUGE + used] == bytes([extent]) * used
        assert not any(ram.bytes[extent * HUGE + used:(extent + 1) * HUGE])


def test_what_another_process_used_becomes_huge_too(ram: Ram) -> None:
    """A worker wrote there first: this process has not mapped it yet."""
    ram.start()
    os.pwrite(ram.fd, b"#" * ENOUGH * 4096, 7 * HUGE + 4096)
    ram.wait_whole(7)
    assert ram.bytes[7 * HUGE + 4096:7 * HUGE + 4097] == b"#"


def test_a_guest_that_uses_little_keeps_small_pages(ram: Ram) -> None:
    ram.start((9 * HUGE, 2, False), least=8 * ENOUGH * 4096)
    ram.touch(1, 2, 3)
    time.sleep(0.1)  # several looks
    assert ram.present()[1:4] == [ENOUGH * 4] * 3 and lib.sv_huge_made(ram.huge) == 0
    ram.touch(4, 5, 6, 7, 8)
    ram.wait_whole(*range(1, 11))


def test_who_gives_memory_back_gets_none_in_advance() -> None:
    """What was given back is not taken again because it looks as if it had never been used."""
    require("huge_memfd")
    ram = Ram(1 << 30)
    try:
        ram.touch(1, 2, 3, 4)
        ram.start((HUGE, 500, False), least=2 * ENOUGH * 4096)
        while lib.sv_huge_made(ram.huge) == 0:
            pass  # to sleep would give it time to be through
        ram.give_back(HUGE, 200 * HUGE)
        wait_until(ram.is_calm, "the thread pauses")
        # One that it was at may come back.
        assert len(ram.whole()) <= 1 and lib.sv_huge_made(ram.huge) < 200
    finally:
        ram.close()


def test_what_it_will_use_is_there_before(ram: Ram) -> None:
    """Upwards and downwards, up to both ends of RAM; what is in use waits for a calm moment."""
    ram.touch(8)
    ram.start((8 * HUGE, 3, False), ((EXTENTS - 2) * HUGE, 99, False), (HUGE + 5, 99, True),
              (1 << 60, 4, True))
    ram.wait_whole(0, 1, 8, 9, 10, EXTENTS - 2, EXTENTS - 1)
    wait_until(lambda: lib.sv_huge_made(ram.huge) == 7, "the count")


def test_nothing_happens_while_it_is_held(ram: Ram) -> None:
    ram.start()
    lib.sv_huge_hold(ram.huge, True)
    ram.touch(1, 2)
    time.sleep(0.1)  # several looks
    assert ram.whole() == []
    lib.sv_huge_hold(ram.huge, False)
    ram.wait_whole(1, 2)


def test_what_was_given_back_and_is_used_again_becomes_huge_again(ram: Ram) -> None:
    ram.start()
    ram.touch(1, 2)
    ram.wait_whole(1, 2)
    ram.give_back(HUGE, HUGE)
    assert ram.whole() == [2]
    ram.touch(3)
    ram.wait_whole(2, 3)
    ram.touch(1)
    ram.wait_whole(1, 2, 3)


def test_what_was_given_back_in_part_is_not_taken_again(ram: Ram) -> None:
    ram.start()
    ram.touch(1, 2)
    ram.wait_whole(1, 2)
    ram.give_back(HUGE, HUGE // 2)
    ram.touch(3)
    wait_until(lambda: 3 in ram.whole(), "the next one")
    ram.touch(4)
    wait_until(lambda: 4 in ram.whole(), "one more")
    assert ram.whole() == [2, 3, 4] and ram.present()[1] == HUGE // 2048


def test_what_a_device_is_using_waits(ram: Ram) -> None:
    """Pages in a pipe stand for those of a direct write."""
    libc = ctypes.CDLL(None, use_errno=True)
    ends = os.pipe()
    ram.touch(1)
    vector = (ctypes.c_size_t * 2)(ram.mapping.address + HUGE, 4096)
    assert libc.vmsplice(ends[1], vector, ctypes.c_size_t(1), 0) == 4096
    ram.start()
    ram.touch(2)
    ram.wait_whole(2)
    assert ram.present()[1] == ENOUGH * 4
    assert os.read(ends[0], 4096) == b"\1" * 4096
    ram.wait_whole(1, 2)  # nothing else need happen
    for end in ends:
        os.close(end)


def test_it_ends_at_once(ram: Ram) -> None:
    ram.start()
    ram.touch(1)
    ram.wait_whole(1)
    began = time.monotonic()
    lib.sv_huge_stop(ram.huge)
    ram.huge = ffi.NULL
    assert time.monotonic() - began < 0.9  # not after its next look
    lib.sv_huge_stop(ffi.NULL)


def test_too_many_places_are_refused(ram: Ram) -> None:
    count = int(lib.SV_MAX_AHEAD) + 1
    assert lib.sv_huge_start(ram.fd, ram.mapping, 0, ffi.new("struct sv_ahead[]", count), count,
                             True, True, ffi.new("struct sv_huge **")) == -errno.EINVAL


def test_ram_of_less_than_a_huge_page(ram: Ram) -> None:
    small = Ram(HUGE // 2)
    small.start((0, 3, False), ((HUGE // 2) - 1, 3, True))
    small.bytes[0:4096 * ENOUGH] = b"x" * 4096 * ENOUGH
    ram.start()
    ram.touch(1)
    ram.wait_whole(1)  # the other has looked by then
    assert os.fstat(small.fd).st_blocks * 512 == 4096 * ENOUGH
    small.close()


@pytest.mark.parametrize("threads", [1, 3])
def test_what_is_populated_is_huge(ram: Ram, threads: int) -> None:
    ram.touch(3)
    assert lib.sv_memory_populate(ram.mapping, 4096, threads) == 0
    assert ram.whole() == list(range(EXTENTS))
    if lib.sv_huge_is_wanted():
        assert ram.huge_kib() == SIZE // 1024
    assert ram.bytes[3 * HUGE:3 * HUGE + 1] == b"\3"
