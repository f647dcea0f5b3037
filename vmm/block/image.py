"""Disk images as the core opens them: checked, locked, measured; workers get descriptors.

Locks are QEMU's (block/file-posix.c, "RAW_LOCK_*"): open-file-description locks on single
bytes, one a permission.  Byte 100 + n is read-locked by who holds permission n, byte 200 + n
by who does not let others hold it; who finds the other's byte locked gives up.  So QEMU and we
exclude each other, and readers share.

Each incarnation of a worker gets an open file description of its own (`Image.reopen`); the
core keeps none of them.  See `lock_incarnation` for why.
"""

from __future__ import annotations

import _stat as stat
import errno
import fcntl
import posix as os
from _struct import pack, unpack

from shared.fds import SEEK_END, SEEK_SET, close_all
from vmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from vmm.config.model import DriveConfig

HELD = 100
UNSHARED = 200
# Permissions, by QEMU's bit numbers (include/block/block-common.h, BLK_PERM_*).
CONSISTENT_READ, WRITE, RESIZE = 0, 1, 3
# A byte of our own, beyond QEMU's: of the one VM that writes. Those that share an image to read
# it have a byte each, anywhere in a range that no image reaches.
INCARNATION = 300
_READERS = 1 << 61

_FLOCK = "hhqqi4x"  # struct flock of 64-bit Linux
_SHARED_WITH = "Is it used more than once or another process using the same file?"

# linux/fs.h; numbers as the kernel's own, the same on x86_64 and aarch64.
_BLKSSZGET = 0x1268
_BLKPBSZGET = 0x127B


class Image:
    """An open image.

    fd: the core's own descriptor, which holds the locks; size in bytes;
    logical_block_size and physical_block_size in bytes (512 and the file system's block for a
    regular file); node: the drive's id; incarnation: the byte that `lock_incarnation` locks.
    """

    __slots__ = ("_identity", "direct", "fd", "incarnation", "is_block_device",
                 "logical_block_size", "node", "path", "physical_block_size", "readonly", "size")

    def __init__(self, fd: int, config: DriveConfig) -> None:
        status = os.fstat(fd)
        self.fd = fd
        self.node = config.id
        self.path = config.file
        self.readonly = config.readonly
        self.direct = config.direct
        self.incarnation = INCARNATION
        if config.readonly:
            self.incarnation = _READERS | int.from_bytes(os.urandom(7), "little")
        self.is_block_device = stat.S_ISBLK(status.st_mode)
        if self.is_block_device:
            self._identity = (-1, status.st_rdev)
            self.size = os.lseek(fd, 0, SEEK_END)
            self.logical_block_size = _ioctl(fd, _BLKSSZGET, 512)
            self.physical_block_size = _ioctl(fd, _BLKPBSZGET, self.logical_block_size)
        else:
            self._identity = (status.st_dev, status.st_ino)
            self.size = status.st_size
            self.logical_block_size = 512
            self.physical_block_size = max(512, status.st_blksize)

    def is_same_file(self, other: Image) -> bool:
        """Whether both are the same file or device, under whatever names."""
        return self._identity == other._identity

    def reopen(self) -> int:
        """A descriptor of an open file description of its own; the caller's.

        :raises ConfigError: the image can't be opened any more.
        """
        flags = fcntl.fcntl(self.fd, fcntl.F_GETFL) & (os.O_ACCMODE | os.O_DIRECT)
        try:
            # Through /proc it is this very file, whatever the path names by now.
            return os.open(f"/proc/self/fd/{self.fd}", flags | os.O_CLOEXEC)
        except OSError as error:
            raise _cannot_open(self.path, error) from error

    def measure(self) -> None:
        """Read the size again: somebody may have changed it."""
        self.size = (os.lseek(self.fd, 0, SEEK_END) if self.is_block_device
                     else os.fstat(self.fd).st_size)

    def grow(self, size: int) -> None:
        """Make a regular file `size` bytes long; a block device must have grown by itself.

        :raises ConfigError: read-only, smaller than it is, or not to be had.
        """
        self.measure()
        if size < self.size:
            raise ConfigError(f"{self.path} has {self.size} bytes: making it smaller would cut off "
                              f"the guest's data", "ask for more than it has")
        if self.is_block_device:
            if size > self.size:
                raise ConfigError(f"{self.path} is a block device of {self.size} bytes",
                                  "grow the device first")
            return
        if self.readonly:
            raise ConfigError(f"{self.path} is read-only", "open it for writing to grow it")
        try:
            os.ftruncate(self.fd, size)
        except OSError as error:
            raise ConfigError(f"Can't grow {self.path} to {size} bytes: "
                              f"{_describe(error)}") from error
        self.size = size

    def lock(self) -> None:
        """Take QEMU's locks: shared for a reader, exclusive for a writer.

        :raises ConfigError: somebody else uses the image.
        """
        held = [CONSISTENT_READ] if self.readonly else [CONSISTENT_READ, WRITE]
        unshared = [WRITE, RESIZE]
        try:
            for byte in [HELD + p for p in held] + [UNSHARED + p for p in unshared]:
                _set_lock(self.fd, fcntl.F_RDLCK, byte)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                self._refuse_lock()
            return  # a file system without locks, as with QEMU's locking=auto
        if (any(_is_locked(self.fd, UNSHARED + p) for p in held)
                or any(_is_locked(self.fd, HELD + p) for p in unshared)):
            self.unlock()
            self._refuse_lock()

    def _refuse_lock(self) -> None:
        kind = "read" if self.readonly else "write"
        raise ConfigError(f"Failed to get {kind} lock on file: {self.path}. {_SHARED_WITH} "
                          f"Error: {errno.EAGAIN}",
                          "end who uses it, or have all open it with readonly=on")

    def unlock(self) -> None:
        """Give all locks back."""
        for base in (HELD, UNSHARED):
            try:
                _set_lock(self.fd, fcntl.F_UNLCK, base, 64)
            except OSError:
                pass

    def close(self) -> None:
        """Close the core's descriptor and give its locks back. Harmless when closed."""
        if self.fd >= 0:
            # Else a program that is just being executed may have them for a moment longer: its
            # copies of our descriptors are closed when the call that started it has returned.
            self.unlock()
        fd, self.fd = self.fd, -1
        close_all((fd,))  # a network's file system may tell of failed writes here, not ours


def open_image(config: DriveConfig, locked: bool = True, others: Iterable[Image] = ()) -> Image:
    """Open, check and (if `locked`) lock the image of a drive.

    :param others: the images that this VM has already.
    :raises ConfigError: missing, not a regular file or block device, no permission, no direct
        I/O on its file system, or in use.
    """
    path = config.file
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        raise ConfigError(f"Failed to get metadata of file {path}: {_describe(error)}",
                          f"check file= of drive '{config.id}'") from error
    _check_kind(path, mode)
    flags = os.O_RDONLY if config.readonly else os.O_RDWR
    if config.direct:
        flags |= os.O_DIRECT
    try:
        # Not to block, should the path have become a pipe meanwhile.
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise _cannot_open(path, error) from error
    try:
        _check_kind(path, os.fstat(fd).st_mode)
        os.set_blocking(fd, True)
        image = Image(fd, config)
        for other in others:
            if image.is_same_file(other) and not (image.readonly and other.readonly):
                raise ConfigError(f"Failed to add drive {path}, file can only be shared with "
                                  f"read_only. {_SHARED_WITH}",
                                  f"drive '{other.node}' of this VM has it")
        if locked:
            image.lock()
    except BaseException:
        os.close(fd)
        raise
    return image


def lock_incarnation(fd: int, byte: int) -> bool:
    """Try to take the lock that one incarnation of a worker holds on its own description `fd`.

    The kernel frees it when the last request in flight of the incarnation before has ended,
    which may be seconds after its process is gone: until then its writes may still reach the
    disk, its reads guest memory, and the next incarnation must not start its queues
    (ARCHITECTURE.md, "Workers are cattle").

    :param byte: `Image.incarnation`.
    :return: the lock is held, or the file system has none.
    """
    try:
        _set_lock(fd, fcntl.F_RDLCK, byte)
        return not _is_locked(fd, byte)
    except OSError as error:
        return error.errno not in (errno.EAGAIN, errno.EACCES)


def hold_incarnation(fd: int, byte: int) -> None:
    """Take the lock beside a living incarnation, which will have drained before `fd` is used."""
    try:
        _set_lock(fd, fcntl.F_RDLCK, byte)
    except OSError:
        pass  # a file system without locks


def _check_kind(path: str, mode: int) -> None:
    if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
        raise ConfigError(f"{path} is not a regular file or block device.",
                          "name an image")


def _describe(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{error.strerror} (os error {error.errno})."
    return f"{error}."


def _cannot_open(path: str, error: OSError) -> ConfigError:
    hint = ""
    if error.errno == errno.EINVAL:
        hint = "its file system may not support direct I/O: say direct=off"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        hint = "check its permissions, or say readonly=on"
    return ConfigError(f"failed to open the file for block {path}. Error: {_describe(error)}",
                       hint)


def _set_lock(fd: int, kind: int, start: int, length: int = 1) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, pack(_FLOCK, kind, SEEK_SET, start, length, 0))


def _is_locked(fd: int, byte: int) -> bool:
    """Whether another open file description has a lock on the byte."""
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK,
                         pack(_FLOCK, fcntl.F_WRLCK, SEEK_SET, byte, 1, 0))
    return bool(unpack(_FLOCK, answer)[0] != fcntl.F_UNLCK)


def _ioctl(fd: int, request: int, otherwise: int) -> int:
    buffer = bytearray(8)
    try:
        fcntl.ioctl(fd, request, buffer)
    except OSError:
        return otherwise
    return int.from_bytes(buffer[:4], "little")
