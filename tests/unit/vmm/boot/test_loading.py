"""Kernel and initrd get into RAM together; what goes wrong on the way names the right file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.unit.vmm.boot.images import BASE, elf
from vmm.boot.loading import Loading
from vmm.config.model import BootConfig, MemoryConfig
from vmm.errors import KernelImageError
from vmm.memory import FileLoad, GuestMemory

MIB = 1 << 20
RAM = 32 * MIB


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    config = MemoryConfig()
    config.size = RAM
    memory = GuestMemory(config)
    yield memory
    memory.close()


@pytest.fixture
def config(tmp_path: Path) -> BootConfig:
    config = BootConfig()
    config.kernel, config.initrd = str(tmp_path / "kernel"), str(tmp_path / "initrd")
    (tmp_path / "kernel").write_bytes(elf())
    (tmp_path / "initrd").write_bytes(b"first" + bytes(5000) + b"last")
    return config


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_both(memory: GuestMemory, config: BootConfig) -> None:
    before = descriptors()
    loading = Loading(memory, config, fresh=True)
    loading.wait()
    loading.wait()
    loading.cancel()
    address, size = loading.module
    assert size == 5009 and address == (RAM - size) & -4096
    assert memory.read(address, 5) == b"first"
    assert memory.read(address + size - 4, 5) == b"last\0"
    assert memory.read(BASE, 1) != b"\0"
    assert descriptors() == before


def test_a_kernel_alone(memory: GuestMemory, config: BootConfig) -> None:
    config.initrd = None
    loading = Loading(memory, config, fresh=True)
    loading.wait()
    assert loading.module == (0, 0)


@pytest.mark.parametrize("processors", [1, 2, 3])
def test_whatever_processors_there_are(memory: GuestMemory, config: BootConfig, tmp_path: Path,
                                       processors: int) -> None:
    """A large file, in huge pages where there are any; the caller keeps its processors."""
    whole = os.sched_getaffinity(0)
    data = os.urandom(9 * MIB + 5)
    (tmp_path / "initrd").write_bytes(data)
    few = set(sorted(whole)[:processors])
    try:
        os.sched_setaffinity(0, few)
        loading = Loading(memory, config, fresh=True)
        loading.wait()
        assert os.sched_getaffinity(0) == few
    finally:
        os.sched_setaffinity(0, whole)
    address, size = loading.module
    assert memory.read(address, size) == data


@pytest.mark.parametrize(("name", "length", "match"), [
    ("kernel", 0x1100, r"-kernel .*/kernel: can't be read: .*the file ends"),
    ("initrd", 100, r"-initrd .*/initrd: can't be read: .*the file ends")])
def test_a_file_that_shrinks_while_it_is_read(
        memory: GuestMemory, config: BootConfig, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch, name: str, length: int, match: str) -> None:
    whole = GuestMemory.start_load

    def start_load(self: GuestMemory, pieces: Sequence[tuple[int, int, int, int, int]]
                   ) -> FileLoad:
        os.truncate(tmp_path / name, length)
        return whole(self, pieces)

    monkeypatch.setattr(GuestMemory, "start_load", start_load)
    before = descriptors()
    loading = Loading(memory, config, fresh=True)
    with pytest.raises(KernelImageError, match=match):
        loading.wait()
    loading.cancel()
    with pytest.raises(KernelImageError, match=match):
        loading.wait()
    assert descriptors() == before


@pytest.mark.parametrize(("name", "match"), [
    ("kernel", r"-kernel .*: No such file"), ("initrd", r"-initrd .*: No such file")])
def test_a_file_that_is_not_there(memory: GuestMemory, config: BootConfig, tmp_path: Path,
                                  name: str, match: str) -> None:
    (tmp_path / name).unlink()
    before = descriptors()
    with pytest.raises(KernelImageError, match=match):
        Loading(memory, config, fresh=True)
    assert descriptors() == before


def test_initrds_that_are_none(memory: GuestMemory, config: BootConfig, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for name, match in (("empty", "the file is empty"), (".", "not a regular file")):
        config.initrd = str(tmp_path / name)
        with pytest.raises(KernelImageError, match=match):
            Loading(memory, config, fresh=True)


def test_no_thread_to_be_had(memory: GuestMemory, config: BootConfig,
                             monkeypatch: pytest.MonkeyPatch) -> None:
    def start_load(self: GuestMemory, pieces: object) -> FileLoad:
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(GuestMemory, "start_load", start_load)
    before = descriptors()
    with pytest.raises(KernelImageError, match=r"can't be loaded: Resource .*limit on threads"):
        Loading(memory, config, fresh=True)
    assert descriptors() == before
