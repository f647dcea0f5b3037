"""The image that a blk worker serves: an inherited descriptor, checked and measured.

Nothing is opened here.  What the descriptor is (regular file or block device, O_DIRECT or
not, writable or not) is read from it, not believed from the options.
"""

from __future__ import annotations

import _stat as stat
import errno
import fcntl
import mmap
import posix as os

from native import _dataplane
from shared.fds import SEEK_END
from shared.virtio.blk import ID_BYTES, SECTOR
from workers.errors import DiskError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

ffi = _dataplane.ffi

# linux/fs.h: ioctls of block devices. Plain numbers, the same on x86_64 and aarch64.
BLKSSZGET = 0x1268    # logical block size, int
BLKPBSZGET = 0x127B   # physical block size, unsigned int
BLKIOMIN = 0x1278     # unsigned int
BLKIOOPT = 0x1279     # unsigned int
BLKROGET = 0x125E     # int

MAX_ALIGN = 65536


class Disk:
    """What there is to know of an image before it is served. Sizes are bytes.

    align: what offsets, lengths and buffers must be multiples of, 1 if the page cache stands
    between; logical_block and physical_block are what the guest is told.

    :param small_blocks: tell the guest of blocks of 512 bytes whatever the image has; the data
        plane changes parts of larger ones.
    :param detect_zeroes: "off", "on" (a write of zeroes becomes a write-zeroes request) or
        "unmap" (that gives space back, if `unmap` allows it at all: as StratoVirt).
    :raises DiskError: not a regular file or block device, or not writable as asked.
    """

    def __init__(self, fd: int, readonly: bool, unmap: bool, serial: str,
                 small_blocks: bool = False, detect_zeroes: str = "off") -> None:
        self.fd = fd
        self.readonly = readonly
        self.unmap = unmap
        self.serial = serial
        self.detect_zeroes = detect_zeroes
        status = os.fstat(fd)
        self.block_device = stat.S_ISBLK(status.st_mode)
        if not self.block_device and not stat.S_ISREG(status.st_mode):
            raise DiskError("The image is not a regular file or block device",
                            "give one to -drive file=")
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        self.direct = bool(flags & os.O_DIRECT)
        if not readonly and flags & os.O_ACCMODE != os.O_RDWR:
            raise DiskError("The image was opened for reading only", "say readonly=on")
        # Whoever reads a descriptor that was opened for both must still not write.
        self.measure()
        self.optimal_io = self.minimal_io = 0
        if self.block_device:
            self.align = self._measure_device()
        else:
            self.physical_block = status.st_blksize
            self.align = probe_alignment(fd) if self.direct else 1
            self.logical_block = max(SECTOR, self.align)
        self.physical_block = max(self.physical_block, self.logical_block)
        if small_blocks:
            self.logical_block = SECTOR

    def measure(self) -> None:
        """Read the image's size.

        :raises DiskError: it is absurd, or the image can't be read.
        """
        try:
            size = (os.lseek(self.fd, 0, SEEK_END) if self.block_device
                    else os.fstat(self.fd).st_size)
        except OSError as error:
            raise DiskError(f"Can't measure the image: {error.strerror}") from error
        if size >= 1 << 62:
            raise DiskError(f"The image's size of {size} bytes is beyond what is served")
        self.size = size

    def _measure_device(self) -> int:
        if not self.readonly and _ioctl_int(self.fd, BLKROGET, 0):
            raise DiskError("The block device is read-only", "say readonly=on")
        self.logical_block = _ioctl_int(self.fd, BLKSSZGET, SECTOR)
        self.physical_block = _ioctl_int(self.fd, BLKPBSZGET, self.logical_block)
        self.minimal_io = _ioctl_int(self.fd, BLKIOMIN, 0)
        self.optimal_io = _ioctl_int(self.fd, BLKIOOPT, 0)
        if self.logical_block < SECTOR or self.logical_block > MAX_ALIGN:
            raise DiskError(f"The block device has blocks of {self.logical_block} bytes",
                            f"{SECTOR} to {MAX_ALIGN} are served")
        return self.logical_block if self.direct else 1

    @property
    def capacity(self) -> int:
        """Sectors that the guest sees: a last partial sector counts (its rest reads as 0)."""
        return -(-self.size // SECTOR)

    def native(self) -> Any:
        """The struct that the data plane takes."""
        disk = ffi.new("struct sv_disk *")
        disk.fd = self.fd
        disk.readonly = self.readonly
        disk.direct = self.direct
        disk.block_device = self.block_device
        disk.unmap = self.unmap
        disk.detect_zeroes = self.detect_zeroes != "off"
        disk.detect_unmap = self.detect_zeroes == "unmap" and self.unmap
        disk.writeback = True
        disk.size = self.size
        disk.capacity = self.capacity
        disk.align = disk.memory_align = self.align
        disk.id = self.serial.encode("utf-8", "replace")[:ID_BYTES].ljust(ID_BYTES, b"\0")
        return disk


def probe_alignment(fd: int) -> int:
    """The smallest alignment with which O_DIRECT reads of a regular file succeed.

    Tried, as older kernels have no other way to tell.

    :raises DiskError: none does.
    """
    buffer = mmap.mmap(-1, 2 * MAX_ALIGN)
    try:
        for align in (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536):
            view = memoryview(buffer)[align:2 * align]
            try:
                os.preadv(fd, [view], 0)
                return align
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise DiskError(f"Can't read the image: {error.strerror}") from error
            finally:
                view.release()
    finally:
        buffer.close()
    raise DiskError("The image's file system refuses direct I/O", "say direct=false")


def _ioctl_int(fd: int, request: int, otherwise: int) -> int:
    buffer = bytearray(8)
    try:
        fcntl.ioctl(fd, request, buffer)
    except OSError:
        return otherwise
    return int.from_bytes(buffer[:4], "little")
