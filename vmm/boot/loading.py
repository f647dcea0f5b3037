"""Kernel and initrd on their way into RAM: checked on the caller's thread, so that every error of a
header is known at once, copied by a thread of C.
"""

from __future__ import annotations

from shared.fds import close_all
from vmm.boot import initrd
from vmm.boot.kernel import inspect, open_regular_file
from vmm.errors import KernelImageError

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from vmm.config.model import BootConfig
    from vmm.memory import GuestMemory


class Loading:
    """`wait` once, before the guest runs; `cancel` at any end.

    kernel: what the image asks for; module: the initrd's address and size, (0, 0) for none.

    :param fresh: RAM is still all zeroes, as a memfd is at first.
    :raises KernelImageError: a file can't be read, is none that we can boot, or doesn't fit.
    """

    def __init__(self, memory: GuestMemory, config: BootConfig, fresh: bool) -> None:
        self._names = f"-kernel {config.kernel}", f"-initrd {config.initrd}"
        self.module = 0, 0
        self._fds: list[int] = []
        try:
            fd, size = open_regular_file("-kernel", config.kernel or "")
            self._fds.append(fd)
            self.kernel = inspect(config.kernel or "", fd, size, memory.regions[0].size)
            # What follows a segment need not be cleared in fresh RAM.
            pieces = [(s.address, fd, s.offset, s.size, 0 if fresh else s.memory_size - s.size)
                      for s in self.kernel.segments]
            if config.initrd is not None:
                fd, size = open_regular_file("-initrd", config.initrd)
                self._fds.append(fd)
                self.module = initrd.place(config.initrd, size, self.kernel,
                                           memory.regions[0].size)
                pieces.append((self.module[0], fd, 0, size, 0))
            self._load = memory.start_load(pieces)
        except OSError as error:
            close_all(self._fds)
            raise KernelImageError(f"{self._names[0]}: can't be loaded: {error.strerror}",
                                   "check the limit on threads") from error
        except BaseException:
            close_all(self._fds)
            raise

    def wait(self) -> None:
        """Return when every byte is in RAM.

        :raises KernelImageError: a file could not be read to its end.
        """
        try:
            self._load.wait()
        except OSError as error:
            name = self._names[self._load.failed >= len(self.kernel.segments)]
            raise KernelImageError(f"{name}: can't be read: {error}", "check the file"
                                   ) from error
        finally:
            close_all(self._fds)
            self._fds.clear()

    def cancel(self) -> None:
        """Return when nothing writes to RAM any more."""
        try:
            self.wait()
        except KernelImageError:
            pass  # `wait` tells
