"""What a worker must leave to its successor: a small file that outlives both."""

from __future__ import annotations

import fcntl
import posix as os

# linux/fcntl.h
_F_ADD_SEALS = 1033
_F_SEAL_SEAL, _F_SEAL_SHRINK, _F_SEAL_GROW = 1, 2, 4


class WorkerState:
    """A sealed file of `size` bytes, zeroes at first, made when first needed."""

    __slots__ = ("_fd", "_name", "_size")

    def __init__(self, name: str, size: int) -> None:
        self._name = name
        self._size = size
        self._fd = -1

    def fileno(self) -> int:
        """The file; stays ours.

        :raises OSError: no memory, no descriptors.
        """
        if self._fd < 0:
            fd = os.memfd_create(self._name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(fd, self._size)
            # A worker that makes it shorter would kill its successor.
            fcntl.fcntl(fd, _F_ADD_SEALS, _F_SEAL_SEAL | _F_SEAL_SHRINK | _F_SEAL_GROW)
            self._fd = fd
        return self._fd

    def forget(self) -> None:
        """The driver has reset the device: the next worker begins afresh."""
        if self._fd >= 0:
            os.pwrite(self._fd, bytes(self._size), 0)

    def close(self) -> None:
        """Harmless when closed."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
