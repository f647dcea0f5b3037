"""Processes as /proc shows them; a /proc of the test's own."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.patience import PATIENT
from vmm.ctl import processes
from vmm.ctl.processes import Snapshot, read_process

if TYPE_CHECKING:
    from pathlib import Path

TICK = os.sysconf("SC_CLK_TCK")


class Proc:
    """A folder like /proc."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, pid: int, name: str = "x", parent: int = 1, state: str = "S", ticks: int = 0,
            status: str = "") -> None:
        own = self.folder / str(pid)
        own.mkdir()
        rest = [state, parent, *[0] * 9, ticks, ticks, *[0] * 6, 1000 + pid, 0]
        (own / "stat").write_text(f"{pid} ({name}) {' '.join(map(str, rest))}\n")
        (own / "status").write_text(f"Name:\t{name}\nTgid:\t{pid}\n{status}")


@pytest.fixture
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Proc:
    folder = tmp_path / "proc"
    folder.mkdir()
    monkeypatch.setattr(processes, "PROC", str(folder))
    (folder / "self").mkdir()
    return Proc(folder)


def memory(private: int, shared: int = 0, huge: int = 0) -> str:
    return (f"RssAnon:\t{private} kB\nRssFile:\t99999 kB\nRssShmem:\t{shared} kB\n"
            f"HugetlbPages:\t{huge} kB\n")


def test_a_vm_and_its_processes(proc: Proc) -> None:
    proc.add(10, "python3.11", ticks=TICK, status=memory(6, 300, 2048))
    proc.add(11, "sv-nursery", parent=10, status=memory(4))
    proc.add(13, "sv-blk-blk0", parent=10, ticks=3 * TICK, status=memory(2, 100))
    proc.add(14, "sv-blk-dead", parent=10, state="Z", status=memory(9))
    proc.add(15, "bash", parent=12, status=memory(9))
    used = Snapshot().usage(10)
    assert [member.pid for member in used.members] == [10, 11, 13]
    assert (used.own, used.guest, used.cpu) == (12 << 10, 2348 << 10, 8.0)


@pytest.mark.parametrize("name", ["a) S 1 (b", "sv-nursery)", "((", ") ", "a b\tc", "\udcff"])
def test_names_with_brackets(proc: Proc, name: str) -> None:
    """A worker that was taken over can call itself so."""
    (proc.folder / "10").mkdir()
    (proc.folder / "10/stat").write_bytes(
        f"10 ({name}) S 77 {' '.join('1' * 20)}".encode("utf-8", "surrogateescape"))
    found = read_process(10)
    assert found is not None
    assert (found.state, found.parent, found.ticks) == ("S", 77, 2)
    assert found.name == name.replace("\udcff", "\ufffd")


@pytest.mark.parametrize("stat", ["", "10", "10 (x) S", "10 (x", "10 (x) S 1 2 3"])
def test_a_process_that_is_going(proc: Proc, stat: str) -> None:
    proc.add(11)
    (proc.folder / "10").mkdir()
    (proc.folder / "10/stat").write_text(stat)
    (proc.folder / "12").mkdir()  # and one that has gone between two steps
    snapshot = Snapshot()
    assert [snapshot.alive(pid) for pid in (10, 11, 12)] == [False, True, False]
    assert snapshot.usage(10).members == [] and snapshot.usage(10).cpu == 0


def test_a_process_whose_memory_we_cannot_see(proc: Proc) -> None:
    proc.add(10)
    (proc.folder / "10/status").unlink()
    used = Snapshot().usage(10)
    assert (used.own, used.guest, len(used.members)) == (0, 0, 1)


@pytest.mark.parametrize(("child", "is_one"), [
    ("sv-nursery", True), ("sv-null", True), ("sv-blk-x", True), ("sv-net-", True),
    ("sv-con-x", True), ("sv-nursery2", False), ("sv-other-x", False), ("blk", False),
    ("sv-blk", False)])
def test_what_is_a_vm(proc: Proc, child: str, is_one: bool) -> None:
    proc.add(10)
    proc.add(11, child, parent=10)
    snapshot = Snapshot()
    assert snapshot.is_core(10) == is_one
    assert not snapshot.is_core(11) and not snapshot.is_core(12)


def test_which_process_is_the_vm(proc: Proc) -> None:
    proc.add(1, "systemd", parent=0)
    proc.add(10)
    proc.add(11, "sv-nursery", parent=10)
    proc.add(20, "sshd")
    snapshot = Snapshot()
    assert snapshot.core(10, 0) == 10
    assert snapshot.core(10, 20) == 10   # the kernel's word is better than the VM's
    assert snapshot.core(1, 10) == 10    # whoever made the socket handed it in
    assert snapshot.core(1, 20) == 1     # what the VM says is no VM
    assert snapshot.core(1, 99) == 1
    assert snapshot.core(1, 1 << 40) == 1
    assert snapshot.core(0, 10) == 0     # pids of another name space
    # Nobody else's processes are counted as the VM's.
    assert [member.pid for member in snapshot.usage(1).members] == [1]


def test_nobody(proc: Proc) -> None:
    """In a container processes from outside are children of 0."""
    proc.add(11, "sv-nursery", parent=0, status=memory(4))
    used = Snapshot().usage(0)
    assert (used.own, used.members) == (0, [])


def test_no_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "PROC", str(tmp_path / "missing"))
    assert Snapshot().usage(1).members == []
    assert not processes.alive(1) and processes.owner(1) == -1
    assert processes.thread_group(1) == 0 and processes.same_network(1) is None


def test_the_real_one() -> None:
    me = read_process(os.getpid())
    assert me is not None and me.parent == os.getppid() and me.started > 0
    assert processes.alive(os.getpid()) and processes.owner(os.getpid()) == os.getuid()
    assert processes.same_network(os.getpid()) is True
    assert Snapshot().usage(os.getpid()).own > 0


@PATIENT
@given(st.binary())
def test_any_stat_file(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.mktemp("proc", numbered=True)
    (folder / "7").mkdir()
    (folder / "7/stat").write_bytes(b"7 (" + data + b") R 1 " + b"3 " * 20)
    before, processes.PROC = processes.PROC, str(folder)
    try:
        found = read_process(7)
    finally:
        processes.PROC = before
    assert found is not None and found.state == "R"
