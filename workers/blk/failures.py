"""I/O errors of the host, told to whoever supervises the worker; seldom enough to be read."""

from __future__ import annotations

import posix as os
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from workers.blk.device import BlkDevice

# In the order of SV_BLK_READ to SV_BLK_ZERO (native/blk/blk.h).
OPERATIONS = ("read", "write", "flush", "discard", "write-zeroes")
# Seconds between two reports of one kind: a disk that has gone fails thousands a second.
WINDOW = 1.0


class Failures:
    """Watches a device's failed requests.

    :param report: called with the operation, the errno of the last failure and how many there
        were since the last report; at most once a WINDOW for each operation.
    """

    def __init__(self, device: BlkDevice, report: Callable[[str, int, int], None]) -> None:
        self._device = device
        self._report = report
        self._seen = [0] * len(OPERATIONS)
        self._next = [0.0] * len(OPERATIONS)
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        device.watch_failures(self._fd)

    def fileno(self) -> int:
        """Readable when a request has failed since `collect`."""
        return self._fd

    def collect(self) -> None:
        """Report what is due."""
        try:
            os.eventfd_read(self._fd)
        except BlockingIOError:
            pass
        now = time.monotonic()
        for kind, operation in enumerate(OPERATIONS):
            count, error = self._device.failures(kind)
            if count != self._seen[kind] and now >= self._next[kind]:
                self._report(operation, error, count - self._seen[kind])
                self._seen[kind] = count
                self._next[kind] = now + WINDOW

    def wait_limit(self) -> float | None:
        """Seconds until something that happened within a window is due; None: nothing did."""
        due = [self._next[kind] for kind in range(len(OPERATIONS))
               if self._device.failures(kind)[0] != self._seen[kind]]
        return max(0.0, min(due) - time.monotonic()) if due else None

    def close(self) -> None:
        """The device has stopped."""
        os.close(self._fd)
