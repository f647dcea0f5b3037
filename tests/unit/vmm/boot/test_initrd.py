"""Where the initial RAM disk goes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmm.arch.x86_64.registers import ENTRY_64
from vmm.boot import initrd
from vmm.boot.kernel import Kernel, Segment
from vmm.config.model import MemoryConfig
from vmm.errors import KernelImageError
from vmm.memory import GuestMemory

MIB = 1 << 20
SIZE = 64 * MIB


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    config = MemoryConfig()
    config.size = SIZE
    memory = GuestMemory(config)
    yield memory
    memory.close()


@pytest.fixture
def kernel() -> Kernel:
    return Kernel(ENTRY_64, 16 * MIB, [Segment(16 * MIB, 0, MIB, MIB)])


def make(tmp_path: Path, size: int) -> str:
    (tmp_path / "initrd").write_bytes(b"")
    os.truncate(tmp_path / "initrd", size)
    with (tmp_path / "initrd").open("r+b") as file:
        file.write(b"first")
        file.seek(size - 1)
        file.write(b"L")
    return str(tmp_path / "initrd")


@pytest.mark.parametrize("size", [4095, 4096, 4097, MIB])
def test_as_high_as_ram_goes(memory: GuestMemory, kernel: Kernel, tmp_path: Path,
                             size: int) -> None:
    address, length = initrd.load(memory, make(tmp_path, size), kernel)
    assert length == size and address % 4096 == 0
    assert SIZE - 4096 < address + size <= SIZE
    assert memory.read(address, 5) == b"first" and memory.read(address + size - 1, 1) == b"L"


def test_never_above_what_the_kernel_accepts(memory: GuestMemory, kernel: Kernel,
                                             tmp_path: Path) -> None:
    kernel.initrd_max = 32 * MIB - 1
    address, size = initrd.load(memory, make(tmp_path, 10000), kernel)
    assert address + size <= 32 * MIB < address + size + 4096
    kernel.initrd_max = 0xFFFFFFFF
    assert initrd.load(memory, make(tmp_path, 4096), kernel)[0] == SIZE - 4096


def test_exactly_between_kernel_and_end(memory: GuestMemory, kernel: Kernel,
                                        tmp_path: Path) -> None:
    room = SIZE - kernel.end
    assert initrd.load(memory, make(tmp_path, room), kernel) == (kernel.end, room)
    with pytest.raises(KernelImageError, match=r"-initrd .* don't fit .*-m"):
        initrd.load(memory, make(tmp_path, room + 1), kernel)


def test_what_does_not_fit(memory: GuestMemory, kernel: Kernel, tmp_path: Path) -> None:
    with pytest.raises(KernelImageError, match="don't fit"):
        initrd.load(memory, make(tmp_path, 2 * SIZE), kernel)
    kernel.initrd_max = 0
    with pytest.raises(KernelImageError, match="don't fit"):
        initrd.load(memory, make(tmp_path, 100), kernel)


def test_a_file_that_shrinks_while_it_is_read(memory: GuestMemory, kernel: Kernel,
                                              tmp_path: Path,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(tmp_path, MIB)
    whole = GuestMemory.load_file

    def load_file(self: GuestMemory, gpa: int, fd: int, offset: int, length: int) -> None:
        os.truncate(path, 100)
        whole(self, gpa, fd, offset, length)

    monkeypatch.setattr(GuestMemory, "load_file", load_file)
    with pytest.raises(KernelImageError, match=r"-initrd .* can't be read: .*the file ends"):
        initrd.load(memory, path, kernel)


def test_none_and_what_is_no_file(memory: GuestMemory, kernel: Kernel, tmp_path: Path) -> None:
    assert initrd.load(memory, None, kernel) == (0, 0)
    (tmp_path / "empty").touch()
    for path, match in (("empty", "the file is empty"), ("missing", "No such file"),
                        (".", "not a regular file")):
        with pytest.raises(KernelImageError, match=match):
            initrd.load(memory, str(tmp_path / path), kernel)
