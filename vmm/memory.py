"""Guest RAM: one file descriptor, mapped once, shared with the workers.

By default a memfd sealed against resizing (ARCHITECTURE.md, decision 4), with `-mem-path` a
file, on hugetlbfs or not.  The file is laid out as the guest sees RAM without its gap: first
what lies below the gap, then what lies from 4 GiB.
"""

from __future__ import annotations

import posix as os
from _stat import S_ISDIR, S_ISREG
from errno import EAGAIN, EFAULT, ENODATA, ENOMEM

from native._core import ffi, lib
from shared.errors import RegionError
from shared.memory_regions import MemoryRegion, RegionTable
from vmm.errors import ConfigError, MemoryAccessError

TYPE_CHECKING = False  # importing typing for it would cost 10 ms of the start
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from vmm.config.model import MemoryConfig

GAP_START = 0xC0000000  # RAM ends here at the latest, for MMIO below 4 GiB
GAP_END = 1 << 32  # and goes on here
BASE_PAGE = 4096
HUGE_PAGE_BITS = 21
HUGE_PAGE = 1 << HUGE_PAGE_BITS
MAX_THREADS = 16
# A guest that uses less keeps small pages: rounded up to huge ones it would cost the host more
# than it gains. A kernel of an ordinary Linux alone is larger.
HUGE_PAGES_FROM = 16 << 20


class GuestMemory:
    """All RAM of one VM, mapped into this process. Sizes and addresses are bytes.

    :param dump_guest_core: whether a core dump of this process contains guest RAM.
    :raises ConfigError: the size or the -mem-path can't be honoured.
    """

    def __init__(self, config: MemoryConfig, dump_guest_core: bool = True,
                 gap_start: int = GAP_START, gap_end: int = GAP_END) -> None:
        self.size = config.size
        self.fd = -1
        self._mapping = ffi.new("struct sv_mapping *")
        self._huge = ffi.NULL  # struct sv_huge
        self._is_held = False
        self._is_memfd = config.path is None
        self._created = ""  # a file that we made and that must go if something fails
        try:
            self.fd = (self._open_file(config.path) if config.path
                       else self._open_memfd(config.huge_page_size))
            self.page_size = self._check_page_size(config.path)
            self._map(dump_guest_core)
        except BaseException:
            self._undo()
            raise
        base: int = self._mapping.address
        low = min(self.size, gap_start)
        self.table = RegionTable([MemoryRegion(0, low, base, 0)])
        if self.size > low:
            self.table.add(MemoryRegion(gap_end, self.size - low, base + low, low))
        self.regions = self.table.regions

    # ---- making ------------------------------------------------------------------------------

    def _open_memfd(self, huge_page_size: int) -> int:
        self._check_size(huge_page_size or BASE_PAGE, "-m")
        fd: int = lib.sv_memory_memfd(b"guest-ram", self.size, huge_page_size)
        if fd < 0 and huge_page_size:
            raise ConfigError(f"memory-backend-memfd: this host has no huge pages of "
                              f"{huge_page_size} bytes: {os.strerror(-fd)}",
                              "choose another hugetlbsize, or hugetlb=off")
        if fd < 0:
            raise ConfigError(f"-m: cannot create {self.size} bytes of guest RAM: "
                              f"{os.strerror(-fd)}", "ask for less or raise the limit")
        return fd

    def _open_file(self, path: str) -> int:
        try:
            return self._open_path(path)
        except OSError as error:
            raise ConfigError(f"-mem-path {path}: {error.strerror}",
                              "name a directory or file that this user can write") from error

    def _open_path(self, path: str) -> int:
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            mode = os.stat(path).st_mode
        except FileNotFoundError:
            self._created = path
            return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
        if S_ISDIR(mode):
            # Without a name from the start, or at once: nothing is ever left behind.
            name = f"{path}/guest-ram-{os.getpid()}-{os.urandom(6).hex()}"
            fd = os.open(name, flags | os.O_CREAT | os.O_EXCL, 0o600)
            os.unlink(name)
            return fd
        if not S_ISREG(mode):
            raise ConfigError(f"-mem-path {path}: neither a directory nor a regular file",
                              "name one of them")
        return os.open(path, flags & ~os.O_NOFOLLOW)

    def _check_size(self, page_size: int, option: str) -> None:
        if self.size <= 0 or self.size % page_size:
            kind = "huge page" if page_size > BASE_PAGE else "page"
            raise ConfigError(f"{option}: {self.size} bytes of guest RAM are not a multiple of "
                              f"the {kind} size, {page_size} bytes", "choose such a size with -m")

    def _check_page_size(self, path: str | None) -> int:
        page_size: int = lib.sv_memory_page_size(self.fd)
        if page_size < 0:
            raise ConfigError(f"-mem-path {path}: {os.strerror(-page_size)}",
                              "name another directory")
        if path is None:
            return page_size  # the size is checked before
        self._check_size(page_size, f"-mem-path {path}")
        locked = lib.sv_memory_lock(self.fd)
        if locked == -EAGAIN:
            raise ConfigError(f"-mem-path {path}: another process uses this file",
                              "give each VM its own file, or name a directory")
        try:
            present = os.fstat(self.fd).st_size
            if present not in (0, self.size):
                raise ConfigError(f"-mem-path {path}: the file has {present} bytes, the guest's "
                                  f"RAM {self.size}", "match -m to it, or name an empty file")
            if present == 0:
                os.ftruncate(self.fd, self.size)
        except OSError as error:
            raise ConfigError(f"-mem-path {path}: cannot be {self.size} bytes long: "
                              f"{error.strerror}", "free some space there") from error
        return page_size

    def _map(self, dump: bool) -> None:
        result = lib.sv_memory_map(self.fd, self.size, self.page_size, dump, self._mapping)
        if result < 0:
            huge = self.page_size > BASE_PAGE
            raise ConfigError(
                f"Cannot map {self.size} bytes of guest RAM: {os.strerror(-result)}",
                "reserve more huge pages (vm.nr_hugepages)" if huge and result == -ENOMEM
                else "ask for less with -m")

    def populate(self) -> None:
        """Allocate all of it now.

        :raises ConfigError: there is not enough.
        """
        threads = max(1, min(MAX_THREADS, os.cpu_count() or 1, self.size >> 26))
        result = lib.sv_memory_populate(self._mapping, self.page_size, threads)
        if result < 0:
            # EFAULT stands for the SIGBUS that a touch would have met.
            reason = os.strerror(ENOMEM if result == -EFAULT else -result)
            raise ConfigError(f"-mem-prealloc: cannot allocate {self.size} bytes of guest RAM: "
                              f"{reason}", "ask for less with -m or free some memory")

    # ---- huge pages --------------------------------------------------------------------------

    def start_huge_pages(self, kernel_end: int, capabilities: bool, calls: bool) -> None:
        """From now on RAM is in huge pages where the guest uses it (native/core/huge.c).

        :param kernel_end: first guest-physical address behind the kernel.
        :param capabilities: whether the thread drops them; calls: whether it limits its calls.
        """
        if not self._is_memfd or self.page_size > BASE_PAGE or self._huge:
            return  # who names a file has chosen its pages
        # Linux lays its tables of pages from the end of RAM downwards, 1/64 of its size, and what
        # it boots from; then it takes memory upwards, in the highest zone that is not all used.
        behind = kernel_end if len(self.regions) == 1 else self.regions[0].size
        ahead = [(max(0, self.size - 1), 8 + (self.size >> 6 + HUGE_PAGE_BITS), True),
                 (behind + HUGE_PAGE - 1 & -HUGE_PAGE, 16, False)]
        out = ffi.new("struct sv_huge **")
        if lib.sv_huge_start(self.fd, self._mapping, HUGE_PAGES_FROM,
                             ffi.new("struct sv_ahead[]", ahead), len(ahead), capabilities,
                             calls, out) == 0:  # else the guest has small pages, as on older hosts
            self._huge = out[0]
            self.hold_huge_pages(self._is_held)

    def is_little_used(self) -> bool:
        """Whether huge pages would cost more than they gain: a call of the kernel."""
        return os.fstat(self.fd).st_blocks * 512 < HUGE_PAGES_FROM

    def hold_huge_pages(self, held: bool) -> None:
        """Whether small pages stay small for now: a huge one takes back what a balloon gave."""
        self._is_held = held
        if self._huge:
            lib.sv_huge_hold(self._huge, held)

    def _undo(self) -> None:
        self.close()
        if self._created:
            try:
                os.unlink(self._created)
            except OSError:
                pass  # the error that brought us here is what the user must see

    # ---- access ------------------------------------------------------------------------------

    def host_address(self, gpa: int, size: int) -> int:
        """Where the guest range [gpa, gpa + size) is in this process.

        :raises MemoryAccessError: it is not all in one region of RAM.
        """
        try:
            region, offset = self.table.translate(gpa, size)
        except RegionError as error:
            raise MemoryAccessError(error.what, "it must lie in guest RAM") from error
        return region.user_addr + offset

    def read(self, gpa: int, size: int) -> bytes:
        """`size` bytes at guest-physical address `gpa`.

        :raises MemoryAccessError: not all in RAM.
        """
        return bytes(ffi.buffer(ffi.cast("char *", self.host_address(gpa, size)), size))

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Write `data` at guest-physical address `gpa`.

        :raises MemoryAccessError: not all in RAM.
        """
        size = len(data)
        ffi.memmove(ffi.cast("char *", self.host_address(gpa, size)), data, size)

    def start_load(self, pieces: Sequence[tuple[int, int, int, int, int]]) -> FileLoad:
        """Copy pieces of files into RAM on a thread of its own, one load at a time.

        :param pieces: (address, descriptor, offset, length, how many zeroes follow) each.
        :raises MemoryAccessError: a destination is not all in RAM.
        :raises OSError: no thread can be had.
        """
        rows = [(fd, offset, length, zeroes, self.host_address(address, length + zeroes))
                for address, fd, offset, length, zeroes in pieces]
        out = ffi.new("struct sv_load **")
        error = lib.sv_load_start(self.fd, self.page_size, self._mapping,
                                  ffi.new("struct sv_piece[]", rows), len(rows), out)
        if error < 0:
            raise OSError(-error, os.strerror(-error))
        return FileLoad(out[0], [offset + length for _, _, offset, length, _ in pieces])

    def close(self) -> None:
        """Unmap and close; nothing may use `host_address` results any more."""
        lib.sv_huge_stop(self._huge)
        self._huge = ffi.NULL
        lib.sv_memory_unmap(self._mapping)
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class FileLoad:
    """Files on their way into RAM. `wait` at any end: until then RAM is written to.

    :param load: struct sv_load.
    :param ends: where each piece ends in its file.
    """

    __slots__ = ("_ends", "_error", "_load", "failed")

    def __init__(self, load: Any, ends: list[int]) -> None:
        self._load = load
        self._ends = ends
        self._error = 0
        self.failed = -1  # number of the piece that can't be loaded

    def wait(self) -> None:
        """Return when every byte is in RAM.

        :raises OSError: piece `failed` can't be read; ENODATA if its file ends too early.
        """
        if self._load is not None:
            failed = ffi.new("uint32_t *")
            self._error = -lib.sv_load_wait(self._load, failed)
            self._load = None
            if self._error:
                self.failed = failed[0]
        if self._error == ENODATA:
            raise OSError(ENODATA, f"the file ends before {self._ends[self.failed]} bytes")
        if self._error:
            raise OSError(self._error, os.strerror(self._error))
