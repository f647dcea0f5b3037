"""Starting the product's command where `TestVm` would help too much: refusals, daemons, users.

`Starter` makes this process the one that orphans fall to, so that none is overlooked.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import struct
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

from tests.support.test_vm import product_command, wait_until

_PR_SET_CHILD_SUBREAPER = 36
LIMIT = 30.0


class Ended(NamedTuple):
    """How a command ended."""

    status: int
    out: str
    err: str


class Starter:
    """Starts commands in `folder`; knows what they left behind. Usable with `with`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment: dict[str, str] | None = None
        self._libc = ctypes.CDLL(None)
        self._shared_memory = set(os.listdir("/dev/shm"))
        self._others = children()  # of other tests' making
        self.started: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Starter:
        self._libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.started:
            process.kill()
            process.communicate()
        for pid in self.orphans():
            os.kill(pid, signal.SIGKILL)
        try:
            wait_until(lambda: not self.orphans(), "the end of what a test left", 5)
        finally:
            self._libc.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)

    def start(self, *arguments: object, before: tuple[str, ...] = (),
              pass_fds: tuple[int, ...] = ()) -> subprocess.Popen[bytes]:
        """The running command; standard output and error are pipes."""
        process = subprocess.Popen([*before, *product_command(), *map(str, arguments)],
                                cwd=self.folder, stdin=subprocess.DEVNULL, env=self.environment,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=pass_fds)
        self.started.append(process)
        return process

    def run(self, *arguments: object, before: tuple[str, ...] = ()) -> Ended:
        """The command's end, which must come by itself, with both streams closed by all."""
        process = self.start(*arguments, before=before)
        out, err = process.communicate(timeout=LIMIT)
        return Ended(process.returncode, out.decode(), err.decode(errors="replace"))

    def orphans(self) -> set[int]:
        """Living processes that commands left to us. The dead ones are reaped."""
        found = set()
        for pid in children() - self._others - {process.pid for process in self.started}:
            try:
                done, _ = os.waitpid(pid, os.WNOHANG | 0x40000000)  # __WALL: clones too
            except ChildProcessError:
                continue
            if not done:
                found.add(pid)
        return found

    def assert_nothing_left(self, before: set[str], pid: int = -1) -> None:
        """No process, no file in the folder that wasn't there, no shared memory."""
        wait_until(lambda: not self.orphans(), "the end of all processes", 5)
        assert set(os.listdir(self.folder)) == before
        shared = set(os.listdir("/dev/shm")) - self._shared_memory
        assert not [name for name in shared if str(pid) in name]


def children() -> set[int]:
    """Pids of this process's children, whichever thread made them."""
    found = set()
    for task in Path("/proc/self/task").iterdir():
        found |= {int(pid) for pid in (task / "children").read_text().split()}
    return found


def peer_pid(path: Path) -> int:
    """The process that listens at a unix socket."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        raw = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return int(struct.unpack("3i", raw)[0])


def wait_listening(path: Path, process: subprocess.Popen[bytes]) -> None:
    """Wait until somebody accepts at the path."""
    deadline = time.monotonic() + LIMIT
    while True:
        try:
            peer_pid(path)
            return
        except OSError:
            if process.poll() is not None:
                _, err = process.communicate()
                raise AssertionError(f"ended with {process.returncode}: {err!r}") from None
            assert time.monotonic() < deadline, f"nobody listens at {path}"
            time.sleep(0.01)
