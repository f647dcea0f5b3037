"""The processes of VMs, as /proc shows them: no question to any VM."""

from __future__ import annotations

import os

from shared.statistics import KINDS

PROC = "/proc"
MAX_PID = 1 << 22  # linux/threads.h, PID_MAX_LIMIT
# What the processes of a VM are called (docs/workers.md).
_HELPERS = ("sv-nursery", "sv-null")
_WORKERS = (*(f"sv-{kind}-" for kind in KINDS), "sv-con-")
_PRIVATE, _GUEST = ("RssAnon",), ("RssShmem", "HugetlbPages")


class Process:
    """One line of the table of processes.

    ticks: CPU time. started: in ticks since the host's start; with the pid it names a process
    for ever.
    """

    __slots__ = ("name", "parent", "pid", "started", "state", "ticks")

    def __init__(self, pid: int, name: str, state: str, parent: int, ticks: int,
                 started: int) -> None:
        self.pid = pid
        self.name = name
        self.state = state
        self.parent = parent
        self.ticks = ticks
        self.started = started


class Member:
    """What one process of a VM uses: `cpu` in seconds, `private` in bytes."""

    __slots__ = ("cpu", "name", "pid", "private", "started")

    def __init__(self, process: Process, private: int) -> None:
        self.pid = process.pid
        self.started = process.started
        self.name = process.name
        self.private = private
        self.cpu = process.ticks / os.sysconf("SC_CLK_TCK")


class Usage:
    """What one VM's processes use.

    guest: bytes of guest RAM that the host has given (and shared pages of the core, few).
    own: private bytes of the core and its workers together; pages that workers share with the
        nursery count for each, so it is an upper bound.
    members: the processes, the core first.
    """

    __slots__ = ("guest", "members", "own")

    def __init__(self) -> None:
        self.guest = 0
        self.own = 0
        self.members: list[Member] = []

    @property
    def cpu(self) -> float:
        """Seconds of CPU time of all of them."""
        return sum(member.cpu for member in self.members)


class Snapshot:
    """All processes of the host at one moment: one pass over /proc, however many VMs."""

    def __init__(self) -> None:
        self._found: dict[int, Process] = {}
        self._children: dict[int, list[int]] = {}
        try:
            names = os.listdir(PROC)
        except OSError:
            names = []
        for name in names:
            process = read_process(int(name)) if name.isdecimal() else None
            if process is not None and process.state not in "ZX":
                self._found[process.pid] = process
                self._children.setdefault(process.parent, []).append(process.pid)

    def alive(self, pid: int) -> bool:
        """Whether there is such a process, and it isn't a zombie."""
        return pid in self._found

    def is_core(self, pid: int) -> bool:
        """Whether it is a VM of ours: nothing else is the parent of nurseries and workers."""
        names = [self._found[child].name for child in self._children.get(pid, ())]
        return any(name in _HELPERS or name.startswith(_WORKERS) for name in names)

    def core(self, peer: int, thread: int) -> int:
        """The pid of a VM; 0: it can't be told.

        :param peer: who made its QMP socket, as the kernel says: the VM itself, unless the
            socket was handed in; 0: it is out of our sight, and what it says of pids, too.
        :param thread: a thread of the VM, as the VM says; 0: it says nothing.
        """
        if peer == 0 or self.is_core(peer):
            return peer
        told = thread_group(thread) if 0 < thread < MAX_PID else 0
        return told if self.is_core(told) else peer

    def usage(self, pid: int) -> Usage:
        """Of the core `pid` and its children; zeroes where we may not look or it is gone."""
        used = Usage()
        if not pid:
            return used  # not the children of nobody
        members = [pid, *sorted(self._children.get(pid, ()))] if self.is_core(pid) else [pid]
        for member in members:
            process = self._found.get(member)
            if process is None:
                continue
            status = _status(member)
            private = sum(status.get(name, 0) for name in _PRIVATE)
            used.members.append(Member(process, private))
            used.own += private
            if member == pid:
                used.guest = sum(status.get(name, 0) for name in _GUEST)
        return used


def read_process(pid: int) -> Process | None:
    """One process; None: there is none of this pid."""
    # proc(5): the name is in brackets, and may have any bracket in it.
    head, _, rest = _read(f"{PROC}/{pid}/stat").rpartition(")")
    fields = rest.split()
    if len(fields) < 20:
        return None
    return Process(pid, head.partition("(")[2], fields[0], int(fields[1]),
                   int(fields[11]) + int(fields[12]), int(fields[19]))


def alive(pid: int) -> bool:
    """Whether there is such a process, and it isn't a zombie."""
    process = read_process(pid)
    return process is not None and process.state not in "ZX"


def owner(pid: int) -> int:
    """The user of a process; -1: there is none."""
    try:
        return os.stat(f"{PROC}/{pid}").st_uid
    except OSError:
        return -1


def thread_group(tid: int) -> int:
    """The process that a thread belongs to; 0: there is no such thread."""
    for line in _read(f"{PROC}/{tid}/status").splitlines():
        if line.startswith("Tgid:"):
            return int(line.split()[1])
    return 0


def same_network(pid: int) -> bool | None:
    """Whether a process sees the interfaces that we see; None: we may not know."""
    try:
        theirs, ours = (os.stat(f"{PROC}/{who}/ns/net") for who in (pid, "self"))
    except OSError:
        return None
    return (theirs.st_dev, theirs.st_ino) == (ours.st_dev, ours.st_ino)


def _status(pid: int) -> dict[str, int]:
    """Bytes by the names of proc(5)."""
    found = {}
    for line in _read(f"{PROC}/{pid}/status").splitlines():
        name, _, rest = line.partition(":")
        if name in _PRIVATE or name in _GUEST:
            found[name] = int(rest.split()[0]) << 10
    return found


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
