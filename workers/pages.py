"""Statistics pages that nobody else removes: the nursery does it for a core that was killed.

The core names them before they exist (vmm/worker/pages.py).  Whoever is killed together with its
nursery leaves its pages behind; the next nursery finds those that nobody has locked any more.
"""

from __future__ import annotations

import _stat as stat
import fcntl
import posix as os
from _struct import pack, unpack

from shared.control.channel import close_quietly
from shared.fds import SEEK_SET
from shared.statistics import is_page_name

MAX_NAMES = 1024
# Milliseconds without a request after which there is time to look for what others left.
IDLE_MS = 1000
_FLOCK = "hhqqi4x"  # struct flock of 64-bit Linux


class PageNames:
    """The names, and the folder that they are in: a descriptor, as the nursery's own root is
    empty."""

    def __init__(self) -> None:
        self._folder = -1
        self._names: set[str] = set()
        self._sweep_due = False

    def learn(self, names: object, fds: list[int]) -> None:
        """What the core announces; the first time the folder comes with it. `fds` are ours."""
        if fds and self._folder < 0:
            self._folder = fds.pop()
            self._sweep_due = True
        for fd in fds:
            close_quietly(fd)
        if isinstance(names, list):
            for name in names[:MAX_NAMES]:
                if isinstance(name, str) and is_page_name(name) and len(self._names) < MAX_NAMES:
                    self._names.add(name)

    def wait_limit(self) -> int | None:
        """Milliseconds after which `sweep` is due, if nothing else is."""
        return IDLE_MS if self._sweep_due else None

    def sweep(self) -> None:
        """Remove pages whose core and workers are all gone. Once."""
        self._sweep_due = False
        try:
            names = os.listdir(self._folder)
        except OSError:
            return
        for name in names:
            if is_page_name(name) and name not in self._names and self._is_left(name):
                self._unlink(name)

    def _is_left(self, name: str) -> bool:
        try:
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC,
                         dir_fd=self._folder)
        except OSError:
            return False  # another user's, or gone
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                return False
            answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK,
                                 pack(_FLOCK, fcntl.F_WRLCK, SEEK_SET, 0, 1, 0))
            return bool(unpack(_FLOCK, answer)[0] == fcntl.F_UNLCK)
        except OSError:
            return False
        finally:
            os.close(fd)

    def remove(self) -> None:
        """The core is gone: so are its pages."""
        for name in self._names:
            self._unlink(name)

    def _unlink(self, name: str) -> None:
        try:
            os.unlink(name, dir_fd=self._folder)
        except OSError:
            pass  # the core has done it
