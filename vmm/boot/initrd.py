"""The initial RAM disk: as high as the kernel allows, page aligned, clear of everything else."""

from __future__ import annotations

from vmm.errors import KernelImageError

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from vmm.boot.kernel import Kernel

_PAGE = 4096


def place(path: str, size: int, kernel: Kernel, ram_end: int) -> tuple[int, int]:
    """The address and size of an initrd of `size` bytes.

    :param ram_end: end of the RAM that starts at 0.
    :raises KernelImageError: it is empty, or doesn't fit.
    """
    if size == 0:
        raise KernelImageError(f"-initrd {path}: the file is empty", "name another file")
    top = min(kernel.initrd_max + 1, ram_end)
    address = (top - size) & -_PAGE
    if size > top or address < kernel.end:
        raise KernelImageError(
            f"-initrd {path}: {size} bytes don't fit between the kernel's end at "
            f"{kernel.end:#x} and {top:#x}", "give the VM more memory with -m")
    return address, size
