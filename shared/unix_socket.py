"""Listening sockets for QMP and character devices.

A stale unix socket (nobody listens on it) is replaced; one that a living process listens on is
refused by name, and left as it is: a second start with the same paths must not hurt the first
VM (compat-decisions, "socket paths").
"""

from __future__ import annotations

import _socket
import errno
import os
import stat

from shared.errors import SharedError

PATH_LIMIT = 107  # sockaddr_un.sun_path without its NUL
_BACKLOG = 16
_FLAGS = _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC | _socket.SOCK_NONBLOCK


class AddressError(SharedError):
    """An address that can't be listened on."""


def listen_unix(path: str, mode: int = 0o600) -> _socket.socket:
    """A non-blocking listener at `path`, which gets `mode`. The caller unlinks it at its end.

    :raises AddressError: too long, taken by a living process, not a socket, no permission.
    """
    if not path or len(os.fsencode(path)) > PATH_LIMIT or "\0" in path:
        raise AddressError(f"The socket path '{path}' has {len(os.fsencode(path))} bytes, 1 to "
                           f"{PATH_LIMIT} are possible", "choose a shorter one")
    # Two starts at the same moment: the lock on the folder makes one wait for the other.
    folder = _lock_folder(path)
    try:
        _remove_stale(path)
        # Created under a mask, so that nobody else can connect before the mode is set.
        sock = _socket.socket(_socket.AF_UNIX, _FLAGS)
        mask = os.umask(0o777 & ~mode)
        try:
            sock.bind(path)
        finally:
            os.umask(mask)
        sock.listen(_BACKLOG)
    except OSError as error:
        raise AddressError(f"Can't listen on {path}: {error.strerror}",
                           "choose another path or remove what is there") from None
    finally:
        os.close(folder)
    return sock


def _lock_folder(path: str) -> int:
    import fcntl

    folder = os.path.dirname(path) or "."
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise AddressError(f"Can't listen on {path}: {folder}: {error.strerror}",
                           "create the folder first") from None
    fcntl.flock(fd, fcntl.LOCK_EX)
    return fd


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
    except (OSError, OverflowError) as error:
        sock.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise AddressError(f"Can't listen on {host}:{port}: {reason}",
                           "choose another address or port") from None
    return sock
