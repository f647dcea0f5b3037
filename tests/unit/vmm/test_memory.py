"""Guest RAM: seals, files, bounds, loading."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.capabilities import require
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

    def build(size: int = 4 * MIB, path: str | None = None, **options: int) -> GuestMemory:
        config = MemoryConfig()
        config.size, config.path = size, path
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
    if 0 <= size < 8 * MIB:
        with pytest.raises(MemoryAccessError):
            memory.write(gpa, bytes(size))


def load(memory: GuestMemory, *pieces: tuple[int, int, int, int, int]) -> int:
    """Load and wait; the number of the piece that failed, with its errno, is raised."""
    loading = memory.start_load(pieces)
    try:
        loading.wait()
    except OSError as error:
        with pytest.raises(OSError) as again:  # as often as it is asked for
            loading.wait()
        assert again.value.errno == error.errno
        raise
    finally:
        failed.append(loading.failed)
    return loading.failed


failed: list[int] = []


def test_load_of_several_pieces(make: Make, tmp_path: Path) -> None:
    memory = make(8 * MIB, gap_start=6 * MIB)
    data = os.urandom(3 * MIB + 123)
    path = tmp_path / "kernel"
    path.write_bytes(data)
    memory.write(0x1000, b"#" * 4 * MIB)
    memory.write(GAP_END, b"#" * 200)
    with path.open("rb") as file:
        fd = file.fileno()
        assert load(memory, (0x1003, fd, 7, len(data) - 7, 5), (GAP_END + 5, fd, 0, 100, 0),
                    (0, fd, 0, 0, 0)) == -1
    end = 0x1003 + len(data) - 7
    assert memory.read(0x1003, len(data) - 7) == data[7:]
    assert memory.read(0, 0x1004) == bytes(0x1000) + b"###" + data[7:8]
    assert memory.read(end, 6) == bytes(5) + b"#"
    assert memory.read(GAP_END, 106) == b"#" * 5 + data[:100] + b"#"


def test_load_keeps_off_the_position_that_others_move(make: Make, tmp_path: Path) -> None:
    """The thread of huge pages does, while `system_reset` loads; so may whoever has the memfd."""
    memory = make()
    (tmp_path / "initrd").write_bytes(b"initrd")
    os.lseek(memory.fd, MIB, os.SEEK_SET)
    with (tmp_path / "initrd").open("rb") as file:
        load(memory, (0x1005, file.fileno(), 0, 6, 0))
    assert os.lseek(memory.fd, 0, os.SEEK_CUR) == MIB
    assert memory.read(0x1004, 8) == b"\0initrd\0"


def test_load_without_a_descriptor_to_spare(make: Make, tmp_path: Path) -> None:
    memory = make()
    (tmp_path / "initrd").write_bytes(b"initrd")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with (tmp_path / "initrd").open("rb") as file:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        try:
            with pytest.raises(OSError):
                os.dup(file.fileno())
            load(memory, (0x1005, file.fileno(), 0, 6, 0))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert memory.read(0x1004, 8) == b"\0initrd\0"


def huge_kib(memory: GuestMemory) -> int:
    """How much of RAM is huge pages, by what maps it."""
    place = f"{memory.regions[0].user_addr:x}-"
    text = Path("/proc/self/smaps").read_text()
    found = re.search(r"ShmemPmdMapped: +(\d+) kB", text[text.index(f"\n{place}"):])
    assert found
    return int(found[1])


@pytest.mark.parametrize(("address", "size", "huge"), [
    (2 * MIB, 4 * MIB, 4), (3 * MIB, 2 * MIB, 4), (2 * MIB, 2 * MIB - 1, 2), (0, MIB // 2, 0),
    (6 * MIB + 5, 3 * MIB - 5, 2)])  # the last pages are no whole huge one
def test_what_is_loaded_lies_in_huge_pages(make: Make, tmp_path: Path, address: int, size: int,
                                           huge: int) -> None:
    require("huge_memfd")
    memory = make(9 * MIB)
    data = os.urandom(size)
    (tmp_path / "kernel").write_bytes(data)
    memory.write(address - 1 if address else size, b"#")
    with (tmp_path / "kernel").open("rb") as file:
        load(memory, (address, file.fileno(), 0, size, 0))
    assert memory.read(address, size) == data
    assert memory.read(address - 1 if address else size, 1) == b"#"
    assert os.fstat(memory.fd).st_blocks * 512 >= huge * MIB
    assert huge_kib(memory) == huge * 1024


@pytest.mark.parametrize(("first", "sizes", "gaps"), [
    (2 * MIB + 5, (21 * MIB + 3,), ()), (MIB, (9 * MIB - 1, 5, 8 * MIB), (3, 1)),
    (0, (8 * MIB, 8 * MIB), (4 * MIB,)), (3 * MIB, (MIB, 100, 12 * MIB), (MIB, 6 * MIB - 4096))])
def test_load_by_several_threads(make: Make, tmp_path: Path, first: int, sizes: tuple[int, ...],
                                 gaps: tuple[int, ...]) -> None:
    """In units of several huge pages, whatever lies where."""
    memory = make(33 * MIB)
    pieces, expected, at = [], bytearray(memory.size), first
    data = os.urandom(sum(sizes))
    (tmp_path / "kernel").write_bytes(data)
    with (tmp_path / "kernel").open("rb") as file:
        offset = 0
        for size, gap in zip(sizes, (*gaps, 0), strict=True):
            pieces.append((at, file.fileno(), offset, size, min(gap, 7)))
            expected[at:at + size] = data[offset:offset + size]
            at, offset = at + size + gap, offset + size
        loading = memory.start_load(pieces)
        loading.wait()  # and helps
    for start in range(0, memory.size, MIB):
        assert memory.read(start, MIB) == expected[start:start + MIB], hex(start)


@pytest.mark.parametrize("file", [False, True])
def test_a_file_of_the_user_s_keeps_its_pages(make: Make, tmp_path: Path, file: bool) -> None:
    require("huge_memfd")
    threads = len(os.listdir("/proc/self/task"))
    memory = make(4 * MIB, path=str(tmp_path / "ram") if file else None)
    memory.start_huge_pages(0, False, False)
    memory.start_huge_pages(0, False, False)  # once is enough
    assert len(os.listdir("/proc/self/task")) == threads + (not file)


def test_load_where_huge_pages_can_not_be_had(make: Make, tmp_path: Path) -> None:
    """A file on a file system of pages."""
    memory = make(8 * MIB, path=str(tmp_path / "ram"))
    data = os.urandom(5 * MIB)
    (tmp_path / "kernel").write_bytes(data)
    with (tmp_path / "kernel").open("rb") as file:
        load(memory, (MIB + 1, file.fileno(), 0, len(data), 0))
    assert memory.read(MIB + 1, len(data)) == data


@pytest.mark.parametrize("size", [100, 3 * MIB])  # by sendfile, by read
def test_load_of_a_file_that_is_too_short(make: Make, tmp_path: Path, size: int) -> None:
    memory = make()
    path = tmp_path / "short"
    path.write_bytes(b"x" * size)
    with path.open("r+b") as file:
        fd = file.fileno()
        for offset, length in ((0, size + 1), (size, 1), (1 << 40, 1)):
            with pytest.raises(OSError, match=f"ends before {offset + length} bytes") as caught:
                load(memory, (0, fd, 0, 1, 0), (0, fd, offset, length, 9), (5, fd, 0, 1, 0))
            assert caught.value.errno == errno.ENODATA and failed[-1] == 1
        with pytest.raises(MemoryAccessError):
            memory.start_load([(memory.size - 50, fd, 0, 40, 11)])
    assert memory.read(5, 1) != b"\0" or size == 100  # what came before the end; no third piece


def test_load_of_what_can_not_be_read(make: Make) -> None:
    memory = make()
    read_end, write_end = os.pipe()
    try:
        os.write(write_end, b"abc")
        with pytest.raises(OSError):  # a pipe has no offsets: an error, not a hang
            load(memory, (0, read_end, 1, 2, 0))
        with pytest.raises(OSError) as caught:
            load(memory, (0, 10_000, 0, 1, 0))
        assert caught.value.errno == errno.EBADF
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


def test_populate_allocates_everything(make: Make) -> None:
    memory = make(8 * MIB)
    memory.populate()
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
