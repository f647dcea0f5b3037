"""Guest RAM: seals, files, bounds, loading."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vmm.config.model import MemoryConfig
from vmm.errors import ConfigError, MemoryAccessError
from vmm.memory import GAP_END, GuestMemory

MIB = 1 << 20
F_GET_SEALS = 1034
SHRINK_GROW_SEAL = 1 | 2 | 4

Make = Callable[..., GuestMemory]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[GuestMemory] = []

    def build(size: int = 4 * MIB, path: str | None = None, prealloc: bool = False,
              **options: int) -> GuestMemory:
        config = MemoryConfig()
        config.size, config.path, config.prealloc = size, path, prealloc
        made.append(GuestMemory(config, **options))
        return made[-1]

    yield build
    for memory in made:
        memory.close()


def test_memfd_is_sealed_against_resizing_only(make: Make) -> None:
    memory = make()
    assert fcntl.fcntl(memory.fd, F_GET_SEALS) == SHRINK_GROW_SEAL
    with pytest.raises(PermissionError):
        os.ftruncate(memory.fd, MIB)
    os.pwrite(memory.fd, b"x", 0)
    assert os.get_inheritable(memory.fd) is False


def test_regions_with_and_without_the_gap(make: Make) -> None:
    memory = make(4 * MIB)
    assert [(r.guest_addr, r.size, r.file_offset) for r in memory.regions] == [(0, 4 * MIB, 0)]
    split = make(4 * MIB, gap_start=3 * MIB)
    assert [(r.guest_addr, r.size, r.file_offset) for r in split.regions] == [
        (0, 3 * MIB, 0), (GAP_END, MIB, 3 * MIB)]
    assert split.regions[1].user_addr - split.regions[0].user_addr == 3 * MIB
    assert split.regions[0].user_addr % (2 * MIB) == 0
    exact = make(3 * MIB, gap_start=3 * MIB)
    assert len(exact.regions) == 1


def test_read_and_write(make: Make) -> None:
    memory = make(4 * MIB, gap_start=3 * MIB)
    for address in (0, 3 * MIB - 5, GAP_END, GAP_END + MIB - 5):
        assert memory.read(address, 5) == bytes(5)
        memory.write(address, b"hello")
        assert memory.read(address, 5) == b"hello"
    assert os.pread(memory.fd, 5, 3 * MIB) == b"hello", "the file holds the same bytes"
    memory.zero(0, 3)
    assert memory.read(0, 5) == b"\0\0\0lo"
    memory.write(8, bytearray(b"ab"))
    memory.write(10, memoryview(b"cd"))
    assert memory.read(8, 4) == b"abcd"


@pytest.mark.parametrize(("gpa", "size"), [
    (-1, 1), (3 * MIB, 1), (3 * MIB - 1, 2), (GAP_END - 1, 1), (GAP_END - 1, 2),
    (GAP_END + MIB, 1), (GAP_END + MIB - 1, 2), (0, 4 * MIB), (0, 1 << 64), (1 << 64, 1),
    ((1 << 64) - 1, 2), (0, -1)])
def test_what_is_not_all_ram_is_refused(make: Make, gpa: int, size: int) -> None:
    memory = make(4 * MIB, gap_start=3 * MIB)
    with pytest.raises(MemoryAccessError):
        memory.host_address(gpa, size)
    with pytest.raises(MemoryAccessError):
        memory.read(gpa, size)
    with pytest.raises(MemoryAccessError):
        memory.zero(gpa, size)
    if 0 <= size < 8 * MIB:
        with pytest.raises(MemoryAccessError):
            memory.write(gpa, bytes(size))


def test_load_file(make: Make, tmp_path: Path) -> None:
    memory = make(8 * MIB, gap_start=6 * MIB)
    data = os.urandom(3 * MIB + 123)
    path = tmp_path / "kernel"
    path.write_bytes(data)
    memory.write(0x1000 + len(data) - 7, b"#")
    with path.open("rb") as file:
        memory.load_file(0x1003, file.fileno(), 7, len(data) - 7)
        memory.load_file(GAP_END + 5, file.fileno(), 0, 100)
        memory.load_file(0, file.fileno(), 0, 0)
    assert memory.read(0x1003, len(data) - 7) == data[7:]
    assert memory.read(GAP_END + 5, 100) == data[:100]
    assert memory.read(0, 0x1003) == bytes(0x1003)


def test_load_file_that_is_too_short_or_unreadable(make: Make, tmp_path: Path) -> None:
    memory = make()
    path = tmp_path / "short"
    path.write_bytes(b"x" * 100)
    with path.open("r+b") as file:
        for offset, length in ((0, 101), (100, 1), (1 << 40, 1)):
            with pytest.raises(OSError) as caught:
                memory.load_file(0, file.fileno(), offset, length)
            assert caught.value.errno == errno.ENODATA
        with pytest.raises(OSError):
            memory.load_file(0, file.fileno(), -1, 1)
        with pytest.raises(MemoryAccessError):
            memory.load_file(memory.size - 50, file.fileno(), 0, 100)
    with pytest.raises(OSError) as caught:
        memory.load_file(0, 10_000, 0, 1)
    assert caught.value.errno == errno.EBADF


def test_load_file_from_something_that_sendfile_refuses(make: Make) -> None:
    memory = make()
    read_end, write_end = os.pipe()
    try:
        os.write(write_end, b"abc")
        with pytest.raises(OSError):  # a pipe has no offsets: an error, not a hang
            memory.load_file(0, read_end, 1, 2)
    finally:
        os.close(read_end)
        os.close(write_end)


@pytest.mark.parametrize("size", [0, -4096, 4095, MIB + 1])
def test_sizes_that_are_no_pages_are_refused(make: Make, size: int) -> None:
    with pytest.raises(ConfigError, match="multiple of the page size"):
        make(size)


def test_absurd_size_is_a_clear_error(make: Make) -> None:
    with pytest.raises(ConfigError):
        make(1 << 62)


def test_prealloc_allocates_everything(make: Make) -> None:
    memory = make(8 * MIB, prealloc=True)
    assert os.fstat(memory.fd).st_blocks * 512 == 8 * MIB
    assert os.fstat(make(8 * MIB).fd).st_blocks == 0


def test_mem_path_directory_leaves_nothing_behind(make: Make, tmp_path: Path) -> None:
    memory = make(path=str(tmp_path))
    assert list(tmp_path.iterdir()) == []
    memory.write(0, b"x")
    assert os.fstat(memory.fd).st_size == 4 * MIB


def test_mem_path_file_is_made_or_used(make: Make, tmp_path: Path) -> None:
    path = tmp_path / "ram"
    memory = make(path=str(path))
    memory.write(5, b"kept")
    memory.close()
    assert path.stat().st_mode & 0o777 == 0o600
    assert make(path=str(path)).read(5, 4) == b"kept"


def test_mem_path_file_of_another_size_is_refused(make: Make, tmp_path: Path) -> None:
    path = tmp_path / "ram"
    path.write_bytes(b"precious")
    with pytest.raises(ConfigError, match="has 8 bytes"):
        make(path=str(path))
    assert path.read_bytes() == b"precious"


def test_mem_path_file_in_use_is_refused(make: Make, tmp_path: Path) -> None:
    path = tmp_path / "ram"
    make(path=str(path))
    with pytest.raises(ConfigError, match="another process uses"):
        make(path=str(path))


@pytest.mark.parametrize("name", ["missing/ram", "file/ram", "loop", "fifo"])
def test_mem_path_that_cannot_be_had(make: Make, tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "fifo")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError) as caught:
        make(path=str(tmp_path / name))
    assert str(tmp_path / name) in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_failed_start_removes_the_file_that_it_made(make: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        make(4097, path=str(tmp_path / "ram"))
    assert list(tmp_path.iterdir()) == []


def test_dump_guest_core_off(make: Make) -> None:
    def flags(memory: GuestMemory) -> str:
        address = f"{memory.regions[0].user_addr:x}-"
        text = Path("/proc/self/smaps").read_text().partition("\n" + address)[2]
        return text.partition("VmFlags:")[2].partition("\n")[0]

    assert " dd" not in flags(make())
    assert " dd" in flags(make(dump_guest_core=False))


def test_close_gives_everything_back(make: Make) -> None:
    memory = make()
    address = f"{memory.regions[0].user_addr:x}-"
    memory.close()
    assert memory.fd == -1
    assert address not in Path("/proc/self/maps").read_text()
    memory.close()
