"""Listening sockets for QMP and character devices.

A stale unix socket (nobody listens on it) is replaced; one that a living process listens on is
refused by name, and left as it is: a second start with the same paths must not hurt the first
VM (compat-decisions, "socket paths").
"""

from __future__ import annotations

import _socket
import _stat as stat
import errno
import posix as os
import time

from shared import paths
from shared.errors import SharedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

PATH_LIMIT = 107  # sockaddr_un.sun_path without its NUL
LOCK_LIMIT = 1.0  # seconds; two starts need milliseconds
_BACKLOG = 16
_FLAGS = _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC | _socket.SOCK_NONBLOCK


class AddressError(SharedError):
    """An address that can't be listened on."""


def _ignore(path: str) -> None:
    pass


# Called with the absolute path of each socket that gets a name.
on_name: Callable[[str], None] = _ignore


class UnixListener:
    """A non-blocking listener with a path. `socket` accepts; `close` removes the path too.

    The path is removed only while it still names this socket: somebody may have removed it,
    and another VM may have made its own there.
    """

    __slots__ = ("_identity", "path", "socket")

    def __init__(self, sock: _socket.socket, path: str) -> None:
        self.socket = sock
        self.path = paths.absolute(path)
        self._identity = _identity(path)

    def close(self) -> None:
        """Stop listening. Harmless when closed."""
        # First the name: who finds it must find somebody who listens.
        if self._identity is not None and _identity(self.path) == self._identity:
            try:
                os.unlink(self.path)
            except OSError:
                pass
        self._identity = None
        self.socket.close()


def listen_unix(path: str, mode: int = 0o600) -> UnixListener:
    """A non-blocking listener at `path`, which gets `mode`.

    :raises AddressError: too long, taken by a living process, not a socket, no permission.
    """
    size = len(path.encode(errors="surrogateescape"))
    if not path or "\0" in path or size > PATH_LIMIT:
        raise AddressError(f"The socket path '{path}' has {size} bytes, 1 to "
                           f"{PATH_LIMIT} are possible", "choose a shorter one")
    # Two starts at the same moment: the lock on the folder makes one wait for the other.
    folder = _lock_folder(path)
    sock = _socket.socket(_socket.AF_UNIX, _FLAGS)
    try:
        _remove_stale(path)
        # Created under a mask, so that nobody else can connect before the mode is set.
        mask = os.umask(0o777 & ~mode)
        try:
            sock.bind(path)
        finally:
            os.umask(mask)
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise AddressError(f"Can't listen on {path}: {error.strerror}",
                           "choose another path or remove what is there") from None
    except AddressError:
        sock.close()
        raise
    finally:
        if folder >= 0:
            os.close(folder)
    listener = UnixListener(sock, path)
    on_name(listener.path)
    return listener


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _lock_folder(path: str) -> int:
    """The folder's descriptor, locked; -1 if it can't be locked.

    Whoever can read the folder can hold this lock for ever: after LOCK_LIMIT we go on without.
    """
    import fcntl

    folder = paths.folder(path) or "."
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:
        return -1  # a folder that we may enter, but not read; bind will tell if we may write
    except OSError as error:
        raise AddressError(f"Can't listen on {path}: {folder}: {error.strerror}",
                           "create the folder first") from None
    deadline = time.monotonic() + LOCK_LIMIT
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
        except OSError as error:
            # Else: a file system without locks.
            if error.errno != errno.EWOULDBLOCK or time.monotonic() > deadline:
                os.close(fd)
                return -1
        time.sleep(0.002)


def _remove_stale(path: str) -> None:
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(status.st_mode):
        raise AddressError(f"Can't listen on {path}: it exists and is not a socket",
                           "choose another path or remove it")
    probe = _socket.socket(_socket.AF_UNIX, _FLAGS)
    try:
        probe.connect(path)
    except OSError as error:
        if error.errno == errno.ECONNREFUSED:
            os.unlink(path)
            return
        if error.errno not in (errno.EAGAIN, errno.EPROTOTYPE):
            raise
        # Its backlog is full, or it is of another type: somebody is there.
    finally:
        probe.close()
    raise AddressError(f"Can't listen on {path}: another process listens there",
                       "choose another path, or end that process")


def listen_tcp(host: str, port: int) -> _socket.socket:
    """A non-blocking listener on an IPv4 address.

    :raises AddressError: taken, no such address, or no permission.
    """
    sock = _socket.socket(_socket.AF_INET, _FLAGS)
    try:
        sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(_BACKLOG)
    except (OSError, OverflowError, ValueError, TypeError) as error:
        # The latter two: a name that can't be one (too long, NUL in it).
        sock.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise AddressError(f"Can't listen on {host}:{port}: {reason}",
                           "choose another address or port") from None
    return sock
