"""Guest RAM on hugetlbfs (-mem-path): reserved pages, loading without write(), clear errors."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import tiny_guest as asm
from tests.support.capabilities import require
from vmm.config.model import MemoryConfig
from vmm.errors import ConfigError
from vmm.memory import GuestMemory

pytestmark = pytest.mark.vm

MIB = 1 << 20
PAGE = 2 * MIB
WANTED = 4
COUNT = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
FREE = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A hugetlbfs with at least WANTED free pages."""
    require("root")
    require("hugepages")
    before = int(COUNT.read_text())
    COUNT.write_text(str(before + WANTED))
    target = tmp_path / "huge"
    target.mkdir()
    subprocess.run(["mount", "-t", "hugetlbfs", "-o", "pagesize=2M", "none", str(target)],
                   check=True)
    try:
        if int(FREE.read_text()) < WANTED:
            pytest.skip("memory is too fragmented for huge pages")
        yield target
    finally:
        subprocess.run(["umount", str(target)], check=True)
        COUNT.write_text(str(before))


def config(size: int, path: Path) -> MemoryConfig:
    made = MemoryConfig()
    made.size, made.path = size, str(path)
    return made


def test_ram_on_huge_pages(folder: Path, tmp_path: Path) -> None:
    memory = GuestMemory(config(WANTED * PAGE, folder))
    try:
        assert memory.page_size == PAGE
        assert memory.regions[0].user_addr % PAGE == 0
        assert list(folder.iterdir()) == []
        data = os.urandom(3 * MIB)
        (tmp_path / "kernel").write_bytes(data)
        with (tmp_path / "kernel").open("rb") as file:
            memory.start_load([(0x1234, file.fileno(), 5, len(data) - 5, 3)]).wait()
        assert memory.read(0x1234, len(data) - 5) == data[5:]
    finally:
        memory.close()


def test_prealloc_takes_the_pages(folder: Path) -> None:
    free = int(FREE.read_text())
    memory = GuestMemory(config(2 * PAGE, folder))
    try:
        memory.populate()
        assert int(FREE.read_text()) == free - 2
    finally:
        memory.close()


def test_too_few_pages_and_odd_sizes_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="reserve more huge pages"):
        GuestMemory(config(4096 * PAGE, folder))
    with pytest.raises(ConfigError, match="multiple of the huge page size, 2097152"):
        GuestMemory(config(3 * MIB, folder / "ram"))
    assert list(folder.iterdir()) == []


def test_a_memfd_of_huge_pages(folder: Path) -> None:
    """`-object memory-backend-memfd,hugetlb=on`: sealed as any other."""
    made = MemoryConfig()
    made.size, made.huge_page_size = 2 * PAGE, PAGE
    free = int(FREE.read_text())
    memory = GuestMemory(made)
    try:
        memory.populate()
        assert memory.page_size == PAGE
        assert int(FREE.read_text()) == free - 2
        memory.write(PAGE - 2, b"data")
        assert memory.read(PAGE - 2, 4) == b"data"
        with pytest.raises(PermissionError):
            os.ftruncate(memory.fd, PAGE)
    finally:
        memory.close()
    made.size = 3 * MIB
    with pytest.raises(ConfigError, match="multiple of the huge page size, 2097152"):
        GuestMemory(made)
    made.size = made.huge_page_size = 8 * MIB
    with pytest.raises(ConfigError, match="no huge pages of"):
        GuestMemory(made)


def test_a_guest_runs_on_huge_pages(folder: Path) -> None:
    require("kvm")
    guest = asm.TinyGuest(asm.mov_eax(0x11223344), asm.STORE_EAX, asm.word(0x3FFFFC),
                          asm.RESET_PULSE, path=str(folder))
    try:
        guest.wait_end()
        assert guest.memory.read(0x3FFFFC, 4) == asm.word(0x11223344)
        assert guest.memory.page_size == PAGE
    finally:
        guest.close()
