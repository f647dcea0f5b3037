"""Finds and kills the workers of a VM at random instants, while the guest works."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path


def children(pid: int, prefix: str = "") -> dict[int, str]:
    """Living processes whose parent it is, with their names."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            if not entry.name.isdigit():
                continue
            text = (entry / "stat").read_text()
        except OSError:
            continue  # it has ended
        name, fields = text[text.index("(") + 1:text.rindex(")")], text.rpartition(")")[2].split()
        if int(fields[1]) == pid and fields[0] != "Z" and name.startswith(prefix):
            found[int(entry.name)] = name
    return found


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    """Send a signal; who has ended already is no error."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


class Killer:
    """`with`: a thread that kills each worker of the VM after 1 to `longest` milliseconds, until
    `limit` are dead. `prefix`: of the names of those that are meant."""

    def __init__(self, core: int, limit: int, longest: int = 300, seed: int = 1,
                 nursery: bool = False, prefix: str = "sv-blk") -> None:
        self.kills = 0
        self._limit = limit
        self._core = core
        self._longest = longest
        self._random = random.Random(seed)
        self._nursery = nursery
        self._prefix = prefix
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def _work(self) -> None:
        last = 0
        while self.kills < self._limit and not self._stop.wait(
                self._random.uniform(1, self._longest) / 1000):
            workers = [pid for pid in children(self._core, self._prefix) if pid != last]
            if not workers:
                continue
            last = self._random.choice(workers)
            if self._nursery:
                for pid in children(self._core, "sv-nursery"):
                    kill(pid)
            kill(last)
            self.kills += 1

    def __enter__(self) -> Killer:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join(10)


def wait_quiet(core: int, count: int = 1, timeout: float = 10,
               prefix: str = "sv-blk") -> list[int]:
    """Wait until `count` workers have been there for a while; their pids."""
    deadline = time.monotonic() + timeout
    seen: list[int] = []
    since = time.monotonic()
    while len(seen) != count or time.monotonic() - since < 0.3:
        now = sorted(children(core, prefix))
        if now != seen:
            seen, since = now, time.monotonic()
        assert time.monotonic() < deadline, f"{count} steady workers: {seen}"
        time.sleep(0.01)  # polls /proc
    return seen
