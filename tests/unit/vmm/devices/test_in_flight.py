"""How many requests a dead worker left undone, by a record that may say anything."""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING

import pytest

from shared.vhost_user.messages import Inflight
from vmm.devices.in_flight import undone_requests

if TYPE_CHECKING:
    from collections.abc import Iterator

SIZE, QUEUES = 8, 2
STRIDE = 192  # 16 + 8 * 16, up to a cache line


@pytest.fixture
def fd() -> Iterator[int]:
    fd = os.memfd_create("record")
    os.ftruncate(fd, QUEUES * STRIDE)
    yield fd
    os.close(fd)


def write(fd: int, queue: int, used: int, taken: set[int], at: int = 0) -> None:
    data = struct.pack("<QHHHH", 0, 1, SIZE, 0, used)
    data += b"".join(struct.pack("<B5xHQ", i in taken, 0, 0) for i in range(SIZE))
    os.pwrite(fd, data, at + queue * STRIDE)


def layout(offset: int = 0) -> Inflight:
    return Inflight(QUEUES * STRIDE, offset, QUEUES, SIZE)


def test_no_record() -> None:
    assert undone_requests(None, {0: 5}) == 0


def test_all_queues_count(fd: int) -> None:
    write(fd, 0, 5, {1, 2, 7})
    write(fd, 1, 9, {0})
    assert undone_requests((layout(), fd), {0: 5, 1: 9}) == 4
    assert undone_requests((layout(), fd), {1: 9}) == 1


def test_the_last_batch_is_published_but_not_marked(fd: int) -> None:
    write(fd, 0, 0xFFFF, {1, 2, 3})
    assert undone_requests((layout(), fd), {0: 1}) == 1  # indices wrap


def test_the_offset_counts(fd: int) -> None:
    os.ftruncate(fd, 4096 + QUEUES * STRIDE)
    write(fd, 0, 0, {4}, 4096)
    assert undone_requests((layout(4096), fd), {0: 0}) == 1


@pytest.mark.parametrize("length", [0, 7, 16, 33])
def test_a_record_that_is_cut_off(fd: int, length: int) -> None:
    write(fd, 0, 0, set(range(SIZE)))
    os.ftruncate(fd, length)
    assert 0 <= undone_requests((layout(), fd), {0: 0}) <= SIZE


def test_a_record_that_lies(fd: int) -> None:
    os.pwrite(fd, b"\xff" * QUEUES * STRIDE, 0)
    assert undone_requests((layout(), fd), {0: 1, 1: 2}) == 0
    write(fd, 0, 0, {1})
    assert undone_requests((layout(), fd), {0: 0x8000}) == 0
    assert undone_requests((layout(1 << 40), fd), {0: 0}) == 0


def test_what_cannot_be_read(fd: int) -> None:
    pipe, other = os.pipe()
    try:
        assert undone_requests((layout(), pipe), {0: 0}) == 0
    finally:
        os.close(pipe)
        os.close(other)


def test_a_record_at_the_end_of_what_files_can_hold(fd: int) -> None:
    """The file's size is what the worker made it: the second queue is beyond any offset."""
    write(fd, 0, used=5, taken={1})
    assert undone_requests((Inflight(1, (1 << 63) - STRIDE, QUEUES, SIZE), fd), {0: 5, 1: 5}) == 0
