"""The initial RAM disk: as high as the kernel allows, page aligned, clear of everything else."""

from __future__ import annotations

import os

from vmm.boot.kernel import open_regular_file
from vmm.errors import KernelImageError

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from vmm.boot.kernel import Kernel
    from vmm.memory import GuestMemory

_PAGE = 4096


def load(memory: GuestMemory, path: str | None, kernel: Kernel) -> tuple[int, int]:
    """Copy the file into RAM; returns its address and size, (0, 0) for no initrd.

    :raises KernelImageError: it can't be read, is empty, or doesn't fit.
    """
    if path is None:
        return 0, 0
    fd, size = open_regular_file("-initrd", path)
    try:
        if size == 0:
            raise KernelImageError(f"-initrd {path}: the file is empty", "name another file")
        top = min(kernel.initrd_max + 1, memory.regions[0].size)
        address = (top - size) & -_PAGE
        if size > top or address < kernel.end:
            raise KernelImageError(
                f"-initrd {path}: {size} bytes don't fit between the kernel's end at "
                f"{kernel.end:#x} and {top:#x}", "give the VM more memory with -m")
        memory.load_file(address, fd, 0, size)
    except OSError as error:
        raise KernelImageError(f"-initrd {path}: can't be read: {error}", "check the file"
                               ) from error
    finally:
        os.close(fd)
    return address, size
