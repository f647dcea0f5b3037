"""The statistics pages of this VM's devices (shared/statistics.py): made here, written by workers.

A page belongs to a device, not to a process: the worker that follows another one goes on
counting.  Each has a name in POSIX shared memory, which is taken away when the device or the VM
goes; should the core be killed, by the nursery; should both be, by the next nursery on this
host, which sees that nobody holds the page's lock any more.

Opened by hand: the package posix_ipc does the same, and takes 1 ms to import.
"""

from __future__ import annotations

import fcntl
import posix as os
from _struct import pack

from shared import log, statistics

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_FLOCK = "hhqqi4x"  # struct flock of 64-bit Linux


class Pages:
    """The pages of one VM.

    announce: called with a name before a file gets it, so that somebody else can remove it.
    """

    def __init__(self, vm_name: str) -> None:
        self._vm_name = vm_name
        self._pages: dict[str, tuple[int, str, str, int]] = {}  # fd, name, kind, queues
        self._starts: dict[str, int] = {}
        self.announce: Callable[[list[str]], None] = _nothing

    def names(self) -> list[str]:
        """The names below statistics.FOLDER that exist, or are about to."""
        return [name for _, name, _, _ in self._pages.values() if name]

    def take(self, kind: str, device: str, queues: int) -> int:
        """The page's descriptor, which stays ours; -1: workers of this kind count nothing.

        A page that the device has is used again, unless it has another shape. Each call is
        counted in the page as a start.

        :raises OSError: no memory, no descriptors.
        """
        if kind not in statistics.RECORDS:
            return -1
        page = self._pages.get(device)
        if page is not None and page[2:] == (kind, queues):
            self._count_start(page[0], device)
            return page[0]
        self.drop(device)
        name = statistics.page_name(os.getpid(), self._vm_name, device)
        if name in self.names():  # two ids that look alike in a file's name
            name = f"{name}.{len(self._pages)}"
        fd, named = self._make(kind, device, queues, name)
        self._pages[device] = (fd, name if named else "", kind, queues)
        self._count_start(fd, device)
        return fd

    def _count_start(self, fd: int, device: str) -> None:
        starts = self._starts[device] = self._starts.get(device, 0) + 1
        try:
            os.pwrite(fd, statistics.STARTS.pack(starts), statistics.STARTS_AT)
        except OSError:
            pass  # the worker made the file shorter: nobody reads it any more

    def _make(self, kind: str, device: str, queues: int, name: str) -> tuple[int, bool]:
        try:
            # It appears under its name when it is whole and locked, or not at all.
            fd = os.open(statistics.FOLDER, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError:
            fd = os.memfd_create(name, os.MFD_CLOEXEC)
            _fill(fd, kind, device, queues, self._vm_name)
            return fd, False
        try:
            _fill(fd, kind, device, queues, self._vm_name)
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, pack(_FLOCK, fcntl.F_WRLCK, 0, 0, 1, 0))
            self.announce([name])
            _give_name(fd, name)
        except OSError as error:
            # Counted all the same, but only QMP shows it.
            log.warning(f"The statistics of '{device}' have no name in {statistics.FOLDER}: "
                        f"{error.strerror}")
            return fd, False
        return fd, True

    def drop(self, device: str) -> None:
        """The device is gone; harmless if it has no page."""
        fd, name, _, _ = self._pages.pop(device, (-1, "", "", 0))
        self._starts.pop(device, None)
        if fd >= 0:
            os.close(fd)
        if name:
            try:
                os.unlink(f"{statistics.FOLDER}/{name}")
            except OSError:
                pass  # somebody was faster

    def close(self) -> None:
        """The VM ends."""
        for device in list(self._pages):
            self.drop(device)

    def read(self, device: str) -> statistics.Page | None:
        """What the device's workers have counted; None: nothing. Believe no number blindly."""
        fd, _, kind, queues = self._pages.get(device, (-1, "", "", 0))
        if fd < 0:
            return None
        try:
            return statistics.decode_page(os.pread(fd, statistics.page_bytes(kind, queues), 0))
        except OSError:
            return None


def _give_name(fd: int, name: str) -> None:
    folder = os.open(statistics.FOLDER, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            os.unlink(name, dir_fd=folder)  # of a predecessor with our pid
        except FileNotFoundError:
            pass
        # With a folder Python calls linkat(), which alone follows the link to the open file.
        os.link(f"/proc/self/fd/{fd}", name, src_dir_fd=folder, dst_dir_fd=folder,
                follow_symlinks=True)
    finally:
        os.close(folder)


def _fill(fd: int, kind: str, device: str, queues: int, vm_name: str) -> None:
    size = statistics.page_bytes(kind, queues)
    os.ftruncate(fd, size)
    os.pwrite(fd, statistics.encode_header(kind, queues, os.getpid(), vm_name, device), 0)


def _nothing(names: list[str]) -> None:
    pass
