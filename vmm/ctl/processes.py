"""The processes of a VM, as /proc shows them: no question to the VM."""

from __future__ import annotations

import os

_MEMORY = {"RssAnon": "private", "RssShmem": "shared"}


class Usage:
    """What one VM's processes use.

    guest: bytes of guest RAM that the host has given (and shared pages of the core, few).
    own: private bytes of the core and its workers together; pages that workers share with the
        nursery count for each, so it is an upper bound.
    cpu: seconds of CPU time, of all of them.
    """

    __slots__ = ("cpu", "guest", "own", "processes")

    def __init__(self) -> None:
        self.guest = 0
        self.own = 0
        self.cpu = 0.0
        self.processes = 0


def alive(pid: int) -> bool:
    """Whether there is such a process, and it isn't a zombie."""
    state, _, _ = _stat(pid)
    return state not in ("", "Z", "X")


def usage(pid: int) -> Usage:
    """Of the core `pid` and its children; zeroes where we may not look or it is gone."""
    used = Usage()
    for member in [pid, *children(pid)]:
        state, _, ticks = _stat(member)
        if not state:
            continue
        memory = _memory(member)
        used.processes += 1
        used.own += memory["private"]
        used.cpu += ticks / os.sysconf("SC_CLK_TCK")
        if member == pid:
            used.guest = memory["shared"]
    return used


def children(pid: int) -> list[int]:
    """Pids of the children of a process: the core is the parent of its workers and nursery."""
    found = []
    try:
        entries = os.listdir("/proc")
    except OSError:
        return []
    for entry in entries:
        if entry.isdecimal() and _stat(int(entry))[1] == pid:
            found.append(int(entry))
    return found


def thread_group(tid: int) -> int:
    """The process that a thread belongs to; 0: there is no such thread."""
    for line in _read(f"/proc/{tid}/status").splitlines():
        if line.startswith("Tgid:"):
            return int(line.split()[1])
    return 0


def _stat(pid: int) -> tuple[str, int, int]:
    """State, parent, ticks of CPU time; ("", 0, 0): there is no such process."""
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    if len(fields) < 13:
        return "", 0, 0
    return fields[0], int(fields[1]), int(fields[11]) + int(fields[12])


def _memory(pid: int) -> dict[str, int]:
    found = {"private": 0, "shared": 0}
    for line in _read(f"/proc/{pid}/status").splitlines():
        name, _, rest = line.partition(":")
        if name in _MEMORY:
            found[_MEMORY[name]] = int(rest.split()[0]) << 10
    return found


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
