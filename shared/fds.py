"""Ownership of file descriptors: closed once, or handed on, never both.

Descriptors that come over a socket, or go to another process, change hands; these helpers say
who owns them at each moment, so that none leaks and none is closed twice.
"""

from __future__ import annotations

import posix as os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

SEEK_SET, SEEK_END = 0, 2  # lseek(2)


class OwnedFd:
    """A descriptor that this object closes, unless `take` handed it on. Usable with `with`."""

    __slots__ = ("_fd",)

    def __init__(self, fd: int = -1) -> None:
        self._fd = fd

    @property
    def fd(self) -> int:
        """The descriptor, -1 if there is none (any more)."""
        return self._fd

    def fileno(self) -> int:
        """As `fd`; lets select and poll take the object."""
        return self._fd

    def take(self) -> int:
        """Give up ownership: the caller closes it from now on. -1 if there is none."""
        fd, self._fd = self._fd, -1
        return fd

    def replace(self, fd: int) -> None:
        """Close what is owned and own `fd` instead."""
        old, self._fd = self._fd, fd
        if old >= 0:
            os.close(old)

    def close(self) -> None:
        """Close; harmless when there is none."""
        self.replace(-1)

    def __enter__(self) -> OwnedFd:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def close_all(fds: Iterable[int]) -> None:
    """Close every descriptor that is not negative; an error of one doesn't spare the others."""
    for fd in fds:
        if fd >= 0:
            try:
                os.close(fd)
            except OSError:
                continue
