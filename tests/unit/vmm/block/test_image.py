"""Images: what is refused, with which text; locks that QEMU understands."""

from __future__ import annotations

import errno
import fcntl
import os
import posix
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vmm.block.family import BlockNode
from vmm.block.image import Image, lock_incarnation, open_image
from vmm.block.worker import BlockWorkers
from vmm.config.model import DriveConfig
from vmm.errors import ConfigError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(10000))
    return path


def drive(path: Path | str, readonly: bool = False, direct: bool = False) -> DriveConfig:
    config = DriveConfig("disk0", str(path))
    config.readonly = readonly
    config.direct = direct
    return config


def test_facts_of_a_file(path: Path) -> None:
    image = open_image(drive(path))
    assert image.size == 10000
    assert not image.is_block_device
    assert image.logical_block_size == 512
    assert image.physical_block_size == path.stat().st_blksize
    assert image.node == "disk0"
    assert not os.get_inheritable(image.fd)
    image.close()
    image.close()
    assert image.fd == -1


@pytest.mark.parametrize(("make", "text"), [
    (lambda p: p / "absent", "Failed to get metadata of file {}: No such file or directory "
                             "(os error 2)."),
    (lambda p: p, "{} is not a regular file or block device."),
    (lambda p: Path("/dev/null"), "{} is not a regular file or block device."),
    (lambda p: _fifo(p / "fifo"), "{} is not a regular file or block device."),
    (lambda p: p / ("x" * 300), "Failed to get metadata of file {}: File name too long"),
])
def test_what_is_no_image(tmp_path: Path, make: Callable[[Path], Path], text: str) -> None:
    target = make(tmp_path)
    with pytest.raises(ConfigError) as caught:
        open_image(drive(target))
    assert text.format(target) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_name_with_a_zero_byte() -> None:
    with pytest.raises(ConfigError, match="Failed to get metadata"):
        open_image(drive("a\0b"))


def _fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


def test_no_permission(path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may open everything")
    path.chmod(0o400)
    with pytest.raises(ConfigError, match="failed to open the file for block"):
        open_image(drive(path))
    open_image(drive(path, readonly=True)).close()


def test_one_writer_alone_or_many_readers(path: Path) -> None:
    writer = open_image(drive(path))
    for readonly, kind in ((False, "write"), (True, "read")):
        with pytest.raises(ConfigError) as caught:
            open_image(drive(path, readonly))
        assert str(caught.value) == (
            f"Failed to get {kind} lock on file: {path}. Is it used more than once or another "
            "process using the same file? Error: 11; end who uses it, or have all open it with "
            "readonly=on")
    writer.close()
    readers = [open_image(drive(path, True)) for _ in range(3)]
    with pytest.raises(ConfigError, match="write lock"):
        open_image(drive(path))
    for reader in readers:
        reader.close()
    open_image(drive(path)).close()


def test_refused_lock_leaves_nothing_locked(path: Path) -> None:
    reader = open_image(drive(path, True))
    with pytest.raises(ConfigError):
        open_image(drive(path))
    open_image(drive(path, True)).close()
    reader.close()


def locked_bytes(path: Path) -> set[int]:
    """Bytes that somebody else has locked, as another process would see them."""
    fd = os.open(path, os.O_RDWR)
    try:
        found = set()
        for byte in range(90, 320):
            answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0,
                                                                    byte, 1, 0))
            if struct.unpack("hhqqi4x", answer)[0] != fcntl.F_UNLCK:
                found.add(byte)
        return found
    finally:
        os.close(fd)


@pytest.mark.parametrize(("readonly", "expected"), [(False, {100, 101, 201, 203}),
                                                    (True, {100, 201, 203})])
def test_bytes_are_those_of_qemu(path: Path, readonly: bool, expected: set[int]) -> None:
    image = open_image(drive(path, readonly))
    assert locked_bytes(path) == expected
    image.unlock()
    assert locked_bytes(path) == set()
    image.lock()
    assert locked_bytes(path) == expected
    image.close()
    assert locked_bytes(path) == set()


def test_unlocked_until_asked(path: Path) -> None:
    first = open_image(drive(path), locked=False)
    second = open_image(drive(path), locked=False)
    first.lock()
    with pytest.raises(ConfigError):
        second.lock()
    first.close()
    second.lock()
    second.close()


def test_image_that_this_vm_has_already(path: Path, tmp_path: Path) -> None:
    other_name = tmp_path / "link.img"
    os.link(path, other_name)
    first = open_image(drive(path))
    with pytest.raises(ConfigError) as caught:
        open_image(drive(other_name), others=[first])
    assert str(caught.value) == (
        f"Failed to add drive {other_name}, file can only be shared with read_only. Is it used "
        "more than once or another process using the same file?; drive 'disk0' of this VM has it")
    first.close()
    first = open_image(drive(path, True))
    open_image(drive(other_name, True), others=[first]).close()
    first.close()


def test_reopened_description_is_another_one(path: Path) -> None:
    image = open_image(drive(path))
    fd = image.reopen()
    assert os.fstat(fd).st_ino == path.stat().st_ino
    assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
    # Moved or replaced: still this very file.
    path.rename(path.with_suffix(".old"))
    again = image.reopen()
    assert os.path.sameopenfile(fd, again)
    os.lseek(fd, 100, os.SEEK_SET)
    assert os.lseek(again, 0, os.SEEK_CUR) == 0
    os.close(again)
    image.close()
    # The core's description is gone, and the locks with it, whatever a worker still has.
    assert locked_bytes(path.with_suffix(".old")) == set()
    os.close(fd)


def test_incarnations_follow_each_other(path: Path) -> None:
    image = open_image(drive(path))
    first, second = image.reopen(), image.reopen()
    assert lock_incarnation(first, image.incarnation)
    assert not lock_incarnation(second, image.incarnation)
    os.close(first)
    assert lock_incarnation(second, image.incarnation)
    os.close(second)
    image.close()


def test_is_same_file(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"")
    a, b = Image(os.open(path, os.O_RDONLY), drive(path)), open_image(drive(other))
    assert not a.is_same_file(b)
    assert b.size == 0
    a.close()
    b.close()


def test_a_copy_of_the_descriptor_keeps_no_lock(path: Path) -> None:
    """As a program has for a moment that is just being executed."""
    image = open_image(drive(path))
    copy = os.dup(image.fd)
    image.close()
    open_image(drive(path)).close()
    os.close(copy)


def test_a_file_system_that_complains_of_a_close(path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS and FUSE tell of what a worker has written: an unplug goes on all the same."""
    image = open_image(drive(path))
    fd, close = image.fd, os.close
    worker: Any = object()
    nursery: Any = SimpleNamespace(spawn=lambda *rest: worker)
    workers = BlockWorkers(nursery, BlockNode(drive(path), image), "d", {})
    opened = [image.reopen(), image.reopen()]

    def complain(number: int) -> None:
        close(number)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(posix, "close", complain)
    workers.discard(opened[0])
    assert workers.spawn(opened[1]) is worker
    image.close()
    monkeypatch.undo()
    assert not any(Path(f"/proc/self/fd/{number}").exists() for number in (fd, *opened))
