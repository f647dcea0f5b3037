"""Which files below /dev/shm are believed to be pages of living VMs."""

from __future__ import annotations

import fcntl
import os
import struct
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.statistics import HEADER_BYTES, PREFIX
from tests.support.patience import PATIENT
from tests.support.stat_pages import encoded, page, write
from tests.support.test_vm import wait_until
from vmm.ctl import processes, sample
from vmm.ctl.sample import Sample, read_pages

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NAME = f"{PREFIX}1.web.d0"


@contextmanager
def held(path: Path) -> Iterator[None]:
    """As if a VM that lives had made the page (vmm/worker/pages.py)."""
    with path.open("r+b") as file:
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 1, 0))
        yield


def test_a_page_of_a_living_vm(tmp_path: Path) -> None:
    path = write(tmp_path, page("blk", {"reads": 7}, device="disk", starts=2))
    with held(path):
        found, = read_pages(str(tmp_path))
    assert (found.kind, found.device, found.vm, found.starts) == ("blk", "disk", "web", 2)
    assert found.counters[0]["reads"] == 7


def test_a_page_that_its_vm_has_left(tmp_path: Path) -> None:
    """It was killed along with its nursery; its pid may be another process's by now."""
    path = write(tmp_path, page("blk", {}))
    assert read_pages(str(tmp_path)) == []
    with held(path):
        assert len(read_pages(str(tmp_path))) == 1
    assert read_pages(str(tmp_path)) == []


@pytest.mark.parametrize("core", [1 << 22, 1 << 63, (1 << 64) - 1])
def test_a_pid_that_no_process_can_have(tmp_path: Path, core: int) -> None:
    path = write(tmp_path, page("blk", {}, core=core), NAME)
    with held(path):
        assert read_pages(str(tmp_path)) == []


def test_a_process_that_has_gone(tmp_path: Path) -> None:
    pid = os.fork()
    if not pid:
        os._exit(0)
    path = write(tmp_path, page("blk", {}, core=pid))
    os.waitpid(pid, 0)
    with held(path):
        assert read_pages(str(tmp_path)) == []


def test_a_page_in_the_name_of_somebody_elses_process(tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, page("blk", {}))
    with held(path):
        monkeypatch.setattr(processes, "owner", lambda pid: os.getuid() + 1)
        assert read_pages(str(tmp_path)) == []


def test_a_page_without_a_device(tmp_path: Path) -> None:
    path = write(tmp_path, page("blk", {}, device=""), NAME)
    with held(path):
        assert read_pages(str(tmp_path)) == []


def test_what_is_no_file(tmp_path: Path) -> None:
    good = write(tmp_path, page("blk", {}))
    os.mkfifo(tmp_path / f"{PREFIX}fifo")
    (tmp_path / f"{PREFIX}folder").mkdir()
    (tmp_path / f"{PREFIX}link").symlink_to(good)
    (tmp_path / f"{PREFIX}dangling").symlink_to("nothing")
    (tmp_path / f"{PREFIX}closed").touch(0o000)
    (tmp_path / "other").write_bytes(encoded(page("blk", {})))
    with (tmp_path / f"{PREFIX}large").open("wb") as large:
        large.truncate(1 << 40)
    with held(good):
        assert len(read_pages(str(tmp_path))) == 1


def test_no_folder(tmp_path: Path) -> None:
    assert read_pages(str(tmp_path / "missing")) == []


@PATIENT
@given(cut=st.integers(0, 4000), changes=st.lists(st.tuples(
    st.integers(0, HEADER_BYTES + 100), st.binary(min_size=1, max_size=8)), max_size=4))
def test_any_bytes(tmp_path_factory: pytest.TempPathFactory, cut: int,
                   changes: list[tuple[int, bytes]]) -> None:
    data = bytearray(encoded(page("blk", {"reads": 1}, {"reads": 2})))
    for at, new in changes:
        data[at:at + len(new)] = new
    folder = tmp_path_factory.mktemp("shm", numbered=True)
    path = folder / NAME
    path.write_bytes(bytes(data[:len(data) - cut]))
    with held(path):
        for found in read_pages(str(folder)):
            assert found.core == os.getpid() and found.device.isprintable()


def test_a_sample_has_those_that_are_wanted(tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "read_pages", lambda: [page("blk", {})])
    mine = os.getpid()
    assert list(Sample({mine}).pages) == [(mine, "d0")]
    assert Sample({1}).pages == {}
    everything = Sample(set(), everything=True)
    assert list(everything.pages) == [(mine, "d0")]
    assert list(everything.usage) == [mine]
    assert Sample({1 << 22}).usage == {}  # it has ended
    wait_until(lambda: Sample({mine}).usage[mine].own > 0, "memory")
