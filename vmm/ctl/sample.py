"""Statistics pages and processes at one moment: no question to any VM.

Nothing in a page is believed: its worker may have been taken over. A page counts only if its
file belongs to the user of the process that it names, so that nobody can invent a VM of
somebody else's, and if that VM still holds its lock.
"""

from __future__ import annotations

import fcntl
import os
import stat
import time
from struct import pack, unpack

from shared import statistics
from vmm.ctl import processes

_PAGE_LIMIT = 1 << 20  # bytes; 64 queues of any kind are far below
_FLOCK = "hhqqi4x"     # struct flock of 64-bit Linux


class Sample:
    """All pages and processes at one moment.

    when: seconds, monotonic. pages: by pid of the core and device. usage: by pid.
    """

    __slots__ = ("pages", "usage", "when")

    def __init__(self, pids: set[int], everything: bool = False) -> None:
        """:param pids: VMs that are of interest. :param everything: those with pages, too."""
        self.when = time.monotonic()
        found = processes.Snapshot()
        self.pages = {(page.core, page.device): page for page in read_pages()
                      if everything or page.core in pids}
        members = pids | {core for core, _ in self.pages}
        self.usage = {pid: found.usage(pid) for pid in members if found.alive(pid)}


def read_pages(folder: str = statistics.FOLDER) -> list[statistics.Page]:
    """The pages of living VMs that we may read."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return []
    found = [_read_page(os.path.join(folder, name)) for name in names
             if statistics.is_page_name(name)]
    return [page for page in found if page is not None]


def _read_page(path: str) -> statistics.Page | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        about = os.fstat(fd)
        if not stat.S_ISREG(about.st_mode) or about.st_size > _PAGE_LIMIT:
            return None
        page = statistics.decode_page(os.pread(fd, about.st_size, 0))
        if page is None or not 0 < page.core < processes.MAX_PID or not page.device:
            return None
        if processes.owner(page.core) != about.st_uid or not _is_held(fd):
            return None
        return page
    except OSError:
        return None
    finally:
        os.close(fd)


def _is_held(fd: int) -> bool:
    """Whether who made the page lives: else its pid may be another process by now."""
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK,
                         pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 1, 0))
    return bool(unpack(_FLOCK, answer)[0] != fcntl.F_UNLCK)
